"""The sections of the report that show images and pictures.

Each takes what was measured and returns a <section>, or None where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from terdit_cli.evaluate.markup import Image, Markup, element, picture
from terdit_cli.evaluate.neighbours import LOW_QUANTILE, Coverage, NeighbourCheck
from terdit_cli.evaluate.plots import (
    bar,
    coverage_plot,
    curve_plot,
    legend,
    memorisation_plot,
    precision_recall_plot,
)
from terdit_cli.evaluate.result import EvalResult, format_value, share

MOST_CLASSES = 20  # rows of the grid of samples
_MOST_CELLS, _MOST_IN_CLASS = 200, 40
MOST_PAIRS = 8  # of each kind of nearest neighbours
MOST_BARS = 20
_CELL_PIXELS, _PAIR_PIXELS = 128, 160  # longer side of a photo in the page


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


def samples(result: EvalResult, images_by_class: Mapping[str, Sequence[Image]]) -> Markup | None:
    names = [name for name, images in images_by_class.items() if len(images)]
    if not names:
        return None
    shown = classes_to_show(names)
    most = samples_of_class(len(shown))
    rows = []
    for name in shown:
        cells = [
            picture(image, f"{name or 'sample'}, {index + 1}", _CELL_PIXELS)
            for index, image in enumerate(images_by_class[name][:most])
        ]
        label = None
        if name:
            distance = result.per_class.get(name)
            detail = None
            if distance is not None:
                text = f"{result.distance_name} {format_value(result.distance_name, distance)}"
                detail = element("span", text)
            label = element("div", name, detail, class_="class-name")
        grid = element("div", *cells, class_="cells")
        rows.append(element("div", label, grid, class_="class-row" if name else "class-row single"))
    note = "The first images" + (" of each class" if any(shown) else "") + "; none were picked."
    if len(shown) < len(names):
        note += f" {len(shown)} of {len(names):,} classes, spread evenly."
    return element(
        "section",
        element("h2", "Samples"),
        element("p", note, class_="note"),
        element("div", *rows, class_="panel"),
    )


def pictures(
    result: EvalResult, coverage: Coverage | None, baseline: EvalResult | None
) -> Markup | None:
    name = result.distance_name
    panels = []
    infinity = result.metrics.get(f"{name} infinity")
    limits = [gate.limit for gate in result.gates if gate.metric == name]
    plot = curve_plot(name, result.curve, infinity, min(limits, default=None))
    if plot is not None:
        note = f"A finite number of images makes {name} larger than it is."
        if infinity is not None and math.isfinite(infinity):
            note += " The dashed line goes on to infinitely many."
        panels.append(_panel(f"{name} over the number of images", note, plot))
    both = _precision_recall(result)
    if both is not None:
        earlier = _precision_recall(baseline) if baseline is not None else None
        plot = precision_recall_plot(both, earlier)
        note = (
            "Precision: how many samples look real. Recall: how much of the real variety they have."
        )
        if plot is not None:
            panels.append(_panel("Precision and recall", note, plot))
    if coverage is not None:
        panels.append(_coverage(coverage))
    if not panels:
        return None
    columns = element("div", *panels, class_="columns")
    return element("section", element("h2", "Fidelity and variety"), columns)


def _precision_recall(result: EvalResult) -> tuple[float, float] | None:
    if "precision" not in result.metrics or "recall" not in result.metrics:
        return None
    return result.metrics["precision"], result.metrics["recall"]


def _coverage(coverage: Coverage) -> Markup:
    note = (
        f"The two largest principal components, {100 * coverage.variance:.0f} % of the variance. "
        f"Covered: inside the ball to the {_ordinal(coverage.k)} neighbour of a point of the other "
        f"set, among the {len(coverage.real):,} reals and {len(coverage.fake):,} samples looked at."
    )
    entries = legend(
        ("dots real", f"real, covered ({_share(coverage.real_covered)})"),
        ("crosses real", f"real, missed ({_share(~coverage.real_covered)})"),
        ("dots fake", f"sample, covered ({_share(coverage.fake_covered)})"),
        ("crosses fake", f"sample, unrealistic ({_share(~coverage.fake_covered)})"),
    )
    return _panel("Feature space", note, coverage_plot(coverage), entries)


def _ordinal(k: int) -> str:
    return {1: "nearest", 2: "second", 3: "third"}.get(k, f"{k}th")


def _share(flags: NDArray[np.bool_]) -> str:
    return f"{100 * float(flags.mean()):.1f} %"


def _panel(title: str, note: str, plot: Markup, *words: Markup) -> Markup:
    text = element("figcaption", element("h3", title), element("p", note, class_="note"), *words)
    return element("figure", text, plot, class_="panel picture")


def nearest_reals(neighbours: Neighbours | None) -> Markup | None:
    if neighbours is None:
        return None
    check = neighbours.check
    share = 100 * check.share_closer
    finding = (
        f"{share:.1f} % of {len(check.distances):,} samples lie closer to a real image than "
        f"{100 * (1 - LOW_QUANTILE):.0f} % of the real images lie to theirs; about "
        f"{100 * LOW_QUANTILE:.0f} % would be expected of new images."
    )
    key = legend(("area real", "real to real"), ("area fake", "sample to real"))
    note = "Dashed: the medians. Samples far to the left of the reals would be copies."
    content = [
        element("h2", "Nearest real images"),
        element(
            "p",
            f"Searched among {check.searched:,} real images. Memorisation can show only where "
            "these include the images the model was trained on.",
            class_="note",
        ),
    ]
    histogram = _panel(
        "Memorisation check",
        note,
        memorisation_plot(check),
        key,
        element("p", finding, class_="finding"),
        element("dl", *_medians(check), class_="bars"),
    )
    content.append(element("div", histogram, class_="columns"))
    for title, pairs in (
        ("The closest of all", neighbours.closest),
        ("Typical ones", neighbours.typical),
    ):
        if pairs:
            cards = (_pair(pair) for pair in pairs[:MOST_PAIRS])
            content.append(
                element(
                    "div",
                    element("h3", title),
                    element("div", *cards, class_="pairs"),
                    class_="panel",
                )
            )
    return element("section", *content)


def _medians(check: NeighbourCheck) -> Iterator[Markup]:
    values = {
        "median, sample to real": float(np.median(check.distances)),
        "median, real to real": float(np.median(check.real_distances)),
        "closest sample": float(check.distances.min()),
        "closest reals": float(check.real_distances.min()),
    }
    largest = max(values.values()) or 1.0
    for name, value in values.items():
        yield element("dt", name)
        yield element("dd", bar(value / largest))
        yield element("dd", f"{value:.4g}")


def _pair(pair: Pair) -> Markup:
    sides = [(pair.sample, pair.sample_name), (pair.real, pair.real_name)]
    cells = [
        element(
            "div",
            picture(image, name, _PAIR_PIXELS) if image is not None else None,
            element("span", name),
        )
        for image, name in sides
    ]
    text = f"distance {pair.distance:.4g}" + (" (a copy)" if pair.distance == 0 else "")
    return element(
        "div",
        element("div", *cells, class_="pair-images"),
        element("p", text),
        class_="pair",
    )


def distances_by_class(result: EvalResult) -> Markup | None:
    if not result.per_class:
        return None
    ordered = sorted(result.per_class.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
    note = "Largest first. A class has few images: compare only with equal numbers of them."
    parts = [ordered]
    if len(ordered) > MOST_BARS:
        parts = [ordered[: MOST_BARS // 2], ordered[-(MOST_BARS // 2) :]]
        note += (
            f" The {MOST_BARS // 2} largest and the {MOST_BARS // 2} smallest of {len(ordered):,}."
        )
    finite = [value for _, value in ordered if math.isfinite(value)]
    largest = max(finite, default=1.0) or 1.0
    lists = []
    for part in parts:
        rows: list[Markup] = []
        for name, value in part:
            length = value / largest if math.isfinite(value) else 0.0
            rows.append(element("dt", name))
            rows.append(element("dd", bar(length)))
            text = format_value(result.distance_name, value)
            if name in result.recognised:
                text += f", {share(result.recognised[name])} recognised"
            rows.append(element("dd", text))
        lists.append(element("dl", *rows, class_="bars panel"))
    return element(
        "section",
        element("h2", f"{result.distance_name} by class"),
        element("p", note, class_="note"),
        *lists,
    )
