"""Image files inside tar shards, read where they lie: nothing is extracted.

A scan of the headers finds every member. Names only name images and lead nowhere on this disk; a
link or device under an image's name is an image that cannot be read. A tar without its end mark is
refused: it was cut, and would pass for a smaller set.

A member KEY.cls beside KEY.jpg (webdataset's form) holds the image's class, a decimal number; a
member KEY.json may hold it under `label` or `cls`.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from terdit_cli.data.decode import MAX_FILE_BYTES, unreadable
from terdit_cli.data.files import is_image, read_part, tail_crc
from terdit_cli.data.image_set import ImageSet, file_set, folder_depth, numbered
from terdit_cli.data.patterns import is_file_of, match_files
from terdit_cli.data.sources.folder import FolderFiles, label
from terdit_cli.errors import InputFileError

_MAX_HEADER = 1 << 20  # bytes of a long name or of a pax header
_MAX_LABEL = 18  # digits of a class: less than 2^63
_MAX_JSON = 1 << 20  # bytes of a .json that a class is looked for in
_JSON_KEYS = ("label", "cls")
# What tarfile raises on damaged headers; RuntimeError is RecursionError for a chain of them.
_SCAN_ERRORS = (OSError, tarfile.TarError, ValueError, OverflowError, LookupError, RuntimeError)


def shards_in(folder: Path) -> list[Path]:
    """Return the tars that lie directly in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if is_file_of(path, ".tar"))


def match_shards(pattern: str) -> list[Path]:
    """Return the tars that a pattern names; see `match_files`."""
    return match_files(pattern, ".tar", "tar of images")


class _Member(NamedTuple):
    shard: Path
    name: str
    offset: int
    size: int
    regular: bool


class TarFiles:
    """All images of some tar shards; names are "shard.tar/member", in the order of the shards.

    `members` are their names without the shards, `labels` their classes, None unless all have one,
    `unlabelled` the first image without a class where others have one in a .cls or .json file,
    `wordless` the first .json file that holds no class.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._found: dict[str, _Member] = {}
        self.left_out: Counter[str] = Counter()
        self.wordless: str | None = None
        labels: dict[str, int | None] = {}
        base = os.path.commonpath([shard.absolute().parent for shard in shards] or [Path("/")])
        for shard in shards:
            place = shard.absolute().relative_to(base).as_posix()
            self._scan(shard, place, labels)
        self.names = list(self._found)
        self.members = [member.name for member in self._found.values()]
        found = _pair(self.names, labels)
        numbers = [number for number in found if number is not None]
        self.labels = numbers if numbers and len(numbers) == len(found) else None
        lacking = (name for name, number in zip(self.names, found, strict=True) if number is None)
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
                    stem, _, suffix = f"{place}/{name}".rpartition(".")
                    if header.isdir():
                        continue
                    if suffix in ("cls", "json") and member.regular:
                        # A .cls counts more than a .json, whichever comes first.
                        if suffix == "cls":
                            labels[stem] = _read_cls(member)
                        elif (number := _read_json(member)) is None:
                            self.wordless = self.wordless or f"{place}/{name}"
                        elif labels.get(stem) is None:
                            labels[stem] = number
                    elif is_image(name, self.left_out):
                        self._found[f"{place}/{name}"] = member
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


def _pair(names: list[str], labels: dict[str, int | None]) -> list[int | None]:
    """Return the class of each image, None where it has none.

    An image belongs to the label of its whole name, a_0.5.png to a_0.5.cls; else, as webdataset
    pairs them, to one of a shorter name, k.left.png to k.cls, that no other image claims as its
    whole name.
    """
    stems = [name.rpartition(".")[0] for name in names]
    claimed = labels.keys() & set(stems)
    found = []
    for stem in stems:
        folder, slash, base = stem.rpartition("/")
        key = stem
        while key not in labels and "." in base:
            base = base.rpartition(".")[0]
            key = folder + slash + base
        found.append(labels.get(key) if key == stem or key not in claimed else None)
    return found


def _read_json(member: _Member) -> int | None:
    """Return the class in a .json member, None if it holds none."""
    if member.size > _MAX_JSON:
        return None
    text = read_part(member.shard, member.offset, member.size, member.name)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    number = str(next((content[key] for key in _JSON_KEYS if key in content), None))
    is_class = number.isascii() and number.isdecimal() and len(number) <= _MAX_LABEL
    return int(number) if is_class else None


def _read_cls(member: _Member) -> int | None:
    """Return the number in a .cls member, None if it holds something else."""
    if member.size > _MAX_LABEL + 2:  # a line may end in CR LF
        return None
    text = read_part(member.shard, member.offset, member.size, member.name)
    found = re.fullmatch(rb"(\d{1,%d})\s*" % _MAX_LABEL, text)
    return int(found[1]) if found else None


def open_tars(path: Path, with_classes: bool) -> ImageSet:
    """Open tar shards: one .tar, a folder of them or a pattern as "train-{000..009}.tar".

    The class of an image is the number in its .cls or .json file, else its top folder inside the
    tar. Where classes are needed, images outside folders have the tar's name for their class (as
    in ImageNet's own n01440764.tar).

    Raises:
        InputFileError: no tars, damaged ones, no images, or labels that are no classes.
    """
    shards = shards_in(path) if path.is_dir() else [path] if path.is_file() else []
    if path.is_dir() and not with_classes and (stray := FolderFiles(path).names):
        raise InputFileError(
            "a folder of both tars and images",
            got=f"{shards[0].name} and {stray[0]}",
            expected="one or the other",
            where=path,
            fix=f"move one of them away, or name the tars: '{path}/*.tar'",
        )
    files = TarFiles(shards or match_shards(str(path)))
    where = str(path)
    if files.labels is not None:
        return _labelled(where, files, files.labels, with_classes)
    if with_classes and files.unlabelled is not None:
        raise InputFileError(
            "an image without a class among images with labels",
            got=f"no number in the .cls or .json of {files.unlabelled}",
            expected="a .cls file with the number of its class beside each image, or a .json file "
            "with it under label or cls",
            where=path,
            fix="complete them, or leave the .cls and .json files out where folders or tars are "
            "the classes",
        )
    parts = [member.split("/") for member in files.members]
    depth = folder_depth([path for path in parts if len(path) > 1])
    if parts and min(map(len, parts)) >= depth + 2:
        classes = [path[depth] for path in parts]
        return file_set(where, files, files.names, **label(sorted(set(classes)), classes))
    if not with_classes:
        return file_set(where, files, files.names)
    if files.wordless is not None:
        raise InputFileError(
            "no classes: the .json files beside the images hold none",
            got=f"no number under {' or '.join(_JSON_KEYS)} in {files.wordless}",
            expected="the number of the class there, in a .cls file, or a folder for each class",
            where=path,
            fix="write the numbers, or leave the .json files out where the tars are the classes",
        )
    tars = [
        name.removesuffix(f"/{member}").rpartition("/")[2].removesuffix(".tar")
        for name, member in zip(files.names, files.members, strict=True)
    ]
    classes = [
        path[depth] if len(path) >= depth + 2 else tar
        for path, tar in zip(parts, tars, strict=True)
    ]
    return file_set(where, files, files.names, **label(sorted(set(classes)), classes))


def _labelled(where: str, files: TarFiles, labels: list[int], with_classes: bool) -> ImageSet:
    if not with_classes:
        names, classes = numbered(np.array(labels))
        return file_set(where, files, files.names, class_names=names, classes=classes)
    if max(labels) >= len(labels):
        raise InputFileError(
            "classes without images",
            got=f"a class {max(labels)} among {len(labels)} images",
            where=where,
            fix="number the classes from 0 on, and give all tars of the set",
        )
    names = [str(number) for number in range(max(labels) + 1)]
    classes = np.array(labels, dtype=np.int64)
    return file_set(where, files, files.names, class_names=names, classes=classes)
