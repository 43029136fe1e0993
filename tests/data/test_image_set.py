"""Images for scoring from folders, zips, tars and .npz files: one interface."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terdit_cli.data.image_set import ImageSet, unreadable_images
from terdit_cli.data.image_sources import open_image_set
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate.statistics import spread

NAMES = ["a.png", "deep/c.png", "deep/er/b.png", "z.png"]
HIDDEN = [".hidden/x.png", "__MACOSX/a.png", "notes.txt", "deep/._c.png"]
KINDS = ["folder", "zip", "tar", "tars"]


def picture(seed: int) -> np.ndarray:
    shape = (6 + seed, 9, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(seed: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def make(kind: str, root: Path, data: dict[str, bytes]) -> Path:
    """Write files as a folder "set", as set.zip, as set.tar, or dealt to the tars of a folder."""
    path = root / ("set" if kind in ("folder", "tars") else f"set.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in data.items():
                archive.writestr(name, content)
    elif kind in ("tar", "tars"):
        shards = [path] if kind == "tar" else [path / "s-0.tar", path / "s-1.tar"]
        shards[0].parent.mkdir(exist_ok=True)
        items = list(data.items())
        half = -(-len(items) // len(shards))
        for number, shard in enumerate(shards):
            with tarfile.open(shard, "w") as archive:
                for name, content in items[number * half : (number + 1) * half]:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in data.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


def a_set() -> dict[str, bytes]:
    return {name: encoded(seed) for seed, name in enumerate(NAMES)} | dict.fromkeys(HIDDEN, b"x")


def classes_of(images: ImageSet) -> list[str] | None:
    if images.classes is None:
        return None
    assert images.classes.dtype == np.int64
    return [images.class_names[label] for label in images.classes]


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_the_order_of_their_names(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path, a_set())
    images = open_image_set(str(path))
    assert (images.where, len(images)) == (str(path), 4)
    for index in (3, 0, 2, 1):
        pixels, mode = images.read(index)
        assert np.array_equal(pixels, picture(index))
        assert pixels.dtype == np.uint8
        assert mode == "RGB"
        assert images.fingerprint(index).rsplit(" ", 2)[0].endswith(NAMES[index])
    assert classes_of(images) is None
    assert images.class_names == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", ["", "data/val/"])
def test_classes_are_the_top_folders(kind: str, wrapped: str, tmp_path: Path) -> None:
    names = ["cat/1.png", "cat/sub/2.png", "dog/1.png", "owl/1.png"]
    path = make(kind, tmp_path, {wrapped + name: encoded(0) for name in names})
    images = open_image_set(str(path))
    assert images.class_names == ["cat", "dog", "owl"]
    assert classes_of(images) == ["cat", "cat", "dog", "owl"]


def test_one_class_is_one(tmp_path: Path) -> None:
    images = open_image_set(str(make("zip", tmp_path, {"cat/1.png": encoded(0)})))
    assert classes_of(images) == ["cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_hash_tells_lists_of_images_apart(kind: str, tmp_path: Path) -> None:
    """Uncompressed files of one size, so that only their bytes differ."""
    data = {f"c/{seed}.bmp": encoded(1, "BMP") for seed in range(3)}
    hashes = {}
    for place, change in {
        "as it is": {},
        "again": {},
        "pixel": {"c/1.bmp": data["c/1.bmp"][:-4] + b"\1\2\3\4"},
        "name": {"c/9.bmp": data["c/1.bmp"]},
    }.items():
        root = tmp_path / place
        root.mkdir()
        images = open_image_set(str(make(kind, root, data | change)))
        hashes[place] = images.sha256([0, 1, 2])
        assert len(hashes[place]) == 64
    assert hashes["as it is"] == hashes["again"]
    assert len({hashes["as it is"], hashes["pixel"]}) == 2
    whole = open_image_set(str(tmp_path / "name" / make(kind, tmp_path, data).name))
    assert whole.sha256(list(range(4))) not in hashes.values()
    same = open_image_set(str(make(kind, tmp_path, data)))
    assert same.sha256([0, 1, 2]) == hashes["as it is"]
    assert same.sha256([0, 2, 1]) != hashes["as it is"]
    assert same.sha256([0, 1]) != hashes["as it is"]


def test_hash_of_names_that_are_not_unicode(tmp_path: Path) -> None:
    path = make("folder", tmp_path, {"a.png": encoded(0)})
    try:
        Path(os.fsdecode(os.fsencode(path) + b"/\xff.png")).write_bytes(encoded(1))
    except OSError:
        pytest.skip("this disk takes only UTF-8 names")
    images = open_image_set(str(path))
    assert len(images) == 2
    assert len(images.sha256([0, 1])) == 64


def test_packaged_images() -> None:
    images = open_image_set("embedded:heldout")
    assert images.where == "embedded:heldout"
    assert images.read(0)[0].shape == (28, 28, 3)
    assert len(classes_of(images) or []) == len(images)
    assert images.sha256([0, 1]) != open_image_set("embedded:train").sha256([0, 1])
    with pytest.raises(UsageError, match="heldouts"):
        open_image_set("embedded:heldouts")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: object, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 11, 3), dtype=np.uint8)
    assert callable(save)
    save(tmp_path / "x.npz", images, np.array([30, 2, 2, 100, 30], np.int32))
    found = open_image_set(str(tmp_path / "x.npz"))
    assert len(found) == 5
    for index in (4, 0, 2, 1, 3):
        pixels, mode = found.read(index)
        assert np.array_equal(pixels, images[index])
        assert mode == "RGB"
    assert found.class_names == ["2", "30", "100"]  # in the order of the numbers
    assert classes_of(found) == ["30", "2", "2", "100", "30"]
    whole = found.sha256([0, 1, 2, 3, 4])
    images[3, 6, 10, 2] ^= 1
    save(tmp_path / "y.npz", images)
    other = open_image_set(str(tmp_path / "y.npz"))
    assert classes_of(other) is None
    assert other.sha256([0, 1, 2, 3, 4]) != whole
    assert found.sha256([0, 1]) != found.sha256([0, 2])


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "CMYK"])
def test_mode_of_each_image_is_told_and_its_pixels_are_rgb(mode: str, tmp_path: Path) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    data = {"a.tif" if mode == "CMYK" else "a.png": encoded(0, kind, mode)}
    pixels, told = open_image_set(str(make("folder", tmp_path, data))).read(0)
    assert told == mode
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(*data.values())).convert("RGB")))


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    path = make("folder", tmp_path, a_set())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "q.png").write_bytes(encoded(0))
    (path / "link").symlink_to(elsewhere)
    (path / "deep" / "loop").symlink_to(path)
    images = open_image_set(str(path))
    found = [images.fingerprint(index).rsplit(" ", 2)[0] for index in range(len(images))]
    assert found == sorted([*NAMES, "link/q.png"])


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_images_are_named(kind: str, tmp_path: Path) -> None:
    broken = {"deep/c.png": encoded(1)[:-30], "z.png": b"x"}
    images = open_image_set(str(make(kind, tmp_path, a_set() | broken)))
    found = dict(unreadable_images(images, [0, 1, 2, 3]))
    assert sorted(found) == [1, 3]
    assert "deep/c.png" in found[1]
    assert "truncated" in found[1]
    assert "z.png" in found[3]
    assert [index for index, _ in unreadable_images(images, [0, 1])] == [1]
    with pytest.raises(InputFileError, match=r"unreadable image: got not an image.*z\.png"):
        images.read(3)


def test_images_that_went_away(tmp_path: Path) -> None:
    path = make("folder", tmp_path, a_set())
    images = open_image_set(str(path))
    (path / "a.png").unlink()
    (path / "z.png").unlink()
    os.mkfifo(path / "z.png")  # reading it would wait for ever
    assert dict(unreadable_images(images, [0, 1, 2, 3])).keys() == {0, 3}
    for index in (0, 3):
        with pytest.raises(InputFileError, match=r"no regular file.*[az]\.png"):
            images.sha256([index])


def test_a_damaged_npz_is_not_an_image_to_skip(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((3, 200, 200, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputFileError, match=r"another checksum.*x\.npz"):
        list(unreadable_images(open_image_set(str(path)), [0, 1, 2]))


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("x.tar", "x.zip", "x.npz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "x.tgz").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    tarfile.open(tmp_path / "none.tar", "w").close()
    for name, reason in (
        ("nowhere", "images not found"),
        ("nowhere.npz", "images not found"),
        ("empty", "no images found: got nothing, expected JPEG, PNG"),
        ("texts.zip", "no images found"),
        ("none.tar", "no images found"),
        ("x.tgz", "got .tgz, expected a folder, .zip, .tar, .npz or .parquet"),
        ("x.tar", "cannot read the tar of images"),
        ("x.zip", "cannot open the zip of images"),
        ("x.npz", "cannot read images from the .npz"),
    ):
        with pytest.raises(InputFileError) as caught:
            open_image_set(str(tmp_path / name))
        assert reason in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
        assert "Fix: " in str(caught.value)


def test_tars_beside_images_are_ambiguous(tmp_path: Path) -> None:
    path = make("tars", tmp_path, a_set())
    (path / "stray.png").write_bytes(encoded(0))
    with pytest.raises(InputFileError) as caught:
        open_image_set(str(path))
    assert "got s-0.tar and stray.png" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "'*" not in str(caught.value)
    assert "/*.tar'" in str(caught.value)
    assert len(open_image_set(f"{path}/*.tar")) == 4


def a_zip(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("a/1.png", encoded(0))
        archive.writestr("a/2.png", encoded(1))
    return buffer.getvalue()


ZIPS = [
    a_zip(kind)
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
]


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from(ZIPS),
    places=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    value=st.integers(0, 255),
    cut=st.integers(0, 10_000),
)
def test_damaged_zips_never_crash(
    data: bytes, places: list[int], value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(data)
    for place in places:
        # Most of the damage into the directory, where it does most.
        damaged[-1 - place % min(len(data), 300)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(damaged[: max(1, cut % (20 * len(data)))])
    with suppress(InputFileError):
        images = open_image_set(str(path))
        dict(unreadable_images(images, list(range(len(images)))))


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
