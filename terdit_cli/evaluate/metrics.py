"""Distances and scores from features and logits; no images here.

All arithmetic is float64. Shapes: N real and M fake samples, D features, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]

BLOCK_ROWS = 2048  # rows of a distance matrix in memory at once
SYMMETRY_TOLERANCE = 1e-6


def _matrix(values: ArrayLike, name: str) -> Matrix:
    """Return finite float64 [N, D]; raises ValueError otherwise."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} has shape {matrix.shape}, expected [N, D]")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return matrix


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), the Frechet distance of two Gaussians.

    With S1 = R R^T, tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of R^T S2 R.
    R [D, r] spans the range of S1 only: of N < D samples r is N - 1, and the root of the rounding
    errors in the other directions would cost half the digits. Source: Dowson and Landau 1982;
    as a score of images Heusel et al. 2017 (arXiv 1706.08500).

    Args:
        mu1, mu2: [D].
        sigma1, sigma2: covariances [D, D], symmetric.

    Raises:
        ValueError: shapes that do not match, a covariance that is not symmetric, or not finite.
    """
    first, second = np.asarray(mu1, dtype=np.float64), np.asarray(mu2, dtype=np.float64)
    covariances = _matrix(sigma1, "sigma1"), _matrix(sigma2, "sigma2")
    size = first.shape[0] if first.ndim == 1 else -1
    if first.shape != second.shape or any(s.shape != (size, size) for s in covariances):
        shapes = [first.shape, covariances[0].shape, second.shape, covariances[1].shape]
        raise ValueError(f"mu1, sigma1, mu2, sigma2 have shapes {shapes}, expected [D], [D, D]")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a mean holds numbers that are not finite")
    for sigma in covariances:
        if np.abs(sigma - sigma.T).max() > SYMMETRY_TOLERANCE * max(1.0, np.abs(sigma).max()):
            raise ValueError("a covariance is not symmetric")
    s1, s2 = (torch.from_numpy(sigma) for sigma in covariances)
    values, vectors = torch.linalg.eigh(s1)
    in_range = values > values[-1] * size * torch.finfo(values.dtype).eps
    root = vectors[:, in_range] * values[in_range].sqrt()
    product = torch.linalg.eigvalsh(root.T @ s2 @ root)
    trace_root = float(product.clamp_min(0).sqrt().sum())
    difference = first - second
    return float(difference @ difference) + float(s1.trace() + s2.trace()) - 2 * trace_root


def kernel_inception_distance(
    real: ArrayLike,
    fake: ArrayLike,
    num_subsets: int = 100,
    max_subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Return the KID: the unbiased squared MMD with kernel (x.y / D + 1)^3, averaged over subsets.

    Subsets are drawn as clean-fid draws them after numpy.random.seed(seed), the fake one first.
    Source: Binkowski et al. 2018 (arXiv 1801.01401).

    Args:
        real: [N, D]; fake: [M, D].
        max_subset_size: at most N and M are drawn.

    Raises:
        ValueError: fewer than two samples, other shapes, or not finite.
    """
    real, fake = _matrix(real, "real"), _matrix(fake, "fake")
    if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"real {real.shape} and fake {fake.shape}: expected [N >= 2, D] both")
    if num_subsets < 1 or max_subset_size < 2:
        raise ValueError(f"{num_subsets} subsets of {max_subset_size}: expected >= 1 of >= 2")
    random = np.random.RandomState(seed)  # the stream that clean-fid uses
    size = min(len(real), len(fake), max_subset_size)
    dim = real.shape[1]
    total = 0.0
    for _ in range(num_subsets):
        x = fake[random.choice(len(fake), size, replace=False)]
        y = real[random.choice(len(real), size, replace=False)]
        within = (x @ x.T / dim + 1) ** 3 + (y @ y.T / dim + 1) ** 3
        between = (x @ y.T / dim + 1) ** 3
        total += (within.sum() - np.trace(within)) / (size - 1) - 2 * between.sum() / size
    return float(total / num_subsets / size)


def inception_score(logits: ArrayLike, split_size: int = 5000) -> float:
    """Return the mean over consecutive splits of exp(mean KL(p(y|x) || p(y))).

    A shorter last split counts as one. Source: Salimans et al. 2016 (arXiv 1606.03498), splits
    as guided-diffusion's evaluator takes them.

    Args:
        logits: [N, C] before the softmax.
    """
    values = _matrix(logits, "logits")
    shifted = values - values.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    scores = []
    for start in range(0, len(log_p), split_size):
        part = log_p[start : start + split_size]
        p = np.exp(part)
        # A class that no sample of the split can have adds p log p -> 0, not 0 * -inf.
        marginal = np.log(np.maximum(p.mean(axis=0, keepdims=True), np.finfo(p.dtype).tiny))
        scores.append(np.exp((p * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall.

    A sample is covered when it lies within the ball of some sample of the other set, whose
    radius is the distance to its k-th neighbour (itself not counted). Source: Kynkaanniemi et
    al. 2019 (arXiv 1904.06991), with <= as in guided-diffusion's evaluator.

    Args:
        real: [N, D]; fake: [M, D]; N and M greater than k.

    Returns:
        (share of fakes covered by the reals, share of reals covered by the fakes).
    """
    real, fake = _matrix(real, "real"), _matrix(fake, "fake")
    if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) <= k:
        raise ValueError(f"real {real.shape} and fake {fake.shape}: expected [N > {k}, D] both")
    return (
        float(_covered(fake, real, _radii(real, k)).mean()),
        float(_covered(real, fake, _radii(fake, k)).mean()),
    )


def _squared_distances(a: Matrix, b: Matrix) -> Matrix:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _radii(samples: Matrix, k: int) -> Matrix:
    """Return each sample's squared distance to its k-th neighbour, [N]."""
    radii = np.empty(len(samples))
    for start in range(0, len(samples), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        # Index k of a sorted row: index 0 is the sample itself.
        radii[rows] = np.partition(_squared_distances(samples[rows], samples), k, axis=1)[:, k]
    return radii


def _covered(points: Matrix, centres: Matrix, radii: Matrix) -> NDArray[np.bool_]:
    covered = np.empty(len(points), dtype=bool)
    for start in range(0, len(points), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        covered[rows] = (_squared_distances(points[rows], centres) <= radii[None]).any(axis=1)
    return covered
