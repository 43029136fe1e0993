"""Figures: well-formed, escaped, without colours of their own, and honest about missing points."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from terdit_cli.lab.study.svg import (
    WIDTH,
    Bar,
    Series,
    bar_figure,
    line_figure,
    number,
    share_figure,
    standalone,
)


def lines(*values: tuple[float, float], **options: bool) -> ET.Element:
    figure = line_figure("t", [Series("a <b> & c", 9, values)], "x", "y", **options)
    assert figure is not None
    return ET.fromstring(figure)


def test_points_lie_where_their_values_are() -> None:
    figure = lines((0, 1), (10, 2), (20, 4))
    path = next(p for p in figure.iter("path") if p.get("class") == "line c1")
    places = [tuple(map(float, part.split())) for part in str(path.get("d"))[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.4)


def test_logarithmic_axes_make_equal_factors_equal_distances() -> None:
    figure = lines((1, 1), (10, 3), (100, 9), log_x=True, log_y=True)
    path = next(p for p in figure.iter("path") if p.get("class") == "line c1")
    places = [tuple(map(float, part.split())) for part in str(path.get("d"))[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_what_has_no_place_is_left_out() -> None:
    figure = lines((1, math.nan), (2, math.inf), (3, -1), (4, 5), log_y=True)
    notes = [t.text for t in figure.iter("title")]
    assert notes == ["t", "a <b> & c: 5.00 at 4.00"]
    assert line_figure("t", [Series("a", 0, [(1, math.nan)])], "x", "y") is None
    assert bar_figure("t", [Bar("a", 0, math.nan, [])], "x") is None
    assert share_figure("t", [("0", "zero")], [(1, [1.0])]) is None


def test_lines_of_one_kind_share_a_line_of_the_key() -> None:
    series = [
        Series(f"v{i}", i // 2, [(1 + i, 1)], kind="even" if i < 2 else "odd") for i in range(4)
    ]
    figure = line_figure("t", series, "x", "y")
    assert figure is not None
    texts = [text.text for text in ET.fromstring(figure).iter("text")]
    assert [text for text in texts if text in ("even", "odd", "v0", "v1")] == ["even", "odd"]
    notes = [title.text for title in ET.fromstring(figure).iter("title")]
    assert notes[1:] == [f"v{i}: 1.00 at {i + 1}.00" for i in range(4)]


@pytest.mark.parametrize("length", [10, 30, 60, 100])
def test_every_label_of_the_key_ends_within_the_picture(length: int) -> None:
    labels = [str(i) * length for i in range(3)]
    figure = line_figure("t", [Series(label, 0, [(1, 1)]) for label in labels], "x", "y")
    assert figure is not None
    shown = [t for t in ET.fromstring(figure).iter("text") if len(str(t.text)) >= 10]
    assert [str(t.text)[0] for t in shown] == ["0", "1", "2"]
    for text in shown:
        assert float(str(text.get("x"))) + 6.7 * len(str(text.text)) <= WIDTH
        assert str(text.text).endswith("\u2026") == (length == 100)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, 1e7])
def test_one_value_and_extreme_ones_are_drawn(value: float) -> None:
    figure = lines((value, value), (value, value))
    assert all(
        "nan" not in str(v) and "inf" not in str(v)
        for e in figure.iter()
        for v in e.attrib.values()
    )


def test_no_colour_stands_in_a_mark_and_files_carry_both_themes() -> None:
    figure = bar_figure("t", [Bar("one", 0, 3.0, [2.9, 3.1], "4 MB"), Bar("two", 1, 0, [])], "x")
    assert figure is not None
    assert not re.search(r"#[0-9a-f]{6}|rgb|fill=|stroke=", figure)
    text = standalone(figure)
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text


def test_shares_fill_the_picture() -> None:
    layers = [("-1", "minus"), ("0", "zero"), ("+1", "plus")]
    figure = share_figure("t", layers, [(0, [0.3, 0.4, 0.3]), (10, [0.2, 0.6, 0.2])])
    assert figure is not None
    texts = [t.text for t in ET.fromstring(figure).iter("text")]
    assert {"-1: 20.0 %", "0: 60.0 %", "+1: 20.0 %"} <= set(texts)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.45, "123"), (12.345, "12.3"), (1.2345, "1.23"), (0.01234, "0.0123"),
     (math.nan, "not a number")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
