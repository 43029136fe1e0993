"""Parquet as Hugging Face's datasets publish it: names, order, row groups, damage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data.images import list_images, open_images
from terdit_cli.errors import InputFileError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT = 10
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def table(missing: int | None = None, names: list[str] | None = None) -> Any:
    images = [
        {"bytes": None if index == missing else png(image), "path": None}
        for index, image in enumerate(pixels())
    ]
    labels = [index % 3 for index in range(COUNT)]
    made = pa.table({"image": pa.array(images, type=IMAGE), "label": labels})
    if names is None:
        return made
    label = {"names": names, "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": {"label": label}}})
    return made.replace_schema_metadata({"huggingface": info})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = table(names=["x", "y", "z"])
    pq.write_table(made.slice(0, 6), tmp_path / "train-0.parquet", row_group_size=4)
    pq.write_table(made.slice(6), tmp_path / "train-1.parquet", row_group_size=1)
    return tmp_path


def test_rows_in_any_order(folder: Path) -> None:
    source = open_images("parquet", folder, 32)
    assert source.class_names == ["x", "y", "z"]
    assert source.labels.tolist() == [index % 3 for index in range(COUNT)]
    assert np.array_equal(source.images, pixels())
    listing = list_images("parquet", folder)
    for index in (9, 0, 5, 8, 3, 1, 7, 4, 6, 2, 9):
        assert np.array_equal(np.array(listing.load(index)), pixels()[index])


def test_numbers_for_names(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "one.parquet")
    assert list_images("parquet", tmp_path / "one.parquet").class_names == ["0", "1", "2"]


def test_row_without_bytes(tmp_path: Path) -> None:
    pq.write_table(table(missing=4), tmp_path / "one.parquet")
    source = open_images("parquet", tmp_path / "one.parquet", 32, on_bad_image="skip")
    assert len(source) == COUNT - 1
    assert source.skipped == ["row 4"]
    with pytest.raises(InputFileError, match=r"got no bytes.*one.parquet row 4"):
        list_images("parquet", tmp_path / "one.parquet").load(4)


@pytest.mark.parametrize(
    ("columns", "got"),
    [
        ({"picture": [1]}, "label"),
        ({"image": [1], "label": ["a"]}, "not whole numbers"),
        ({"image": [1], "label": [-1]}, "not whole numbers"),
        ({"image": [1], "label": [1 << 40]}, "a label 1099511627776"),
        (None, "magic bytes"),
    ],
)
def test_files_that_hold_no_labelled_images(
    tmp_path: Path, columns: dict[str, list[Any]] | None, got: str
) -> None:
    path = tmp_path / "one.parquet"
    if columns is None:
        path.write_bytes(b"PAR1 and no more")
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(InputFileError, match=got) as caught:
        list_images("parquet", path)
    assert str(path) in str(caught.value)


def test_label_without_a_name(tmp_path: Path) -> None:
    pq.write_table(table(names=["x", "y"]), tmp_path / "one.parquet")
    with pytest.raises(InputFileError, match="a label 2"):
        list_images("parquet", tmp_path / "one.parquet")


def test_image_column_of_another_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1], "label": [0]}), tmp_path / "one.parquet")
    with pytest.raises(InputFileError, match="unreadable image"):
        list_images("parquet", tmp_path / "one.parquet").load(0)
