"""Classes of images in tars: numbers in .cls files, folders, or the tars' names."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data.image_sources import open_image_set, open_labelled
from terdit_cli.data.images import open_images
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
    pattern = open_labelled("tars", tmp_path / "a-{000..001}.tar")
    assert pattern.labels.tolist() == [2, 0, 1]


def test_folders_and_names_of_tars(tmp_path: Path) -> None:
    write(tmp_path / "all.tar", {"train/dog/1.png": png(1), "train/cat/1.png": png(2)})
    one = open_labelled("tars", tmp_path / "all.tar")
    assert one.class_names == ["cat", "dog"]
    assert one.labels.tolist() == [1, 0]
    (tmp_path / "all.tar").unlink()
    write(tmp_path / "n02.tar", {"1.png": png(1)})
    write(tmp_path / "n01.tar", {"2.png": png(2), "3.png": png(3)})
    many = open_labelled("tars", tmp_path)
    assert many.class_names == ["n01", "n02"]
    assert many.labels.tolist() == [0, 0, 1]


def test_images_without_a_class_among_others(tmp_path: Path) -> None:
    """Falling back on the tars' names would train on shards as classes."""
    for bad in ({}, {"y.cls": b"5,"}, {"y.cls": b""}):
        write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"0", "y.png": png(2)} | bad)
        with pytest.raises(
            InputFileError, match=r"no number in the \.cls or \.json of a\.tar/y\.png"
        ):
            open_labelled("tars", tmp_path)
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"cat"})
    with pytest.raises(InputFileError, match=r"no number in the \.cls or \.json of a\.tar/x\.png"):
        open_labelled("tars", tmp_path)


def test_paths_that_look_like_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "set[1]{a,b}"
    folder.mkdir()
    write(folder / "n[0].tar", {"1.png": png(1)})
    for path in (folder, folder / "n[0].tar"):
        assert open_labelled("tars", path).class_names == ["n[0]"]


def test_number_that_no_image_has(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"1"})
    with pytest.raises(InputFileError, match=r"got a class 1 among 1 images.*Fix: number"):
        open_labelled("tars", tmp_path / "a.tar")
    more = {"y.png": png(2), "y.cls": b"1"}
    write(tmp_path / "a.tar", {"x.png": png(1), "x.cls": b"1", **more})
    with pytest.raises(InputFileError, match="class folders without images: got 0"):
        open_labelled("tars", tmp_path / "a.tar")


def test_no_tars(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="tar of images not found"):
        open_labelled("tars", tmp_path)
    write(tmp_path / "a.tar", {"x.txt": b"no image", "x.cls": b"0"})
    with pytest.raises(InputFileError, match="no images found"):
        open_labelled("tars", tmp_path)
    with pytest.raises(UsageError, match="no such split"):
        open_labelled("tars", tmp_path, "train")


def test_dots_in_names_do_not_mix_labels(tmp_path: Path) -> None:
    """A scale or a seed in a name, as a_0.5.png: a label belongs to the whole name."""
    members = {}
    for number, name in enumerate(("a_0.5", "a_0.7", "a_0", "b.left", "b.right")):
        members[f"{name}.png"] = png(number)
    labels = {"a_0.5.cls": b"0", "a_0.7.cls": b"1", "a_0.cls": b"2", "b.cls": b"3"}
    write(tmp_path / "a.tar", members | labels)
    assert open_labelled("tars", tmp_path / "a.tar").labels.tolist() == [0, 1, 2, 3, 3]
    scored = open_image_set(str(tmp_path / "a.tar"))
    assert scored.labels.tolist() == [0, 1, 2, 3, 3]
    del labels["a_0.5.cls"]  # the label of a_0.png is not a_0.5.png's
    write(tmp_path / "a.tar", members | labels)
    with pytest.raises(InputFileError, match=r"no number .* of a\.tar/a_0\.5\.png"):
        open_labelled("tars", tmp_path / "a.tar")


def test_labels_in_json(tmp_path: Path) -> None:
    write(tmp_path / "s-0.tar", {"x.png": png(1), "x.json": b'{"label": 1, "caption": "a dog"}'})
    write(tmp_path / "s-1.tar", {"y.json": b'{"cls": "0"}', "y.png": png(2), "z.png": png(3)})
    with pytest.raises(InputFileError, match=r"no number .* of s-1\.tar/z\.png"):
        open_labelled("tars", tmp_path)
    write(tmp_path / "s-1.tar", {"y.json": b'{"cls": "0"}', "y.png": png(2)})
    assert open_labelled("tars", tmp_path).labels.tolist() == [1, 0]
    assert open_image_set(str(tmp_path)).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "text", [b'{"caption": "a dog"}', b'{"label": -1}', b"[1]", b"{", b"[" * 9999]
)
def test_json_without_a_class_does_not_make_classes_of_the_tars(
    text: bytes, tmp_path: Path
) -> None:
    for number in range(2):
        write(tmp_path / f"s-{number}.tar", {"x.png": png(1), "x.json": text})
    with pytest.raises(InputFileError, match=r"no number under label or cls in s-0\.tar/x\.json"):
        open_labelled("tars", tmp_path)
    assert open_image_set(str(tmp_path)).classes is None
