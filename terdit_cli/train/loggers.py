"""metrics.jsonl, one line a logged step, and loss.png drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from terdit_cli.atomic import atomic_path, write_problem

FILE = "metrics.jsonl"
PICTURE = "loss.png"


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the logged lines of a run; a half-written last line is left out."""
    path = run_folder / FILE
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        entries.append(entry)
    return entries


class MetricsLog:
    """Appends to metrics.jsonl; opened at a step, it drops what a lost continuation wrote."""

    def __init__(self, run_folder: Path, start_step: int) -> None:
        self._folder = run_folder
        kept = [entry for entry in read_metrics(run_folder) if entry["step"] <= start_step]
        with atomic_path(run_folder / FILE) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line; numbers that are not finite become null.

        Raises:
            EnvironmentProblem: disk full or not writable.
        """
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        path = self._folder / FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise write_problem(path, error) from error

    def draw(self, title: str) -> Path:
        """Draw loss.png from what is logged so far and return its path."""
        path = self._folder / PICTURE
        with atomic_path(path) as temporary:
            draw_loss(read_metrics(self._folder), title, temporary)
        return path


def draw_loss(entries: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the loss (logarithmic) and the learning rate over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    entries = [entry for entry in entries if entry["loss"] is not None]
    steps = [entry["step"] for entry in entries]
    axes.plot(steps, [entry["loss"] for entry in entries], color="tab:blue", label="loss")
    axes.plot(steps, [entry["mse"] for entry in entries], color="tab:cyan", lw=1, label="mse")
    axes.set(xlabel="step", ylabel="loss", title=title)
    if steps:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    rate = axes.twinx()
    rate.plot(steps, [entry["lr"] for entry in entries], color="tab:orange", lw=1, label="lr")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    figure.savefig(path, format="png")
