"""A labelled grid of images, and PNG files with text chunks that say how they were made.

Shapes: N images of H x W pixels, uint8 [N, H, W, 3].
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from terdit_cli.system.atomic import atomic_path

_PAPER, _INK = "white", "black"
_GAP = 6  # pixels between cells


def draw_grid(
    images: NDArray[np.uint8],
    labels: list[str] | None = None,
    title: str | None = None,
    columns: int | None = None,
    cell_size: int = 96,
) -> Image.Image:
    """Draw images uint8 [N, H, W, 3] in rows, with a caption under each and a title above.

    Small images are enlarged by a whole factor until their short side has at least
    `cell_size` pixels; large ones keep their size. `columns` defaults to the most square grid.
    Texts that do not fit are truncated.

    Raises:
        ValueError: no images, another shape or type, or not one label for each image.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"images {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3]")
    count, height, width, _ = images.shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    factor = max(1, math.ceil(cell_size / min(height, width)))
    height, width = height * factor, width * factor
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    font_size = min(24, max(12, width // 9))
    font = ImageFont.load_default(size=font_size)
    line = font_size + _GAP
    caption = line if labels is not None else 0
    top = line + _GAP if title else 0
    sheet = Image.new(
        "RGB",
        (
            _GAP + columns * (width + _GAP),
            _GAP + top + rows * (height + caption + _GAP),
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_GAP, _GAP), _fit(title, font, sheet.width - 2 * _GAP), _INK, font)
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        left = _GAP + column * (width + _GAP)
        upper = _GAP + top + row * (height + caption + _GAP)
        cell = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(cell, (left, upper))
        if labels is not None:
            text = _fit(labels[index], font, width)
            pen.text((left + width // 2, upper + height + 2), text, _INK, font, anchor="ma")
    return sheet


def save_png(
    image: Image.Image, path: str | os.PathLike[str], text: dict[str, str] | None = None
) -> None:
    """Write a PNG completely or not at all, with the entries of `text` as text chunks.

    Raises:
        EnvironmentProblem: the folder cannot be written or the disk is full.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        # File names may hold bytes that are no text.
        chunks.add_text(key, value.encode(errors="backslashreplace").decode())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the longest beginning of `text`, dots added, that is at most `width` pixels wide."""
    text = " ".join(text.split())  # one line
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
