"""`terdit plot`: the training curves of runs on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terdit_cli.train.curves import plot_runs


@dataclass(frozen=True)
class PlotResult:
    """Which runs' curves lie where."""

    runs: tuple[Path, ...]
    out: Path


def run(runs: Sequence[Path], out: Path) -> PlotResult:
    """Plot the curves of several runs on one picture, .png, .svg or .html.

    Raises:
        InputFileError: a folder without metrics.jsonl.
        UsageError: no run, or another kind of picture.
    """
    return PlotResult(tuple(runs), plot_runs(runs, out))
