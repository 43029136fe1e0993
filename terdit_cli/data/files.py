"""Named image files, read as bytes, from a folder tree or straight out of a zip.

Nothing is extracted to disk, hidden files and macOS's `__MACOSX` copies do not count, and every
read is bounded. Names are relative paths with `/`, sorted.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from terdit_cli.data.decode import MAX_FILE_BYTES, is_image_name, unreadable
from terdit_cli.errors import InputFileError

# What zipfile raises on a damaged, encrypted (RuntimeError) or exotic (NotImplementedError) member.
_MEMBER_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class ImageFiles(Protocol):
    """A fixed list of image files that can be read one by one."""

    names: list[str]

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; InputFileError names the file when it cannot be read."""


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


class ZipFiles:
    """All images in a zip; each process opens the archive when it first reads from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise InputFileError(
                "cannot open the zip of images",
                got=str(error),
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
        except _MEMBER_ERRORS as error:
            raise unreadable(name, str(error) or type(error).__name__) from error


def read_bounded(path: Path, name: str) -> bytes:
    """Return the bytes of a regular file of at most MAX_FILE_BYTES; `name` is for the message.

    Raises:
        InputFileError: the file is gone, not a regular file, too large or not readable.
    """
    try:
        if not path.is_file():  # also a broken link, and a pipe, which would block
            raise unreadable(name, "no regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise unreadable(name, f"{path.stat().st_size} bytes, over {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from error


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
