"""Image files inside tar shards, read where they lie: nothing is extracted.

A scan of the headers finds every member. Names only name images and lead nowhere on this disk; a
link or device under an image's name is an image that cannot be read. A tar without its end mark is
refused: it was cut, and would pass for a smaller set.

A member KEY.cls beside KEY.jpg (webdataset's form) holds the image's class, a decimal number.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from terdit_cli.data.decode import MAX_FILE_BYTES, is_image_name, unreadable
from terdit_cli.data.files import read_part, tail_crc
from terdit_cli.errors import InputFileError, UsageError

MAX_SHARDS = 100_000  # that a pattern may stand for
_MAX_HEADER = 1 << 20  # bytes of a long name or of a pax header
_MAX_LABEL = 18  # digits of a class: less than 2^63
# What tarfile raises on damaged headers; RuntimeError is RecursionError for a chain of them.
_SCAN_ERRORS = (OSError, tarfile.TarError, ValueError, OverflowError, LookupError, RuntimeError)


def is_pattern(where: str) -> bool:
    """Say whether a path has braces or wildcards in it."""
    return any(sign in where for sign in "{*?[")


def match_shards(pattern: str) -> list[Path]:
    """Return the tars that a pattern names, as "train-{000..009}.tar" or "*/train-*.tar".

    What is in braces is a range of numbers, as wide as its first, or a list with commas; each
    result must exist. Wildcards give sorted paths.

    Raises:
        InputFileError: nothing there, or not a tar. UsageError: too many.
    """
    shards: dict[Path, None] = {}
    for count, name in enumerate(_expand(pattern)):
        if count >= MAX_SHARDS:
            raise UsageError(
                "too many shards",
                got=f"over {MAX_SHARDS} in {pattern}",
                expected=f"at most {MAX_SHARDS}",
                fix="check the range in braces",
            )
        paths = sorted(glob.glob(name, recursive=True)) if is_pattern(name) else [name]  # noqa: PTH207
        shards |= dict.fromkeys(map(Path, paths))
        wrong = name if not paths else next((path for path in paths if not _is_shard(path)), None)
        if wrong is not None:
            got = "a folder without tars" if Path(wrong).is_dir() else "another file"
            raise InputFileError(
                "tar of images not found",
                got=got if Path(wrong).exists() else "nothing there",
                expected=f"a tar for each part of {pattern}",
                where=wrong,
                fix="check the pattern, and that all shards were copied",
            )
    return list(shards)


def shards_in(folder: Path) -> list[Path]:
    """Return the tars that lie directly in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if _is_shard(path))


def _is_shard(path: str | Path) -> bool:
    path = Path(path)
    return path.suffix.lower() == ".tar" and not path.name.startswith(".") and path.is_file()


def _expand(pattern: str) -> Iterator[str]:
    """Iterate over what braces stand for, the last pair changing fastest."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(braced: str) -> list[str]:
    if found := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braced):
        first, last = int(found[1]), int(found[2])
        if first <= last:
            numbers = range(first, min(last, first + MAX_SHARDS) + 1)
            return [f"{number:0{len(found[1])}d}" for number in numbers]
    return braced.split(",")


class _Member(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int
    regular: bool


class TarFiles:
    """All images of some tar shards; names are "shard.tar/member", in the order of the shards.

    `members` are their names without the shards, `labels` their classes, None unless all have one,
    `unlabelled` the first image without a class among such with a .cls file.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._found: dict[str, _Member] = {}
        labels: dict[str, int | None] = {}
        base = os.path.commonpath([shard.absolute().parent for shard in shards] or [Path("/")])
        for shard in shards:
            place = shard.absolute().relative_to(base).as_posix()
            self._scan(shard, place, labels)
        self.names = list(self._found)
        self.members = [member.name for member in self._found.values()]
        keys = [_key(name) for name in self.names]
        numbers = [number for key in keys if (number := labels.get(key)) is not None]
        self.labels = numbers if numbers and len(numbers) == len(keys) else None
        lacking = (name for name in self.names if labels.get(_key(name)) is None)
        self.unlabelled = next(lacking, None) if labels else None

    def _scan(self, shard: Path, place: str, labels: dict[str, int | None]) -> None:
        """Note the images and classes of one shard; of equal names the last counts, as in a tar."""
        try:
            with _HeaderReader(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                for header in archive:
                    parts = header.name.split("/")
                    name = "/".join(part for part in parts if part not in ("", "."))
                    member = _Member(
                        shard,
                        name,
                        header.offset_data,
                        header.size,
                        header.isreg() and not header.issparse(),
                    )
                    if member.offset + member.size > stream.length:
                        raise tarfile.ReadError(f"{name} ends beyond the end of the file")
                    if is_image_name(name) and not header.isdir():
                        self._found[f"{place}/{name}"] = member
                    elif name.endswith(".cls") and member.regular:
                        labels[_key(f"{place}/{name}")] = _read_label(member)
                if stream.last != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end mark where the members end")
        except _SCAN_ERRORS as error:
            raise InputFileError(
                "cannot read the tar of images",
                got=str(error) or type(error).__name__,
                expected="a whole, uncompressed tar",
                where=shard,
                fix="copy or download the file again; unpack a compressed one",
            ) from error

    def fingerprint(self, name: str) -> str:
        """Return the size of one file, and the CRC of its last bytes (see `tail_crc`).

        Raises:
            InputFileError: the shard is gone or shorter than it was.
        """
        member = self._found[name]
        return f"{member.size} {tail_crc(member.shard, member.offset, member.size, name):08x}"

    def read(self, name: str) -> bytes:
        """Return the bytes of one member, at most MAX_FILE_BYTES.

        Raises:
            InputFileError: no regular file, larger than the bound, or the shard is gone or shorter
                than it was.
        """
        member = self._found[name]
        if not member.regular:
            raise unreadable(name, "no regular file")
        if member.size > MAX_FILE_BYTES:
            raise unreadable(name, f"{member.size} bytes, over {MAX_FILE_BYTES}")
        return read_part(member.shard, member.offset, member.size, name)


class _HeaderReader(io.BufferedReader):
    """What tarfile reads headers through: bounded in what it allocates, and only forwards.

    tarfile reads as much as a header declares, and one that points back is a loop without end.
    It also takes a damaged header in the middle for the end; `last`, what was read last, tells.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.length = path.stat().st_size
        self.last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = super().read(size)
        return self.last

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if offset < self.tell() or whence != os.SEEK_SET:
            raise tarfile.ReadError("a member that begins before its header")
        return super().seek(offset)


def _key(name: str) -> str:
    """Return what webdataset takes for the key of a sample: the path up to its first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _read_label(member: _Member) -> int | None:
    """Return the number in a .cls member, None if it holds something else."""
    if member.size > _MAX_LABEL + 2:  # a line may end in CR LF
        return None
    text = read_part(member.shard, member.offset, member.size, member.name)
    found = re.fullmatch(rb"(\d{1,%d})\s*" % _MAX_LABEL, text)
    return int(found[1]) if found else None
