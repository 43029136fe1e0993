"""Curves drawn from metrics.jsonl: loss.png of a run, and several runs on one picture.

Of several, a colour is a run and a panel is a quantity; runs of older versions simply lack some
curves. A .png for a look, a self-contained .html with the same curves as SVG and the last values.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.system.atomic import atomic_path
from terdit_cli.train.loggers import FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = dict[str, Any]
Value = Callable[[Entry], float | None]
COLOURS = ("#1f5fbf", "#d1572a", "#2b8a5b", "#8a4fbf", "#b8860b", "#c2347a", "#3a7d8c", "#6b6b6b")
SUFFIXES = (".png", ".html")
PICTURE = "loss.png"


def _at(*keys: str) -> Value:
    """Return the reader of a nested value; None where a line lacks it."""

    def read(entry: Entry) -> float | None:
        value: Any = entry
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read


# title, unit, value, scale: logarithmic, from zero, or as the values are
PANELS: tuple[tuple[str, str, Value, Literal["log", "zero", "free"]], ...] = (
    ("loss", "mse + vb", _at("loss"), "log"),
    ("loss, quarter of timesteps with least noise", "", _at("loss_by_quarter", "1"), "log"),
    ("loss, quarter of timesteps with most noise", "", _at("loss_by_quarter", "4"), "log"),
    ("gradient norm before clipping", "L2", _at("grad_norm"), "log"),
    ("learning rate", "", _at("lr"), "zero"),
    ("codes flipped by a step", "share", _at("flipped", "all"), "log"),
    ("codes that are 0", "share", _at("zero", "all"), "free"),
    ("speed", "images/s", _at("images_per_second"), "zero"),
)
COLUMNS = 2


def draw_run(run_folder: Path, title: str) -> Path:
    """Draw loss.png from what a run has logged so far and return its path."""
    path = run_folder / PICTURE
    with atomic_path(path) as temporary:
        draw_loss(read_metrics(run_folder), title, temporary)
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
        _logarithmic(axes)
    axes.grid(alpha=0.3, which="both")
    rate = axes.twinx()
    rate.plot(steps, [entry["lr"] for entry in entries], color="tab:orange", lw=1, label="lr")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    figure.savefig(path, format="png")


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Draw the curves of run folders (or metrics.jsonl files) into `out`.

    Raises:
        UsageError: no run, or `out` is no .png or .html.
        InputFileError: a folder without logged lines.
        EnvironmentProblem: `out` cannot be written.
    """
    if not runs:
        raise UsageError("there is no run to plot", fix="terdit plot runs/quickstart")
    if out.suffix not in SUFFIXES:
        raise UsageError(
            "curves can't be drawn into this kind of file", got=out.name,
            expected=" or ".join(SUFFIXES), fix="-o curves.png",
        )  # fmt: skip
    entries = {}
    for run, name in zip(runs, _names(runs), strict=True):
        folder = run.parent if run.name == FILE else run
        entries[name] = read_metrics(folder)
        if not entries[name]:
            raise InputFileError(
                "there is nothing to plot", got=f"no line in {folder / FILE}",
                expected="the folder of a run that has logged a step",
                fix="name a run folder, such as runs/quickstart",
            )  # fmt: skip
    figure = draw_curves(entries)
    with atomic_path(out) as temporary:
        if out.suffix == ".png":
            figure.savefig(temporary, format="png")
        else:
            temporary.write_text(_page(figure, entries), encoding="utf-8")
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    parts = [(run.parent if run.name == FILE else run).absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a run is named twice", got=", ".join(map(str, runs)), fix="name each once")


def draw_curves(entries: dict[str, list[Entry]]) -> Figure:
    """Draw every panel that at least one run has values for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(_points(run, panel[2]) for run in entries.values())]
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(11, 0.8 + 2.7 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).flatten()
    for axes, (title, unit, value, scale) in zip(grid, panels, strict=False):
        _style(axes, title, unit)
        for (_name, run), colour in zip(entries.items(), _colours(len(entries)), strict=True):
            points = [(s, v) for s, v in _points(run, value) if v > 0 or scale != "log"]
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, lw=1.4,
                      marker=marker, markersize=4)  # fmt: skip
            if scale == "log" and points:
                _logarithmic(axes)
        if scale == "zero":
            axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(panels) - COLUMNS) : len(panels)]:
        axes.set_xlabel("step", color="#444444")
        axes.tick_params(labelbottom=True)
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, lw=2.5) for colour in _colours(len(entries))]
    names = [name.replace("$", r"\$") for name in entries]  # no formulas in names
    figure.legend(lines, names, loc="outside upper left", ncols=min(4, len(names)), frameon=False)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _points(run: list[Entry], value: Value) -> list[tuple[int, float]]:
    values = ((entry["step"], value(entry)) for entry in run)
    return [(step, number) for step, number in values if number is not None]


def _style(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#222222")
    axes.set_ylabel(unit, fontsize=8.5, color="#444444")
    axes.grid(alpha=0.25, lw=0.6)
    axes.tick_params(which="both", labelsize=8, colors="#444444")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")


def _logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers such as 0.04."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))


def _page(figure: Figure, entries: dict[str, list[Entry]]) -> str:
    """Return a page with the curves and a table of the runs' last values."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    columns = [panel for panel in PANELS if any(_points(run, panel[2]) for run in entries.values())]
    names = (f"{title}, {unit}" if unit else title for title, unit, *_ in columns)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for name, run in entries.items():
        points = [_points(run, value) for _, _, value, _ in columns]
        cells = "".join(f"<td>{f'{p[-1][1]:.4g}' if p else ''}</td>" for p in points)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{run[-1]['step']:,}</td>{cells}</tr>")
    style = (
        "body{font:14px system-ui,sans-serif;margin:2em auto;max-width:75em;color:#222}"
        "svg{width:100%;height:auto}table{border-collapse:collapse}"
        "th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}"
        "th:first-child,td:first-child{text-align:left}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>terdit: curves</title>'
        f"<style>{style}</style><body>{svg[svg.index('<svg') :]}"
        f"<table><tr><th>run, last values</th><th>step</th>{head}</tr>{''.join(rows)}</table>"
        "</body></html>\n"
    )
