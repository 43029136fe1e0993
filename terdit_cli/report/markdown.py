"""Markdown in which text from outside is never markup: tables, code spans, sentences."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

LONGEST_TEXT = 1000  # characters of a code span or sentence
# Characters that XML 1.0 does not allow (controls, lone surrogates, two non-characters), and the
# controls of text direction, with which a path could be displayed as another one.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def clean(value: object) -> str:
    """Return text without the characters that no HTML, XML or Markdown file may hold."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; its cells are Markdown without a bar or the end of a line."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(title: str, content: str) -> str:
    """Return a folded section with a title; `content` is Markdown."""
    # The blank line after the summary makes the content Markdown again.
    return f"<details>\n<summary>{html.escape(title)}</summary>\n\n{content}\n\n</details>"


def plain(text: object) -> str:
    """Return trusted text as one line that a table cell can hold."""
    return " ".join(clean(text).split()).replace("<", "&lt;").replace("|", "\\|")


def _line(value: object) -> str:
    # A bar ends the cell of a table even in a code span, and its escape depends on what stands
    # before it.
    return " ".join(clean(value).replace("|", "\N{BROKEN BAR}").split())


def code(value: object) -> str:
    """Return a code span of one line, which a cell of a table can hold."""
    text = _line(value)
    text = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "..."
    if not text:
        return ""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def prose(text: str) -> str:
    """Return a sentence of one line in which nothing is markup or a mention."""
    text = re.sub(r"([\\`*_{}\[\]<>&~$#!])", r"\\\1", _line(text)[:LONGEST_TEXT])
    return re.sub(r"[@#](?=\w)|:(?=//)", r"\g<0><!-- -->", text)
