"""The nearest real image of each sample, and which samples and reals cover each other.

Memorisation: the distance from a sample to its nearest real, beside the distance from a real to
*its* nearest other real. A model that copies lies closer to the reals than they do to each other.
It shows only where the reals are, or contain, the images that the model was trained on.

Precision and recall as a picture: both sets in the plane of the two largest principal components
of their union, each point with whether the other set covers it.

Shapes: N reals, M samples ("fakes"), D features, Q queries, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from terdit_cli.evaluate.metrics import check_pair, covered, row_blocks

Indices = NDArray[np.int64]
Distances = NDArray[np.float64]
Flags = NDArray[np.bool_]

MOST_QUERIES = 2000  # samples and reals whose neighbours are looked for, and points of a picture
LOW_QUANTILE = 0.01  # of the distances between reals: closer than that is suspicious
_CANDIDATES = 4  # kept beyond the k nearest until their exact distances are known


class Nearest(NamedTuple):
    """The k nearest of each query, nearest first: indices and distances [Q, k]."""

    indices: Indices
    distances: Distances


@dataclass(frozen=True)
class NeighbourCheck:
    """Nearest reals of Q samples, and the distances of reals to their nearest other real."""

    fakes: Indices  # [Q] samples that were looked at
    reals: Indices  # [Q] the nearest real of each
    distances: Distances  # [Q]
    real_distances: Distances  # [P]
    searched: int  # reals among which the nearest was looked for

    @property
    def share_closer(self) -> float:
        """Return the share of samples closer to a real than nearly all reals are.

        "Nearly all" leaves LOW_QUANTILE of the reals, so about that is expected of samples that
        are as far from the reals as other real images.
        """
        threshold = np.quantile(self.real_distances, LOW_QUANTILE, method="lower")
        is_copy = self.distances == 0  # counts even where reals repeat each other
        return float((is_copy | (self.distances < threshold)).mean())

    def closest(self, count: int) -> list[int]:
        """Return the positions in `fakes` of the samples nearest to a real, nearest first."""
        return np.argsort(self.distances, kind="stable")[:count].tolist()

    def typical(self, count: int) -> list[int]:
        """Return the positions in `fakes` of the samples in the middle of the distances."""
        order = np.argsort(self.distances, kind="stable")
        start = max(0, (len(order) - count) // 2)
        return order[start : start + count].tolist()


@dataclass(frozen=True)
class Coverage:
    """Both sets in a plane, and which points the other set covers (see `precision_recall`)."""

    real: NDArray[np.float64]  # [N, 2]
    fake: NDArray[np.float64]  # [M, 2]
    real_covered: Flags  # [N], its mean is the recall of these points
    fake_covered: Flags  # [M], its mean is their precision
    variance: float  # share of the variance that the plane shows
    k: int


def nearest(
    queries: ArrayLike, points: ArrayLike, k: int = 1, own: Indices | None = None
) -> Nearest:
    """Return the k nearest `points` of each query by Euclidean distance.

    Distances are of differences, not of products: equal vectors are at 0 exactly.

    Args:
        queries: float [Q, D]; points: float [N, D], possibly np.memmap; N > k.
        own: [Q], the place of each query in `points`, which is not its neighbour.

    Raises:
        ValueError: too few points, other shapes, or not finite.
    """
    known, asked = check_pair(points, queries, 1)
    found = k + _CANDIDATES
    if k < 1 or len(known) < k + (own is not None):
        raise ValueError(f"{k} neighbours among {len(known)} points")
    indices = np.empty((len(asked), k), dtype=np.int64)
    distances = np.empty((len(asked), k))
    for rows in row_blocks(len(asked)):
        x = torch.tensor(asked[rows], dtype=torch.float64)
        best = torch.full((len(x), 0), torch.inf, dtype=torch.float64)
        place = torch.zeros((len(x), 0), dtype=torch.int64)
        for columns in row_blocks(len(known)):
            y = torch.tensor(known[columns], dtype=torch.float64)
            # |x|^2 is the same for every candidate of a query.
            block = (y.square().sum(dim=1) - 2 * x @ y.T).contiguous()
            if own is not None:
                inside = torch.from_numpy(own[rows] - columns.start)
                mine = (inside >= 0) & (inside < len(y))
                block[mine, inside[mine]] = torch.inf
            best = torch.cat([best, block], dim=1)
            columns_here = torch.arange(columns.start, columns.start + len(y))
            place = torch.cat([place, columns_here.expand(len(x), -1)], dim=1)
            best, kept = best.topk(min(found, best.shape[1]), largest=False)
            place = place.gather(1, kept)
        for row, (values, candidates) in enumerate(zip(best, place, strict=True)):
            candidates = candidates[values.isfinite()].sort().values
            y = torch.tensor(known[candidates.numpy()], dtype=torch.float64)
            exact = (y - x[row]).square().sum(dim=1).sqrt()
            order = exact.argsort(stable=True)[:k]
            indices[rows.start + row] = candidates[order].numpy()
            distances[rows.start + row] = exact[order].numpy()
    return Nearest(indices, distances)


def check_neighbours(
    real: ArrayLike, fake: ArrayLike, most: int = MOST_QUERIES, seed: int = 0
) -> NeighbourCheck:
    """Find the nearest real of samples, and of reals.

    Args:
        real: float [N, D], N >= 2, all of which are searched; fake: float [M, D].
        most: samples and reals that are looked at; drawn by `seed` where there are more.

    Raises:
        ValueError: too few reals, other shapes, or not finite.
    """
    reals, fakes = check_pair(real, fake, 1)
    if len(reals) < 2:
        raise ValueError("one real image has no other as a neighbour")
    asked, own = _draw(len(fakes), most, seed), _draw(len(reals), most, seed)
    of_fakes = nearest(fakes[asked], reals)
    of_reals = nearest(reals[own], reals, own=own)
    return NeighbourCheck(
        fakes=asked,
        reals=of_fakes.indices[:, 0],
        distances=of_fakes.distances[:, 0],
        real_distances=of_reals.distances[:, 0],
        searched=len(reals),
    )


def cover(
    real: ArrayLike, fake: ArrayLike, k: int = 3, most: int = MOST_QUERIES, seed: int = 0
) -> Coverage:
    """Return both sets in the plane of their principal components, and who is covered.

    Args:
        real: float [N, D]; fake: float [M, D]; N and M greater than k.
        most: points of each set; drawn by `seed` where there are more. Coverage is computed
            among these alone, so its means differ from the precision and recall of all.

    Raises:
        ValueError: fewer samples, other shapes, or not finite.
    """
    reals, fakes = check_pair(real, fake, k + 1)
    reals, fakes = (part[_draw(len(part), most, seed)] for part in (reals, fakes))
    both = torch.tensor(np.concatenate([reals, fakes]), dtype=torch.float64)
    # Each set has the same weight in the plane, whatever its number of points.
    shares = [np.full((len(part), 1), 0.5 / len(part)) for part in (reals, fakes)]
    weights = torch.from_numpy(np.concatenate(shares))
    centred = both - (weights * both).sum(dim=0)
    scaled = centred * weights.sqrt()
    if len(scaled) < scaled.shape[1]:
        values, left = torch.linalg.eigh(scaled @ scaled.T)
        axes = scaled.T @ left[:, -2:].flip(1)
        axes = axes / axes.norm(dim=0).clamp_min(torch.finfo(axes.dtype).tiny)
    else:
        values, axes = torch.linalg.eigh(scaled.T @ scaled)
        axes = axes[:, -2:].flip(1)
    total = float(values.clamp_min(0).sum())
    # Of constant features only the square of a rounding error is left.
    is_constant = total <= 1e-24 * float((weights * both.square()).sum())
    # The sign of an axis is a matter of taste, but the same picture should come twice.
    largest = axes.abs().argmax(dim=0)
    axes = axes * axes.gather(0, largest[None]).sign()
    plane = torch.zeros(len(both), 2, dtype=torch.float64)
    plane[:, : axes.shape[1]] = centred @ axes  # one feature has one axis
    fake_covered, real_covered = covered(reals, fakes, k)
    return Coverage(
        real=plane[: len(reals)].numpy(),
        fake=plane[len(reals) :].numpy(),
        real_covered=real_covered,
        fake_covered=fake_covered,
        variance=0.0 if is_constant else float(values[-2:].clamp_min(0).sum()) / total,
        k=k,
    )


def _draw(count: int, most: int, seed: int) -> Indices:
    """Return up to `most` of `count` indices, in order."""
    if count <= most:
        return np.arange(count)
    chosen = np.random.default_rng(seed).choice(count, most, replace=False)
    return np.sort(chosen)
