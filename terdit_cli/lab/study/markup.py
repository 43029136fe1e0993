"""Text that is safe inside HTML, SVG and XML by construction, and images as data URIs.

`element` escapes every child that is not `Markup` itself, so text that came from outside (class
names, paths, warnings) cannot become markup by being forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from typing import Any

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

    Small images are kept exactly; others become JPEG.
    """
    if max(image.shape[:2]) <= PIXEL_ART:
        return exact_picture(image, alt)
    photo = PillowImage.fromarray(image)
    photo.thumbnail((size, size), PillowImage.Resampling.LANCZOS)
    return _img(photo, alt, None, format="JPEG", quality=_JPEG_QUALITY)


def exact_picture(image: Image, alt: str) -> Markup:
    """Return an <img> of uint8 [H, W, 3] as it is (PNG), to be enlarged pixel by pixel."""
    return _img(PillowImage.fromarray(image), alt, "pixels", format="PNG")


def _img(photo: PillowImage.Image, alt: str, class_: str | None, **options: Any) -> Markup:
    buffer = io.BytesIO()
    photo.save(buffer, optimize=True, **options)
    kind, content = str(options["format"]).lower(), base64.b64encode(buffer.getvalue()).decode()
    return element(
        "img", src=f"data:image/{kind};base64,{content}", alt=alt, width=photo.width,
        height=photo.height, class_=class_,
    )  # fmt: skip


def whole_page(title: str, style: str, main: Markup) -> str:
    """Return an HTML page that asks for nothing: its policy allows this style and data URIs."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(style)),
    )
    return "<!doctype html>\n" + element("html", head, element("body", main), lang="en") + "\n"


def _escape(value: object) -> str:
    return html.escape(clean(value))
