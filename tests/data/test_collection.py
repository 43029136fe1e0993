"""Images for scoring from folders, zips and .npz files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data import collection
from terdit_cli.data.collection import count_images, read_images, spread
from terdit_cli.errors import InputFileError

NAMES = ["a.png", "deep/c.png", "deep/er/b.png", "z.jpg"]


def picture(seed: int) -> np.ndarray:
    shape = (6 + seed, 9, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, format="PNG")
    return buffer.getvalue()


def make(kind: str, root: Path) -> Path:
    data = {name: encoded(seed) for seed, name in enumerate(NAMES)}
    data |= {".hidden/x.png": b"x", "__MACOSX/a.png": b"x", "notes.txt": b"x", "deep/._c.png": b"x"}
    if kind == "zip":
        with zipfile.ZipFile(root / "set.zip", "w") as archive:
            for name, value in data.items():
                archive.writestr(name, value)
        return root / "set.zip"
    for name, value in data.items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(value)
    return root / "set"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_in_the_order_of_their_paths(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    assert count_images(path) == 4
    found = list(read_images(path))
    assert [name for name, _ in found] == NAMES
    for seed, (_, pixels) in enumerate(found):
        assert np.array_equal(pixels, picture(seed))
    assert all(pixels.shape == (5, 5, 3) for _, pixels in read_images(path, 5))


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    path = make("folder", tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "q.png").write_bytes(encoded(0))
    (path / "link").symlink_to(elsewhere)
    (path / "deep" / "loop").symlink_to(path)
    assert [name for name, _ in read_images(path)] == sorted([*NAMES, "link/q.png"])


@pytest.mark.parametrize("key", ["arr_0", "images"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(key: str, save: object, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 11, 3), dtype=np.uint8)
    path = tmp_path / "samples.npz"
    assert callable(save)
    save(path, **{key: images, "labels": np.arange(5)})
    assert count_images(path) == 5
    found = list(read_images(path))
    assert [name for name, _ in found] == [f"samples.npz[{index}]" for index in range(5)]
    assert np.array_equal(np.stack([pixels for _, pixels in found]), images)
    assert all(pixels.shape == (4, 4, 3) for _, pixels in read_images(path, 4))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "float32 [2, 4, 4, 3]"),
        (np.zeros((2, 4, 4, 1), np.uint8), "uint8 [2, 4, 4, 1]"),
        (np.zeros((4, 4, 3), np.uint8), "uint8 [4, 4, 3]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "uint8 [0, 4, 4, 3]"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "in Fortran order"),
        (np.array([{"a": 1}], dtype=object), "object [1]"),
    ],
)
def test_npz_with_another_array(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=array)
    for call in (count_images, read_images):
        with pytest.raises(InputFileError) as caught:
            call(path)
        assert reason in str(caught.value)
        assert str(path) in str(caught.value)
        assert "Fix: save them with numpy.savez" in str(caught.value)


def test_npz_that_lies_about_its_size(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"shape": (10**6, 512, 512, 3), "fortran_order": False, "descr": "|u1"}
    )
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", stream.getvalue() + b"\0" * 1000)
    with pytest.raises(InputFileError, match=r"1000 bytes for shape \[1000000, 512, 512, 3\]"):
        read_images(path)


def test_npz_over_the_pixel_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((1, 8, 8, 3), np.uint8))
    monkeypatch.setattr(collection, "MAX_PIXELS", 63)
    with pytest.raises(InputFileError, match="8 x 8 pixels, over 63"):
        count_images(path)


@pytest.mark.parametrize("damage", ["text", "cut", "flip", "no key", "no header"])
def test_damaged_npz(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[400] ^= 1
    if damage in ("no key", "no header"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy" if damage == "no key" else "arr_0.npy", b"x")
    else:
        path.write_bytes({"text": b"hello", "cut": data[:300], "flip": data}[damage])
    with pytest.raises(InputFileError, match=r"cannot read images from the .npz") as caught:
        list(read_images(path))
    assert str(path) in str(caught.value)


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").write_bytes(b"x")
    for name, reason in (
        ("nowhere", "images not found"),
        ("nowhere.npz", "cannot read images from the .npz"),
        ("empty", "no images found"),
        ("x.tar", "got .tar, expected a folder, .zip or .npz"),
    ):
        for call in (count_images, read_images):
            with pytest.raises(InputFileError) as caught:
                call(tmp_path / name)
            assert reason in str(caught.value)
            assert str(tmp_path / name) in str(caught.value)
            assert "Fix: " in str(caught.value)


def test_unreadable_image_is_named_at_its_turn(tmp_path: Path) -> None:
    path = make("folder", tmp_path)
    (path / "deep/c.png").write_bytes(b"x")
    stream = read_images(path)
    assert next(stream)[0] == "a.png"
    with pytest.raises(InputFileError, match=r"unreadable image: got not an image.*deep/c.png"):
        next(stream)


def test_a_part_is_spread_over_sorted_and_over_periodic_sets() -> None:
    assert spread(5, 5) == spread(5, 9) == [0, 1, 2, 3, 4]
    chosen = np.array(spread(1000, 100))
    assert (chosen == spread(1000, 100)).all()
    assert (chosen // 10 == np.arange(100)).all()  # one of each stretch: sorted sets
    # Classes repeating with period 10: 10 of each expected, deviation 3; 5 of them.
    assert np.abs(np.bincount(chosen % 10, minlength=10) - 10).max() < 15
    assert len(set(chosen % 10)) == 10
    odd = spread(7, 3)
    assert odd == sorted(set(odd))
    assert len(odd) == 3
