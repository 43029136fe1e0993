"""Named image files, read as bytes, from a folder tree or straight out of a zip.

Nothing is extracted to disk, hidden files and macOS's `__MACOSX` copies do not count, and every
read is bounded. Names are relative paths with `/`, sorted.
"""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from terdit_cli.data.decode import MAX_FILE_BYTES, is_image_name, unreadable
from terdit_cli.errors import InputFileError

# What zipfile raises on an archive that is damaged, encrypted (RuntimeError) or exotic
# (NotImplementedError, a RuntimeError too).
ZIP_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_TAIL = 4096  # bytes


class ImageFiles(Protocol):
    """A fixed list of image files that can be read one by one."""

    names: list[str]

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; InputFileError names the file when it cannot be read."""

    def fingerprint(self, name: str) -> str:
        """Return what is known of a file's content without reading it."""


class FolderFiles:
    """All images below a folder at any depth; links to folders are followed, loops are not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(self._walk())

    def _walk(self) -> list[str]:
        names = []
        seen = {os.path.realpath(self.root)}
        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=_refuse):
            links = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}  # noqa: PTH118
            subfolders[:] = [name for name in subfolders if links[name] not in seen]
            seen.update(links.values())
            prefix = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if prefix == "." else prefix + "/"
            names += [prefix + name for name in files if is_image_name(prefix + name)]
        return names

    def read(self, name: str) -> bytes:
        """Return the bytes of one file, at most MAX_FILE_BYTES.

        Raises:
            InputFileError: the file is gone, not a regular file, too large or not readable.
        """
        return read_bounded(self.root / name, name)

    def fingerprint(self, name: str) -> str:
        """Return the size of one file, and the CRC of its last bytes (see `tail_crc`).

        Raises:
            InputFileError: the file is gone or not a regular file.
        """
        path = self.root / name
        size = regular_size(path, name)
        return f"{size} {tail_crc(path, 0, size, name):08x}"


class ZipFiles:
    """All images in a zip; each process opens the archive when it first reads from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except ZIP_ERRORS as error:
            raise InputFileError(
                "cannot open the zip of images",
                got=str(error) or type(error).__name__,
                expected="a whole zip archive",
                where=path,
                fix="copy or download the file again",
            ) from error
        # Some Windows tools write backslashes.
        named = {member.filename.replace("\\", "/"): member for member in members}
        self._members = {name: named[name] for name in sorted(named) if is_image_name(name)}
        self.names = list(self._members)
        self._archive: zipfile.ZipFile | None = None
        self._owner = -1

    def fingerprint(self, name: str) -> str:
        """Return the size and the CRC that the archive holds of one member."""
        return f"{self._members[name].file_size} {self._members[name].CRC:08x}"

    def _open(self) -> zipfile.ZipFile:
        # A forked process shares the file position with its parent: it needs its own handle.
        # Threads share one, ZipFile locks around each read.
        if self._archive is None or self._owner != os.getpid():
            self._archive = zipfile.ZipFile(self.path)
            self._owner = os.getpid()
        return self._archive

    def read(self, name: str) -> bytes:
        """Return the uncompressed bytes of one member, at most MAX_FILE_BYTES, CRC checked.

        Raises:
            InputFileError: the member is damaged, encrypted or larger than the bound.
        """
        member = self._members[name]
        if member.file_size > MAX_FILE_BYTES:
            raise unreadable(name, f"{member.file_size} bytes, over {MAX_FILE_BYTES}")
        try:
            with self._open().open(member) as stream:
                return stream.read(MAX_FILE_BYTES + 1)
        except ZIP_ERRORS as error:
            raise unreadable(name, str(error) or type(error).__name__) from error


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


def _refuse(error: OSError) -> None:
    raise InputFileError(
        "cannot list the folder of images",
        got=error.strerror,
        where=error.filename,
        fix="check the permissions",
    ) from error
