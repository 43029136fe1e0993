"""How far a Frechet distance of n samples can be trusted: an interval, a curve over n, its limit.

A distance of n samples is too large by about b / n, and another n samples would give another one.
These are two questions:

    interval   d +- 1.96 s        where the distances of other n samples of the same model lie
               s^2 = var(d of n - k samples) (n - k) / k,   k = n / 10 left out at random
    infinity   d(n) = d_inf + b / n, fitted over n        what is left when the bias is gone

The interval is for its n and does not reach for d_inf: a limit set for 50,000 images says nothing
about 1,000. Only the samples vary; the reference counts as given. Shapes: M samples, D features.

Why samples are left out and not drawn with replacement: a resample holds each of its samples 1.6
times on average, which for this distance is the same as fewer samples. Its distances all lie far
above d, and the usual percentile interval misses nearly always (of Gaussians with a known distance,
0 to 13 % of 95 % intervals held it), while their spread is up to three times too large for n < D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.errors import UsageError
from terdit_cli.evaluate.metrics import BLOCK_ROWS, frechet_distance
from terdit_cli.evaluate.statistics import FeatureStatistics

Matrix = NDArray[np.float64]
Samples = NDArray[Any]  # [M, D], of any float dtype; only parts of it are converted

NORMAL_95 = 1.959963984540054  # of a normal distribution, 95 % lie within so many deviations
LEFT_OUT = 10  # each replicate leaves out one sample of so many
LEAST_SAMPLES = 2 * LEFT_OUT
POINTS = 15  # of a curve over n
LEAST_FITTED = 2  # the law b / n holds from n = 2 D on; the fit needs a range of twice that


def normal_interval(value: float, standard_error: float) -> tuple[float, float]:
    """Return the 95 % interval of an estimate with a normal error."""
    return value - NORMAL_95 * standard_error, value + NORMAL_95 * standard_error


def bootstrap_interval(
    mean: Matrix, covariance: Matrix, fake: Samples, replicates: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the Frechet distance of a reference and samples.

    It covers the sampling of the M fakes, as if drawn independently (balanced classes vary less:
    then it is a little wide), at this M; neither the bias of M samples nor the choice of the
    reference. In simulations it held the expected distance of M samples 93 to 100 % of the time.
    Source: m of n bootstrap without replacement (Bickel, Goetze and van Zwet 1997), which with
    n - k of n is the delete-k jackknife of Shao and Wu 1989.

    Args:
        mean, covariance: of the reference, float64 [D], [D, D].
        fake: [M, D]; up to M = D a replicate costs the eigenvalues of an [M, M] matrix, above that
            a covariance of M / 10 samples and a `frechet_distance`.
        replicates: 100 know the width to 7 %.
        seed: of what is left out; the interval is a function of the arguments.

    Raises:
        UsageError: fewer than 20 samples. ValueError: shapes, or not finite.
    """
    if len(fake) < LEAST_SAMPLES:
        raise UsageError(
            "too few images for an interval",
            got=len(fake),
            expected=f"at least {LEAST_SAMPLES}",
            fix=f"-n {LEAST_SAMPLES}",
        )
    if replicates < 2:
        raise ValueError(f"{replicates} replicates, expected >= 2")
    count, dim = fake.shape
    left_out = count // LEFT_OUT
    random = np.random.default_rng(seed)
    subsets = _Subsets(mean, covariance, fake) if count - left_out <= dim else None
    whole = FeatureStatistics(dim)
    for start in range(0, count, BLOCK_ROWS):
        whole.update(fake[start : start + BLOCK_ROWS])
    found = []
    for _ in range(replicates):
        order = random.permutation(count)
        if subsets is not None:
            found.append(subsets.distance(order[left_out:]))
        else:
            rest = _without(whole, fake[np.sort(order[:left_out])])
            found.append(frechet_distance(mean, covariance, *rest))
    distance = frechet_distance(mean, covariance, whole.mean, whole.covariance)
    error = float(np.std(found, ddof=1)) * math.sqrt((count - left_out) / left_out)
    low, high = normal_interval(distance, error)
    return max(0.0, low), high


def frechet_over_n(
    mean: Matrix, covariance: Matrix, fake: Samples, points: int = POINTS, seed: int = 0
) -> list[tuple[int, float]]:
    """Return (n, Frechet distance of the reference and n of the samples) for growing n up to M.

    The sizes are evenly spaced from M / 10; each subset holds those before it, in an order that is
    a function of the seed, so that one pass over the samples makes the whole curve.

    Args:
        mean, covariance: of the reference, float64 [D], [D, D].
        fake: [M, D], M >= 2.

    Raises:
        ValueError: shapes, or not finite.
    """
    count, dim = fake.shape
    order = np.random.default_rng(seed).permutation(count)
    sizes = np.unique(np.linspace(max(2, count // 10), count, points).round().astype(int))
    subsets = _Subsets(mean, covariance, fake[order[:dim]])
    growing = FeatureStatistics(dim)
    curve = []
    for size in map(int, sizes):
        while growing.count < size:
            end = min(size, growing.count + BLOCK_ROWS)
            growing.update(fake[order[growing.count : end]])
        if size <= dim:
            distance = subsets.distance(np.arange(size))
        else:
            distance = frechet_distance(mean, covariance, growing.mean, growing.covariance)
        curve.append((size, distance))
    return curve


def frechet_infinity(curve: Sequence[tuple[int, float]], dim: int) -> float:
    """Return the limit of a curve for n -> infinity: the intercept of a line over 1 / n.

    It is nearly free of bias, so it compares sets of different sizes; it may be a little below 0
    where the distance is. Source: Chong and Forsyth 2020 (arXiv 1911.07023), who start at 5,000
    samples of 2,048 features; with fewer than twice as many samples as features the distance does
    not follow the line, and such points are left out.

    Args:
        curve: of `frechet_over_n`.
        dim: D.

    Raises:
        UsageError: the curve ends below 4 D samples.
    """
    largest = max(n for n, _ in curve)
    least = 2 * LEAST_FITTED * dim
    fitted = [(n, distance) for n, distance in curve if n >= LEAST_FITTED * dim]
    if largest < least or len(fitted) < 3:
        raise UsageError(
            "too few images to extrapolate the distance",
            got=largest,
            expected=f"at least {least}, 4 for each of {dim} features",
            fix=f"-n {least}, or compare distances of the same n",
        )
    n, distances = np.array(fitted).T
    return float(np.polyfit(1 / n, distances, 1)[1])


class _Subsets:
    """Distances of a reference to subsets of at most D samples, without a [D, D] matrix each.

    With X the samples less the reference's mean, tr (S1 S2)^1/2 of a subset is the sum of the roots
    of the eigenvalues of its part of X S1 X^T, centred in rows and columns, over n - 1.
    """

    def __init__(self, mean: Matrix, covariance: Matrix, samples: Samples) -> None:
        self._x = torch.from_numpy(samples - np.asarray(mean, dtype=np.float64))
        sigma = torch.from_numpy(np.array(covariance, dtype=np.float64))
        self._gram = self._x @ sigma @ self._x.T
        self._variance = float(sigma.trace())

    def distance(self, rows: NDArray[np.int_]) -> float:
        """Return the distance of the samples in `rows`, [n]."""
        chosen = torch.from_numpy(rows)
        x, gram = self._x[chosen], self._gram[chosen][:, chosen]
        gap = x.mean(dim=0)
        centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
        # Centring leaves one eigenvalue that should be 0; the root of what it comes out as is
        # about 1e-8 of the largest root.
        values = torch.linalg.eigvalsh(centred / (len(rows) - 1)).clamp_min(0)
        variance = float((x - gap).square().sum()) / (len(rows) - 1)
        apart = float(gap @ gap)
        return max(0.0, apart + self._variance + variance - 2 * float(values.sqrt().sum()))


def _without(whole: FeatureStatistics, samples: Samples) -> tuple[Matrix, Matrix]:
    """Return mean and covariance of a set less some of its samples.

    The rule by which `FeatureStatistics` adds a batch, solved for the part before it.
    """
    count = whole.count - len(samples)
    batch = np.asarray(samples, dtype=np.float64)
    batch_mean = batch.mean(axis=0)
    mean = (whole.count * whole.mean - len(batch) * batch_mean) / count
    centred, gap = batch - batch_mean, mean - batch_mean
    scatter = whole.covariance * (whole.count - 1) - centred.T @ centred
    scatter -= np.outer(gap, gap) * (count * len(batch) / whole.count)
    return mean, scatter / (count - 1)
