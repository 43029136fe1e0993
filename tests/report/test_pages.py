"""Images of a page: small ones exact, large ones bounded, alternatives escaped."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from terdit_cli.report.pages import image_tag

RANDOM = np.random.default_rng(0)


def test_small_images_are_kept_exactly() -> None:
    pixels = RANDOM.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    tag = image_tag(pixels, 'a & "b"', 128)
    assert 'class="pixels"' in tag
    assert 'alt="a &amp; &#34;b&#34;"' in tag
    data = re.search(r"base64,([^\"]+)", tag)
    assert data is not None
    opened = Image.open(io.BytesIO(base64.b64decode(data[1])))
    np.testing.assert_array_equal(np.asarray(opened), pixels)


def test_large_images_are_made_smaller() -> None:
    large = RANDOM.integers(0, 256, (100, 300, 3), dtype=np.uint8)
    tag = image_tag(large, "x", 128)
    assert "image/jpeg" in tag
    assert 'width="128" height="43"' in tag
    assert 'width="300" height="100" class="pixels"' in image_tag(large, "x", 128, exact=True)
