"""Figures: values in their places, both themes, texts that stay texts, the same every time."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from markupsafe import Markup
from PIL import Image

from terdit_cli.report.figures import (
    HEIGHT,
    SERIES,
    WIDTH,
    chart,
    logarithmic,
    notes,
    png,
    standalone,
    style,
    svg,
)

HOSTILE = "</svg><script>$x_1$ & \0\ud800\u202e\u4e00"


@style()
def drawn(*points: tuple[float, float], log: bool = False, text: str = "x", **key: Any) -> Markup:
    figure, axes = chart(text, "y", key)
    if log:
        for axis, values in zip((axes.xaxis, axes.yaxis), zip(*points, strict=True), strict=True):
            logarithmic(axis, min(values), max(values))
    shown = notes(f"{a}, {b} {text}" for a, b in points)
    axes.plot(*zip(*points, strict=True), color=SERIES[0], marker="o", gid=shown)
    return svg(figure, f"of {text}")


def places(drawing: Markup) -> list[tuple[float, float]]:
    marks = [use for use in ET.fromstring(drawing).iter("use") if use.find("title") is not None]
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in marks]


def test_points_lie_where_their_values_are() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(drawn((0, 1), (10, 2), (20, 4)))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.05)


def test_logarithmic_axes_make_equal_factors_equal_distances() -> None:
    (x0, y0), (x1, y1), (x2, y2) = places(drawn((1, 1), (10, 3), (100, 9), log=True))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (0.031, 0.034), (20, 60), (1e-9, 1e9)])
def test_a_logarithmic_axis_has_a_few_plain_numbers(low: float, high: float) -> None:
    texts = [t.text for t in ET.fromstring(drawn((low, low), (high, high), log=True)).iter("text")]
    assert 4 <= len(texts) <= 2 * 20
    assert all(re.fullmatch(r"[0-9.,]+(e[-+][0-9]+)?|[xy]", str(text)) for text in texts)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, 1e7])
def test_one_value_and_extreme_ones_are_drawn(value: float) -> None:
    drawing = drawn((value, value), (value, value))
    assert len(places(drawing)) == 2
    assert not re.search(r"\bnan\b|\binf", drawing)


def test_texts_stay_texts() -> None:
    drawing = drawn((1, 2), text=HOSTILE, **{HOSTILE: {"color": "red"}})
    assert "<script" not in drawing
    root = ET.fromstring(drawing)
    assert root.get("aria-label", "").startswith("of </svg><script>$x_1$ & \ufffd")
    texts = [node.text or "" for node in root.iter("text")]
    assert len([text for text in texts if text.startswith("</svg><script>$x_1$ & \ufffd")]) == 2
    assert root.findtext(".//title", "").startswith("1, 2 </svg>")


def test_colours_follow_the_theme_and_no_style_stands_in_a_mark() -> None:
    drawing = drawn((1, 1), (2, 2), a={"color": SERIES[1], "marker": "s"})
    assert "style" not in drawing
    text = standalone(drawing)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (sheet,) = (node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}style"))
    assert "prefers-color-scheme:dark" in sheet
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]{6})"', drawing))
    assert {SERIES[0], SERIES[1]} <= used
    for colour in used:
        assert f'[stroke="{colour}"]{{stroke:#' in sheet


def test_ids_are_those_that_are_used_and_of_one_figure() -> None:
    first, second = drawn((1, 1), (2, 2), text="one"), drawn((1, 1), (2, 2), text="two")
    for drawing in (first, second):
        ids = re.findall(r' id="([^"]+)"', drawing)
        assert set(ids) == set(re.findall(r"#([mp]\w+)", drawing))
    assert not set(re.findall(r' id="([^"]+)"', first)) & set(re.findall(r' id="([^"]+)"', second))
    assert first == drawn((1, 1), (2, 2), text="one")


@pytest.mark.parametrize("length", [10, 30, 60, 100])
def test_every_label_of_the_key_ends_within_the_picture(length: int) -> None:
    key = {str(i) * length: {"color": SERIES[i]} for i in range(3)}
    root = ET.fromstring(drawn((1, 1), **key))
    shown = [text for text in root.iter("text") if len(str(text.text)) >= 10]
    assert [str(text.text)[0] for text in shown] == ["0", "1", "2"]
    height = float(root.get("viewBox", "").split()[3])
    for text in shown:
        assert float(str(text.get("x"))) + 6 * len(str(text.text)) <= WIDTH
        assert float(str(text.get("y"))) < height
        assert str(text.text).endswith("\u2026") == (length == 100)


@style()
def test_a_png_is_on_white() -> None:
    figure, _ = chart("x", "y")
    with Image.open(io.BytesIO(png(figure))) as picture:
        assert picture.size == (2 * WIDTH, 2 * HEIGHT)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
