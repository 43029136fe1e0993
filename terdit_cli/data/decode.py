"""Bytes of an image file -> 8-bit RGB -> a square of the training size.

The crop is ADM's: halve with a box filter while the short side is at least twice the target,
resize the short side to the target with a bicubic filter, cut the centre. An image that already
has the target size comes through unchanged.

Shapes: H, W height and width in pixels; S the side of the square.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from terdit_cli.errors import InputFileError

# Pillow's decoders that run, whatever a file's content says it is, and the suffixes of their files.
# No others: Pillow's EPS reader, for one, starts another program.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
FORMATS_READ = "JPEG, PNG, WebP, BMP, PPM, TIFF, GIF, JPEG 2000 or AVIF"
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 2 * 1 GiB / 4 / 3 bytes
MAX_FILE_BYTES = 256 << 20

# What Pillow's decoders raise on broken input (SyntaxError is its word for a broken PNG).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@cache
def _formats() -> list[str]:
    """Return the decoders that this build of Pillow has."""
    Image.init()
    return [name for name in _SUFFIXES if name in Image.OPEN]


class UnreadableImage(InputFileError):
    """One image of a set that may be left out, where the user allows it."""


def unreadable(name: str, reason: str) -> UnreadableImage:
    """Return the error for one unreadable image."""
    return UnreadableImage(
        "unreadable image",
        got=reason,
        expected=f"a whole 8-bit {FORMATS_READ} file",
        where=name,
        fix="repair or remove the file, or leave such files out: data.on_bad_image=skip, for "
        "eval-fid --on-bad-image skip",
    )


def decode_with_mode(data: bytes, name: str) -> tuple[Image.Image, str]:
    """Decode the bytes of one image file into an RGB image, and say which mode it had.

    Transparency is dropped, as Pillow's convert("RGB") does, orientation tags do not turn the
    image, and of an animation the first frame counts. `name` is for the message.

    Raises:
        UnreadableImage: not an image, truncated, of a depth other than 8 bits, or larger than
            MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise unreadable(name, f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
            if _is_deep(image):
                raise unreadable(name, f"more than 8 bits a channel (mode {image.mode})")
            return image.convert("RGB"), image.mode
    except _DECODE_ERRORS as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        # Pillow's text for unknown data holds the address of a buffer: noise, new in every run.
        reason = "not an image" if "BytesIO" in first_line else first_line
        raise unreadable(name, reason) from error


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Say whether an image that is open but not loaded has more than 8 bits a channel.

    Converting a deep grey image to RGB would clip it, not scale it. Deep colour Pillow reads as if
    it had 8 bits; what it will decode, as "RGB;16B" or a PPM's largest value, tells.
    """
    if image.mode[0] in "IF":
        return True
    for codec, _, _, arguments in image.tile:
        for part in arguments if isinstance(arguments, tuple) else (arguments,):
            if isinstance(part, str) and re.search(r";16[BLNS]", part):
                return True
            if codec in ("ppm", "ppm_plain") and isinstance(part, int) and part > 255:
                return True
    return False


def center_crop(image: Image.Image, image_size: int, name: str = "image") -> Image.Image:
    """Return the centre square [S, S] of an image of any size by ADM's rule (guided-diffusion).

    Raises:
        UnreadableImage: so long and narrow that it would be scaled to over MAX_PIXELS.
    """
    while min(image.size) >= 2 * image_size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = image_size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        reason = f"{image.width} x {image.height} pixels, which would become {scaled[0]} x "
        raise unreadable(name, f"{reason}{scaled[1]}, over {MAX_PIXELS}")
    if scaled != image.size:
        image = image.resize(scaled, resample=Image.Resampling.BICUBIC)
    left = (image.width - image_size) // 2
    top = (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def to_pixels(
    image: Image.Image, image_size: int | None = None, name: str = "image"
) -> NDArray[np.uint8]:
    """Return the pixels uint8 [S, S, 3], or [H, W, 3] when `image_size` is None.

    Greyscale becomes three equal channels. `name` is for the message of `center_crop`.
    """
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image_size is not None:
        image = center_crop(image, image_size, name)
    return np.array(image, dtype=np.uint8)
