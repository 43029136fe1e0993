"""Shards of features and a reference -> every metric that they allow.

All metrics of the images come from the same features, read in the order of the images. What a
pipeline does not define (sFID without spatial features, IS without a classifier) or a reference
does not hold (KID, precision and recall without features) is left out, never replaced.

Shapes: D features, N images, M reference images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.errors import UsageError
from terdit_cli.evaluate.confidence import bootstrap_interval, frechet_infinity, frechet_over_n
from terdit_cli.evaluate.feature_shards import FeatureShards
from terdit_cli.evaluate.metrics import (
    INCEPTION_SPLIT,
    frechet_distance,
    frechet_distance_of_samples,
    inception_score,
    kernel_inception_distances,
    kernel_inception_standard_error,
    precision_recall,
)
from terdit_cli.evaluate.probe import fit_probe
from terdit_cli.evaluate.reference_set import Reference
from terdit_cli.evaluate.request import NEIGHBOURS
from terdit_cli.evaluate.statistics import FeatureStatistics, spread

KID_SAMPLES, KID_SUBSET = 10_000, 1000  # of each side
LEAST_REALS = 20  # of each class, to fit a probe to and to hold some out

Samples = NDArray[np.float32]
ClassMembers = dict[str, tuple[list[int], list[int]]]  # class -> our images, the reference's


@dataclass(frozen=True)
class Asked:
    """What beyond the metrics that are always computed is wanted."""

    pr_samples: int | None = KID_SAMPLES  # of each side; None: all; 0: no precision and recall
    replicates: int = 0  # of the bootstrap; if there are any, the curve over n and its limit too
    seed: int = 0


@dataclass
class Scores:
    """Fields of EvalResult."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recognised:
    """What a linear probe on the reference's features makes of images of known classes."""

    by_class: dict[str, float]  # shares of images that it takes for their class
    all: float
    reals: float  # of the reference's own images, each tenth of which it was not fitted to


def statistics_of(shards: FeatureShards, name: str) -> FeatureStatistics | None:
    """Return mean and covariance of one kind of features, None where there are none."""
    statistics: FeatureStatistics | None = None
    for part in shards.stream(name):
        if statistics is None:
            statistics = FeatureStatistics(part.shape[1])
        statistics.update(part)
    return statistics


def score(name: str, ours: FeatureShards, theirs: Reference, asked: Asked) -> Scores:
    """Compute all metrics; `name` is the primary distance's.

    Raises:
        UsageError: too few images for what is asked.
    """
    scores = Scores()
    pool = statistics_of(ours, "pool")
    assert pool is not None, "every extractor pools"
    distance = frechet_distance(theirs.mean, theirs.covariance, pool.mean, pool.covariance)
    scores.metrics[name] = distance
    spatial = statistics_of(ours, "spatial")
    if spatial and theirs.spatial_mean is not None and theirs.spatial_covariance is not None:
        scores.metrics["sFID"] = frechet_distance(
            theirs.spatial_mean, theirs.spatial_covariance, spatial.mean, spatial.covariance
        )
    logits = ours.rows("logits")
    if logits is not None:
        scores.metrics["IS"] = inception_score(logits)
        last = len(logits) % INCEPTION_SPLIT
        if len(logits) > INCEPTION_SPLIT and last:
            scores.warnings.append(
                f"the last split of the Inception Score has {last} of {INCEPTION_SPLIT} images, "
                "which lowers the mean: choose a multiple"
            )
    if theirs.features is not None:
        _compare_samples(scores, ours, theirs.features, asked)
    if asked.replicates:
        features = _rows(ours)
        scores.intervals[name] = bootstrap_interval(
            theirs.mean, theirs.covariance, features, asked.replicates, asked.seed
        )
    if asked.replicates:
        scores.curve = frechet_over_n(theirs.mean, theirs.covariance, _rows(ours), seed=asked.seed)
        try:
            scores.metrics[f"{name} infinity"] = frechet_infinity(scores.curve, pool.dim)
        except UsageError as error:  # the curve itself is still worth showing
            scores.warnings.append(f"no {name} infinity: {error}")
    counts = {"images": ours.count, "of the reference": theirs.count}
    few = [f"{n} {what}" for what, n in counts.items() if n is not None and n <= pool.dim]
    if few:
        scores.warnings.append(
            f"{' and '.join(few)} for {pool.dim} features: the distance is biased upwards; compare "
            "it only with distances of the same n and reference"
        )
    return scores


def effect_of_bf16(ours: FeatureShards, theirs: Reference) -> dict[str, float]:
    """Return the distance of the first images by features of both precisions.

    The difference is what bfloat16 does to the distance at this n; what it does at a larger n is
    about the same, while the distances themselves fall.
    """
    exact = statistics_of(ours, "pool_fp32")
    assert exact is not None, "a run in bf16 makes some features in fp32 too"
    rough = FeatureStatistics(exact.dim)
    rough.update(_rows(ours, range(exact.count)))
    distances = [
        frechet_distance(theirs.mean, theirs.covariance, part.mean, part.covariance)
        for part in (exact, rough)
    ]
    return {"n": exact.count, "fp32": distances[0], "bf16": distances[1]}


def _compare_samples(scores: Scores, ours: FeatureShards, reals: Samples, asked: Asked) -> None:
    """Add KID, precision and recall."""
    fakes = _rows(ours, spread(ours.count, KID_SAMPLES))
    if min(len(fakes), len(reals)) >= 2:
        some = _some(reals, KID_SAMPLES)
        smaller = min(len(fakes), len(some))
        subset = min(smaller, KID_SUBSET)
        distances = kernel_inception_distances(
            some, fakes, max_subset_size=subset, seed=asked.seed % 2**32
        )
        scores.metrics["KID"] = float(distances.mean())
        error = kernel_inception_standard_error(distances, subset, smaller)
        if error is not None:
            scores.metrics["KID standard error"] = error
    if asked.pr_samples == 0:
        return
    most = max(ours.count, len(reals)) if asked.pr_samples is None else asked.pr_samples
    fakes = _rows(ours, spread(ours.count, most))
    reals = _some(reals, most)
    if min(len(fakes), len(reals)) <= NEIGHBOURS:
        return
    if len(fakes) * len(reals) > 10**9:
        console.note(f"precision and recall of {len(reals)} and {len(fakes)} images: minutes")
    precision, recall = precision_recall(reals, fakes, NEIGHBOURS)
    scores.metrics |= {"precision": precision, "recall": recall}


def _rows(shards: FeatureShards, images: Sequence[int] | None = None) -> Samples:
    rows = shards.rows("pool", images)
    assert rows is not None, "every extractor pools"
    return rows


def _some(samples: Samples, most: int) -> Samples:
    return samples if len(samples) <= most else samples[spread(len(samples), most)]


def class_members(
    our_classes: list[str], their_classes: list[str], wanted: list[str]
) -> ClassMembers:
    """Return the images of each wanted class, from the class of each image.

    Raises:
        UsageError: a class with fewer than two images on a side.
    """
    fakes, reals = _by_class(our_classes), _by_class(their_classes)
    for name in wanted:
        for side, images in (("the images", fakes), ("the reference", reals)):
            if len(images[name]) < 2:
                raise UsageError(
                    "too few images of a class",
                    got=f"{len(images[name])} of {name!r} in {side}",
                    expected="at least 2 on both sides",
                    where="--per-class",
                    fix=f"give more images, or other classes: {side} has {_most(images)}",
                )
    return {name: (fakes[name], reals[name]) for name in wanted}


def _most(images: dict[str, list[int]]) -> str:
    """Return the classes with the most images, for a message."""
    names = sorted((name for name in images if images[name]), key=lambda name: -len(images[name]))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def score_classes(
    ours: FeatureShards, theirs: FeatureShards, members: ClassMembers
) -> dict[str, float]:
    """Return the Frechet distance of each class, by name."""
    return {
        name: frechet_distance_of_samples(_rows(theirs, reals), _rows(ours, fakes))
        for name, (fakes, reals) in members.items()
    }


def recognise(
    ours: FeatureShards, theirs: FeatureShards, members: ClassMembers
) -> Recognised | None:
    """Return whether images look like their class to a linear probe on the reference's features.

    None of one class, which is all there is to see, or of too few images to fit and try a probe.
    """
    names = list(members)
    labels = [np.full(len(reals), index) for index, (_, reals) in enumerate(members.values())]
    if len(names) < 2 or min(map(len, labels)) < LEAST_REALS:
        return None
    reals = np.concatenate([_rows(theirs, reals) for _, reals in members.values()])
    probe = fit_probe(reals, np.concatenate(labels), len(names))
    found = [probe.classify(_rows(ours, fakes)) for fakes, _ in members.values()]
    shares = {name: float((found[i] == i).mean()) for i, name in enumerate(names)}
    right = sum(int((part == index).sum()) for index, part in enumerate(found))
    total = sum(map(len, found))
    return Recognised(shares, right / total, probe.held_out_accuracy)


def _by_class(classes: list[str]) -> defaultdict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        found[name].append(index)
    return found
