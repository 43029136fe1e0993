"""A page as a list of blocks, and its two forms: Markdown with files beside it, and one HTML.

What a page says is built once (`page.py`); the two forms cannot say different things. The HTML
asks for nothing: images are data URIs, figures inline SVG, there is no script, and its own
Content-Security-Policy forbids all else.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from terdit_cli.lab.study.markup import (
    PIXEL_ART,
    Markup,
    clean,
    element,
    exact_picture,
    picture,
    whole_page,
)
from terdit_cli.lab.study.svg import standalone
from terdit_cli.report.grid import save_png
from terdit_cli.system.atomic import atomic_path

_SHEETS = ("figures.css", "page.css")
_PIXELS = 640  # longer side of a picture of large images in the page
_SENTENCE = 24  # characters of a cell that needs room
_GAP = 1  # pixels between images of a picture
_ENLARGED = 3  # times, in the files beside the Markdown page

Images = NDArray[np.uint8]  # [N, H, W, 3]


@dataclass(frozen=True)
class Heading:
    level: int  # 1 to 3
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Notes:
    """What a reader must know before believing the numbers."""

    items: Sequence[str]


@dataclass(frozen=True)
class Card:
    """One number of the headline."""

    name: str
    value: str
    note: str
    verdict: bool | None = None  # of a goal


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Table:
    """Rows under a header; rows whose first cell is in `strong` stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing; `name` is that of its file, "STUDY--WHAT"."""

    name: str
    title: str
    note: str
    drawing: Markup


@dataclass(frozen=True)
class Figures:
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Picture:
    """Images uint8 [N, H, W, 3] in rows of `columns`."""

    label: str
    images: Images
    columns: int


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side; `name` is that of their files, "STUDY--WHAT"."""

    name: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Commands:
    """How everything was made, folded away: (what, command, machine and date)."""

    title: str
    rows: Sequence[tuple[str, str, str]] = field(default_factory=tuple)


Block = Heading | Text | Notes | Cards | Table | Figures | Pictures | Commands


def write_document(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write PATH.md, PATH.html and, in a folder PATH beside them, the Markdown page's pictures.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    folder = path.with_suffix("")
    used = {name for block in blocks for name in _write_files(block, folder)}
    studies = {name.partition("--")[0] for name in used}
    for old in folder.glob("*--*"):  # of variants that a study no longer has
        if old.name not in used and old.name.partition("--")[0] in studies:
            old.unlink()
    forms = {path: markdown(blocks, folder.name), path.with_suffix(".html"): html(title, blocks)}
    for target, text in forms.items():
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def _write_files(block: Block, folder: Path) -> list[str]:
    """Write a block's pictures as files and return their names."""
    if isinstance(block, Figures):
        for figure in block.figures:
            with atomic_path(folder / f"{figure.name}.svg") as temporary:
                temporary.write_text(standalone(figure.drawing), encoding="utf-8", newline="\n")
        return [f"{figure.name}.svg" for figure in block.figures]
    if isinstance(block, Pictures):
        names = []
        for place, shown in enumerate(block.pictures):
            sheet = Pillow.fromarray(mosaic(shown))
            if max(sheet.size) < _PIXELS:
                size = (sheet.width * _ENLARGED, sheet.height * _ENLARGED)
                sheet = sheet.resize(size, Pillow.Resampling.NEAREST)
            names.append(_picture_file(block, place))
            save_png(sheet, folder / names[-1])
        return names
    return []


def _picture_file(block: Pictures, place: int) -> str:
    word = re.sub(r"[^A-Za-z0-9]+", "-", block.pictures[place].label).strip("-").lower()
    return f"{block.name}-{place}-{word or 'images'}.png"


def mosaic(shown: Picture) -> Images:
    """Return images in rows with gaps of one pixel between them: uint8 [H, W, 3]."""
    count, height, width, _ = shown.images.shape
    rows = -(-count // shown.columns)
    sheet = np.full(
        (rows * (height + _GAP) - _GAP, shown.columns * (width + _GAP) - _GAP, 3), 128, np.uint8
    )
    for index, image in enumerate(shown.images):
        row, column = divmod(index, shown.columns)
        top, left = row * (height + _GAP), column * (width + _GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


# Markdown


def markdown(blocks: Sequence[Block], folder: str) -> str:
    """Return the blocks as Markdown; `folder` holds the pictures."""
    return "\n\n".join(_as_markdown(block, folder) for block in blocks) + "\n"


def _as_markdown(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + f" {_plain(block.text)}"
    if isinstance(block, Text):
        return _plain(block.text)
    if isinstance(block, Notes):
        return "\n".join(f"> - {_plain(item)}" for item in block.items)
    if isinstance(block, Cards):
        rows = [(card.name, card.value, card.note + _verdict(card)) for card in block.cards]
        return _table(("", "", ""), rows, ())
    if isinstance(block, Table):
        return _table(block.header, block.rows, block.strong)
    if isinstance(block, Figures):
        return "\n\n".join(
            f"![{_plain(figure.title)}]({folder}/{figure.name}.svg)\n\n"
            f"**{_plain(figure.title)}.** {_plain(figure.note)}"
            for figure in block.figures
        )
    if isinstance(block, Pictures):
        labels = [_cell(shown.label) for shown in block.pictures]
        files = [
            f"![{label}]({folder}/{_picture_file(block, place)})"
            for place, label in enumerate(labels)
        ]
        return _table(labels, [files], (), escape=False)
    body = "\n\n".join(
        f"{_plain(what)} ({_plain(where)})\n\n```\n{clean(command)}\n```"
        for what, command, where in block.rows
    )
    return f"<details>\n<summary>{_plain(block.title)}</summary>\n\n{body}\n\n</details>"


def _verdict(card: Card) -> str:
    return "" if card.verdict is None else f"; goal {'met' if card.verdict else 'not met'}"


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[str], escape: bool = True
) -> str:
    show = _cell if escape else str
    lines = [[show(cell) for cell in header], ["---"] * len(header)]
    for row in rows:
        cells = [show(cell) for cell in row]
        if row[0] in strong:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return one line in which nothing begins an HTML tag."""
    return " ".join(clean(text).split()).replace("<", "&lt;")


# HTML


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return the blocks as one HTML page."""
    files = importlib.resources.files(__package__)
    style = "\n".join(files.joinpath(name).read_text("utf-8") for name in _SHEETS)
    return whole_page(title, style, element("main", *map(_as_html, blocks)))


def _as_html(block: Block) -> Markup:
    if isinstance(block, Heading):
        return element(f"h{block.level}", block.text)
    if isinstance(block, Text):
        return element("p", block.text)
    if isinstance(block, Notes):
        items = (element("li", item) for item in block.items)
        return element("div", element("ul", *items), class_="notes", role="note")
    if isinstance(block, Cards):
        return element("div", *map(_card, block.cards), class_="cards")
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Figures):
        panels = (
            element(
                "figure",
                figure.drawing,
                element("figcaption", element("b", f"{figure.title}. "), figure.note),
            )
            for figure in block.figures
        )
        return element("div", *panels, class_="columns")
    if isinstance(block, Pictures):
        shown = (
            element(
                "figure",
                picture_of(one),
                element("figcaption", element("b", one.label)),
            )
            for one in block.pictures
        )
        return element("div", *shown, class_="pictures")
    rows = (
        element("li", element("b", what), f" {where}", element("pre", element("code", command)))
        for what, command, where in block.rows
    )
    return element("details", element("summary", block.title), element("ul", *rows))


def picture_of(shown: Picture) -> Markup:
    """Return a picture's <img>, small images exact and enlarged pixel by pixel."""
    sheet = mosaic(shown)
    if max(shown.images.shape[1:3]) <= PIXEL_ART:
        return exact_picture(sheet, shown.label)
    return picture(sheet, shown.label, _PIXELS)


def _card(card: Card) -> Markup:
    chip = None
    if card.verdict is not None:
        kind = "good" if card.verdict else "bad"
        chip = element(
            "span", f"goal {'met' if card.verdict else 'not met'}", class_=f"chip {kind}"
        )
    return element(
        "article",
        element("h3", card.name),
        element("p", card.value, class_="big"),
        element("p", card.note, class_="note"),
        chip,
        class_="card",
    )


def _html_table(block: Table) -> Markup:
    head = element("tr", *(element("th", name, scope="col") for name in block.header))
    body = []
    for first, *rest in block.rows:
        cells = (element("td", cell, class_=_kind(cell)) for cell in rest)
        kind = "strong" if first in block.strong else None
        body.append(element("tr", element("th", first, scope="row"), *cells, class_=kind))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="scroll")


def _kind(cell: str) -> str | None:
    """Return the class of a cell: numbers are not broken, sentences have room."""
    if re.match(r"[-+]?\d", cell):
        return "number"
    return "words" if len(cell) > _SENTENCE else None
