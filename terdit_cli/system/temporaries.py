"""The files that `atomic` writes before it renames them: named by their owner, locked meanwhile.

    .model.tdt.terdit-HOST-PID-1f2e3d4c.tmp

A process that is killed leaves its own behind. Whether one was left is told by its lock, which the
system drops with the process, however it ends; a process number would be another's by then. Locks
say nothing about another machine where a network disk keeps them local, and some file systems have
none: such a file is taken for left when nobody has written to it for a day.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

LEFT_SECONDS = 86_400.0  # without a word, after which another machine's file is taken for left
_STEM_BYTES = 64  # of the target's name: file systems limit the length of names
_SWEEP_SHARE = 0.02  # of the time, at most: a folder of many images is not listed for each
_NAME = re.compile(r"\..*\.terdit-(?P<host>[\w.-]+)-\d+-[0-9a-f]{8}\.tmp", re.DOTALL)

_next_sweep: dict[Path, float] = {}  # on the monotonic clock


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is one that is written, or was when its writer died."""
    return _NAME.fullmatch(name) is not None


def claim(target: Path) -> tuple[Path, int]:
    """Make an empty temporary file beside `target`; return its path and the descriptor of its lock.

    What dead processes left in that folder is removed. The file is given up by closing the
    descriptor, after it was renamed or removed.

    Raises:
        OSError: the folder cannot be written.
    """
    stem = os.fsencode(target.name)[:_STEM_BYTES].decode(errors="ignore")
    while True:
        name = f".{stem}.terdit-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        path = target.with_name(name)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _is_held(lock) and os.fstat(lock).st_nlink:
            break
        os.close(lock)  # another process came between: it took the file for left and removes it
    # By the clock of the disk, which may be another machine's.
    _sweep(target.parent, os.fstat(lock).st_mtime)
    return path, lock


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII) or "_"


def _is_held(descriptor: int) -> bool:
    """Lock a file if nobody has; return False if somebody has. Without locks it counts as held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _sweep(folder: Path, now: float) -> None:
    """Remove what dead processes left in a folder."""
    started = time.monotonic()
    if started < _next_sweep.get(folder, 0.0):
        return
    with suppress(OSError), os.scandir(folder) as entries:  # a folder may forbid to be listed
        for entry in entries:
            if (match := _NAME.fullmatch(entry.name)) is not None:
                with suppress(OSError):  # another user's, or gone meanwhile
                    _remove_left(entry.path, match["host"] == _host(), now)
    ended = time.monotonic()
    _next_sweep[folder] = ended + (ended - started) / _SWEEP_SHARE


def _remove_left(path: str, ours: bool, now: float) -> None:
    """Remove a temporary file unless its writer may live; holds its lock meanwhile.

    Args:
        ours: it was made on this machine, whose locks can be believed.
        now: seconds since 1970 on the disk's clock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            ours = False
        if ours or now - os.fstat(descriptor).st_mtime > LEFT_SECONDS:
            os.unlink(path)  # noqa: PTH108 - as scandir names it
    finally:
        os.close(descriptor)
