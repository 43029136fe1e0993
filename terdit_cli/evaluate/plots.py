"""The plots of an evaluation's page: distance over n, precision and recall, distances, coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from terdit_cli.evaluate.neighbours import Coverage, NeighbourCheck
from terdit_cli.evaluate.result import format_value
from terdit_cli.report.figures import (
    BAD,
    RULE,
    SERIES,
    SOFT,
    SURFACE,
    Plot,
    chart,
    notes,
    style,
    svg,
)

FAKE, REAL = SERIES[:2]
MOST_POINTS = 600  # of each set in the plot of coverage
_BINS = 40
_TICK = 0.011  # share of the axis that a character of a tick takes
_HOLLOW: dict[str, Any] = {"color": FAKE, "marker": "o", "mfc": SURFACE, "mec": FAKE, "mew": 2}
_DASHED: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.5}


@style()
def curve_plot(
    name: str, curve: Sequence[tuple[int, float]], infinity: float, limit: float | None
) -> Plot | None:
    """Draw the distance over n, and the line to its value at infinity; None without two points.

    The axis is 1/n from right to left: there the bias of a finite n is a straight line.

    Args:
        infinity: the extrapolated distance, through which the line is the best one, or not finite.
        limit: of a gate.
    """
    points = sorted((n, value) for n, value in curve if math.isfinite(value))
    if len({n for n, _ in points}) < 2:
        return None
    counts, values = np.array(points).T
    known = [*values, infinity] if math.isfinite(infinity) else list(values)
    spread = max(known) - min(known) or abs(known[0]) or 1.0
    low, high = min(known) - 0.25 * spread, max(known) + 0.1 * spread
    if limit is not None and low - 2 * spread < limit < high + 2 * spread:
        low, high = min(low, limit - 0.1 * spread), max(high, limit + 0.1 * spread)
    figure, axes = chart("images (scale 1/n)", name)
    start = -1.06 / counts[0]
    axes.set(xlim=(start, 0), ylim=(low, high))
    if limit is not None and low < limit < high:
        axes.axhline(limit, color=BAD, lw=1.5)
        words = f"limit {format_value(name, limit)}"
        axes.annotate(words, (start, limit), (4, 4), textcoords="offset points", color=BAD)
    note = f"A finite number of images makes {name} larger than it is."
    if math.isfinite(infinity):
        slope = (values - infinity) @ (1 / counts) / np.sum(1 / counts**2)
        axes.plot([-1 / counts[0], 0], [infinity + slope / counts[0], infinity], color=FAKE,
                  **_DASHED)  # fmt: skip
        shown = format_value(name, infinity)
        axes.plot(0, infinity, clip_on=False, gid=notes([f"extrapolated: {shown}"]), **_HOLLOW)
        axes.annotate(shown, (0, infinity), (4, -20), textcoords="offset points", ha="right")
        note += " The dashed line goes on to infinitely many."
    texts = [f"n = {n:,}: {format_value(name, value)}" for n, value in points]
    axes.plot(-1 / counts, values, color=FAKE, marker="o", gid=notes(texts))
    ticks = {0.0: "\N{INFINITY}"}
    for n, _ in reversed(points):  # without those whose text would touch another's
        place, text = -1 / n, f"{n:,}"
        room = _TICK * (-start) * (len(text) + 3)
        if all(abs(place - other) > room + _TICK * (-start) * len(ticks[other]) for other in ticks):
            ticks[place] = text
    axes.set_xticks(list(ticks), list(ticks.values()))
    title = f"{name} over the number of images"
    return Plot(title, note, svg(figure, title))


@style()
def memorisation_plot(check: NeighbourCheck) -> Plot:
    """Draw the distances from samples and from reals to their nearest real as two histograms."""
    key = {
        "real to real": {"color": REAL, "lw": 8, "alpha": 0.6},
        "sample to real": {"color": FAKE, "lw": 8, "alpha": 0.6},
    }
    figure, axes = chart("distance to the nearest real (0 is a copy)", "share of images", key)
    both = np.concatenate([check.distances, check.real_distances])
    high = float(np.quantile(both, 0.998)) * 1.05 or 1.0
    edges = np.linspace(0, high, _BINS + 1)
    for values, colour in ((check.real_distances, REAL), (check.distances, FAKE)):
        shares = np.histogram(np.minimum(values, high), edges)[0] / len(values)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.28, lw=0)
        axes.stairs(shares, edges, color=colour, lw=1.5)
        if (middle := float(np.median(values))) <= high:
            axes.axvline(middle, color=colour, **_DASHED)
    axes.set(xlim=(0, high), yticks=[])
    title = "Memorisation check"
    note = "Dashed: the medians. Samples far to the left of the reals would be copies."
    return Plot(title, note, svg(figure, title))


@style()
def precision_recall_plot(
    point: tuple[float, float], earlier: tuple[float, float] | None
) -> Plot | None:
    """Draw (precision, recall) in the unit square, and those of an earlier run; None if not finite.

    Up is realism, to the right is variety.
    """
    if not all(map(math.isfinite, point)):
        return None
    precision, recall = point
    figure, axes = chart("recall", "precision")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=np.linspace(0, 1, 5))
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.fill_between([0, recall], precision, color=FAKE, alpha=0.1, lw=0)
    axes.plot([0, recall, recall], [precision, precision, 0], color=FAKE, **_DASHED)
    for x, y, words, side in (
        (0.03, 0.93, "realistic, but alike", "left"),
        (0.97, 0.93, "like the reals", "right"),
        (0.97, 0.04, "varied, but unrealistic", "right"),
    ):
        axes.text(x, y, words, color=SOFT, style="italic", ha=side)
    if earlier is not None and all(map(math.isfinite, earlier)):
        axes.plot([earlier[1], recall], [earlier[0], precision], color=FAKE)
        text = f"before: precision {earlier[0]:.3f}, recall {earlier[1]:.3f}"
        axes.plot(earlier[1], earlier[0], clip_on=False, gid=notes([text]), **_HOLLOW)
    text = f"precision {precision:.3f}, recall {recall:.3f}"
    axes.plot(recall, precision, color=FAKE, marker="o", ms=11, clip_on=False, gid=notes([text]))
    title = "Precision and recall"
    note = "Precision: how many samples look real. Recall: how much of the real variety they have."
    return Plot(title, note, svg(figure, title))


@style()
def coverage_plot(coverage: Coverage) -> Plot:
    """Draw both sets in their plane: dots where the other set covers them, crosses elsewhere."""
    layers = []
    for points, covered, colour, name, other in (
        (coverage.real, coverage.real_covered, REAL, "real", "missed"),
        (coverage.fake, coverage.fake_covered, FAKE, "sample", "unrealistic"),
    ):
        count = min(MOST_POINTS, len(points))
        shown = np.unique(np.linspace(0, len(points) - 1, count).astype(np.int64))
        for flags, word, marker in ((covered, "covered", "o"), (~covered, other, "x")):
            look: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "ms": 5,
                "ls": "",
                "mec": colour,
            }
            look |= {"mew": 0, "alpha": 0.42} if marker == "o" else {"mew": 1.4}
            label = f"{name}, {word} ({100 * float(flags.mean()):.1f} %)"
            layers.append((marker, label, look, points[shown[flags[shown]]]))
    figure, axes = chart("", "", {label: look for _, label, look, _ in layers})
    both = np.concatenate([coverage.real, coverage.fake])
    low, high = np.quantile(both, [0.005, 0.995], axis=0)
    flat = high - low <= 0
    low, high = np.where(flat, low - 1, low), np.where(flat, high + 1, high)
    margin = 0.05 * (high - low)
    low, high = low - margin, high + margin
    for _, _, look, points in sorted(layers, key=lambda layer: layer[0]):  # crosses over dots
        axes.plot(*np.clip(points, low, high).T, **look)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=RULE)
    bottom = axes.get_position().y0 - 0.1
    axes.set_position((0.02, bottom, 0.96, 0.98 - bottom))
    title = "Feature space"
    note = (
        f"The two largest principal components, {100 * coverage.variance:.0f} % of the variance. "
        "Covered: inside the ball to the "
        f"{ {1: 'nearest', 2: 'second', 3: 'third'}.get(coverage.k, f'{coverage.k}th') } neighbour "
        f"of a point of the other set, among the {len(coverage.real):,} reals and "
        f"{len(coverage.fake):,} samples looked at."
    )
    return Plot(title, note, svg(figure, title))
