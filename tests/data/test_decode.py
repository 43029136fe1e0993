"""Image bytes to RGB squares: the ADM crop, and bytes that are no good image."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from terdit_cli.data import decode
from terdit_cli.data.decode import (
    UnreadableImage,
    center_crop,
    decode_with_mode,
    to_pixels,
)
from terdit_cli.data.files import is_image
from terdit_cli.errors import InputFileError


def decoded(data: bytes, name: str) -> Image.Image:
    return decode_with_mode(data, name)[0]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, kind: int, pixels: bytes) -> bytes:
    """A PNG with any header: what Pillow itself would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    return png(width, height, 8, 2, bytes(10))


def bmp_565() -> bytes:
    """A BMP of one blue pixel, with 16 bits for all channels together."""
    header = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + b"\x1f\x00\0\0"


def deep_tiff() -> bytes:
    """A TIFF of 2 x 2 RGB pixels with 16 bits a channel."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24)]
    folder = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return header + folder + bytes(4) + struct.pack("<HHH", 16, 16, 16) + bytes(range(24))


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 33),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_crop_gives_the_square_for_any_shape(height: int, width: int, size: int, seed: int) -> None:
    pixels = to_pixels(noise(height, width, seed), size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8


def test_image_of_the_target_size_is_untouched() -> None:
    image = noise(28, 28)
    assert np.array_equal(to_pixels(image, 28), np.asarray(image))


def test_wide_image_of_the_target_height_is_only_cut() -> None:
    image = noise(16, 25)
    assert np.array_equal(to_pixels(image, 16), np.asarray(image)[:, 4:20])


def test_halving_is_a_box_filter() -> None:
    image = noise(32, 32)
    pixels = np.asarray(image, dtype=np.float64)
    boxes = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(to_pixels(image, 16) - boxes).max() <= 1  # a rounding after rows and columns


def test_halving_comes_before_the_bicubic_step() -> None:
    image = noise(70, 90)
    halved = image.resize((45, 35), Image.Resampling.BOX)
    scaled = halved.resize((round(45 * 20 / 35), 20), Image.Resampling.BICUBIC)
    left = (scaled.width - 20) // 2
    expected = np.asarray(scaled)[:, left : left + 20]
    assert np.array_equal(to_pixels(image, 20), expected)


def test_grey_becomes_three_equal_channels() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    pixels = to_pixels(decoded(encode(grey), "grey.png"), 16)
    for channel in range(3):
        assert np.array_equal(pixels[..., channel], np.asarray(grey))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decoded(encode(noise(9, 7).convert(mode), kind), "x")
    assert image.mode == "RGB"
    assert image.size == (7, 9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_formats(kind: str) -> None:
    assert decoded(encode(noise(5, 6), kind), "x").size == (6, 5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(noise(40, 40))[:900], "truncated"),
        (encode(noise(40, 40), "JPEG")[:500], "truncated"),
        (encode(Image.fromarray(np.ones((4, 4), np.uint16))), "more than 8 bits"),
        (png(2, 2, 16, 0, bytes(10)), "more than 8 bits a channel (mode i;16)"),
        (png(2, 2, 16, 2, bytes(26)), "more than 8 bits a channel (mode rgb)"),
        (png(2, 2, 16, 4, bytes(18)), "more than 8 bits a channel (mode rgba)"),
        (png(2, 2, 16, 6, bytes(34)), "more than 8 bits a channel (mode rgba)"),
        (deep_tiff(), "more than 8 bits a channel (mode rgb)"),
        (b"P6 2 2 65535\n" + bytes(24), "more than 8 bits a channel (mode rgb)"),
        (b"P3 2 2 65535\n" + b"1 " * 12, "more than 8 bits a channel (mode rgb)"),
        (b"P5 2 2 65535\n" + bytes(8), "more than 8 bits a channel (mode i)"),
        (huge_png(13_400, 13_400), "pixels"),
        (huge_png(40_000, 40_000), "pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_bytes_name_the_file_and_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        decoded(data, "dog/7.png")
    message = str(caught.value)
    assert "dog/7.png" in message
    assert reason in message.lower()
    assert "Fix: repair or remove" in message
    assert "0x" not in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (b"P6 1 1 255\n\1\2\3", (1, 2, 3)),
        (b"P6 1 1 15\n\1\2\17", (17, 34, 255)),
        (b"P5 1 1 15\n\2", (34, 34, 34)),
        (bmp_565(), (0, 0, 255)),
        (png(1, 1, 1, 0, b"\0\x80"), (255, 255, 255)),
    ],
)
def test_fewer_than_8_bits_are_scaled(data: bytes, pixels: tuple[int, ...]) -> None:
    assert to_pixels(decoded(data, "x"))[0, 0].tolist() == list(pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "LA", "RGBA", "P", "CMYK"])
def test_mode_is_told_and_the_pixels_are_pillow_s(mode: str) -> None:
    data = encode(noise(9, 7).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    image, told = decode_with_mode(data, "x")
    assert told == mode
    assert np.array_equal(
        np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_transparent_pixels_keep_the_colour_below() -> None:
    image = Image.new("RGBA", (2, 2), (10, 200, 30, 0))
    assert to_pixels(decoded(encode(image), "x"))[1, 1].tolist() == [10, 200, 30]


def test_orientation_tags_do_not_turn_an_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    buffer = io.BytesIO()
    noise(5, 9).save(buffer, format="PNG", exif=exif)
    image = decoded(buffer.getvalue(), "x")
    assert np.array_equal(np.asarray(image), np.asarray(noise(5, 9)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_damaged_files_never_crash(kind: str, position: int, value: int, cut: int) -> None:
    data = bytearray(encode(noise(12, 11), kind))
    data[position % len(data)] = value
    data = data[: max(1, cut % (2 * len(data)))]
    try:
        image = decoded(bytes(data), "x")
    except InputFileError:
        return
    assert image.mode == "RGB"


def test_pixel_bound_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode.MAX_PIXELS == 2 * (1 << 30) // 4 // 3
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    with pytest.raises(InputFileError, match="10 x 10 pixels, over 99"):
        decoded(encode(noise(10, 10)), "x")


@pytest.mark.parametrize(
    ("name", "expected", "suffix"),
    [
        ("cat/1.jpg", True, ""),
        ("cat/1.JPEG", True, ""),
        ("1.webp", True, ""),
        ("cat/photo.jfif", True, ""),
        ("cat/photo.JPE", True, ""),
        ("cat/first.gif", True, ""),
        ("cat/1.txt", False, ".txt"),
        ("cat/1.HEIC", False, ".heic"),
        ("cat", False, "without suffix"),
        ("cat/._1.jpg", False, ""),
        (".git/1.jpg", False, ""),
        ("__MACOSX/cat/1.jpg", False, ""),
        ("cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_B.jpg", False, ""),
        ("$RECYCLE.BIN/1.jpg", False, ""),
        ("lost+found/1.jpg", False, ""),
        (".ipynb_checkpoints/1-checkpoint.png", False, ""),
        (".thumbnails/1.png", False, ""),
        ("cat/Thumbs.db", False, ""),
    ],
)
def test_image_names(name: str, expected: bool, suffix: str) -> None:
    left_out: Counter[str] = Counter()
    assert is_image(name, left_out) is expected
    assert left_out == ({suffix: 1} if suffix else {})


def test_crop_of_a_line() -> None:
    assert center_crop(noise(1, 50), 4).size == (4, 4)
