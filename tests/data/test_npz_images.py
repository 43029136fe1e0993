"""Images in .npz files: read by number without loading all, and files made to do harm."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.data.sources import npz_images
from terdit_cli.data.sources.npz_images import NpzImages
from terdit_cli.errors import InputFileError


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 7, 11, 3), dtype=np.uint8)


def npz(save: Callable[..., None] = np.savez, **arrays: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("key", ["arr_0", "images"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_order_gives_the_images(key: str, save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(npz(save, before=np.arange(99), **{key: images(), "labels": np.arange(5)}))
    found = NpzImages(path)
    assert (found.count, found.height, found.width) == (5, 7, 11)
    for index in (4, 0, 1, 2, 3, 4, 0):
        assert np.array_equal(found.read(index), images()[index])
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 3, 4]
    assert found.sha256() == NpzImages(path).sha256()


def test_archive_behind_other_bytes(tmp_path: Path) -> None:
    """As in a self-extracting zip: the places in the archive's directory count from its start."""
    path = tmp_path / "x.npz"
    path.write_bytes(b"#!/bin/sh\n" * 50 + npz(arr_0=images()))
    assert np.array_equal(NpzImages(path).read(3), images()[3])


def test_a_stored_array_is_not_read_up_to_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(npz(arr_0=np.broadcast_to(images(1), (30_000, 7, 11, 3))))
    found, reads = NpzImages(path), []
    original = npz_images._Stored.read

    def read(self: npz_images._Stored, size: int) -> bytes:
        reads.append(size)
        return original(self, size)

    monkeypatch.setattr(npz_images._Stored, "read", read)
    for index in (29_999, 0, 15_000):
        assert np.array_equal(found.read(index), images()[0])
    assert reads == [7 * 11 * 3] * 3


def test_adm_batches_with_statistics(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_x.npz"
    moments = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    path.write_bytes(npz(arr_0=images(), **moments))
    found = NpzImages(path)
    assert found.count == 5
    assert found.labels is None


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "float32 [2, 4, 4, 3]"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8)}, "uint8 [2, 4, 4, 1]"),
        ({"images": np.zeros((4, 4, 3), np.uint8)}, "uint8 [4, 4, 3]"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "uint8 [0, 4, 4, 3]"),
        ({"images": np.uint8(7)}, "uint8 []"),
        ({"images": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "in Fortran order"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "pickled objects, which are never loaded"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "keys mu.npy, sigma.npy"),
        ({}, "keys none"),
        ({"arr_0": images(2), "arr_1": np.zeros(3, np.int64)}, "labels int64 [3] for 2 images"),
        ({"arr_0": images(2), "arr_1": np.zeros(2)}, "labels float64 [2] for 2 images"),
        ({"arr_0": images(2), "arr_1": np.array([{}, {}])}, "labels object [2] for 2 images"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(npz(**arrays))
    with pytest.raises(InputFileError) as caught:
        NpzImages(path)
    for text in (reason, str(path), "Fix: save them with numpy.savez"):
        assert text in str(caught.value)


def lying(
    shape: str,
    content: bytes,
    name: str = "arr_0",
    compression: int = zipfile.ZIP_STORED,
    magic: bytes = b"\x93NUMPY\x01\x00",
) -> bytes:
    """An .npz whose array declares a shape that is not that of its content."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    prefix = magic + len(header).to_bytes(2, "little")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{name}.npy", prefix + header + content)
        if name != "arr_0":
            with archive.open("arr_0.npy", "w") as stream:
                np.save(stream, images())
    return buffer.getvalue()


def declared_size(data: bytes, size: int) -> bytes:
    """The same archive, whose directory claims another size of its first member."""
    changed = bytearray(data)
    entry = data.index(b"PK\x01\x02")
    changed[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    return bytes(changed)


def header_bomb() -> bytes:
    """A header that says it is 32 MB long, of spaces that pack to nothing."""
    length = 1 << 25
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little")
        archive.writestr("arr_0.npy", start + b" " * length)
    return buffer.getvalue()


SHAPE = 1 << 28, 1, 1, 3
HOSTILE = {
    "text": (b"hello", "not a zip"),
    "empty": (b"", "not a zip"),
    "huge": (lying("(1000000, 512, 512, 3)", bytes(1000)), "1000 bytes for shape [1000000, 512"),
    "longer than declared": (lying("(2, 5, 5, 3)", bytes(151)), "151 bytes for shape"),
    "wrapping": (lying(f"({1 << 62}, 4, 4, 3)", b""), "0 bytes for shape"),
    "below zero": (lying("(-2, -5, 5, 3)", bytes(150)), "uint8 [-2, -5, 5, 3]"),
    "packed too well": (
        declared_size(lying(str(SHAPE), bytes(1000), compression=8), 3 << 28),
        "bytes packed into",
    ),
    "stored too well": (declared_size(lying(str(SHAPE), bytes(1000)), 3 << 28), "bytes packed"),
    "header bomb": (header_bomb(), "EOF: reading array header"),
    "code for a shape": (lying("__import__('os').abort()", b""), ""),
    "tuples in tuples": (lying("(" * 300 + ")" * 300, b""), ""),
    "labels": (lying("(10000000000,)", b"", "labels"), "labels uint8 [10000000000] for 5 images"),
    "labels cut": (lying("(5,)", b"123", "labels"), "3 bytes for 5 labels uint8"),
    "format 9": (
        lying("(1, 1, 1, 3)", b"123", magic=b"\x93NUMPY\x09\x00"),
        "format version (9, 0)",
    ),
    "no header": (lying("(1, 1, 1, 3)", b"123", magic=b"something"), "magic string"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[kind]
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"cannot read images from the \.npz") as caught:
        NpzImages(path)
    for text in (reason, str(path), "Fix: save them"):
        assert text in str(caught.value)


def test_over_the_pixel_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((1, 8, 8, 3), np.uint8))
    monkeypatch.setattr(npz_images, "MAX_PIXELS", 63)
    with pytest.raises(InputFileError, match="8 x 8 pixels, over 63"):
        NpzImages(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_shows_when_all_were_read(save: Callable[..., None], tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    data, path = bytearray(npz(save, arr_0=many)), tmp_path / "x.npz"
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = NpzImages(path)
    with pytest.raises(InputFileError, match=r"(?i)(checksum|crc|decompress).*x\.npz"):
        _ = [found.read(index) for index in range(40)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_file_that_was_cut_or_went_away(save: Callable[..., None], tmp_path: Path) -> None:
    many = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "x.npz"
    path.write_bytes(npz(save, arr_0=many))
    found, gone = NpzImages(path), NpzImages(path)
    path.write_bytes(path.read_bytes()[:80_000])
    with pytest.raises(InputFileError, match=r"x\.npz"):
        found.read(39)
    path.unlink()
    with pytest.raises(InputFileError, match=r"No such file.*x\.npz"):
        gone.read(0)


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from([npz(save, arr_0=images()) for save in (np.savez, np.savez_compressed)]),
    places=st.lists(st.integers(0, 10_000), min_size=1, max_size=3),
    value=st.integers(0, 255),
    cut=st.integers(0, 40_000),
)
def test_damaged_files_never_crash(
    data: bytes, places: list[int], value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(data)
    for place in places:
        # Into the headers and the directory: pixels have no structure to break.
        start = place % 200
        damaged[start if place % 2 else -1 - start] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(damaged[:cut])
    with suppress(InputFileError):
        found = NpzImages(path)
        for index in range(min(found.count, 9)):
            assert found.read(index).shape == (found.height, found.width, 3)
