"""Figures: matplotlib's objects in the project's colours, as SVG that follows the theme or as PNG.

A plotting function is decorated with `style()`, starts with `chart()` and returns `svg()`. pyplot
is not used and no date is stored: the same numbers give the same text. The SVG holds the colours of
the light theme as attributes, so that any viewer can show it on white; the style sheet `THEMES`
replaces each by its counterpart if the reader prefers a dark page. Texts stay texts, and a marker
shows its values when the pointer is on it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from terdit_cli.report.markdown import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 430, 294  # points, of a chart without its key: legible on a phone
INK, SOFT, RULE, SURFACE, BAD = "#171a21", "#5a6372", "#e2e6ec", "#ffffff", "#b3261e"
EMPTY = "#d5d9e0"  # of an empty area
SERIES = (
    "#c8520b", "#1f5fbf", "#1a7f5a", "#8a4fbf", "#9a6f00", "#c2347a", "#17798c", "#6b6f76",
)  # fmt: skip
MARKERS = "osD^"
_DARK = {
    INK: "#e8ebf0", SOFT: "#9aa4b4", RULE: "#2b313c", SURFACE: "#181c23", BAD: "#ff9087",
    EMPTY: "#3a414d",
    **dict(zip(SERIES, ("#ff9350", "#86acff", "#55cfa0", "#c5a0ff", "#e6bd4a", "#ff86bb",
                        "#5cc8dc", "#aab0ba"), strict=True)),
}  # fmt: skip
_FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",sans-serif'
_SVG = "{http://www.w3.org/2000/svg}"
_NOTES = "\N{SYMBOL FOR UNIT SEPARATOR}"
_KEY_LINE = 20  # points
_CHARACTER = 6.4  # points, usual advance of the text
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "lines.markeredgecolor": SURFACE,
}


def _themes() -> str:
    def texts(halo: str) -> str:
        return f".figure text{{stroke:{halo};stroke-width:3px;paint-order:stroke}}"

    dark = "".join(
        f'.figure [{kind}="{light}"]{{{kind}:{dark}}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    return (
        f".figure{{font-family:{_FONTS}}}{texts(SURFACE)}"
        f"@media screen and (prefers-color-scheme:dark){{{dark}{texts(_DARK[SURFACE])}}}"
    )


THEMES = _themes()


class Plot(NamedTuple):
    """A figure under its title, with a note for its readers."""

    title: str
    note: str
    drawing: Markup  # as returned by `svg`
    name: str = ""  # of its file


Looks = Mapping[str, Mapping[str, Any]]


@contextmanager
def style() -> Iterator[None]:
    """Give matplotlib the project's style while a figure is built."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE):
        # Characters that the measuring font lacks; the reader's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def chart(
    x_name: str, y_name: str, key: Looks | None = None, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, Axes]:
    """Return a figure of one empty chart; see `charts`."""
    figure, (axes,) = charts(x_name, [y_name], key, 1, width, height)
    return figure, axes


def charts(
    x_name: str,
    y_names: Sequence[str],
    key: Looks | None = None,
    columns: int = 2,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of empty charts in rows, each below the name of its y axis, above a key.

    Args:
        key: label -> how its line, marker or area looks, as of matplotlib's Line2D.
        width, height: points, of one chart.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(y_names)) or 1
    rows, whole = -(-len(y_names) // columns), columns * width
    key = {_short(label, whole): look for label, look in (key or {}).items()}
    abreast = max(1, int(whole // (32 + _CHARACTER * max(map(len, key), default=1))))
    below = 4 + _KEY_LINE * -(-len(key) // abreast) if key else 0
    high = rows * height + below
    figure = Figure(figsize=(whole / 72, high / 72))
    found = []
    for place, y_name in enumerate(y_names):
        row, column = divmod(place, columns)
        left, bottom = column * width + 52, below + (rows - 1 - row) * height + 44
        axes = figure.add_axes(
            (left / whole, bottom / high, (width - 68) / whole, (height - 78) / high)
        )
        axes.set_xlabel(clean(x_name))
        axes.set_title(clean(y_name), x=-44 / (width - 68), pad=13)
        axes.xaxis.set_major_formatter(tick_text)
        axes.yaxis.set_major_formatter(tick_text)
        axes.locator_params(nbins=6)
        found.append(axes)
    if key:
        figure.legend(
            [Line2D([], [], **look) for look in key.values()], key, loc="lower left",
            bbox_to_anchor=(0, 0), ncols=abreast, borderpad=0.3, borderaxespad=0, handlelength=1.6,
            handletextpad=0.6, columnspacing=1.2, fontsize=12,
        )  # fmt: skip
    return figure, found


def _short(label: str, width: float) -> str:
    room = int((width - 30) / _CHARACTER)
    label = " ".join(clean(label).split())
    return label if len(label) <= room else label[: room - 1] + "\N{HORIZONTAL ELLIPSIS}"


def tick_text(value: float, _place: float | None = None) -> str:
    """Return a tick's number: 0.25, 4,000, 1e-09."""
    return f"{value:,.6g}"


def number(value: float) -> str:
    """Return three or four significant digits: 0.0314, 3.14, 31.4, 314, 31,416."""
    if not math.isfinite(value):
        return "not a number"
    size = abs(value)
    if size < 1:
        return f"{value:.3g}"
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def logarithmic(axis: Any, low: float, high: float) -> None:
    """Make an axis (`axes.xaxis`) logarithmic from `low` to `high` with a few plain numbers."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

    margin = max((high / low) ** 0.06, 1.03)
    low, high = low / margin, high * margin
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10)):
        locator: Locator = LogLocator(subs=factors)
        if sum(low <= value <= high for value in locator.tick_values(low, high)) >= 3:
            break
    else:
        locator = MaxNLocator(5)
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(tick_text)


def notes(texts: Iterable[object]) -> str:
    """Return the `gid` of a line whose markers show these texts, one each, to the pointer."""
    return _NOTES + _NOTES.join(" ".join(clean(text).split()) for text in texts)


def svg(figure: Figure, title: str) -> Markup:
    """Return a figure as <svg> to be put into a page.

    Args:
        title: for readers who do not see it. Two figures of a page have different ones.
    """
    import matplotlib

    buffer = io.BytesIO()
    title = " ".join(clean(title).split())
    for words in [words for axes in figure.axes for words in axes.texts]:
        words.set_text(clean(words.get_text()))
    with style(), matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    used = set(re.findall(rb"#([mp]\w+)", buffer.getvalue()))
    _, _, *drawn = root  # without metadata and style sheet
    box = root.get("viewBox", "")
    root.clear()
    root.attrib.update({"class": "figure", "viewBox": box, "role": "img", "aria-label": title})
    root.set("stroke-linejoin", "round")
    root.extend(drawn)
    for node in list(root.iter()):
        node.tag, name = node.tag.removeprefix(_SVG), node.get("id", "")
        if name.encode() not in used:
            node.attrib.pop("id", None)
        elif node.tag == "path":  # a marker: its colours are where it is used, and follow the theme
            node.attrib.pop("style", None)
        _without_style(node)
        if name.startswith(_NOTES):
            markers = node.findall(f".//{_SVG}use")
            for marker, text in zip(markers, name.split(_NOTES)[1:], strict=True):
                ET.SubElement(marker, "title").text = text
    return Markup(ET.tostring(root, "unicode"))


def _without_style(node: ET.Element) -> None:
    """Turn styles into attributes, which a page's policy allows; shorten numbers."""
    markers = node.findall(f"{_SVG}use")
    if len({marker.get("style") for marker in markers}) == 1:  # once for all of them
        node.set("style", [marker.attrib.pop("style") for marker in markers].pop())
    for item in node.attrib.pop("style", "").split(";"):
        key, _, value = item.partition(":")
        if value and key.strip() != "font-family":
            node.set(key.strip(), value.strip())
    for key, value in list(node.items()):
        if key.startswith("{"):  # of XLink
            del node.attrib[key]
            node.set("href", value)
        elif key in ("d", "x", "y", "width", "height", "transform"):
            short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", value)
            node.set(key, " ".join(short.split()))
    if node.get("transform", "").startswith("rotate(-0 "):
        del node.attrib["transform"]
    node.text = node.text if node.tag == "text" else None
    node.tail = None


def standalone(drawing: Markup) -> str:
    """Return the result of `svg` as a separate SVG file, with both themes inside."""
    opened, _, rest = drawing.partition(">")
    return f'{opened} xmlns="http://www.w3.org/2000/svg"><style>{THEMES}</style>{rest}\n'


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=144, facecolor=SURFACE)
    return buffer.getvalue()
