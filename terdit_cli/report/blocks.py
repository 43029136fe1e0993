"""A page as a list of blocks, and its two forms: one HTML file, or Markdown with files beside it.

The content of a page is built once, so the two forms cannot differ.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from terdit_cli.report.figures import Plot, standalone
from terdit_cli.report.markdown import clean, details, plain, table
from terdit_cli.report.pages import SMALL, write_page
from terdit_cli.system.atomic import write_whole

_PIXELS = 640  # longer side, in pixels, of a picture of large images in the page
_SENTENCE = 24  # characters from which a cell is laid out as a sentence
_ENLARGED = 3  # enlargement in the files beside the Markdown page

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
    """What a reader must know before relying on the numbers."""

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

    def kind(self, cell: str) -> str:
        """Return how a cell is shown: numbers are not wrapped, sentences have room."""
        if re.match(r"[-+]?\d", cell):
            return "number"
        return "words" if len(cell) > _SENTENCE else ""


@dataclass(frozen=True)
class Plots:
    """Figures side by side; their names are their file names, "STUDY--WHAT"."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Picture:
    """Images uint8 [N, H, W, 3] in rows of `columns`."""

    label: str
    images: Images
    columns: int

    @property
    def small(self) -> bool:
        """Return whether the images are shown exactly, enlarged by whole pixels."""
        return max(self.images.shape[1:3]) <= SMALL

    @property
    def sheet(self) -> Images:
        """Return the images with gaps of one pixel between them: uint8 [H, W, 3]."""
        count, height, width, _ = self.images.shape
        empty = -count % self.columns
        padded = np.pad(self.images, ((0, empty), (0, 1), (0, 1), (0, 0)), constant_values=128)
        rows = padded.reshape(-1, self.columns, height + 1, width + 1, 3).swapaxes(1, 2)
        return rows.reshape(-1, self.columns * (width + 1), 3)[:-1, :-1]


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side; `name` is their file name, "STUDY--WHAT"."""

    name: str
    note: str
    pictures: Sequence[Picture]

    def files(self) -> list[str]:
        """Return the names of the pictures' files."""
        words = (re.sub(r"[^a-z0-9]+", "-", p.label.lower()).strip("-") for p in self.pictures)
        return [f"{self.name}-{i}-{word or 'images'}.png" for i, word in enumerate(words)]


@dataclass(frozen=True)
class Commands:
    """How everything was made, folded away: (what, command, machine and date)."""

    title: str
    rows: Sequence[tuple[str, str, str]]


Block = Heading | Text | Notes | Cards | Table | Plots | Pictures | Commands


def without_pictures(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks without figures and pictures, and without headings that are then empty."""
    kept = [block for block in blocks if not isinstance(block, Plots | Pictures)]
    return [
        block
        for block, after in itertools.zip_longest(kept, kept[1:])
        if not isinstance(block, Heading)
        or not (after is None or (isinstance(after, Heading) and after.level <= block.level))
    ]


def write_html(path: Path, title: str, blocks: Iterable[Block]) -> None:
    """Write the blocks as one HTML file.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    named = [(type(block).__name__, block) for block in blocks]
    write_page(path, "blocks.html", title, blocks=named, pixels=_PIXELS)


def write_markdown(path: Path, blocks: Sequence[Block], folder: Path) -> set[str]:
    """Write the blocks as Markdown and their pictures into `folder`; return these files' names.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    files: dict[str, str | bytes] = {}
    for block in blocks:
        if isinstance(block, Plots):
            files |= {f"{plot.name}.svg": standalone(plot.drawing) for plot in block.plots}
        elif isinstance(block, Pictures):
            files |= {n: _png(p) for n, p in zip(block.files(), block.pictures, strict=True)}
    for name, content in files.items():
        write_whole(folder / name, content)
    texts = (_markdown(block, folder.name) for block in blocks)
    write_whole(path, "\n\n".join(filter(None, texts)) + "\n")
    return set(files)


def _png(shown: Picture) -> bytes:
    sheet, buffer = Pillow.fromarray(shown.sheet), io.BytesIO()
    if max(sheet.size) < _PIXELS:
        size = (sheet.width * _ENLARGED, sheet.height * _ENLARGED)
        sheet = sheet.resize(size, Pillow.Resampling.NEAREST)
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _markdown(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return "#" * block.level + f" {plain(block.text)}"
    if isinstance(block, Text):
        return plain(block.text)
    if isinstance(block, Notes):
        return "\n".join(f"> - {plain(item)}" for item in block.items)
    if isinstance(block, Cards):
        goals = {None: "", True: "; goal met", False: "; goal not met"}
        cards = [(card.name, card.value, card.note + goals[card.verdict]) for card in block.cards]
        return table(("", "", ""), [map(plain, card) for card in cards])
    if isinstance(block, Table):
        return table(map(plain, block.header), [_row(block, row) for row in block.rows])
    if isinstance(block, Plots):
        return _side_by_side(
            (
                f"![{plain(p.title)}]({folder}/{p.name}.svg)",
                f"**{plain(p.title)}.** {plain(p.note)}",
            )
            for p in block.plots
        )
    if isinstance(block, Pictures):
        cells = (
            (f"![{plain(shown.label)}]({folder}/{name})", plain(shown.label))
            for name, shown in zip(block.files(), block.pictures, strict=True)
        )
        return f"{plain(block.note)}\n\n{_side_by_side(cells)}"
    return details(
        block.title,
        "\n\n".join(
            f"{plain(what)} ({plain(where)})\n\n```\n{clean(command)}\n```"
            for what, command, where in block.rows
        ),
    )


def _row(block: Table, row: Sequence[str]) -> list[str]:
    cells = list(map(plain, row))
    return [f"**{cell}**" if cell and row[0] in block.strong else cell for cell in cells]


def _side_by_side(cells: Iterable[tuple[str, str]]) -> str:
    """Return pictures with captions below them, two per row."""
    shown = ["<br>".join(cell) for cell in cells]
    if len(shown) % 2 and len(shown) > 1:
        shown.append("")
    rows = [shown[i : i + 2] for i in range(0, len(shown), 2)]
    return table([""] * len(rows[0]), rows) if rows else ""
