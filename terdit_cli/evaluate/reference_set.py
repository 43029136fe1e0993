"""What images are compared with: statistics of a reference set, and files that hold them.

Ours (.npz): format = 2, mu [D], sigma [D, D], n, pipeline, images_sha256, and where they exist
mu_s, sigma_s (the spatial features of sFID) and features [R, D] float32. Files of pytorch-fid and
clean-fid hold mu and sigma only, ADM's VIRTUAL_*.npz also mu_s and sigma_s: these say neither
their number of images nor the network, but only ADM's evaluator writes mu_s.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.system.atomic import atomic_path
from terdit_cli.system.memory import parsing

Matrix = NDArray[np.float64]

FORMAT = 2
LARGEST_DIM = 1 << 14  # Inception has 2048 features, and 2023 spatial ones
_LARGEST_FEATURES = 1 << 33  # bytes: a million images of 2048 features
_LARGEST_LABEL = 1 << 16  # bytes of each of the labels
_LARGEST_HEADER = 1 << 16  # bytes of an array's; numpy itself takes 10,000
_LABELS = {"format": "iu", "n": "iu", "pipeline": "U", "images_sha256": "U"}  # name: kinds of dtype
_BROKEN = (  # what zipfile and numpy raise on damaged, encrypted or exotic files
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_SYMMETRY_TOLERANCE = 1e-6
_ADM = "adm"


@dataclass(frozen=True)
class Reference:
    """Means [D] and covariances [D, D] float64; None is what the file does not say."""

    mean: Matrix
    covariance: Matrix
    spatial_mean: Matrix | None = None  # [2023]
    spatial_covariance: Matrix | None = None
    features: NDArray[np.float32] | None = None  # [R, D]: all of them, or some spread evenly
    count: int | None = None
    pipeline: str | None = None
    images_sha256: str | None = None

    def require_pipeline(self, pipeline: str, where: object) -> None:
        """Raise UsageError if the reference was made with other features."""
        known = self.pipeline
        if known is None and self.spatial_mean is not None and pipeline.split("@")[0] != _ADM:
            known = "adm, by its spatial statistics"
        elif known is None or known == pipeline:
            return
        raise UsageError(
            "the reference was made with other features",
            got=known,
            expected=pipeline,
            where=where,
            fix="use its features with --features, or make a reference with these",
        )

    def require_dim(self, dim: int, where: object, spatial_dim: int | None = None) -> None:
        """Raise UsageError for another number of features, or of spatial ones if that is given."""
        ours: list[tuple[str, Matrix | None, int | None]] = [
            ("features", self.mean, dim),
            ("spatial features", self.spatial_mean, spatial_dim),
        ]
        for kind, mean, expected in ours:
            if mean is not None and expected is not None and len(mean) != expected:
                raise UsageError(
                    f"the reference has another number of {kind}",
                    got=len(mean),
                    expected=expected,
                    where=where,
                    fix="make a reference with these features",
                )


def save_reference(path: Path, reference: Reference) -> None:
    """Write a reference as .npz, whole or not at all."""
    entries = {
        "format": np.int64(FORMAT),
        "mu": reference.mean,
        "sigma": reference.covariance,
        "mu_s": reference.spatial_mean,
        "sigma_s": reference.spatial_covariance,
        "features": reference.features,
        "n": None if reference.count is None else np.int64(reference.count),
        "pipeline": None if reference.pipeline is None else np.array(reference.pipeline),
        "images_sha256": (
            None if reference.images_sha256 is None else np.array(reference.images_sha256)
        ),
    }
    present = {name: value for name, value in entries.items() if value is not None}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **present)  # type: ignore[arg-type]


def is_statistics_file(path: Path) -> bool:
    """Return whether a path is an .npz that holds mu and sigma."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except _BROKEN:  # whoever reads it says what is wrong with it
        return False


def holds_images(path: Path) -> bool:
    """Return whether a statistics file has the images of its set too, as ADM's have."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "arr_0.npy" in archive.namelist()
    except _BROKEN:
        return False


def load_reference(path: Path) -> Reference:
    """Read statistics of our own, pytorch-fid's, clean-fid's or ADM's form.

    Raises:
        InputFileError: missing, damaged, of a newer format, or not means and covariances.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _check_declared(archive)
        with np.load(path, allow_pickle=False) as values:
            labels = {name: values[name].item() for name in _LABELS if name in found}
            if labels.get("format", 0) > FORMAT:
                raise ValueError(f"format {labels['format']}, newer than {FORMAT}")
            mean, covariance = _moments(values["mu"], values["sigma"])
            spatial: tuple[Matrix, Matrix] | tuple[None, None] = (None, None)
            if "mu_s" in found:
                spatial = _moments(values["mu_s"], values["sigma_s"])
            features = values["features"] if "features" in found else None
        if features is not None and not np.isfinite(features).all():
            raise ValueError("features that are not finite")
        count = labels.get("n")
        least = 2 if features is None else max(2, len(features))
        if count is not None and count < least:
            raise ValueError(f"n = {count}, expected at least {least}")
    except _BROKEN as error:
        raise InputFileError(
            "the reference statistics cannot be read",
            got=str(error) or type(error).__name__,
            expected="an .npz with mu [D] and sigma [D, D]",
            where=path,
            fix="make it with `terdit eval-fid --make-reference`",
        ) from error
    told = labels.get("pipeline"), labels.get("images_sha256")
    return Reference(mean, covariance, spatial[0], spatial[1], features, count, *told)


def _moments(mu: NDArray[Any], sigma: NDArray[Any]) -> tuple[Matrix, Matrix]:
    mean, covariance = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("numbers that are not finite")
    difference = np.abs(covariance - covariance.T).max()
    if difference > _SYMMETRY_TOLERANCE * max(1.0, np.abs(covariance).max()):
        raise ValueError("sigma is not symmetric")
    if (np.diagonal(covariance) < 0).any():
        raise ValueError("sigma has negative variances")
    return mean, covariance


def _check_declared(archive: zipfile.ZipFile) -> set[str]:
    """Return the names of the arrays in a file once all that are read declare what they should.

    numpy allocates what an array's header declares before it reads a byte of it, so this comes
    before `numpy.load`; images that lie beside the statistics are not looked at.

    Raises:
        ValueError: too large, of another type or shape, or pickled objects. KeyError: missing.
    """
    found = {name.removesuffix(".npy") for name in archive.namelist()}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu == "mu_s" and not {mu, sigma} & found:
            continue
        shape, _ = _declared(archive, mu, "fiu")
        if len(shape) != 1 or not 1 <= shape[0] <= LARGEST_DIM:
            raise ValueError(f"{mu} {list(shape)}, expected [D] with D up to {LARGEST_DIM}")
        square, _ = _declared(archive, sigma, "fiu")
        if square != shape * 2:
            raise ValueError(f"{mu} {list(shape)} and {sigma} {list(square)} do not fit")
    if "features" in found:
        dim = _declared(archive, "mu", "fiu")[0][0]
        shape, dtype = _declared(archive, "features", "f")
        if dtype != np.float32 or len(shape) != 2 or shape[1] != dim or shape[0] < 1:
            raise ValueError(f"features {dtype} {list(shape)}, expected float32 [R, {dim}]")
        if math.prod(shape) * dtype.itemsize > _LARGEST_FEATURES:
            raise ValueError(f"features {list(shape)}, over {_LARGEST_FEATURES} bytes")
    for name, kinds in _LABELS.items():
        if name in found:
            shape, dtype = _declared(archive, name, kinds)
            if shape or dtype.itemsize > _LARGEST_LABEL:
                raise ValueError(f"{name} {dtype} {list(shape)}, expected one value")
    return found


def _declared(
    archive: zipfile.ZipFile, name: str, kinds: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type that the header of an array declares, read within bounds."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        header = io.BytesIO(stream.read(_LARGEST_HEADER))
    with parsing():
        if np.lib.format.read_magic(header) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(header)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never loaded")
    if dtype.kind not in kinds:
        raise ValueError(f"{name} is {dtype} {list(shape)}")
    size = math.prod(shape) * dtype.itemsize
    if member.file_size != header.tell() + size:
        raise ValueError(f"{name} declares {size} bytes in a file of {member.file_size}")
    return shape, dtype
