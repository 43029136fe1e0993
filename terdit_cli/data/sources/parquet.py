"""Images in parquet files as Hugging Face's datasets are published: read with pyarrow, the extra.

A column of images (a structure with the file's `bytes`, or the bytes themselves) and one of whole
numbers, their classes; the names of the classes stand in the schema's `huggingface` entry. The
names of the files tell the splits: train-00000-of-00002.parquet is of the split train. Parquet has
no access to single rows: a few row groups are kept, so read in order, as `terdit prepare` does;
training on a set that does not fit in memory would read a row group for nearly every image.
"""

from __future__ import annotations

import importlib
import json
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.data.decode import MAX_FILE_BYTES, decode_with_mode, unreadable
from terdit_cli.data.files import is_hidden, tail_crc
from terdit_cli.data.image_set import ImageSet
from terdit_cli.data.patterns import is_pattern, match_files
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError, did_you_mean

GROUPS_KEPT = 3
LARGEST_GROUP = 4 << 30  # bytes
# What published sets call their columns, the most usual first.
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
# The split that stands for the held-out part where the user does not name one of the set's own.
_HELD_OUT = ("test", "validation", "valid", "val", "dev")


def parquet_files(path: Path, split: str | None) -> list[Path]:
    """Return the files of one split: of a .parquet file, a folder at any depth, or a pattern.

    Args:
        split: one of the splits that the files' names tell, `heldout` (test, or validation), `all`,
            or None: train where there is such a split.

    Raises:
        InputFileError: nothing there. UsageError: no such split, or several to choose from.
    """
    if path.is_dir():
        found = (file for file in path.rglob("*.parquet"))
        files = [file for file in found if not is_hidden(file.relative_to(path).as_posix())]
    elif is_pattern(str(path)) and not path.exists():
        files = match_files(str(path), ".parquet", "parquet file")
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise InputFileError(
            "no parquet files here", got="nothing", expected=".parquet files", where=path,
            fix="check the path",
        )  # fmt: skip
    if len(files) == 1 and files[0] == path and split is None:
        return files
    splits: dict[str, list[Path]] = {}
    for file in sorted(files):
        splits.setdefault(split_of(file), []).append(file)
    if split == "all" or (split is None and len(splits) == 1):
        return sorted(files)
    wanted = split or "train"
    if split == "heldout":
        wanted = next((name for name in _HELD_OUT if name in splits), split)
    if wanted not in splits:
        names = ", ".join(sorted(splits))
        raise UsageError(
            "several splits, and none named" if split is None else "no such split",
            got=names if split is None else repr(split) + did_you_mean(split, splits),
            expected=f"one of {names}, or all",
            where=path,
            fix=f"set data.split={next(iter(sorted(splits)))}",
        )
    return splits[wanted]


def split_of(file: Path) -> str:
    """Return the split that a file's name tells: train of train-00000-of-00002.parquet.

    A name without letters, as 0000.parquet, is of the split that its folder names.
    """
    name = re.sub(r"([-_.]?\d+([-_]of[-_]\d+)?)+([-_][0-9a-f]{8,})?$", "", file.stem)
    return (name if re.search(r"[^\W\d]", name) else file.parent.name).lower()


def open_parquet(path: Path, split: str | None) -> ImageSet:
    """Open parquet files as labelled images, in the order of their names.

    Raises:
        EnvironmentProblem: pyarrow is missing.
        InputFileError: no parquet files, damaged ones, or no columns of images and labels.
        UsageError: see `parquet_files`.
    """
    files = parquet_files(path, split)
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise EnvironmentProblem(
            "reading parquet needs pyarrow",
            got=str(error),
            where=path,
            fix="pip install 'terdit[parquet]'",
        ) from error
    readers, labels = [], []
    for file in files:
        try:
            readers.append(parquet.ParquetFile(file, memory_map=True))
            columns = readers[-1].schema_arrow.names
            features = _features(readers[0].schema_arrow.metadata)
            image = _column(file, "Image", IMAGE_COLUMNS, columns, features)
            label = _column(file, "ClassLabel", LABEL_COLUMNS, columns, features)
            values = readers[-1].read(columns=[label]).column(label)
        except (OSError, LookupError, ValueError, arrow.ArrowException) as error:
            raise _wrong(file, (str(error) or type(error).__name__).splitlines()[0]) from error
        labels.append(_whole_numbers(file, values))
    stored = features.get(label, {}).get("names")
    names = [str(name) for name in stored] if isinstance(stored, list) else []
    classes = np.concatenate(labels)
    count = int(classes.max(initial=-1)) + 1
    if count > (len(names) or len(classes)):  # a class without an image is refused later
        worst = next(k for k, part in enumerate(labels) if part.max(initial=-1) == count - 1)
        known = f"{len(names)} class names" if names else f"{len(classes)} images"
        raise _wrong(files[worst], f"a label {count - 1} among {known}")
    groups = _Groups(readers, image, arrow.ArrowException)
    first = np.cumsum([0, *groups.lengths])

    def load(index: int) -> tuple[Image.Image, str]:
        name = f"{path.name} row {index}"
        group = int(np.searchsorted(first, index, side="right")) - 1
        return decode_with_mode(groups.row(group, index - int(first[group]), name), name)

    facts = [f"{file.stat().st_size} {_tail(file):08x}" for file in files]
    rows_before = np.cumsum([0, *map(len, labels)])

    def fingerprint(index: int) -> str:
        file = int(np.searchsorted(rows_before, index, side="right")) - 1
        return f"{files[file].name} {index - int(rows_before[file])} {facts[file]}"

    return ImageSet(
        str(path),
        [f"row {index}" for index in range(len(classes))],
        load,
        fingerprint,
        names or [str(number) for number in range(count)],
        classes,
    )


class _Groups:
    """The images of the row groups used last; rows may be asked for by several threads."""

    def __init__(self, readers: list[Any], column: str, arrow_error: type[Exception]) -> None:
        self._places = [
            (reader, group) for reader in readers for group in range(reader.metadata.num_row_groups)
        ]
        self.lengths = [reader.metadata.row_group(group).num_rows for reader, group in self._places]
        self._column, self._error = column, arrow_error
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, number: int, row: int, name: str) -> bytes:
        """Return the bytes of one image file; raises InputFileError."""
        with self._lock:
            if number not in self._kept:
                self._kept[number] = self._read(number, name)
                while len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(number)
            images = self._kept[number]
        try:
            content = images[row]["bytes"] if hasattr(images.type, "fields") else images[row]
            if not content.is_valid:
                raise unreadable(name, "no bytes")
            size = content.as_buffer().size
        except (LookupError, AttributeError, TypeError) as error:
            raise unreadable(name, f"a column of {images.type}, not of image files") from error
        if size > MAX_FILE_BYTES:
            raise unreadable(name, f"{size} bytes, over {MAX_FILE_BYTES}")
        return bytes(content.as_py())

    def _read(self, number: int, name: str) -> Any:
        reader, group = self._places[number]
        size = reader.metadata.row_group(group).total_byte_size
        if size > LARGEST_GROUP:
            raise unreadable(name, f"a row group of {size} bytes, over {LARGEST_GROUP}")
        try:
            return reader.read_row_group(group, columns=[self._column]).column(self._column)
        except (OSError, LookupError, self._error) as error:
            raise unreadable(name, (str(error) or type(error).__name__).splitlines()[0]) from error


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's datasets note of the columns in a schema, or nothing."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (LookupError, ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: noted for name, noted in features.items() if isinstance(noted, dict)}


def _column(
    file: Path,
    kind: str,
    usual: tuple[str, ...],
    columns: list[str],
    features: dict[str, dict[str, Any]],
) -> str:
    """Return the column of a kind: of a usual name, else the only one that the schema calls so."""
    noted = [name for name in columns if features.get(name, {}).get("_type") == kind]
    found = next((name for name in usual if name in columns), None)
    if found is None and len(noted) == 1:
        found = noted[0]
    if found is None:
        raise _wrong(file, f"columns {', '.join(columns[:20]) or 'none'}")
    return found


def _whole_numbers(file: Path, column: Any) -> NDArray[np.int64]:
    """Return the labels of a file; raises InputFileError that names it, and the row."""
    values = column.to_numpy()
    if values.dtype.kind in "iu" and values.min(initial=0) >= 0:
        return cast("NDArray[np.int64]", values.astype(np.int64))
    row, value = next(
        (row, value) for row, value in enumerate(column.to_pylist()) if not _is_class(value)
    )
    raise _wrong(file, f"labels that are not whole numbers from 0 on: {value!r} in row {row}")


def _is_class(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tail(file: Path) -> int:
    """Return a CRC of a file's end, where parquet keeps what it knows of all row groups."""
    return tail_crc(file, 0, file.stat().st_size, file.name)


def _wrong(path: Path, got: str) -> InputFileError:
    return InputFileError(
        "cannot read the parquet files as labelled images",
        got=got,
        expected=f"a column of images ({', '.join(IMAGE_COLUMNS)}) and one of whole numbers "
        f"({', '.join(LABEL_COLUMNS)})",
        where=path,
        fix="save the dataset as Hugging Face's datasets do, or use another source",
    )
