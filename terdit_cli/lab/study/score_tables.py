"""The tables of a study: a row is a variant, its numbers are means over the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from terdit_cli import console
from terdit_cli.lab.study.collect import Findings, Mean, Model, guidance, steps_named
from terdit_cli.lab.study.records import Footprint
from terdit_cli.report.blocks import Block, Heading, Table, Text
from terdit_cli.report.figures import number

_MOST_CLASSES = 40  # columns of the table of classes


def main_table(findings: Findings, scale: float, n: int | None = None) -> Table:
    """Return the distances and what goes with them, with one CFG scale.

    Args:
        n: images of a model of a pair, beside its own baseline; None: as many as all variants have,
            all beside the headline's baseline.
    """
    study = findings.study
    rows = []
    for variant in study.variants:
        scores = [score for _, score in findings.finals(variant.name, scale, n)]
        distance = findings.distance(variant.name, scale, n)
        if distance is None:
            continue
        baseline = None if n is None else study.baseline_of(variant.name)
        ratio = findings.ratio(variant.name, scale, n, baseline)
        rows.append(
            (
                variant.label,
                _with_range(number(distance.mean), distance),
                "" if ratio is None else _with_range(f"{ratio.mean:.3f}", ratio),
                *(_mean([s.metric(name) for s in scores], 3) for name in ("precision", "recall")),
                _mean([s.metric("KID") for s in scores], 4),
                _percent([s.accuracy.all for s in scores if s.accuracy]),
                _percent([s.nearest.share_closer for s in scores if s.nearest]),
                str(len(scores)),
                f"{scores[0].n:,}",
                steps_named(study, variant),
            )
        )
    header = (
        guidance(scale), findings.distance_name, "ratio", "precision", "recall", "KID",
        "classifier accuracy", "memorisation rate", "seeds", "images", "steps",
    )  # fmt: skip
    return Table(header, rows, _strong(findings))


def _with_range(shown: str, mean: Mean) -> str:
    return f"{shown} ({mean.spread})" if mean.spread else shown


def _strong(findings: Findings) -> list[str]:
    return [findings.study.variant(name).label for name in findings.study.paired]


def cost_of(findings: Findings, name: str) -> Model | None:
    """Return the model of a variant whose footprint was measured."""
    return next((m for m in findings.models_of(name) if m.footprint is not None), None)


def _mean(values: Sequence[float | None], places: int) -> str:
    """Return the mean of what is there, "" of nothing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{fmean(known):.{places}f}" if known else ""


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f} %" if values else ""


def loss_table(findings: Findings) -> Table:
    """Return the losses at the last step, by quarter of the timesteps too."""
    study = findings.study
    rows = []
    for variant in study.variants:
        step = study.steps_of(variant)[-1]
        losses = [m.losses[step] for m in findings.models_of(variant.name) if step in m.losses]
        if not losses:
            continue
        rows.append(
            (
                variant.label,
                _mean([loss.loss for loss in losses], 5),
                _mean([loss.mse for loss in losses], 5),
                _mean([loss.vb for loss in losses], 5),
                *(_mean([loss.quarters[i] for loss in losses], 5) for i in range(4)),
                str(len(losses)),
            )
        )
    header = ("last step", "loss", "mse", "vb", *(f"quarter {i}" for i in range(1, 5)), "seeds")
    return Table(header, rows, _strong(findings))


def cost_table(findings: Findings) -> Table:
    """Return bytes, operations and the work of training beside the distance."""
    scale = findings.study.largest_scale
    rows = []
    for variant, distance, model, cost in _costs(findings, scale):
        rates = [entry["images_per_second"] for entry in model.metrics]
        memory = [entry.get("memory_bytes") or 0 for entry in model.metrics]
        rows.append(
            (
                variant,
                distance,
                f"{cost.parameters:,}",
                f"{100 * cost.ternary / cost.parameters:.1f} %",
                f"{cost.bytes:,}",
                f"{cost.file_bytes['t5']:,}" if "t5" in cost.file_bytes else "",
                f"{cost.forward_flops / 1e9:.3g}",
                f"{median(rates):.0f}" if rates else "",
                console.byte_size(max(memory)) if any(memory) else "",
                _hours(findings, model),
            )
        )
    header = (
        "variant", f"{findings.distance_name}, {guidance(scale)}", "parameters", "ternary",
        "bytes", "as t5", "GFLOP per forward", "training images/s", "training memory",
        "training time",
    )  # fmt: skip
    return Table(header, rows, _strong(findings))


def latency_table(findings: Findings) -> Table:
    """Return memory and latency of sampling beside the distance."""
    scale = findings.study.largest_scale
    rows = []
    for variant, distance, _, cost in _costs(findings, scale):
        timed = findings.timed(cost)
        times = [1000 * seconds for seconds in sorted(timed.latency)] if timed else []
        rows.append(
            (
                variant,
                distance,
                f"{median(times):.3g} ({times[0]:.3g} to {times[-1]:.3g})" if times else "",
                f"{cost.nfe}",
                console.byte_size(cost.peak_bytes) if cost.peak_bytes else "",
                _runs_as(timed or cost),
                (timed or cost).machine,
            )
        )
    header = (
        "variant", f"{findings.distance_name}, {guidance(scale)}", "ms per image",
        "forwards per image", "memory", "runs as", "machine",
    )  # fmt: skip
    return Table(header, rows, _strong(findings))


def _costs(findings: Findings, scale: float) -> Iterator[tuple[str, str, Model, Footprint]]:
    """Yield label, distance, model and footprint of each variant that has one."""
    for variant in findings.study.variants:
        model = cost_of(findings, variant.name)
        if model is not None and model.footprint is not None:
            distance = findings.distance(variant.name, scale)
            shown = "" if distance is None else number(distance.mean)
            yield variant.label, shown, model, model.footprint


def _runs_as(cost: Footprint) -> str:
    library = f"{cost.backend} {cost.isa}" if cost.isa else cost.backend
    return f"{cost.form}, {library}, {cost.activations}, threads {cost.threads}"


def _hours(findings: Findings, model: Model) -> str:
    """Return "54m + 1h 01m" of a model that is initialised from another one."""
    parts = []
    for variant in findings.study.lineage(model.variant):
        found = (m.training for m in findings.models_of(variant.name) if m.seed == model.seed)
        training = next(found, None)
        if training is None or not training.seconds:
            return ""
        parts.append(console.duration(training.seconds))
    return " + ".join(parts)


def class_table(findings: Findings) -> Iterator[Block]:
    """Yield the accuracy of the linear probe on the generated images of each class."""
    study, probe = findings.study, findings.probe
    scale = study.largest_scale

    rows = list(_by_class(findings, scale))
    if probe is None or not rows or len(findings.class_names) > _MOST_CLASSES:
        return
    yield Heading(3, f"Does an image look like its class? ({guidance(scale)})")
    yield Text(
        "A linear probe (multinomial logistic regression) on the features of "
        f"{probe.trained_on:,} training images recognises {100 * probe.accuracy:.1f} % of "
        f"{probe.held_out:,} that were held out. Shares of generated images that it takes for "
        "their class:"
    )
    real = [f"{100 * probe.per_class[name]:.1f}" for name in findings.class_names]
    header = ("%", "all", *findings.class_names)
    yield Table(
        header,
        [("real images, held out", f"{100 * probe.accuracy:.1f}", *real), *rows],
        _strong(findings),
    )


def _by_class(findings: Findings, scale: float) -> Iterator[tuple[str, ...]]:
    for variant in findings.study.variants:
        finals = findings.finals(variant.name, scale)
        found = [score.accuracy for _, score in finals if score.accuracy is not None]
        if found:
            classes = [
                _mean([100 * accuracy.per_class[name] for accuracy in found], 1)
                for name in findings.class_names
            ]
            yield (variant.label, _mean([100 * accuracy.all for accuracy in found], 1), *classes)


def nearest_table(findings: Findings) -> Iterator[Block]:
    """Yield the distances to the nearest training image."""
    study = findings.study
    scale = study.largest_scale
    rows = []
    for variant in study.variants:
        found = [s.nearest for _, s in findings.finals(variant.name, scale) if s.nearest]
        if not found:
            continue
        rows.append(
            (
                variant.label,
                _mean([near.median for near in found], 3),
                _mean([near.real_median for near in found], 3),
                _mean([near.closest for near in found], 3),
                _mean([near.real_closest for near in found], 3),
                _percent([near.share_closer for near in found]),
                f"{found[0].looked_at:,}",
                f"{found[0].searched:,}",
            )
        )
    if rows:
        yield Heading(3, f"Does it copy its training images? ({guidance(scale)})")
        yield Text(
            "Distances in feature space from generated images to the nearest of so many training "
            'images, evenly spread ("among"), beside those from these to their nearest other one. '
            "A model that copies would be nearer; so are images that are smoother than real ones, "
            "which the pictures tell apart. The memorisation rate is the share of images that "
            "are nearer than 99 % of the reals. Copies of training images that are not among them "
            "are not seen."
        )
        header = (
            "variant", "median", "median, reals", "closest", "closest reals",
            "memorisation rate", "images", "among",
        )  # fmt: skip
        yield Table(header, rows, _strong(findings))
