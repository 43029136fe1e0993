"""Streaming mean and covariance of features, and reference files.

    mean' = mean + d * b / n,   M' = M + M_b + d d^T * a b / n,   d = mean_b - mean

for a samples so far, a batch of b and n = a + b (Chan, Golub and LeVeque 1979), in float64: 50,000
images never lie in memory, and neither do their features. Covariance = M / (n - 1), as numpy.cov.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from terdit_cli.atomic import atomic_path
from terdit_cli.errors import InputFileError, UsageError

Matrix = NDArray[np.float64]

LARGEST_DIM = 1 << 14  # Inception has 2048 features
_LARGEST_LABEL = 1 << 16  # bytes of n and of pipeline
_BROKEN = (  # what zipfile and numpy raise on damaged, encrypted or exotic files
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
_SYMMETRY_TOLERANCE = 1e-6


class FeatureStatistics:
    """Mean and covariance of a stream of features, and a sample of `keep` of them for KID.

    The sample is uniform over the stream (Vitter's algorithm R): image folders come sorted by
    class, so their first features are those of a few classes. It does not depend on batching.
    """

    def __init__(self, dim: int, keep: int = 0) -> None:
        self.dim = dim
        self.count = 0
        self._mean: Matrix = np.zeros(dim)
        self._scatter: Matrix = np.zeros((dim, dim))
        self._keep = keep
        self._kept = np.empty((0, dim), dtype=np.float32)
        self._random = np.random.RandomState(0)

    def update(self, features: NDArray[np.floating]) -> None:
        """Add a batch of features [B, D]; raises ValueError for another width or not finite."""
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features have shape {batch.shape}, expected [B, {self.dim}]")
        if not np.isfinite(batch).all():
            raise ValueError("features hold numbers that are not finite")
        if not len(batch):
            return
        left = self._keep - len(self._kept)
        if left > 0:
            self._kept = np.concatenate([self._kept, batch[:left].astype(np.float32)])
        # Sample number i (from 0) takes the place of a kept one with probability keep / (i + 1).
        for row in range(max(left, 0), len(batch)) if self._keep else ():
            slot = self._random.randint(self.count + row + 1)
            if slot < self._keep:
                self._kept[slot] = batch[row]
        mean = batch.mean(axis=0)
        centred = batch - mean
        self._add(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add another stream, which keeps as many; each side's share is drawn by its count."""
        if (other.dim, other._keep) != (self.dim, self._keep):
            got, expected = (other.dim, other._keep), (self.dim, self._keep)
            raise ValueError(f"(features, kept) are {got}, expected {expected}")
        if self.count + other.count > self._keep > 0:
            share = self._random.hypergeometric(self.count, other.count, self._keep)
            parts = self._pick(self._kept, share), self._pick(other._kept, self._keep - share)
        else:
            parts = self._kept, other._kept
        self._kept = np.concatenate(parts)
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _pick(self, kept: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        return kept[np.sort(self._random.permutation(len(kept))[:size])]

    def _add(self, count: int, mean: Matrix, scatter: Matrix) -> None:
        total = self.count + count
        difference = mean - self._mean
        self._scatter += scatter + np.outer(difference, difference) * (self.count * count / total)
        self._mean = self._mean + difference * (count / total)
        self.count = total

    @property
    def mean(self) -> Matrix:
        """The mean, [D]."""
        return self._mean

    @property
    def covariance(self) -> Matrix:
        """The unbiased covariance, [D, D]; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def kept(self) -> NDArray[np.float32]:
        """A uniform sample of the stream, all of it when it fits, float32 [at most `keep`, D]."""
        return self._kept


@dataclass(frozen=True)
class Reference:
    """The statistics of a reference set; other tools' files say neither count nor pipeline."""

    mean: Matrix
    covariance: Matrix
    count: int | None
    pipeline: str | None

    def require_pipeline(self, pipeline: str, where: object) -> None:
        """Raise UsageError if the reference was made with other features."""
        if self.pipeline is not None and self.pipeline != pipeline:
            raise UsageError(
                "the reference was made with other features",
                got=self.pipeline,
                expected=pipeline,
                where=where,
                fix="use its features with --features, or make a reference with these",
            )


def save_reference(path: Path, statistics: FeatureStatistics, pipeline: str) -> None:
    """Write mu, sigma, n and pipeline as .npz, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            mu=statistics.mean,
            sigma=statistics.covariance,
            n=np.int64(statistics.count),
            pipeline=np.array(pipeline),
        )


def is_statistics_file(path: Path) -> bool:
    """Return whether a path is an .npz that holds mu and sigma (and not images)."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except _BROKEN:  # whoever reads it says what is wrong with it
        return False


def _check_declared_size(archive: zipfile.ZipFile, name: str, limit: int) -> None:
    """Raise ValueError for an array larger than any reference, or than the file that holds it.

    numpy allocates what the header declares before it reads a byte of it.
    """
    size = archive.getinfo(name).file_size
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version == (2, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    declared = math.prod(shape) * dtype.itemsize
    if dtype.kind == "c" or 0 in shape:
        raise ValueError(f"{name} is {dtype} {list(shape)}")
    if declared > min(size, limit):
        raise ValueError(f"{name} declares {declared} bytes in a file of {size}")


def load_reference(path: Path) -> Reference:
    """Read statistics of our own, pytorch-fid's, clean-fid's or ADM's form (mu and sigma).

    Raises:
        InputFileError: missing, damaged, or not a mean and a covariance.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in ("mu.npy", "sigma.npy"):
                _check_declared_size(archive, name, 8 * LARGEST_DIM**2)
            for name in {"n.npy", "pipeline.npy"} & set(archive.namelist()):
                _check_declared_size(archive, name, _LARGEST_LABEL)
        with np.load(path, allow_pickle=False) as values:
            mean = np.asarray(values["mu"], dtype=np.float64)
            covariance = np.asarray(values["sigma"], dtype=np.float64)
            count = int(values["n"]) if "n" in values.files else None
            pipeline = str(values["pipeline"]) if "pipeline" in values.files else None
        size = mean.shape[0] if mean.ndim == 1 else -1
        if covariance.shape != (size, size):
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} do not fit")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("numbers that are not finite")
        difference = np.abs(covariance - covariance.T).max(initial=0)
        if difference > _SYMMETRY_TOLERANCE * max(1.0, np.abs(covariance).max(initial=0)):
            raise ValueError("sigma is not symmetric")
        if (np.diagonal(covariance) < 0).any():
            raise ValueError("sigma has negative variances")
        if count is not None and count < 2:
            raise ValueError(f"n = {count}")
    except _BROKEN as error:
        raise InputFileError(
            "the reference statistics cannot be read",
            got=str(error) or type(error).__name__,
            expected="an .npz with mu [D] and sigma [D, D]",
            where=path,
            fix="make it with `terdit eval-fid --save-reference`",
        ) from error
    return Reference(mean, covariance, count, pipeline)
