"""One training at a time in a run folder: two would mix their logs and take each other's saves."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from terdit_cli.atomic import make_folder
from terdit_cli.errors import UsageError
from terdit_cli.train.parallel import World


@contextmanager
def alone_in(run_folder: Path, world: World) -> Iterator[None]:
    """Hold a run folder, made if it is not there; all processes of a job together.

    The system lets go when the process ends, however it does. A file system that cannot lock a
    folder is taken as it is.

    Raises:
        UsageError: another training is at work there.
        EnvironmentProblem: the folder cannot be made.
    """
    descriptor, taken, made = None, False, False
    if world.is_main:
        made = not run_folder.exists()
        make_folder(run_folder)
        descriptor = os.open(run_folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass
    try:
        if world.agree(float(taken)):
            raise UsageError(
                "another process trains in this run folder", where=run_folder,
                fix="wait for it, stop it, or name another folder with --out",
            )  # fmt: skip
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        if made:
            with suppress(OSError):  # of a run that did not come to its first file
                run_folder.rmdir()
