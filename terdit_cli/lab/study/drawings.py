"""Which figures a study has: curves, bars, loss against distance, codes, sizes.

A variant has the same colour and marker in all curves and bars: its place in the study. Where all
variants stand in one figure, their kind has: no eye tells forty colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from terdit_cli import console
from terdit_cli.lab.study.collect import Findings, Model, guidance, steps_named
from terdit_cli.lab.study.document import Figure
from terdit_cli.lab.study.records import Loss
from terdit_cli.lab.study.score_tables import cost_of
from terdit_cli.lab.study.spec import Lines, Study, Variant, recipe_of
from terdit_cli.lab.study.svg import Bar, Point, Series, bar_figure, line_figure, share_figure

_LAYERS = (("-1", "minus"), ("0", "zero"), ("+1", "plus"))


def _number(findings: Findings, name: str) -> int:
    """Return the number of a variant's colour: the headline's pair has the first two."""
    headline = findings.study.headline
    first = [headline.ternary, headline.twin]
    others = [v.name for v in findings.study.variants if v.name not in first]
    return [*first, *others].index(name)


def _of_kind(study: Study, variant: Variant, points: Sequence[Point]) -> Series:
    """Return a variant's points in a figure of all; twin and ternary look as the headline's."""
    if variant.ternarize is not None:
        return Series(variant.label, 2, points, kind="ternarized after training")
    source = variant if variant.of is None else study.variant(variant.of)  # a trained one
    if recipe_of(study, source, study.seeds_of(source)[0]).ternary.enabled:
        return Series(variant.label, 0, points, kind="trained as ternary")
    return Series(variant.label, 1, points, kind="full precision")


def _figure(what: str, findings: Findings, title: str, note: str, drawing: Any) -> list[Figure]:
    if drawing is None:
        return []
    return [Figure(f"{findings.study.name}--{what}", title, note, drawing)]


def curves(findings: Findings) -> list[Figure]:
    """Return the distance over the steps, one figure a guidance, and the loss over the steps.

    Of each of the study's groups of lines.
    """
    study = findings.study
    n = study.evaluation.curve_images
    name = findings.distance_name
    figures = []
    for index, lines in enumerate(study.drawn_lines):
        for scale in study.evaluation.cfg_scales:
            series = _series(findings, lines, _distance_at(scale, n))
            title = f"{lines.title}, {guidance(scale)}"
            drawing = line_figure(f"{name} over steps: {title}", series, "steps", name, log_y=True)
            note = f"{name} of {n:,} images, {guidance(scale)}; logarithmic. {_DOTS}"
            figures += _figure(f"distance-{index}-cfg-{scale:g}", findings, title, note, drawing)
        series = _series(findings, lines, _loss_at)
        title = f"{lines.title}, loss"
        drawing = line_figure(title, series, "steps", "loss", log_y=True)
        note = f"Averaged weights, the same images and noise for all; logarithmic. {_DOTS}"
        figures += _figure(f"loss-{index}", findings, title, note, drawing)
    return figures


_DOTS = (
    "Steps are those in all: a model that begins with another's weights goes on where that one "
    "ended. Lines join the means over seeds (before the last step: the first seed), or finished "
    "trainings of different length; dots are the seeds."
)


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


def bars(findings: Findings) -> list[Figure]:
    """Return the study's figures of bars, each for every guidance."""
    study = findings.study
    figures = []
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
            title = f"{group.title}, {guidance(scale)}"
            drawing = bar_figure(title, rows, f"{findings.distance_name}, lower is better")
            note = (
                f"{study.evaluation.n:,} images, last step; to the right the bytes on disk. Dots "
                "are the seeds."
            )
            if longer:
                note += f" Steps of two trainings: {'; '.join(longer)}."
            figures += _figure(f"bars-{index}-cfg-{scale:g}", findings, title, note, drawing)
    return figures


def _bytes(findings: Findings, name: str) -> str:
    model = cost_of(findings, name)
    return (
        "" if model is None or model.footprint is None else console.byte_size(model.footprint.bytes)
    )


def loss_against_distance(findings: Findings) -> list[Figure]:
    """Return (loss, distance) of every scored step: models of one curve differ in nothing else."""
    study = findings.study
    n = study.evaluation.curve_images
    name = findings.distance_name
    figures = []
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
        title = f"Loss against distance, {guidance(scale)}"
        drawing = line_figure(title, series, "loss", name, log_x=True, log_y=True)
        note = (
            "A point is a scored step, means over seeds; lines join a variant's steps. If one "
            "curve held all points, the loss would tell the distance."
        )
        figures += _figure(f"loss-distance-cfg-{scale:g}", findings, title, note, drawing)
    return figures


def codes(findings: Findings) -> list[Figure]:
    """Return the shares of -1, 0, +1 of the headline's model; zeros and flips over the steps.

    These of the variants whose images are shown.
    """
    study = findings.study
    headline = study.headline.ternary
    figures: list[Figure] = []
    first = next((m for m in findings.models_of(headline) if m.metrics), None)
    if first is not None:
        rows = [
            (float(entry["step"]), [entry[name]["all"] for name in ("minus", "zero", "plus")])
            for entry in first.metrics
            if "zero" in entry
        ]
        label = first.variant.label
        title = f"Shares of -1, 0 and +1: {label}"
        note = f"All ternary matrices, seed {first.seed}."
        figures += _figure("shares", findings, title, note, share_figure(title, _LAYERS, rows))
    for key, title, note, log in (
        ("zero", "Codes that are 0", "Of all codes, first seed of each.", False),
        (
            "flipped",
            "Codes that flip",
            "Codes that one step changes, of all, at the steps that are logged; logarithmic.",
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
            number = _number(findings, variant.name)
            series.append(Series(variant.label, number, _thinned(points), marked=False))
        drawing = line_figure(title, series, "step", "%", log_y=log)
        figures += _figure(key, findings, title, note, drawing)
    return figures


_MOST_POINTS = 150  # of a line


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of neighbours, so that a long run is not a black band."""
    size = -(-len(points) // _MOST_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(a for a, _ in part), fmean(b for _, b in part)) for part in parts]


def sizes(findings: Findings) -> list[Figure]:
    """Return the distance over bytes on disk, and over latency, of every variant."""
    study = findings.study
    scale = max(study.evaluation.cfg_scales)
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
    figures: list[Figure] = []
    for what, title, series, x_name in (
        ("bytes", "Distance against bytes on disk", by_bytes, "megabytes on disk"),
        ("latency", "Distance against latency", by_time, "milliseconds an image"),
    ):
        drawing = line_figure(title, series, x_name, name, log_x=True, log_y=True)
        figures += _figure(what, findings, title, note, drawing)
    return figures
