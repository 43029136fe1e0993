"""Text that is safe inside HTML, SVG and XML by construction, and images as data URIs.

`element` escapes every child that is not `Markup` itself, so text that came from outside (class
names, paths, warnings) cannot become markup by being forgotten.
"""

from __future__ import annotations

import base64
import html
import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

# What XML 1.0 has no character for (controls, lone surrogates, two non-characters), and the
# controls of text direction, with which a path could show as another one.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
_VOID = frozenset({"br", "img", "link", "meta"})
PIXEL_ART = 64  # pixels of the longer side up to which an image is shown pixel by pixel
_JPEG_QUALITY = 85

Image = NDArray[np.uint8]  # [H, W, 3]


class Markup(str):
    """HTML, SVG or XML whose text is escaped."""

    __slots__ = ()


def clean(value: object) -> str:
    """Return text without the characters that no HTML or XML file may hold."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return <name attributes>children</name>.

    Children that are not `Markup` are escaped; None and "" are left out. Attribute names lose a
    final "_" and have "-" for other "_"; an attribute that is None is left out.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(pairs)}>"
    return Markup(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Return the children one after the other, escaped like those of `element`."""
    shown = (child for child in children if child is not None)
    return Markup("".join(x if isinstance(x, Markup) else _escape(x) for x in shown))


def picture(image: Image, alt: str, size: int) -> Markup:
    """Return an <img> of uint8 [H, W, 3], its longer side made at most `size` pixels.

    Small images are kept exactly (PNG), to be enlarged pixel by pixel; others become JPEG.
    """
    photo = PillowImage.fromarray(image)
    buffer = io.BytesIO()
    if max(photo.size) <= PIXEL_ART:
        photo.save(buffer, format="PNG", optimize=True)
        kind, classes = "png", "pixels"
    else:
        photo.thumbnail((size, size), PillowImage.Resampling.LANCZOS)
        photo.save(buffer, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
        kind, classes = "jpeg", None
    address = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return element(
        "img",
        src=address,
        alt=alt,
        width=photo.width,
        height=photo.height,
        class_=classes,
    )


def _escape(value: object) -> str:
    return html.escape(clean(value))
