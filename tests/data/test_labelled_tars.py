"""Classes of images in tars: numbers in .cls files, folders, or the tars' names."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data.images import list_images, open_images
from terdit_cli.errors import InputFileError, UsageError


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_numbers_of_a_webdataset(tmp_path: Path) -> None:
    write(
        tmp_path / "a-000.tar", {"x.png": png(1), "x.cls": b"2", "y.png": png(2), "y.cls": b"0\n"}
    )
    write(tmp_path / "a-001.tar", {"z.cls": b"1", "z.json": b"{}", "z.png": png(3)})
    source = open_images("tars", tmp_path, 4)
    assert source.class_names == ["0", "1", "2"]
    assert source.labels.tolist() == [2, 0, 1]
    assert source.images is not None
    assert source.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    pattern = list_images("tars", tmp_path / "a-{000..001}.tar")
    assert pattern.labels.tolist() == [2, 0, 1]


def test_folders_and_names_of_tars(tmp_path: Path) -> None:
    write(tmp_path / "all.tar", {"train/dog/1.png": png(1), "train/cat/1.png": png(2)})
    one = list_images("tars", tmp_path / "all.tar")
    assert one.class_names == ["cat", "dog"]
    assert one.labels.tolist() == [1, 0]
    (tmp_path / "all.tar").unlink()
    write(tmp_path / "n02.tar", {"1.png": png(1)})
    write(tmp_path / "n01.tar", {"2.png": png(2), "3.png": png(3)})
    many = list_images("tars", tmp_path)
    assert many.class_names == ["n01", "n02"]
    assert many.labels.tolist() == [0, 0, 1]


def test_images_without_a_class_among_others(tmp_path: Path) -> None:
    """Falling back on the tars' names would train on shards as classes."""
    for bad in ({}, {"y.cls": b"5,"}, {"y.cls": b""}):
        write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"0", "y.png": png(2)} | bad)
        with pytest.raises(InputFileError, match=r"no number in the \.cls of a\.tar/y\.png"):
            list_images("tars", tmp_path)
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"cat"})
    with pytest.raises(InputFileError, match=r"no number in the \.cls of a\.tar/x\.png"):
        list_images("tars", tmp_path)


def test_paths_that_look_like_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "set[1]{a,b}"
    folder.mkdir()
    write(folder / "n[0].tar", {"1.png": png(1)})
    for path in (folder, folder / "n[0].tar"):
        assert list_images("tars", path).class_names == ["n[0]"]


def test_number_that_no_image_has(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"1"})
    with pytest.raises(InputFileError, match=r"got a class 1 among 1 images.*Fix: number"):
        list_images("tars", tmp_path / "a.tar")
    more = {"y.png": png(2), "y.cls": b"1"}
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"1", **more})
    with pytest.raises(InputFileError, match="class folders without images: got 0"):
        list_images("tars", tmp_path / "a.tar")


def test_no_tars(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="tar of images not found"):
        list_images("tars", tmp_path)
    write(tmp_path / "a.tar", {"x.txt": b"no image", "x.cls": b"0"})
    with pytest.raises(InputFileError, match="no training images"):
        list_images("tars", tmp_path)
    with pytest.raises(UsageError, match="no such split"):
        list_images("tars", tmp_path, "train")
