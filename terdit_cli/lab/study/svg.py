"""The figures of a study as SVG that follows the theme of whatever shows it.

No colour stands in a mark: each has a class, and `figures.css` gives both themes. The same figure
is put into the page and, with that style sheet inside, written as a file for the Markdown page.
A series, or a kind of them, has a colour and a shape of marker of its own, in all figures alike;
the key is part of the figure. Drawn about as wide as a phone shows them, so that their text stays
legible there.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from terdit_cli.lab.study.markup import Markup, element, join

WIDTH, HEIGHT = 430, 300  # of a plot without its key, in the units of its text
COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 12, 46
_CHARACTER = 6.7  # usual advance of the 13 unit text
_KEY_LEFT = 14.0
_LINE = 20  # height of a line of the key
_BAR_ROW = 40

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: `points` are joined and marked, `dots` are single values beside them.

    Lines of one `kind` look alike and share a line of the key, where it takes the labels' place.
    """

    label: str
    number: int  # colour and marker
    points: Sequence[Point]
    dots: Sequence[Point] = field(default_factory=tuple)
    marked: bool = True
    kind: str | None = None

    def values(self, axis: int) -> list[float]:
        found = [point[axis] for point in (*self.points, *self.dots)]
        return [value for value in found if math.isfinite(value)]


@dataclass(frozen=True)
class Bar:
    """One bar: a mean, and the single values behind it."""

    label: str
    number: int
    value: float
    dots: Sequence[float]
    note: str = ""


@dataclass(frozen=True)
class _Scale:
    """Data to picture: [low, high] to [start, end], linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values inside, about five."""
        if not self.log:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * f for f in (1, 2, 5, 10) if power * f >= 0.75 * rough)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [index * step for index in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [f * 10.0**d for d in decades for f in factors]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return _Scale(self.low, self.high, 0, 1, False).ticks()


def _scale(values: Sequence[float], start: float, end: float, log: bool) -> _Scale:
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.03)
        return _Scale(low / margin, high * margin, start, end, True)
    spread = high - low or abs(high) or 1.0
    return _Scale(low - 0.05 * spread, high + 0.06 * spread, start, end, False)


def line_figure(
    title: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Markup | None:
    """Draw lines with markers; None without any point.

    Args:
        title: for readers that do not see.
        log_x, log_y: logarithmic axes; values that are not positive are left out.
    """
    series = [_shown(line, log_x, log_y) for line in series]
    series = [line for line in series if line.points or line.dots]
    if not series:
        return None
    x = _scale([v for line in series for v in line.values(0)], _LEFT, WIDTH - _RIGHT, log_x)
    y = _scale([v for line in series for v in line.values(1)], HEIGHT - _BOTTOM, _TOP, log_y)
    marks: list[Markup] = []
    for line in series:
        kind = f"c{line.number % COLOURS}"
        if len(line.points) > 1:
            path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points)
            marks.append(element("path", d=f"M{path}", class_=f"line {kind}"))
        for a, b in line.dots:
            marks.append(
                element("circle", cx=f"{x(a):.1f}", cy=f"{y(b):.1f}", r=2, class_=f"dot {kind}")
            )
        for a, b in line.points if line.marked else line.points[-1:]:
            note = f"{line.label}: {number(b)} at {number(a)}"
            marks.append(_marker(x(a), y(b), line.number, 4.2, note))
    frame = _axes(x, y, x_name, y_name)
    keys = list(dict.fromkeys((line.kind or line.label, line.number) for line in series))
    return _svg(title, [*frame, *marks], keys, HEIGHT)


def _shown(line: Series, log_x: bool, log_y: bool) -> Series:
    def keep(points: Sequence[Point]) -> list[Point]:
        return [
            (a, b)
            for a, b in points
            if math.isfinite(a + b) and (a > 0 or not log_x) and (b > 0 or not log_y)
        ]

    return dataclasses.replace(line, points=keep(line.points), dots=keep(line.dots))


def share_figure(
    title: str, layers: Sequence[tuple[str, str]], rows: Sequence[tuple[float, Sequence[float]]]
) -> Markup | None:
    """Draw shares that add up to 1 as stacked areas over the steps; None without two rows.

    Args:
        layers: (label, class) from the bottom up.
        rows: (step, share of each layer).
    """
    if len(rows) < 2:
        return None
    x = _Scale(rows[0][0], rows[-1][0], _LEFT, WIDTH - _RIGHT, False)
    y = _Scale(0, 1, HEIGHT - _BOTTOM, _TOP, False)
    marks = []
    for index, (label, kind) in enumerate(layers):
        low = [(step, sum(shares[:index])) for step, shares in rows]
        high = [(step, sum(shares[: index + 1])) for step, shares in rows]
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in [*low, *reversed(high)])
        marks.append(element("path", d=f"M{path}Z", class_=f"layer {kind}"))
        last = rows[-1][1][index]
        if last > 0.06:
            middle = y((low[-1][1] + high[-1][1]) / 2) + 4
            marks.append(
                _text(x.end - 6, middle, f"{label}: {100 * last:.1f} %", "end", f"on-{kind}")
            )
    return _svg(title, [*_axes(x, y, "step", "share of the codes"), *marks], [], HEIGHT)


def bar_figure(title: str, bars: Sequence[Bar], x_name: str) -> Markup | None:
    """Draw horizontal bars, their single values as dots; None without any."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return None
    high = max(max(bar.value, *bar.dots, 0) for bar in bars) or 1.0
    x = _Scale(0, 1.16 * high, 8, WIDTH - 8, False)
    marks: list[Markup] = []
    for index, bar in enumerate(bars):
        top = 4 + index * _BAR_ROW
        kind = f"c{bar.number % COLOURS}"
        marks.append(_text(x.start, top + 13, bar.label, "start", "name"))
        if bar.note:
            marks.append(_text(x.end, top + 13, bar.note, "end"))
        marks.append(
            element(
                "rect", x=f"{x.start:.1f}", y=top + 18, width=f"{x(bar.value) - x.start:.1f}",
                height=14, rx=2, class_=f"bar {kind}",
            )
        )  # fmt: skip
        for value in bar.dots if len(bar.dots) > 1 else ():
            marks.append(
                element("circle", cx=f"{x(value):.1f}", cy=top + 25, r=2.6, class_="spread")
            )
        right = max([bar.value, *bar.dots])
        marks.append(_text(x(right) + 7, top + 30, number(bar.value), "start", "value"))
    height = 4 + len(bars) * _BAR_ROW + 20
    marks.append(_text(x.start, height - 5, x_name, "start"))
    return _svg(title, marks, [], height)


def standalone(figure: Markup) -> str:
    """Return a figure as an SVG file with both themes inside."""
    opened, _, rest = figure.partition(">")
    sheet = importlib.resources.files(__package__).joinpath("figures.css").read_text("utf-8")
    style = element("style", Markup(sheet))
    return f'{opened} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def number(value: float) -> str:
    """Return three or four significant digits: 0.0314, 3.14, 31.4, 314, 31,416."""
    if not math.isfinite(value):
        return "not a number"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(value) or 1)
    if max(map(abs, ticks)) >= 10_000 and step >= 1000:
        return f"{value / 1000:g}k"
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{places}f}" if places < 5 else f"{value:.2g}"


def _axes(x: _Scale, y: _Scale, x_name: str, y_name: str) -> list[Markup]:
    base = HEIGHT - _BOTTOM
    parts: list[Markup] = []
    ticks = y.ticks()
    for value in ticks:
        text = f"{value:g}" if y.log else _tick(value, ticks)
        parts.append(_line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid"))
        parts.append(_text(_LEFT - 7, y(value) + 4, text, "end"))
    ticks, right = x.ticks(), -math.inf
    for value in ticks:
        text = f"{value:g}" if x.log else _tick(value, ticks)
        half = _CHARACTER * len(text) / 2
        parts.append(_line(x(value), base, x(value), base + 4, "axis"))
        if x(value) - half > right + 6 and x(value) + half <= WIDTH:
            parts.append(_text(x(value), base + 18, text, "middle"))
            right = x(value) + half
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 7, x_name, "middle", "name"))
    middle = (_TOP + base) / 2
    parts.append(
        element(
            "text", y_name, x=13, y=f"{middle:.1f}", transform=f"rotate(-90 13 {middle:.1f})",
            text_anchor="middle", class_="name",
        )
    )  # fmt: skip
    parts.append(_line(_LEFT, base, WIDTH - _RIGHT, base, "axis"))
    return parts


def _svg(
    title: str, marks: Sequence[Markup], keys: Sequence[tuple[str, int]], height: int
) -> Markup:
    key, rows = _key(keys, height)
    total = height + rows * _LINE + (8 if rows else 0)
    return element(
        "svg", element("title", title), *marks, key, viewBox=f"0 0 {WIDTH} {total}",
        class_="figure", role="img", aria_label=title,
    )  # fmt: skip


def _key(keys: Sequence[tuple[str, int]], top: int) -> tuple[Markup, int]:
    """Return the key below a plot, and how many lines it has."""
    parts: list[Markup] = []
    left, row = _KEY_LEFT, 0
    room = int((WIDTH - _KEY_LEFT - 14) / _CHARACTER)
    for label, kind in keys:
        label = label if len(label) <= room else label[: room - 1] + "\u2026"
        wide = 24 + _CHARACTER * len(label)
        if left > _KEY_LEFT and left + wide > WIDTH:
            left, row = _KEY_LEFT, row + 1
        y = top + 14 + row * _LINE
        line = _line(left - 9, y - 4, left + 9, y - 4, f"line c{kind % COLOURS}")
        parts += [line, _marker(left, y - 4, kind, 4.2), _text(left + 14, y, label, "start")]
        left += wide + 10
    return join(*parts), row + 1 if keys else 0


def _marker(x: float, y: float, kind: int, size: float, note: str | None = None) -> Markup:
    """Draw a circle, square, diamond or triangle."""
    shape = (kind + kind // COLOURS) % 4
    far = 1.25 * size
    if shape == 0:
        arc = f"a{size} {size} 0 1 0"
        path = f"M{x - size:.1f} {y:.1f}{arc} {2 * size} 0{arc} {-2 * size} 0Z"
    elif shape == 1:
        path = f"M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}Z"
    elif shape == 2:
        right, left = f"{x + far:.1f} {y:.1f}", f"{x - far:.1f} {y:.1f}"
        path = f"M{x:.1f} {y - far:.1f}L{right}L{x:.1f} {y + far:.1f}L{left}Z"
    else:
        path = f"M{x:.1f} {y - far:.1f}L{x + far:.1f} {y + 0.8 * far:.1f}H{x - far:.1f}Z"
    title = element("title", note) if note else None
    return element("path", title, d=path, class_=f"mark c{kind % COLOURS}")


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element(
        "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_
    )


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)
