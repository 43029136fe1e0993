"""What the user sees: results on stdout, everything else on stderr.

A live progress bar on a terminal; elsewhere a plain line every few steps. Only the main
process of a job (rank 0) writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system.launcher import is_main

PLAIN_SECONDS = 10.0  # without a terminal: one line at most this often, unless told otherwise
PIPE_WIDTH = 160  # columns of a table that no terminal shows

# Piped output is for programs and logs: never wrap a line there.
_out = Console(soft_wrap=True, highlight=False, emoji=False)
_err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def note(text: str) -> None:
    """Print a line to stderr."""
    if is_main():
        with _heard():
            _err.print(escape(text))


def warn(text: str) -> None:
    """Print a warning line to stderr."""
    if is_main():
        with _heard():
            _err.print(f"[yellow]warning:[/] {escape(text)}")


def fail(text: str) -> None:
    """Print an error line to stderr, from any rank."""
    with _heard():
        _err.print(f"[red]error:[/] {escape(text)}")


@contextmanager
def _heard() -> Iterator[None]:
    """Go on where stderr is on a full disk: the work matters more than what is said of it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


@contextmanager
def _written() -> Iterator[None]:
    """Raise EnvironmentProblem where stdout is on a full disk; a closed pipe's own error."""
    try:
        yield
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise EnvironmentProblem(
            "the result cannot be written to stdout", got=error.strerror,
            fix="redirect it to a disk with free space",
        ) from error  # fmt: skip


def result(text: str) -> None:
    """Print a line to stdout."""
    if is_main():
        with _written():
            _out.print(escape(text))


def result_json(value: dict[str, Any]) -> None:
    """Print exactly one JSON object to stdout."""
    if is_main():
        with _written():
            print(json.dumps(value, indent=2, default=str))


def result_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout, without a header if all names are empty."""
    if not is_main():
        return
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        show_header=any(header),
    )
    for index, name in enumerate(header):
        left = index == 0
        table.add_column(
            name, justify="left" if left else "right", overflow="fold", no_wrap=not left
        )
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    # Rich would cut what is wider than the terminal, digits too, and a pipe has no width: there the
    # terminal itself wraps.
    wide = Console(width=10 * PIPE_WIDTH)
    needed = Measurement.get(wide, wide.options, table).maximum
    fits = _out.is_terminal and needed <= _out.width
    target = _out if fits else Console(width=max(needed, PIPE_WIDTH), highlight=False)
    with _written():
        _out.print(
            f"[bold]{escape(title)}[/]"
        )  # not the table's own title, which is folded to the table's width
        target.print(table, soft_wrap=not fits)


class Meter:
    """Reports progress of one task; made by `progress`."""

    def __init__(self, description: str, total: int, every: int | None, bar: Progress | None):
        self._description = description
        self._total = total
        self._every = every
        self._bar = bar
        self._task = bar.add_task(description, total=total, status="") if bar else None
        self._started = time.monotonic()
        self._last_line = self._started

    def start_at(self, completed: int) -> None:
        """Record that `completed` of the total was done before this process started."""
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, completed=completed)

    def update(self, completed: int, status: str = "") -> None:
        """Record that `completed` of the total is done; `status` is free text beside the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=completed, status=escape(status))
            return
        now = time.monotonic()
        due = now - self._last_line >= PLAIN_SECONDS
        if self._every is not None:
            due = completed % self._every == 0
        if due or (completed == self._total and self._last_line > self._started):
            self._last_line = now
            note(f"{self._description}: {completed}/{self._total} {status}".rstrip())


@contextmanager
def progress(description: str, total: int, every: int | None = None) -> Iterator[Meter]:
    """Show progress over `total` units; without a terminal, one line every `every` units.

    With `every=None` a plain line comes at most every ten seconds.
    """
    # rich can be told to treat a pipe as a terminal, and shows nothing on one without a cursor.
    drawn = sys.stderr is not None and sys.stderr.isatty() and _err.is_interactive
    if not (drawn and is_main()):
        yield Meter(description, total, every, None)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_err,
    )
    with bar:
        yield Meter(description, total, every, bar)


def duration(seconds: float) -> str:
    """Format seconds as "2h 03m", "4m 05s" or "6.7s"."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}h {int(seconds % 3600 // 60):02d}m"
    if seconds >= 60:
        return f"{int(seconds // 60)}m {int(seconds % 60):02d}s"
    return f"{seconds:.1f}s"


def byte_size(count: float) -> str:
    """Format bytes in decimal units: "134.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
