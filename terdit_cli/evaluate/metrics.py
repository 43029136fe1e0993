"""Distances and scores from features and logits; no images here.

All arithmetic is float64. Samples [N, D] may be arrays of any float dtype or np.memmap: only blocks
of them are converted, unless a function says otherwise. Every function refuses numbers that are not
finite with a ValueError that names the first such row. Shapes: N real and M fake samples, D
features, C classes, S subsets or splits.

    Frechet distance   |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)
    KID                mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  k(x, y) = (x.y / D + 1)^3
    Inception Score    exp(mean KL(p(y|x) || p(y)))
    precision, recall  share of the fakes (reals) within a k-neighbour ball of the other set
"""

from __future__ import annotations

import hashlib
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
Samples = NDArray[Any]

BLOCK_ROWS = 2048  # samples converted at once; a block of distances is BLOCK_ROWS^2
SYMMETRY_TOLERANCE = 1e-6
LARGEST_ROOT_ERROR = 1e-10  # of tr (S1 S2)^1/2, estimated, in parts of tr S1 + tr S2


def _samples(values: ArrayLike, name: str) -> Samples:
    """Return [N, D] in its own dtype and place."""
    samples = np.asarray(values)
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"{name} has shape {samples.shape}, expected [N, D]")
    for rows in row_blocks(len(samples)):
        finite = np.isfinite(samples[rows]).all(axis=1)
        if not finite.all():
            first = rows.start + int(np.argmin(finite))
            raise ValueError(f"{name} holds numbers that are not finite, first in row {first}")
    return samples


def check_pair(real: ArrayLike, fake: ArrayLike, least: int) -> tuple[Samples, Samples]:
    """Return two sets of the same features and at least `least` samples each."""
    reals, fakes = _samples(real, "real"), _samples(fake, "fake")
    if reals.shape[1] != fakes.shape[1] or min(len(reals), len(fakes)) < least:
        raise ValueError(
            f"real {reals.shape} and fake {fakes.shape}: expected [N >= {least}, D] both"
        )
    return reals, fakes


def _tensor(values: Samples) -> Tensor:
    """Return a float64 copy; torch takes no negative strides and no foreign byte order."""
    return torch.from_numpy(np.array(values, dtype=np.float64, order="C"))


def row_blocks(count: int) -> list[slice]:
    """Return slices of at most BLOCK_ROWS rows that cover `count`."""
    return [slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS)]


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), the Frechet distance of two Gaussians.

    Never below 0. Covariances of fewer samples than features, and of features that do not vary,
    lose no digits. Source: Dowson and Landau 1982; as a score of images Heusel et al. 2017
    (arXiv 1706.08500).

    Args:
        mu1, mu2: [D].
        sigma1, sigma2: covariances [D, D], symmetric.

    Raises:
        ValueError: shapes that do not match, a covariance that is not symmetric, or not finite.
    """
    first, second = np.asarray(mu1, dtype=np.float64), np.asarray(mu2, dtype=np.float64)
    covariances = [
        np.asarray(_samples(sigma, name), dtype=np.float64)
        for sigma, name in ((sigma1, "sigma1"), (sigma2, "sigma2"))
    ]
    size = first.shape[0] if first.ndim == 1 else -1
    if first.shape != second.shape or any(s.shape != (size, size) for s in covariances):
        shapes = [first.shape, covariances[0].shape, second.shape, covariances[1].shape]
        raise ValueError(f"mu1, sigma1, mu2, sigma2 have shapes {shapes}, expected [D], [D, D]")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a mean holds numbers that are not finite")
    for sigma in covariances:
        if np.abs(sigma - sigma.T).max() > SYMMETRY_TOLERANCE * max(1.0, np.abs(sigma).max()):
            raise ValueError("a covariance is not symmetric")
    gap = first - second
    variances = sum(float(np.trace(sigma)) for sigma in covariances)
    trace_root = _trace_of_root(*(_tensor(sigma) for sigma in covariances))
    return max(0.0, float(gap @ gap) + variances - 2 * trace_root)


def _trace_of_root(s1: Tensor, s2: Tensor) -> float:
    """Return tr (S1 S2)^1/2 of two covariances [D, D].

    With S1 = R1 R1^T and S2 = R2 R2^T it is the sum of the singular values of R1^T R2, which are
    the roots of the eigenvalues p of R1^T S2 R1. Eigenvalues are found several times faster, but
    with errors of about e = eps max(p) each, and the root of p + e is off by e / sqrt(p): where
    features hardly vary, or a rank is not full, these add up, and singular values are taken.
    """
    root, failed = torch.linalg.cholesky_ex(s1)
    if not failed:
        values = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0)
        error = torch.finfo(values.dtype).eps * values[-1]
        errors = (error / (values + error).sqrt()).sum()
        if errors <= LARGEST_ROOT_ERROR * (s1.trace() + s2.trace()):
            return float(values.sqrt().sum())
    return float(torch.linalg.svdvals(_root_of_range(s1).T @ _root_of_range(s2)).sum())


def _root_of_range(sigma: Tensor) -> Tensor:
    """Return R [D, r] with S = R R^T, r the rank: of N < D samples N - 1."""
    values, vectors = torch.linalg.eigh(sigma)
    in_range = values > values[-1].abs() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, in_range] * values[in_range].sqrt()


def frechet_distance_of_samples(real: ArrayLike, fake: ArrayLike) -> float:
    """Return the Frechet distance of the Gaussians fitted to two sets of samples.

    Equal to `frechet_distance` of their means and unbiased covariances. Where a set has at most D
    samples, tr (S1 S2)^1/2 is the nuclear norm of A B^T / sqrt((N-1)(M-1)), A and B the centred
    samples: no [D, D] matrix is made. Both sets are converted whole: N and M of some thousands.

    Args:
        real: [N, D]; fake: [M, D]; at least 2 each.

    Raises:
        ValueError: fewer samples, other shapes, or not finite.
    """
    reals, fakes = (np.asarray(part, dtype=np.float64) for part in check_pair(real, fake, 2))
    means = reals.mean(axis=0), fakes.mean(axis=0)
    if min(len(reals), len(fakes)) > reals.shape[1]:
        covariances = [np.atleast_2d(np.cov(part, rowvar=False)) for part in (reals, fakes)]
        return frechet_distance(means[0], covariances[0], means[1], covariances[1])
    a, b = (
        torch.from_numpy((part - mean) / np.sqrt(len(part) - 1))
        for part, mean in zip((reals, fakes), means, strict=True)
    )
    gap = means[0] - means[1]
    variances = float(a.square().sum() + b.square().sum())
    return max(0.0, float(gap @ gap) + variances - 2 * float(torch.linalg.svdvals(a @ b.T).sum()))


def kernel_inception_distances(
    real: ArrayLike,
    fake: ArrayLike,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> Matrix:
    """Return the unbiased squared MMD with kernel (x.y / D + 1)^3 of each subset, [S].

    Subsets are drawn as clean-fid draws them after numpy.random.seed(seed), the fake one first,
    and only they are converted. The KID is their mean; see `kernel_inception_standard_error`.
    Source: Binkowski et al. 2018 (arXiv 1801.01401).

    Args:
        real: [N, D]; fake: [M, D].
        max_subset_size: at most N and M are drawn.

    Raises:
        ValueError: fewer than two samples, other shapes, or not finite.
    """
    reals, fakes = check_pair(real, fake, 2)
    if num_subsets < 1 or max_subset_size < 2:
        raise ValueError(f"{num_subsets} subsets of {max_subset_size}: expected >= 1 of >= 2")
    random = np.random.RandomState(seed)  # the stream that clean-fid uses
    size = min(len(reals), len(fakes), max_subset_size)
    dim = reals.shape[1]

    def kernel(a: Matrix, b: Matrix) -> Matrix:
        return (a @ b.T / dim + 1) ** 3

    distances = np.empty(num_subsets)
    for index in range(num_subsets):
        x = fakes[random.choice(len(fakes), size, replace=False)].astype(np.float64)
        y = reals[random.choice(len(reals), size, replace=False)].astype(np.float64)
        within = kernel(x, x) + kernel(y, y)
        off_diagonal = (within.sum() - np.trace(within)) / (size - 1)
        distances[index] = (off_diagonal - 2 * kernel(x, y).sum() / size) / size
    return distances


def kernel_inception_distance(
    real: ArrayLike,
    fake: ArrayLike,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Return the KID, the mean of `kernel_inception_distances`; it may be below 0."""
    distances = kernel_inception_distances(real, fake, num_subsets, max_subset_size, seed)
    return float(distances.mean())


def kernel_inception_standard_error(
    distances: NDArray[np.float64], subset_size: int, samples: int
) -> float | None:
    """Return the standard error of the KID as an estimate of the distance of the distributions.

    Subsets of m out of n samples overlap, so their standard deviation s over sqrt(S) would only
    say how well the mean of all possible subsets is known. For an average over samples s^2 is
    v (1/m - 1/n) and the error of the mean of S subsets is v/n + s^2/S, hence

        error^2 = s^2 (1/S + f / (1 - f)),   f = m/n

    Source: sampling without replacement from a finite population (Cochran 1977, chapter 2).

    Args:
        distances: of the subsets, [S].
        subset_size: m; samples: n, the size of the smaller set.

    Returns:
        None where it cannot be known: one subset, or each subset is the whole set.
    """
    share = min(subset_size, samples) / samples
    if len(distances) < 2 or share == 1:
        return None
    return float(distances.std(ddof=1) * np.sqrt(1 / len(distances) + share / (1 - share)))


INCEPTION_SPLIT = 5000  # images, as guided-diffusion's evaluator


def inception_scores(logits: ArrayLike, split_size: int = INCEPTION_SPLIT) -> Matrix:
    """Return exp(mean KL(p(y|x) || p(y))) of each consecutive split, [S].

    A shorter last split counts as one. The Inception Score is their mean. Source: Salimans et al.
    2016 (arXiv 1606.03498), splits as guided-diffusion's evaluator takes them.

    Args:
        logits: [N, C] before the softmax.

    Raises:
        ValueError: another shape, not finite, or a split of no samples.
    """
    rows = _samples(logits, "logits")
    if split_size < 1:
        raise ValueError(f"splits of {split_size} samples, expected >= 1")
    starts = range(0, len(rows), split_size)
    return np.array([_inception_score(rows[start : start + split_size]) for start in starts])


def _inception_score(logits: Samples) -> float:
    log_p = _tensor(logits).log_softmax(dim=1)
    p = log_p.exp()
    # A class that no sample of the split can have adds p log p -> 0, not 0 * -inf.
    marginal = p.mean(dim=0).clamp_min(torch.finfo(p.dtype).tiny).log()
    return float((p * (log_p - marginal)).sum(dim=1).mean().exp())


def inception_score(logits: ArrayLike, split_size: int = INCEPTION_SPLIT) -> float:
    """Return the Inception Score, the mean of `inception_scores`."""
    return float(inception_scores(logits, split_size).mean())


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall: the shares of fakes and of reals that are `covered`.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), with <= as in guided-diffusion's evaluator.
    """
    fakes, reals = covered(real, fake, k)
    return float(fakes.mean()), float(reals.mean())


def covered(
    real: ArrayLike, fake: ArrayLike, k: int = 3
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which fakes [M] the reals cover, and which reals [N] the fakes cover.

    A sample is covered when it lies within the ball of some sample of the other set, whose
    radius is the distance to its k-th neighbour (itself not counted). Equal samples are at
    distance 0 exactly, so that each covers its copies even if the radius is 0 (more than k
    copies).

    Args:
        real: [N, D]; fake: [M, D]; N and M greater than k.

    Raises:
        ValueError: fewer samples, other shapes, or not finite.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected >= 1")
    samples = check_pair(real, fake, k + 1)
    reals, fakes = (_Points(*part) for part in zip(samples, _names(*samples), strict=True))
    real_radii, fake_radii = _radii(reals, k), _radii(fakes, k)
    precise = torch.zeros(len(fakes.samples), dtype=torch.bool)
    recalled = torch.zeros(len(reals.samples), dtype=torch.bool)
    for rows, columns in product(row_blocks(len(precise)), row_blocks(len(recalled))):
        block = _squared_distances(fakes, rows, reals, columns)
        precise[rows] |= (block <= real_radii[columns]).any(dim=1)
        recalled[columns] |= (block <= fake_radii[rows, None]).any(dim=0)
    return precise.numpy(), recalled.numpy()


class _Points(NamedTuple):
    """Samples [N, D] and the name of each, [N]: equal samples of all sets have equal names."""

    samples: Samples
    names: Tensor

    def block(self, rows: slice) -> Tensor:
        return _tensor(self.samples[rows])


def _names(*sets: Samples) -> list[Tensor]:
    known: dict[bytes, int] = {}
    names = []
    for samples in sets:
        found = []
        for rows in row_blocks(len(samples)):
            block = samples[rows].astype(np.float64) + 0.0  # -0.0 becomes 0.0
            digests = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in block)
            found += [known.setdefault(digest, len(known)) for digest in digests]
        names.append(torch.tensor(found))
    return names


def _squared_distances(a: _Points, rows: slice, b: _Points, columns: slice) -> Tensor:
    """Return |x|^2 + |y|^2 - 2 x.y, and 0 for equal samples, where that leaves a rounding error."""
    x, y = a.block(rows), b.block(columns)
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = squares.addmm_(x, y.T, alpha=-2).clamp_min_(0)
    return distances.masked_fill_(a.names[rows, None] == b.names[columns], 0)


def _radii(points: _Points, k: int) -> Tensor:
    """Return each sample's squared distance to its k-th neighbour, [N]."""
    # The k + 1 nearest, one of which is the sample itself.
    nearest = torch.full((len(points.samples), k + 1), torch.inf, dtype=torch.float64)

    def note(rows: slice, distances: Tensor) -> None:
        near = distances.topk(min(k + 1, distances.shape[1]), largest=False, sorted=False).values
        nearest[rows] = torch.cat([nearest[rows], near], dim=1).topk(k + 1, largest=False).values

    for rows, columns in combinations_with_replacement(row_blocks(len(points.samples)), 2):
        block = _squared_distances(points, rows, points, columns)
        note(rows, block)
        if columns != rows:
            note(columns, block.T)
    return nearest[:, -1]
