"""Images in parquet files as Hugging Face's datasets are published: read with pyarrow, the extra.

Columns `image` (a structure with the file's `bytes`) and `label` (whole numbers; the names of the
classes stand in the schema's `huggingface` entry). Parquet has no access to single rows: a few
row groups are kept, so read in order, as `terdit prepare` does; training on a set that does not
fit in memory would read a row group for nearly every image.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from terdit_cli.data.decode import decode_image, unreadable
from terdit_cli.data.files import MAX_FILE_BYTES
from terdit_cli.data.listing import Listing, check_classes
from terdit_cli.errors import EnvironmentProblem, InputFileError

GROUPS_KEPT = 3
LARGEST_GROUP = 4 << 30  # bytes


def list_parquet(path: Path) -> Listing:
    """List a .parquet file, or those of a folder in the order of their names.

    Raises:
        EnvironmentProblem: pyarrow is missing.
        InputFileError: no parquet files, damaged ones, or other columns than image and label.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputFileError(
            "no parquet files here", got="nothing", expected=".parquet files", where=path,
            fix="check the path",
        )  # fmt: skip
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
    try:
        readers = [parquet.ParquetFile(file, memory_map=True) for file in files]
        columns = [reader.read(columns=["label"]).column("label") for reader in readers]
        labels = np.concatenate([column.to_numpy() for column in columns])
        names = _class_names(readers[0].schema_arrow.metadata)
        lengths = [
            reader.metadata.row_group(group).num_rows
            for reader in readers
            for group in range(reader.metadata.num_row_groups)
        ]
    except (OSError, LookupError, ValueError, arrow.ArrowException) as error:
        raise _wrong(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise _wrong(path, "labels that are not whole numbers from 0 on")
    count = int(labels.max(initial=-1)) + 1
    if count > (len(names) or len(labels)):  # a class without an image is refused below
        raise _wrong(path, f"a label {count - 1} among {len(labels)} images")
    labels = labels.astype(np.int64)
    check_classes(path, names or [str(number) for number in range(count)], labels)
    groups = _Groups(readers, arrow.ArrowException)
    first = np.cumsum([0, *lengths])

    def load(index: int) -> Image.Image:
        name = f"{path.name} row {index}"
        group = int(np.searchsorted(first, index, side="right")) - 1
        content = groups.row(group, index - int(first[group]), name)
        return decode_image(content, name)

    rows = [f"row {index}" for index in range(len(labels))]
    return Listing(str(path), names or [str(k) for k in range(count)], labels, rows, load)


class _Groups:
    """The images of the row groups used last; rows may be asked for by several threads."""

    def __init__(self, readers: list[Any], arrow_error: type[Exception]) -> None:
        self._places = [
            (reader, group) for reader in readers for group in range(reader.metadata.num_row_groups)
        ]
        self._error = arrow_error
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
        content = images[row]["bytes"]
        if not content.is_valid:
            raise unreadable(name, "no bytes")
        if content.as_buffer().size > MAX_FILE_BYTES:
            raise unreadable(name, f"{content.as_buffer().size} bytes, over {MAX_FILE_BYTES}")
        return bytes(content.as_py())

    def _read(self, number: int, name: str) -> Any:
        reader, group = self._places[number]
        size = reader.metadata.row_group(group).total_byte_size
        if size > LARGEST_GROUP:
            raise unreadable(name, f"a row group of {size} bytes, over {LARGEST_GROUP}")
        try:
            return reader.read_row_group(group, columns=["image.bytes"]).column("image")
        except (OSError, LookupError, self._error) as error:
            raise unreadable(name, (str(error) or type(error).__name__).splitlines()[0]) from error


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """Return the names that Hugging Face's datasets note in a schema, or none."""
    try:
        noted = json.loads((metadata or {})[b"huggingface"])
        names = noted["info"]["features"]["label"]["names"]
    except (LookupError, ValueError, TypeError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _wrong(path: Path, got: str) -> InputFileError:
    return InputFileError(
        "cannot read the parquet files as labelled images",
        got=got,
        expected="columns `image` (with `bytes`) and `label`",
        where=path,
        fix="save the dataset as Hugging Face's datasets do, or use another source",
    )
