"""The figures of a study: curves, bars, loss against distance, trits, sizes.

A variant has the same colour and marker in all curves and bars: its place in the study. Where all
variants stand in one figure, their kind has: no eye tells forty colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from terdit_cli import console
from terdit_cli.lab.study.collect import Findings, Model, guidance, steps_named
from terdit_cli.lab.study.records import Loss
from terdit_cli.lab.study.score_tables import cost_of
from terdit_cli.lab.study.spec import Lines, Study, Variant, recipe_of
from terdit_cli.report.figures import (
    EMPTY,
    INK,
    MARKERS,
    SERIES,
    SOFT,
    SURFACE,
    Plot,
    chart,
    logarithmic,
    notes,
    number,
    style,
    svg,
)

Point = tuple[float, float]
_BAR = 40  # points, of a bar with its label
_LAYERS = {"-1": SERIES[1], "0": EMPTY, "+1": SERIES[0]}


@dataclass(frozen=True)
class Series:
    """One line: `points` are joined and marked, `dots` are single values beside them.

    Lines of one `kind` look alike and share a line of the key, where it takes the labels' place.
    """

    label: str
    number: int  # colour and marker
    points: Sequence[Point]
    dots: Sequence[Point] = ()
    marked: bool = True  # every point, or the last one
    kind: str | None = None


@dataclass(frozen=True)
class Bar:
    """One bar: a mean, and the single values behind it."""

    label: str
    number: int
    value: float
    dots: Sequence[float]
    note: str = ""


def _look(place: int) -> dict[str, Any]:
    turn, colour = divmod(place, len(SERIES))
    return {"color": SERIES[colour], "marker": MARKERS[(colour + turn) % len(MARKERS)]}


@style()
def line_plot(
    name: str,
    title: str,
    note: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    log_x: bool = False,
    log_y: bool = False,
) -> list[Plot]:
    """Draw lines with markers, or nothing without any point.

    Values that are not finite, or not positive where an axis is logarithmic, are left out.
    """

    def shown(points: Sequence[Point]) -> list[Point]:
        return [
            (x, y)
            for x, y in points
            if math.isfinite(x + y) and (x > 0 or not log_x) and (y > 0 or not log_y)
        ]

    drawn = [(line, shown(line.points), shown(line.dots)) for line in series]
    drawn = [(line, points, dots) for line, points, dots in drawn if points or dots]
    every = [point for _, points, dots in drawn for point in (*points, *dots)]
    if not every:
        return []
    key = {line.kind or line.label: _look(line.number) for line, *_ in drawn}
    figure, axes = chart(x_name, y_name, key)
    for line, points, dots in drawn:
        look = _look(line.number)
        if dots:
            single = {"color": look["color"], "marker": "o", "ls": "", "mew": 0, "alpha": 0.55}
            axes.plot(*zip(*dots, strict=True), ms=4, **single)
        if points:
            marked = points if line.marked else points[-1:]
            gid = notes(f"{line.label}: {number(y)} at {number(x)}" for x, y in marked)
            only = None if line.marked else [len(points) - 1]
            axes.plot(*zip(*points, strict=True), markevery=only, gid=gid, **look)
    for log, axis, values in (
        (log_x, axes.xaxis, [x for x, _ in every]), (log_y, axes.yaxis, [y for _, y in every])
    ):  # fmt: skip
        if log:
            logarithmic(axis, min(values), max(values))
    return [Plot(title, note, svg(figure, f"{name}: {title}"), name)]


@style()
def share_plot(
    name: str, title: str, note: str, rows: Sequence[tuple[float, Sequence[float]]]
) -> list[Plot]:
    """Draw the shares of -1, 0 and 1 over the steps as layers, or nothing without two rows."""
    if len(rows) < 2:
        return []
    steps, shares = [step for step, _ in rows], list(zip(*(each for _, each in rows), strict=True))
    figure, axes = chart("step", "share of the trits")
    axes.stackplot(steps, shares, colors=list(_LAYERS.values()), lw=0)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    below = 0.0
    for label, last in zip(_LAYERS, rows[-1][1], strict=True):
        if last > 0.06:
            words, place = f"{label}: {100 * last:.1f} %", (steps[-1], below + last / 2)
            axes.annotate(words, place, (-6, -4), textcoords="offset points", ha="right")
        below += last
    return [Plot(title, note, svg(figure, f"{name}: {title}"), name)]


@style()
def bar_plot(name: str, title: str, note: str, bars: Sequence[Bar], x_name: str) -> list[Plot]:
    """Draw horizontal bars, their single values as dots, or nothing without any."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return []
    figure, axes = chart(x_name, "", height=_BAR * len(bars) + 40)
    axes.set_position((0.02, 30 / (_BAR * len(bars) + 40), 0.96, 1 - 34 / (_BAR * len(bars) + 40)))
    high = max(max(bar.value, *bar.dots, 0) for bar in bars) or 1.0
    axes.set(xlim=(0, 1.16 * high), ylim=(len(bars) - 0.25, -0.55), xticks=[], yticks=[])
    axes.spines.bottom.set_visible(False)
    for place, bar in enumerate(bars):
        axes.barh(place, bar.value, 0.36, color=SERIES[bar.number % len(SERIES)], alpha=0.85)
        axes.text(0, place - 0.3, bar.label)
        axes.text(1.16 * high, place - 0.3, bar.note, ha="right", color=SOFT)
        if len(bar.dots) > 1:
            look: dict[str, Any] = {"color": INK, "marker": "o", "ls": "", "mec": SURFACE}
            axes.plot(bar.dots, [place] * len(bar.dots), ms=5, **look)
        right = (max([bar.value, *bar.dots]), place)
        axes.annotate(number(bar.value), right, (7, 0), textcoords="offset points", va="center",
                      weight="bold")  # fmt: skip
    return [Plot(title, note, svg(figure, f"{name}: {title}"), name)]


def _number(findings: Findings, name: str) -> int:
    """Return the number of a variant's colour: the headline's pair has the first two."""
    headline = findings.study.headline
    first = [headline.ternary, headline.baseline]
    others = [v.name for v in findings.study.variants if v.name not in first]
    return [*first, *others].index(name)


def _of_kind(study: Study, variant: Variant, points: Sequence[Point]) -> Series:
    """Return a variant's points in a figure of all; baseline and ternary look as the headline's."""
    if variant.ternarize is not None:
        return Series(variant.label, 2, points, kind="ternary (PTQ)")
    source = variant if variant.of is None else study.variant(variant.of)  # a trained one
    if recipe_of(study, source, study.seeds_of(source)[0]).ternary.enabled:
        return Series(variant.label, 0, points, kind="ternary (QAT)")
    return Series(variant.label, 1, points, kind="full precision")


def curves(findings: Findings) -> list[Plot]:
    """Return the distance over the steps, one figure per CFG scale, and the loss over the steps.

    Of each of the study's groups of lines.
    """
    study = findings.study
    n = study.evaluation.curve_images
    name = findings.distance_name
    figures: list[Plot] = []
    for index, lines in enumerate(study.all_lines):
        for scale in study.evaluation.cfg_scales:
            series = _series(findings, lines, _distance_at(scale, n))
            figures += line_plot(
                f"{study.name}--distance-{index}-cfg-{scale:g}",
                f"{lines.title}, {guidance(scale)}",
                f"{name} of {n:,} images, logarithmic.",
                series, "steps", name, log_y=True,
            )  # fmt: skip
        figures += line_plot(
            f"{study.name}--loss-{index}",
            f"{lines.title}, loss",
            "Averaged weights, the same images and noise for all; logarithmic.",
            _series(findings, lines, _loss_at), "steps", "loss", log_y=True,
        )  # fmt: skip
    return figures


Value = Callable[[Model, int], float | None]  # of a model at a step


def _distance_at(scale: float, n: int) -> Value:
    def value(model: Model, step: int) -> float | None:
        score = model.scores.get((step, scale, n))
        return None if score is None else score.distance

    return value


def _loss_at(model: Model, step: int) -> float | None:
    return model.losses[step].loss if step in model.losses else None


def _series(findings: Findings, lines: Lines, value: Value) -> list[Series]:
    """Return the lines of a figure: means over the seeds, and the seeds."""
    study = findings.study
    drawn = []
    for group in lines.groups:
        points, dots = [], []
        for name in group:
            variant = study.variant(name)
            steps = study.steps_of(variant) if len(group) == 1 else study.steps_of(variant)[-1:]
            for step in steps:
                found = [value(model, step) for model in findings.models_of(name)]
                finite = [v for v in found if v is not None and math.isfinite(v)]
                at = float(study.steps_before(variant) + step)
                points += [(at, fmean(finite))] if finite else []
                dots += [(at, v) for v in finite] if len(finite) > 1 else []
        label = study.variant(group[0]).label
        drawn.append(Series(label, _number(findings, group[0]), points, dots))
    return drawn


def bars(findings: Findings) -> list[Plot]:
    """Return the study's figures of bars, each for every CFG scale."""
    study = findings.study
    figures: list[Plot] = []
    for index, group in enumerate(study.bars):
        for scale in study.evaluation.cfg_scales:
            rows, longer = [], []
            for name in group.variants:
                distance = findings.distance(name, scale)
                if distance is None:
                    continue
                variant, values = study.variant(name), list(distance.values.values())
                rows.append(
                    Bar(variant.label, _number(findings, name), distance.mean, values,
                        _bytes(findings, name))
                )  # fmt: skip
                if len(study.steps_taken(variant)) > 1:
                    longer.append(f"{variant.label} ({steps_named(study, variant)})")
            note = (
                f"{study.evaluation.n:,} images, last step; to the right the bytes on disk. Dots "
                "are the seeds."
            )
            if longer:
                note += f" Steps of two trainings: {'; '.join(longer)}."
            figures += bar_plot(
                f"{study.name}--bars-{index}-cfg-{scale:g}",
                f"{group.title}, {guidance(scale)}",
                note, rows, f"{findings.distance_name}, lower is better",
            )  # fmt: skip
    return figures


def _bytes(findings: Findings, name: str) -> str:
    model = cost_of(findings, name)
    return (
        "" if model is None or model.footprint is None else console.byte_size(model.footprint.bytes)
    )


def loss_against_distance(findings: Findings) -> list[Plot]:
    """Return (loss, distance) of every scored step: models of one curve differ in nothing else."""
    study = findings.study
    n = study.evaluation.curve_images
    figures: list[Plot] = []
    for scale in study.evaluation.cfg_scales:
        series = []
        for variant in filter(lambda variant: variant.is_trained, study.variants):
            points = []
            for step in study.steps_of(variant):
                pairs: list[tuple[Loss, float]] = []
                for model in findings.models_of(variant.name):
                    score = model.scores.get((step, scale, n))
                    if step in model.losses and score is not None:
                        pairs.append((model.losses[step], score.distance))
                if pairs:
                    loss = fmean(loss.loss for loss, _ in pairs)
                    points.append((loss, fmean(distance for _, distance in pairs)))
            series.append(_of_kind(study, variant, points))
        figures += line_plot(
            f"{study.name}--loss-distance-cfg-{scale:g}",
            f"Loss against distance, {guidance(scale)}",
            "A point is a scored step, means over seeds; lines join a variant's steps. If one "
            "curve held all points, the loss would tell the distance.",
            series, "loss", findings.distance_name, log_x=True, log_y=True,
        )  # fmt: skip
    return figures


def trits(findings: Findings) -> list[Plot]:
    """Return the shares of -1, 0, +1 of the headline's model; zeros and flips over the steps.

    These of the variants whose images are shown.
    """
    study = findings.study
    headline = study.headline.ternary
    figures: list[Plot] = []
    first = next((m for m in findings.models_of(headline) if m.metrics), None)
    if first is not None:
        rows = [
            (float(entry["step"]), [entry[name]["all"] for name in ("minus", "zero", "plus")])
            for entry in first.metrics
            if "zero" in entry
        ]
        figures += share_plot(
            f"{study.name}--shares",
            f"Shares of -1, 0 and +1: {first.variant.label}",
            f"All ternary matrices, seed {first.seed}.",
            rows,
        )
    for key, title, note, log in (
        ("zero", "Trits that are 0", "Of all trits, first seed of each.", False),
        (
            "flipped",
            "Trits that flip",
            "Trits that one step changes, of all, at the steps that are logged; logarithmic.",
            True,
        ),
    ):
        series = []
        for variant in map(study.variant, study.shown):
            model = next((m for m in findings.models_of(variant.name) if m.metrics), None)
            if model is None:
                continue
            points = [
                (float(e["step"]), 100 * float(e[key]["all"])) for e in model.metrics if key in e
            ]
            place = _number(findings, variant.name)
            series.append(Series(variant.label, place, _thinned(points), marked=False))
        figures += line_plot(f"{study.name}--{key}", title, note, series, "step", "%", log_y=log)
    return figures


_MOST_POINTS = 150  # of a line


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of neighbours, so that a long run is not a black band."""
    size = -(-len(points) // _MOST_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(a for a, _ in part), fmean(b for _, b in part)) for part in parts]


def sizes(findings: Findings) -> list[Plot]:
    """Return the distance over bytes on disk, and over latency, of every variant."""
    study = findings.study
    scale = study.largest_scale
    by_bytes, by_time = [], []
    for variant in study.variants:
        model = cost_of(findings, variant.name)
        distance = findings.distance(variant.name, scale)
        if model is None or model.footprint is None or distance is None:
            continue
        cost = model.footprint
        by_bytes.append(_of_kind(study, variant, [(cost.bytes / 1e6, distance.mean)]))
        if (timed := findings.timed(cost)) is not None:
            milliseconds = 1000 * median(timed.latency)
            by_time.append(_of_kind(study, variant, [(milliseconds, distance.mean)]))
    name = findings.distance_name
    note = f"Last step, {guidance(scale)}; both axes logarithmic. To the lower left is better."
    figures: list[Plot] = []
    for what, title, series, x_name in (
        ("bytes", "Distance against bytes on disk", by_bytes, "megabytes on disk"),
        ("latency", "Distance against latency", by_time, "ms per image"),
    ):
        figures += line_plot(
            f"{study.name}--{what}", title, note, series, x_name, name, log_x=True, log_y=True
        )
    return figures
