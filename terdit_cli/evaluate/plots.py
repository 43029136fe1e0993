"""The report's pictures as SVG that follows the page's theme.

No colour stands here: every mark has a class, and the style sheet of the page gives both themes.
Pictures are drawn about as wide as they are shown on a phone, so that their text stays legible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from terdit_cli.evaluate.markup import Markup, element, join
from terdit_cli.evaluate.neighbours import Coverage, NeighbourCheck
from terdit_cli.evaluate.result import format_value

WIDTH, HEIGHT = 380, 280  # of a picture, in the units of its text
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 16, 44  # margins
_SQUARE = HEIGHT - _TOP - _BOTTOM + _LEFT + _RIGHT  # width of a picture as wide as high inside
MOST_POINTS = 600  # of each set in the scatter picture
_BINS = 40
_CHARACTER = 6.5  # widest usual advance of the 12 unit text


@dataclass(frozen=True)
class _Scale:
    """Data to picture: [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _x_scale(low: float, high: float) -> _Scale:
    return _Scale(low, high, _LEFT, WIDTH - _RIGHT)


def _y_scale(low: float, high: float) -> _Scale:
    return _Scale(low, high, HEIGHT - _BOTTOM, _TOP)


def curve_plot(
    name: str, curve: Sequence[tuple[int, float]], infinity: float | None, limit: float | None
) -> Markup | None:
    """Draw the distance over n, and the line to its value at infinity; None without two points.

    The axis is 1/n from right to left: there the bias of a finite n is a straight line.

    Args:
        infinity: the extrapolated distance; the line is the best one through it.
        limit: of a gate.
    """
    points = sorted((n, value) for n, value in curve if math.isfinite(value))
    if len({n for n, _ in points}) < 2:
        return None
    values = [value for _, value in points]
    if infinity is not None and math.isfinite(infinity):
        values.append(infinity)
    else:
        infinity = None
    spread = max(values) - min(values) or abs(values[0]) or 1.0
    low, high = min(values) - 0.25 * spread, max(values) + 0.1 * spread
    if limit is not None and low - 2 * spread < limit < high + 2 * spread:
        low, high = min(low, limit - 0.1 * spread), max(high, limit + 0.1 * spread)
    x, y = _x_scale(-1.06 / points[0][0], 0.0), _y_scale(low, high)
    marks: list[Markup] = []
    if limit is not None and low < limit < high:
        text = f"limit {format_value(name, limit)}"
        marks += [
            _line(x.start, y(limit), x.end, y(limit), "limit"),
            _text(x.start + 4, y(limit) - 5, text, "start", "limit"),
        ]
    if infinity is not None:
        inverse = np.array([1 / n for n, _ in points])
        above = np.array([value for _, value in points]) - infinity
        slope = float(inverse @ above / (inverse @ inverse))
        first = infinity + slope / points[0][0]
        marks.append(_line(x(-1 / points[0][0]), y(first), x.end, y(infinity), "fit"))
        title = f"extrapolated: {format_value(name, infinity)}"
        marks.append(_dot(x.end, y(infinity), 5, "hollow", title))
        marks.append(_text(x.end + 6, y(infinity) + 19, format_value(name, infinity), "end"))
    path = "L".join(f"{x(-1 / n):.1f} {y(value):.1f}" for n, value in points)
    marks.append(element("path", d=f"M{path}", class_="line"))
    marks += [
        _dot(x(-1 / n), y(value), 4, "fake", f"n = {n:,}: {format_value(name, value)}")
        for n, value in points
    ]
    ticks = [(x(-1 / n), f"{n:,}") for n, _ in reversed(points)]
    return _axes(
        f"{name} over the number of images",
        marks,
        _without_overlap([(x.end, "\N{INFINITY}"), *ticks]),
        _ticks(y),
        "images (scale 1/n)",
    )


def memorisation_plot(check: NeighbourCheck) -> Markup:
    """Draw the distances from samples and from reals to their nearest real as two histograms."""
    both = np.concatenate([check.distances, check.real_distances])
    high = float(np.quantile(both, 0.998)) * 1.05 or 1.0
    edges = np.linspace(0, high, _BINS + 1)
    shares = [_shares(part, edges) for part in (check.real_distances, check.distances)]
    x, y = _x_scale(0, high), _y_scale(0, 1.08 * max(float(part.max()) for part in shares))
    marks = []
    for part, kind in zip(shares, ("real", "fake"), strict=True):
        steps = [f"M{x(0):.1f} {y(0):.1f}"]
        for edge, share in zip(edges, part, strict=False):
            steps.append(f"L{x(edge):.1f} {y(share):.1f}H{x(edge + edges[1]):.1f}")
        steps.append(f"L{x(high):.1f} {y(0):.1f}")
        marks.append(element("path", d="".join(steps), class_=f"area {kind}"))
    for values, kind in ((check.real_distances, "real"), (check.distances, "fake")):
        middle = float(np.median(values))
        if middle <= high:
            marks.append(_line(x(middle), y.start, x(middle), y.end, f"median {kind}"))
    ticks = [(x(value), _tick_text(value, x)) for value in _tick_values(x)]
    return _axes(
        "distances to the nearest real image",
        marks,
        _without_overlap(ticks),
        [],
        "distance to the nearest real (0 is a copy)",
        "share of images",
    )


def precision_recall_plot(
    point: tuple[float, float], earlier: tuple[float, float] | None
) -> Markup | None:
    """Draw (precision, recall) in the unit square, and those of an earlier run; None if not finite.

    Up is realism, to the right is variety.
    """
    if not all(map(math.isfinite, point)):
        return None
    x, y = _Scale(0, 1, _LEFT, _SQUARE - _RIGHT), _y_scale(0, 1)
    precision, recall = point
    across, up = x(recall), y(precision)
    marks = [
        element(
            "rect",
            x=f"{x.start:.1f}", y=f"{up:.1f}",
            width=f"{across - x.start:.1f}", height=f"{y.start - up:.1f}", class_="reach",
        ),
        _line(across, up, across, y.start, "fit"),
        _line(x.start, up, across, up, "fit"),
        _text(x.start + 8, y.end + 16, "realistic, but alike", "start", "hint"),
        _text(x.end - 8, y.end + 16, "like the reals", "end", "hint"),
        _text(x.end - 8, y.start - 10, "varied, but unrealistic", "end", "hint"),
    ]  # fmt: skip
    if earlier is not None and all(map(math.isfinite, earlier)):
        old = x(earlier[1]), y(earlier[0])
        title = f"before: precision {earlier[0]:.3f}, recall {earlier[1]:.3f}"
        marks += [_line(*old, across, up, "line"), _dot(*old, 5, "hollow", title)]
    marks.append(_dot(across, up, 7, "fake", f"precision {precision:.3f}, recall {recall:.3f}"))
    quarters = [0.0, 0.25, 0.5, 0.75, 1.0]
    return _axes(
        "precision and recall",
        marks,
        [(x(value), f"{value:g}") for value in quarters],
        [(y(value), f"{value:g}") for value in quarters],
        "recall",
        "precision",
        _SQUARE,
    )


def coverage_plot(coverage: Coverage) -> Markup:
    """Draw both sets in their plane: dots where the other set covers them, crosses elsewhere."""
    both = np.concatenate([coverage.real, coverage.fake])
    low, high = np.quantile(both, [0.005, 0.995], axis=0)
    flat = high - low <= 0
    low, high = np.where(flat, low - 1, low), np.where(flat, high + 1, high)
    margin = 0.05 * (high - low)
    x = _Scale(low[0] - margin[0], high[0] + margin[0], _RIGHT, WIDTH - _RIGHT)
    y = _Scale(low[1] - margin[1], high[1] + margin[1], HEIGHT - _TOP, _TOP)
    layers = []
    for points, covered, kind in (
        (coverage.real, coverage.real_covered, "real"),
        (coverage.fake, coverage.fake_covered, "fake"),
    ):
        count = min(MOST_POINTS, len(points))
        shown = np.unique(np.linspace(0, len(points) - 1, count).astype(np.int64))
        places = np.clip(points[shown], low - margin, high + margin)
        layers += [
            (kind, is_covered, _marks(places[covered[shown] == is_covered], x, y, is_covered))
            for is_covered in (True, False)
        ]
    layers.sort(key=lambda layer: not layer[1])  # the crosses over the dots
    paths = [
        element("path", d=path, class_=f"{'dots' if is_covered else 'crosses'} {kind}")
        for kind, is_covered, path in layers
        if path
    ]
    frame = element(
        "rect", x=1, y=1, width=WIDTH - 2, height=HEIGHT - 2, rx=8, class_="plane"
    )  # fmt: skip
    return _svg("real and generated images in feature space", [frame, *paths])


def bar(share: float) -> Markup:
    """Draw a bar that fills `share` of its place."""
    rect = element("rect", width=f"{100 * min(1.0, max(0.0, share)):.1f}", height=10)
    return element(
        "svg", rect, viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar",
        aria_hidden="true",
    )  # fmt: skip


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return counts / len(values)


def _marks(points: NDArray[np.float64], x: _Scale, y: _Scale, is_covered: bool) -> str:
    shape = "h0" if is_covered else "m-2.5 -2.5l5 5m0 -5l-5 5"
    return "".join(f"M{x(a):.1f} {y(b):.1f}{shape}" for a, b in points)


def _axes(
    title: str,
    marks: Iterable[Markup],
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Iterable[tuple[float, str]],
    x_name: str,
    y_name: str | None = None,
    width: int = WIDTH,
) -> Markup:
    base = HEIGHT - _BOTTOM
    parts = []
    for place, text in y_ticks:
        parts.append(_line(_LEFT, place, width - _RIGHT, place, "grid"))
        parts.append(_text(_LEFT - 8, place + 4, text, "end"))
    for place, text in x_ticks:
        parts.append(_line(place, base, place, base + 4, "axis"))
        parts.append(_text(place, base + 18, text, "middle"))
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 6, x_name, "middle", "name"))
    if y_name is not None:
        across = (_TOP + base) / 2
        turn = f"rotate(-90 13 {across:.1f})"
        parts.append(
            element(
                "text", y_name, x=13, y=f"{across:.1f}", transform=turn, text_anchor="middle",
                class_="name",
            )
        )  # fmt: skip
    # The axis is over what is drawn, which may lie on it.
    axis = _line(_LEFT, base, width - _RIGHT, base, "axis")
    return _svg(title, [*parts, *marks, axis], width)


def _svg(title: str, parts: Iterable[Markup], width: int = WIDTH) -> Markup:
    return element(
        "svg", *parts, viewBox=f"0 0 {width} {HEIGHT}", class_="plot", role="img",
        aria_label=title,
    )  # fmt: skip


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element(
        "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_
    )


def _dot(x: float, y: float, radius: float, class_: str, title: str) -> Markup:
    return element(
        "circle", element("title", title), cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=class_
    )


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def _ticks(y: _Scale) -> list[tuple[float, str]]:
    return [(y(value), _tick_text(value, y)) for value in _tick_values(y)]


def _tick_values(scale: _Scale) -> list[float]:
    step = _step(scale)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [index * step for index in range(first, last + 1)]


def _tick_text(value: float, scale: _Scale) -> str:
    step = _step(scale)
    if not 1e-4 <= step < 1e6:
        return f"{value:.2g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _step(scale: _Scale) -> float:
    """Return 1, 2 or 5 times a power of ten that gives about five ticks."""
    rough = (scale.high - scale.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.75 * rough)


def _without_overlap(ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out each tick whose text would touch one that is kept; the first ones win."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        wide = _CHARACTER * len(text) / 2
        if all(abs(place - p) > wide + _CHARACTER * len(t) / 2 + 6 for p, t in kept):
            kept.append((place, text))
    return kept


def legend(*entries: tuple[str, str]) -> Markup:
    """Return (class, text) pairs as the key of a picture."""
    keys = []
    for class_, text in entries:
        shape = "M7 7h0" if "dots" in class_ else "M3.5 3.5l7 7m0 -7l-7 7"
        if "area" in class_:
            shape = "M1 1h12v12h-12Z"
        mark = element("path", d=shape, class_=class_)
        icon = element("svg", mark, viewBox="0 0 14 14", class_="key", aria_hidden="true")
        keys.append(element("li", icon, text))
    return element("ul", join(*keys), class_="legend")
