"""What the page of an evaluation shows: numbers, verdicts, samples, plots, neighbours, origin.

Its form is `evaluation.html` among the templates of the kit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from terdit_cli.evaluate.neighbours import LOW_QUANTILE, Coverage, NeighbourCheck
from terdit_cli.evaluate.plots import (
    coverage_plot,
    curve_plot,
    memorisation_plot,
    precision_recall_plot,
)
from terdit_cli.evaluate.result import EvalResult, format_interval, format_value, share
from terdit_cli.evaluate.summary import (
    describe_change,
    described,
    differences,
    flat,
    origin,
    verdict,
)
from terdit_cli.report.figures import Plot
from terdit_cli.report.pages import Image, write_page

MOST_CLASSES = 20  # rows of the grid of samples
_MOST_CELLS, _MOST_IN_CLASS = 200, 40
MOST_PAIRS = 8  # of each kind of nearest neighbours
MOST_BARS = 20
_LONGEST_TEXT = 4000  # characters of one value of the provenance
_MEANINGS = {
    "sFID": "spatial features; lower is better",
    "IS": "Inception Score; higher is better",
    "precision": "samples that look real; higher is better",
    "recall": "reals that samples reach; higher is better",
    "KID": "kernel distance; lower is better",
}


@dataclass(frozen=True)
class Pair:
    """A sample and its nearest real image, which may not be at hand."""

    sample: Image
    real: Image | None
    distance: float
    sample_name: str = "sample"
    real_name: str = "nearest real"


@dataclass(frozen=True)
class Neighbours:
    """What the memorisation check found, with pictures of some pairs."""

    check: NeighbourCheck
    closest: Sequence[Pair] = field(default_factory=list)
    typical: Sequence[Pair] = field(default_factory=list)


def classes_to_show(names: Sequence[str]) -> list[str]:
    """Return the classes of the grid: all, or MOST_CLASSES spread over them."""
    count = min(len(names), MOST_CLASSES)
    return [names[index * len(names) // count] for index in range(count)]


def samples_of_class(classes: int) -> int:
    """Return how many samples of each class the grid shows for so many classes."""
    return min(_MOST_IN_CLASS, max(10, _MOST_CELLS // max(1, classes) // 10 * 10))


def write_report(
    path: Path,
    result: EvalResult,
    images_by_class: Mapping[str, Sequence[Image]] | None = None,
    neighbours: Neighbours | None = None,
    coverage: Coverage | None = None,
    baseline: EvalResult | None = None,
) -> None:
    """Write the page.

    Args:
        images_by_class: samples, uint8 [H, W, 3]; one class named "" where they have none. What is
            beyond `classes_to_show` and `samples_of_class` is left out.
        baseline: an earlier result, shown beside this one.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    facts, provenance = origin(result), result.to_dict()["provenance"]
    command, config = provenance.get("command"), provenance.get("config")
    source = str(provenance.get("model") or provenance.get("images") or "images")
    headline = f"{result.distance_name} {format_value(result.distance_name, result.distance)}"
    write_page(
        path,
        "evaluation.html",
        f"{headline}, {verdict(result)}: {source}",
        distance_name=result.distance_name,
        number=format_value,
        longest=_LONGEST_TEXT,
        source=source,
        facts=[*described(result), result.pipeline],
        verdict=verdict(result),
        tone="" if result.passed and not result.gates else "good" if result.passed else "bad",
        cards=list(_cards(result, baseline)),
        gates=result.gates,
        warnings=result.warnings,
        **_samples(result, images_by_class or {}),
        plots=list(_plots(result, coverage, baseline)),
        neighbours=None if neighbours is None else _neighbours(neighbours),
        **_classes(result),
        origin=[
            (key, value)
            for key, value in facts.items()
            if key != "command" and not key.startswith("config.")
        ],
        network=list(flat(config)) if isinstance(config, Mapping) else [],
        changed=[] if baseline is None else differences(result, baseline),
        command=" ".join(map(str, command)) if isinstance(command, list) else command,
        date=provenance.get("date", "no date"),
    )


def _cards(result: EvalResult, baseline: EvalResult | None) -> Iterator[dict[str, Any]]:
    """Yield what the cards of the metrics say, the primary one first."""
    errors = "KID standard error"  # part of the card of KID
    names = sorted(result.metrics, key=lambda name: name != result.distance_name)
    for name in names:
        value, interval = result.metrics[name], result.intervals.get(name)
        if name == errors:
            continue
        old = None if baseline is None else baseline.metrics.get(name)
        meaning = _MEANINGS.get(name, "")
        if name == result.distance_name:
            meaning = "distance to the reference; lower is better"
        elif name == f"{result.distance_name} infinity":
            meaning = "extrapolated to infinitely many images"
        yield {
            "name": name,
            "value": value,
            "interval": interval and format_interval(name, interval),
            "error": name == "KID"
            and errors in result.metrics
            and format_value(errors, result.metrics[errors]),
            "before": old,
            "change": old is not None and describe_change(name, value, old),
            "meaning": meaning,
        }


def _samples(result: EvalResult, by_class: Mapping[str, Sequence[Image]]) -> dict[str, Any]:
    names = [name for name, images in by_class.items() if len(images)]
    shown = classes_to_show(names)
    rows = []
    for name in shown:
        detail = None
        if name in result.per_class:
            distance = format_value(result.distance_name, result.per_class[name])
            detail = f"{result.distance_name} {distance}"
        rows.append((name, detail, by_class[name][: samples_of_class(len(shown))]))
    note = "The first images" + (" of each class" if any(shown) else "") + "; none were picked."
    if len(shown) < len(names):
        note += f" {len(shown)} of {len(names):,} classes, spread evenly."
    return {"samples": rows, "samples_note": note}


def _plots(
    result: EvalResult, coverage: Coverage | None, baseline: EvalResult | None
) -> Iterator[Plot]:
    name = result.distance_name
    infinity = result.metrics.get(f"{name} infinity", math.nan)
    limits = [gate.limit for gate in result.gates if gate.metric == name]
    plots = [
        curve_plot(name, result.curve, infinity, min(limits, default=None)),
        precision_recall_plot(
            _precision_recall(result), None if baseline is None else _precision_recall(baseline)
        ),
        None if coverage is None else coverage_plot(coverage),
    ]
    return filter(None, plots)


def _precision_recall(result: EvalResult) -> tuple[float, float]:
    return result.metrics.get("precision", math.nan), result.metrics.get("recall", math.nan)


def _neighbours(neighbours: Neighbours) -> dict[str, Any]:
    check = neighbours.check
    values = {
        "median, sample to real": float(np.median(check.distances)),
        "median, real to real": float(np.median(check.real_distances)),
        "closest sample": float(check.distances.min()),
        "closest reals": float(check.real_distances.min()),
    }
    largest = max(values.values()) or 1.0
    return {
        "note": f"Searched among {check.searched:,} real images. Memorisation can show only where "
        "these include the images the model was trained on.",
        "plot": memorisation_plot(check),
        "finding": f"{100 * check.share_closer:.1f} % of {len(check.distances):,} samples lie "
        f"closer to a real image than {100 * (1 - LOW_QUANTILE):.0f} % of the real images lie to "
        f"theirs; about {100 * LOW_QUANTILE:.0f} % would be expected of new images.",
        "medians": [(name, value, value / largest) for name, value in values.items()],
        "groups": [
            ("The closest of all", neighbours.closest[:MOST_PAIRS]),
            ("Typical ones", neighbours.typical[:MOST_PAIRS]),
        ],
    }


def _classes(result: EvalResult) -> dict[str, Any]:
    ordered = sorted(result.per_class.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
    note = "Largest first. A class has few images: compare only with equal numbers of them."
    parts = [ordered] if ordered else []
    if len(ordered) > MOST_BARS:
        half = MOST_BARS // 2
        parts = [ordered[:half], ordered[-half:]]
        note += f" The {half} largest and the {half} smallest of {len(ordered):,}."
    finite = [value for _, value in ordered if math.isfinite(value)]
    largest = max(finite, default=1.0) or 1.0

    def row(name: str, value: float) -> tuple[str, float, str]:
        text = format_value(result.distance_name, value)
        if name in result.recognised:
            text += f", {share(result.recognised[name])} recognised"
        return name, max(0.0, value / largest) if math.isfinite(value) else 0.0, text

    return {"classes": [[row(*item) for item in part] for part in parts], "classes_note": note}
