"""`terdit plot`: the training curves of runs in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terdit_cli.train.curves import plot_runs


@dataclass(frozen=True)
class PlotResult:
    """The runs and the file of their curves."""

    runs: tuple[Path, ...]
    out: Path


def run(runs: Sequence[Path], out: Path) -> PlotResult:
    """Plot the curves of several runs in one figure, .png, .svg or .html.

    Raises:
        InputFileError: a folder without metrics.jsonl.
        UsageError: no run, or an unknown format.
    """
    return PlotResult(tuple(runs), plot_runs(runs, out))
