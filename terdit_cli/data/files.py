"""Image files by name: which names are images, and reads that are bounded.

Names are relative paths with `/`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Protocol

from terdit_cli.data.decode import IMAGE_SUFFIXES, MAX_FILE_BYTES, unreadable
from terdit_cli.errors import InputFileError

# What systems and network disks put beside a user's files: thumbnails, trash, copies.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini"))
_TAIL = 4096  # bytes


class ImageFiles(Protocol):
    """A fixed list of image files that can be read one by one."""

    names: list[str]
    left_out: Counter[str]  # files that are no images, by suffix

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; InputFileError names the file when it cannot be read."""

    def fingerprint(self, name: str) -> str:
        """Return what is known of a file's content without reading it."""


def is_hidden(name: str) -> bool:
    """Say whether a part of a relative path is hidden, or a folder that a system made."""
    return any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in name.split("/"))


def is_image(name: str, left_out: Counter[str]) -> bool:
    """Say whether a relative path names an image, and count the suffix of one that does not.

    Hidden files and those of the system are neither.
    """
    if is_hidden(name):
        return False
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    base = PurePosixPath(name)
    if base.name.lower() not in _SYSTEM_FILES:
        left_out[base.suffix.lower() or "without suffix"] += 1
    return False


def regular_size(path: Path, name: str) -> int:
    """Return the bytes of a regular file; `name` is for the message.

    Raises:
        InputFileError: the file is gone, or it is a folder, a broken link or a pipe (which blocks).
    """
    try:
        if not path.is_file():
            raise unreadable(name, "no regular file")
        return path.stat().st_size
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from error


def read_bounded(path: Path, name: str) -> bytes:
    """Return the bytes of a regular file of at most MAX_FILE_BYTES; `name` is for the message.

    Raises:
        InputFileError: the file is gone, not a regular file, too large or not readable.
    """
    size = regular_size(path, name)
    if size > MAX_FILE_BYTES:
        raise unreadable(name, f"{size} bytes, over {MAX_FILE_BYTES}")
    return read_part(path, 0, size, name)


def read_part(path: Path, offset: int, size: int, name: str) -> bytes:
    """Return `size` bytes of a file from `offset` on; `name` is for the message.

    Raises:
        InputFileError: the file is gone, not readable or too short.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from error
    if len(content) != size:
        raise unreadable(name, f"{len(content)} bytes of {size}")
    return content


def tail_crc(path: Path, offset: int, size: int, name: str) -> int:
    """Return the CRC-32 of the last 4096 of `size` bytes: it tells apart files of equal size.

    The end of a compressed image depends on what comes before; a PNG's even holds a checksum of
    all its pixels.

    Raises:
        InputFileError: the file is gone, not readable or too short.
    """
    part = min(size, _TAIL)
    return zlib.crc32(read_part(path, offset + size - part, part, name))


def require_folder(path: Path, what: str, fix: str) -> None:
    """Raise InputFileError unless `path` is an existing folder."""
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise InputFileError(f"{what} not found", got=got, expected="a folder", where=path, fix=fix)
