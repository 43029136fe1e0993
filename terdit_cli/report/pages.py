"""Pages from Jinja2 templates that load nothing from outside.

Images are data URIs, figures inline SVG, there is no script, and a page's own
Content-Security-Policy forbids everything else; its style sheet is allowed by its hash. Pages
follow the reader's light or dark theme and have layouts for phones and for paper. All values in a
template are escaped, and characters that are not allowed in files are replaced.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image as Pillow

from terdit_cli.report.figures import THEMES
from terdit_cli.report.markdown import clean
from terdit_cli.system.atomic import write_whole

Image = NDArray[np.uint8]  # [H, W, 3]

SMALL = 64  # longer side, in pixels, up to which an image is shown exactly
_JPEG_QUALITY = 85


def write_page(path: Path, template: str, title: str, **values: Any) -> None:
    """Write a page as one HTML file.

    Args:
        template: a file of `templates` that extends page.html.
        values: for the template; `Markup` is inserted unchanged.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    templates = importlib.resources.files(__package__) / "templates"
    sheet = templates.joinpath("page.css").read_text("utf-8") + THEMES
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: templates.joinpath(name).read_text("utf-8")),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image"] = image_tag
    values |= {
        "title": title,
        "sheet": Markup(sheet),
        "digest": base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode(),
    }
    text = environment.get_template(template).render(values)
    write_whole(path, text)


def image_tag(image: Image, alt: str, size: int, exact: bool = False) -> Markup:
    """Return an <img> of uint8 [H, W, 3], its longer side made at most `size` pixels.

    Small images, and those requested exactly, are kept exactly; others become JPEG.
    """
    photo, buffer = Pillow.fromarray(image), io.BytesIO()
    exact = exact or max(image.shape[:2]) <= SMALL
    if exact:
        photo.save(buffer, format="PNG", optimize=True)
    else:
        photo.thumbnail((size, size), Pillow.Resampling.LANCZOS)
        photo.save(buffer, format="JPEG", optimize=True, quality=_JPEG_QUALITY)
    return Markup('<img src="data:image/{};base64,{}" alt="{}" width="{}" height="{}"{}>').format(
        "png" if exact else "jpeg",
        base64.b64encode(buffer.getvalue()).decode(),
        clean(alt),
        photo.width,
        photo.height,
        Markup(' class="pixels"') if exact else "",
    )
