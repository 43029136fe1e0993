"""Images straight out of a zip: nothing is extracted to disk."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from terdit_cli.data.decode import MAX_FILE_BYTES, unreadable
from terdit_cli.data.files import is_image
from terdit_cli.data.image_set import ImageSet
from terdit_cli.data.sources.folder import by_folders
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
        self.left_out: Counter[str] = Counter()
        self._members = {
            name: named[name] for name in sorted(named) if is_image(name, self.left_out)
        }
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


def open_zip(path: Path, with_classes: bool) -> ImageSet:
    """Open a zip of images, in class folders or not; see `folder.by_folders`.

    Raises:
        InputFileError: not a zip, or one without images.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        fix = "set data.source=folder" if path.is_dir() else "check the path"
        raise InputFileError("zip not found", got=got, expected="a file", where=path, fix=fix)
    return by_folders(str(path), ZipFiles(path), (), with_classes)
