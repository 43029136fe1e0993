"""Locks a folder for one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from terdit_cli.system.atomic import make_folder


@contextmanager
def held(folder: Path) -> Iterator[int | None]:
    """Lock a folder, which is created if absent.

    Yields the descriptor that holds it, for children to hold it as well, or None if another
    process does. The system releases the lock when the last holder ends, however it ends. On a file
    system that cannot lock folders there is no lock.

    Raises:
        EnvironmentProblem: the folder cannot be made.
    """
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield descriptor if free else None
    finally:
        os.close(descriptor)
