"""Curves from metrics.jsonl: loss.png of a run, and several runs in one figure.

With several runs, each has a colour and each quantity a panel; runs of older versions lack some
curves. A .png or .svg holds the curves, an .html also a table of the last values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.report import figures
from terdit_cli.report.blocks import Heading, Plots, Table, write_html
from terdit_cli.report.figures import SERIES, Plot
from terdit_cli.system.atomic import write_whole
from terdit_cli.train.loggers import FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = dict[str, Any]
Value = Callable[[Entry], float | None]
Panel = tuple[str, Value, Literal["log", "zero", "free"]]
SUFFIXES = (".png", ".svg", ".html")
PICTURE = "loss.png"
TITLE = "Training curves"


def _at(*keys: str) -> Value:
    """Return the reader of a nested value; None if a line lacks it."""

    def read(entry: Entry) -> float | None:
        value: Any = entry
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read


# title, value, scale: logarithmic, from zero, or fitted to the values
PANELS: tuple[Panel, ...] = (
    ("loss (mse + vb)", _at("loss"), "log"),
    ("loss, quarter of timesteps with least noise", _at("loss_by_quarter", "1"), "log"),
    ("loss, quarter of timesteps with most noise", _at("loss_by_quarter", "4"), "log"),
    ("gradient norm before clipping (L2)", _at("grad_norm"), "log"),
    ("learning rate", _at("lr"), "zero"),
    ("trits flipped by a step, share", _at("flipped", "all"), "log"),
    ("trits that are 0, share", _at("zero", "all"), "free"),
    ("speed, images/s", _at("images_per_second"), "zero"),
)


def draw_run(run_folder: Path, title: str) -> Path:
    """Plot loss.png from the log of a run so far and return its path."""
    path = run_folder / PICTURE
    draw_loss(read_metrics(run_folder), title, path)
    return path


@figures.style()
def draw_loss(entries: list[Entry], title: str, path: Path) -> None:
    """Plot the loss (logarithmic) and the learning rate over the steps as a PNG."""
    looks: dict[str, dict[str, Any]] = {
        "loss": {"color": SERIES[1]},
        "mse": {"color": SERIES[6], "lw": 1},
        "learning rate, right": {"color": SERIES[0], "lw": 1},
    }
    figure, axes = figures.chart("step", title, looks, 580, 320)
    entries = [entry for entry in entries if entry["loss"] is not None]
    steps = [entry["step"] for entry in entries]
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((left, bottom, 0.93 * width, height))  # room for numbers on the right
    right = axes.twinx()
    right.grid(visible=False)
    right.yaxis.set_major_formatter(figures.tick_text)
    for name, place, look in zip(("loss", "mse", "lr"), (axes, axes, right), looks.values(),
                                 strict=True):  # fmt: skip
        place.plot(steps, [entry[name] for entry in entries], **look)
    shown = [entry[name] for entry in entries for name in ("loss", "mse") if entry[name] > 0]
    if shown:
        figures.logarithmic(axes.yaxis, min(shown), max(shown))
    right.set_ylim(bottom=0)
    write_whole(path, figures.png(figure))


def plot_runs(runs: Sequence[Path], out: Path) -> Path:
    """Plot the curves of run folders (or metrics.jsonl files) into `out`.

    Raises:
        UsageError: no run, or `out` is not a .png, .svg or .html.
        InputFileError: a folder without logged lines.
        EnvironmentProblem: `out` cannot be written.
    """
    if not runs:
        raise UsageError("there is no run to plot", fix="terdit plot runs/quickstart")
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            "unknown format for curves", got=out.name,
            expected=", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}", fix="-o curves.png",
        )  # fmt: skip
    entries = {}
    for run, name in zip(runs, _names(runs), strict=True):
        folder = run.parent if run.name == FILE else run
        entries[name] = read_metrics(folder)
        if not entries[name]:
            raise InputFileError(
                "nothing to plot", got=f"no line in {folder / FILE}",
                expected="the folder of a run that has logged a step",
                fix="give a run folder, such as runs/quickstart",
            )  # fmt: skip
    if suffix == ".html":
        _write_page(out, entries)
    elif suffix == ".svg":
        write_whole(out, figures.standalone(figures.svg(draw_curves(entries), TITLE)))
    else:
        write_whole(out, figures.png(draw_curves(entries)))
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    parts = [(run.parent if run.name == FILE else run).absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a run is given twice", got=", ".join(map(str, runs)), fix="give each once")


@figures.style()
def draw_curves(entries: dict[str, list[Entry]]) -> Figure:
    """Plot every panel that at least one run has values for."""
    panels = _panels(entries)
    figure, grid = figures.charts("step", [title for title, *_ in panels], _looks(entries))
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel, entries)
    return figure


def _panels(entries: dict[str, list[Entry]]) -> list[Panel]:
    return [panel for panel in PANELS if any(_points(run, panel[1]) for run in entries.values())]


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: {"color": SERIES[i % len(SERIES)]} for i, name in enumerate(names)}


def _draw(axes: Axes, panel: Panel, entries: dict[str, list[Entry]]) -> None:
    _, value, scale = panel
    shown: list[float] = []
    for run, look in zip(entries.values(), _looks(entries).values(), strict=True):
        points = [(s, v) for s, v in _points(run, value) if v > 0 or scale != "log"]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="o" if len(points) == 1 else None, **look)
            shown += values
    if scale == "log" and shown:
        figures.logarithmic(axes.yaxis, min(shown), max(shown))
    elif scale == "zero":
        axes.set_ylim(bottom=0)


def _points(run: list[Entry], value: Value) -> list[tuple[int, float]]:
    values = ((entry["step"], value(entry)) for entry in run)
    return [(step, number) for step, number in values if number is not None]


@figures.style()
def _write_page(out: Path, entries: dict[str, list[Entry]]) -> None:
    """Write a page with a figure of each panel and a table of the runs' last values."""
    plots, panels = [], _panels(entries)
    for panel in panels:
        figure, axes = figures.chart("step", "", _looks(entries))
        _draw(axes, panel, entries)
        plots.append(Plot(panel[0], "", figures.svg(figure, panel[0])))
    rows = []
    for name, run in entries.items():
        points = [_points(run, value) for _, value, _ in panels]
        values = [f"{p[-1][1]:.4g}" if p else "" for p in points]
        rows.append([name, f"{run[-1]['step']:,}", *values])
    last = Table(["run, last values", "step", *(title for title, *_ in panels)], rows)
    write_html(out, f"terdit: {TITLE.lower()}", [Heading(1, TITLE), Plots(plots), last])
