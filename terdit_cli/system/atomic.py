"""Files appear complete or not at all: write to a temporary name, sync, rename.

A reader never sees a half-written file, and a failed or killed write leaves the previous file
as it was; what a killed one leaves beside it, the next write into that folder removes. Failures of
the disk become `EnvironmentProblem` with the path and the way out.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.system import temporaries

# What file systems say of `fsync` where they have none for folders: some of NFS, SMB and FUSE.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty file beside `target`; on success sync it and rename it to `target`.

    Missing parent folders are made. On any exception the temporary file is removed and
    `target` is untouched.

    Raises:
        EnvironmentProblem: the folder cannot be written or the disk is full.
    """
    target = Path(target)
    _refuse_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = temporaries.claim(target)
    except OSError as error:
        raise write_problem(target, error) from error
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        # Only failures of this write are explained here: an OSError about another file,
        # raised by the caller's code, passes through.
        if error.filename is not None and Path(error.filename) not in (
            target,
            target.parent,
            temporary,
            *target.parents,
        ):
            raise
        raise write_problem(target, error) from error
    finally:
        with suppress(OSError):  # gone after the rename
            temporary.unlink()
        os.close(lock)


def write_whole(target: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text (UTF-8, lines ending in a line feed everywhere) or bytes as `atomic_path` does."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(target: Path, force: bool, what: str = "the output exists") -> None:
    """Raise UsageError if a file exists and may not be overwritten."""
    if not force and os.path.isfile(target):  # noqa: PTH113 - False where it may not be looked at
        raise UsageError(
            what, got=target.name, where=target.parent,
            fix="give another name with -o, or overwrite it with --force",
        )  # fmt: skip


def check_writable(target: Path) -> None:
    """Raise the EnvironmentProblem that `atomic_path` would raise, as far as is known now."""
    _refuse_folder(target)
    try:
        folder = next(parent for parent in target.absolute().parents if parent.exists())
        number = 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
        if not folder.is_dir():
            number = errno.ENOTDIR
    except OSError as error:  # below a folder that may not be entered
        raise write_problem(target, error) from error
    if number:
        raise write_problem(target, OSError(number, os.strerror(number)))


def _refuse_folder(target: Path) -> None:
    """Raise EnvironmentProblem if a file's name is that of a folder, or is not accessible."""
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise write_problem(target, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; raises what `atomic_path` raises."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_problem(folder, error) from error


def remove_file(path: Path) -> None:
    """Remove a file, or find that it is gone; raises what `atomic_path` raises."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_problem(path, error) from error


def write_problem(target: Path, error: OSError) -> EnvironmentProblem:
    """Turn the operating system's refusal to write `target` into an error with a fix."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free disk space or name another folder; the previous file, if any, is untouched"
    elif error.errno == errno.EISDIR:
        fix = "name a file in it"
    else:
        fix = "name a folder you can write to"
    reason = error.strerror or str(error)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        reason = "a file where a folder is needed"
    return EnvironmentProblem("cannot write", got=reason, where=target, fix=fix)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where folders can be opened and synced.

    Raises:
        OSError: the disk fails, EIO for one.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
