"""Streaming mean and covariance of features.

    mean' = mean + d b / n,   M' = M + X^T X + d d^T a b / n,   d = mean_b - mean

for a samples so far, b new ones less their mean in X [b, D], and n = a + b (Chan, Golub and LeVeque
1979), in float64: the features of 50,000 images never lie in memory. Covariance = M / (n - 1), as
numpy.cov.

Samples are added in blocks of BLOCK rows whatever the batches they come in, so a stream gives the
same bits for every batch size. With d (a b / n)^1/2 as one more row of X a block is one symmetric
rank-b update, half the work of a matrix product, into the lower triangle of M.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk

Matrix = NDArray[np.float64]

BLOCK = 256  # rows; larger ones are no faster, of 2048 features they take 4 MB


class FeatureStatistics:
    """Mean and covariance of a stream of features [N, D]."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean: Matrix = np.zeros(dim)
        self._scatter: Matrix = np.zeros((dim, dim), order="F")  # its lower triangle
        self._block: Matrix = np.empty((BLOCK + 1, dim))  # the samples that are not in them yet

    def update(self, features: NDArray[np.floating]) -> None:
        """Add a batch of features [B, D]; raises ValueError for another width or not finite."""
        batch = np.asarray(features)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features have shape {batch.shape}, expected [B, {self.dim}]")
        if not np.isfinite(batch).all():
            raise ValueError("features hold numbers that are not finite")
        while len(batch):
            used = self.count % BLOCK
            fitting = batch[: BLOCK - used]
            self._block[used : used + len(fitting)] = fitting
            self.count += len(fitting)
            batch = batch[len(fitting) :]
            if self.count % BLOCK == 0:
                self._mean, self._scatter = _add(
                    self.count - BLOCK, self._mean, self._scatter, self._block
                )

    @property
    def mean(self) -> Matrix:
        """The mean, [D]."""
        rest = self.count % BLOCK
        if not rest:
            return self._mean
        difference = self._block[:rest].mean(axis=0) - self._mean
        return self._mean + difference * (rest / self.count)

    @property
    def covariance(self) -> Matrix:
        """The unbiased covariance, [D, D]; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples, got {self.count}")
        scatter, rest = self._scatter, self.count % BLOCK
        if rest:  # into copies: the block is not full, and more may follow
            block = self._block[: rest + 1].copy()
            _, scatter = _add(self.count - rest, self._mean, scatter.copy(order="F"), block)
        lower = np.tril(scatter, -1)
        return (lower + lower.T + np.diag(np.diagonal(scatter))) / (self.count - 1)


def _add(before: int, mean: Matrix, scatter: Matrix, block: Matrix) -> tuple[Matrix, Matrix]:
    """Return mean and scatter of `before` samples and of those in all rows of `block` but the last.

    Overwrites `scatter` and `block`.
    """
    added = len(block) - 1
    total = before + added
    block_mean = block[:-1].mean(axis=0)
    difference = block_mean - mean
    block[:-1] -= block_mean
    block[-1] = difference * math.sqrt(before * added / total)
    # BLAS stores by columns: the transposed block, and the scatter in order F, are not copied.
    scatter = dsyrk(1.0, block.T, beta=1.0, c=scatter, lower=1, overwrite_c=1)
    return mean + difference * (added / total), scatter


def spread(total: int, n: int) -> list[int]:
    """Return `n` of `total` indices in order, one drawn from each of n equal stretches.

    So a set sorted by class keeps its classes in proportion, and so does one whose classes repeat
    with a period, where equal steps would hit one class only. Always the same for (total, n).
    """
    if n >= total:
        return list(range(total))
    bounds = [index * total // n for index in range(n + 1)]
    draws: list[int] = np.random.RandomState(0).randint(bounds[:-1], bounds[1:]).tolist()
    return draws
