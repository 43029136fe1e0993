"""Parquet as Hugging Face's datasets publish it: names, order, row groups, damage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data.image_sources import open_image_set, open_labelled
from terdit_cli.data.images import open_images
from terdit_cli.errors import InputFileError, UsageError

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
    listing = open_labelled("parquet", folder)
    for index in (9, 0, 5, 8, 3, 1, 7, 4, 6, 2, 9):
        assert np.array_equal(listing.read(index)[0], pixels()[index])


def test_numbers_for_names(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "one.parquet")
    assert open_labelled("parquet", tmp_path / "one.parquet").class_names == ["0", "1", "2"]


def test_row_without_bytes(tmp_path: Path) -> None:
    pq.write_table(table(missing=4), tmp_path / "one.parquet")
    source = open_images("parquet", tmp_path / "one.parquet", 32, on_bad_image="skip")
    assert len(source) == COUNT - 1
    assert source.skipped == ["row 4"]
    with pytest.raises(InputFileError, match=r"got no bytes.*one.parquet row 4"):
        open_labelled("parquet", tmp_path / "one.parquet").load(4)


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
        open_labelled("parquet", path)
    assert str(path) in str(caught.value)


def test_label_without_a_name(tmp_path: Path) -> None:
    pq.write_table(table(names=["x", "y"]), tmp_path / "one.parquet")
    with pytest.raises(InputFileError, match="a label 2"):
        open_labelled("parquet", tmp_path / "one.parquet")


def test_image_column_of_another_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1], "label": [0]}), tmp_path / "one.parquet")
    with pytest.raises(InputFileError, match="unreadable image"):
        open_labelled("parquet", tmp_path / "one.parquet").load(0)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Three splits in a folder data/, with CIFAR-10's column names on the hub."""
    made = table(names=["x", "y", "z"]).rename_columns(["img", "label"])
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(made.slice(0, 3), folder / "train-00000-of-00002.parquet")
    pq.write_table(made.slice(3, 3), folder / "train-00001-of-00002.parquet")
    pq.write_table(made.slice(0, 4), folder / "test-00000-of-00001-0123456789abcdef.parquet")
    pq.write_table(made.slice(0, 5), folder / "validation.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "count"),
    [(None, 6), ("train", 6), ("test", 4), ("heldout", 4), ("validation", 5), ("all", 15)],
)
def test_splits_are_not_mixed(split: str | None, count: int, published: Path) -> None:
    assert len(open_labelled("parquet", published, split)) == count
    where = str(published) if split is None else f"{published}:{split}"
    scored = open_image_set(where)
    assert len(scored) == count
    assert len({scored.fingerprint(index) for index in range(count)}) == count
    assert np.array_equal(scored.read(0)[0], pixels()[0])


def test_splits_that_are_not_there(published: Path) -> None:
    with pytest.raises(UsageError, match=r"got 'trian' \(did you mean 'train'.*one of test, train"):
        open_labelled("parquet", published, "trian")
    for file in (published / "data").glob("train*"):
        file.unlink()
    with pytest.raises(UsageError, match="several splits, and none named: got test, validation"):
        open_labelled("parquet", published)
    (published / "data" / "validation.parquet").unlink()
    assert len(open_labelled("parquet", published)) == 4


def test_patterns(published: Path) -> None:
    data = published / "data"
    assert len(open_labelled("parquet", data / "train-*.parquet")) == 6
    assert len(open_labelled("parquet", data / "train-{00000..00001}-of-00002.parquet")) == 6
    assert len(open_image_set(f"{data}/train-*.parquet")) == 6
    with pytest.raises(UsageError, match="several splits"):
        open_labelled("parquet", data / "{test-*,validation}.parquet")


def test_files_named_by_numbers_are_of_their_folders_split(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        (tmp_path / split).mkdir()
        pq.write_table(table().slice(0, count), tmp_path / split / "0000.parquet")
    assert len(open_labelled("parquet", tmp_path)) == 6
    assert len(open_labelled("parquet", tmp_path, "test")) == 4


def test_label_errors_name_the_file_and_the_row(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "train-0.parquet")
    pq.write_table(
        pa.table({"image": table().column("image"), "label": [0, 1, None] * 3 + [0]}),
        tmp_path / "train-1.parquet",
    )
    with pytest.raises(InputFileError, match=r"row 2.*train-1\.parquet"):
        open_labelled("parquet", tmp_path)


def test_columns_are_named_where_none_fits(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(table().rename_columns(["pixels", "target"]), path)
    with pytest.raises(InputFileError, match="got columns pixels, target"):
        open_labelled("parquet", path)
    features = {
        "pixels": {"_type": "Image"},
        "target": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
    }
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    made = table().rename_columns(["pixels", "target"]).replace_schema_metadata(noted)
    pq.write_table(made, path)
    assert open_labelled("parquet", path).class_names == ["a", "b", "c"]


def test_bytes_without_a_structure(tmp_path: Path) -> None:
    images = [png(image) for image in pixels()]
    pq.write_table(pa.table({"jpg": images, "cls": [0] * COUNT}), tmp_path / "a.parquet")
    found = open_labelled("parquet", tmp_path / "a.parquet")
    assert np.array_equal(found.read(3)[0], pixels()[3])
