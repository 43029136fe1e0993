"""`terdit eval-fid`: a model or a set of images against a reference, with a gate for CI.

Only the Inception pipeline's distance is called FID. Features are summarised as they come, so
50,000 images never lie in memory; KID uses at most `KID_SAMPLES` features of each side.
"""

from __future__ import annotations

import datetime
import itertools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import terdit_cli
from terdit_cli import console
from terdit_cli.commands.generate import ImageGenerator, model_sha256, open_generator
from terdit_cli.data.collection import count_images, read_images, spread
from terdit_cli.data.images import open_images
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate.features import FeatureExtractor, make_extractor
from terdit_cli.evaluate.metrics import frechet_distance, kernel_inception_distance
from terdit_cli.evaluate.statistics import (
    FeatureStatistics,
    Reference,
    is_statistics_file,
    load_reference,
    save_reference,
)
from terdit_cli.runtime.cpu import set_threads

KID_SAMPLES = 10_000
FEATURE_BATCH = {"cpu": 8, "cuda": 64}  # images; a CPU's caches hold no more
EMBEDDED = "embedded"  # the packaged images as a reference or as images
_EMBEDDED_SIZE = 28

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class EvalResult:
    """The distance under its right name, and all that is needed to repeat it."""

    distance_name: str
    distance: float
    kid: float | None  # None: the reference has no features, only mean and covariance
    n: int
    n_reference: int | None
    pipeline: str
    max_distance: float | None
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether the gate holds; a distance that is no number never does."""
        if not math.isfinite(self.distance):
            return False
        return self.max_distance is None or self.distance <= self.max_distance


@dataclass(frozen=True)
class _Images:
    """Images to come: how many, and from where."""

    count: int
    images: Iterator[Image]
    where: str


def run(
    reference: str | None = None,
    model: Path | None = None,
    images: str | None = None,
    n: int | None = None,
    features: str = "inception",
    weights: Path | None = None,
    max_distance: float | None = None,
    save_reference_to: Path | None = None,
    sampler: str = "ddpm",
    steps: int = 250,
    cfg_scale: float = 4.0,
    cfg_channels: str = "3",
    seed: int = 0,
    batch_size: int = 8,
    backend: str = "auto",
    device: str | None = None,
    vae: str | None = None,
    activations: str = "auto",
    threads: int | None = None,
) -> EvalResult | None:
    """Score a model's or given images against a reference.

    Args:
        reference: folder, zip, .npz of images or of statistics, or "embedded[:train|:heldout]".
        model: draw the images with it (class-balanced); or
        images: folder, zip, .npz, or "embedded[:split]".
        n: how many images (default: all given; 1,000 of a model) and, of a reference made of
            images, at most how many; a part of a set is spread evenly over it.
        max_distance: the gate.
        save_reference_to: write the images' statistics as a reference .npz; with no reference
            that is all that is done, and the result is None.
        activations: of the model, see `open_generator`.
        threads: of this process from now on, torch's too; None leaves them as they are.

    Raises:
        UsageError, InputFileError, EnvironmentProblem. A missed gate is not raised here.
    """
    if (model is None) == (images is None):
        raise UsageError(
            "what to score is not clear",
            got="both --model and --images" if model else "neither --model nor --images",
            expected="one of them",
        )
    if reference is None and save_reference_to is None:
        raise UsageError("nothing to compare with", fix="give --reference")
    if n is not None and n < 2:
        raise UsageError("wrong -n", got=n, expected="at least 2 images")
    if seed < 0:
        raise UsageError("wrong --seed", got=seed, expected="an integer from 0 up", fix="--seed 0")
    if save_reference_to is not None and save_reference_to.suffix.lower() != ".npz":
        raise UsageError(
            "wrong name for reference statistics",
            got=save_reference_to.name,
            expected="a name that ends in .npz",
            where="--save-reference",
            fix=f"--save-reference {save_reference_to}.npz",
        )
    asked = SamplerConfig(sampler, steps, cfg_scale, cfg_channels)  # type: ignore[arg-type]
    if threads is not None:
        set_threads(threads)
    started = time.monotonic()
    extractor = make_extractor(features, weights, _extractor_device(device))
    provenance: dict[str, Any] = {
        "terdit": terdit_cli.__version__,
        "torch": torch.__version__,
        "machine": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "reference": reference,
    }
    if model is not None:
        generator = open_generator(model, backend, device, vae, activations)
        source = _from_model(
            generator, n or 1000, generator.fit(asked), seed, batch_size, provenance
        )
    else:
        source = _from_path(str(images), n)
        provenance["images"] = images
    # The reference first: what is wrong with it shows before hours of sampling.
    theirs, kept = _open_reference(reference, n, extractor) if reference else (None, None)
    ours = _collect(source, extractor, "images")
    if save_reference_to is not None:
        save_reference(save_reference_to, ours, extractor.pipeline)
    if reference is None or theirs is None:
        return None
    distance = _distance(ours, theirs, reference)
    kid = None
    if kept is not None and min(len(kept), len(ours.kept)) >= 2:
        kid = kernel_inception_distance(kept, ours.kept, seed=seed % 2**32)
    provenance["seconds"] = round(time.monotonic() - started, 1)
    return EvalResult(
        distance_name=extractor.distance_name,
        distance=distance,
        kid=kid,
        n=ours.count,
        n_reference=theirs.count,
        pipeline=extractor.pipeline,
        max_distance=max_distance,
        provenance=provenance,
        warnings=_warnings(ours, theirs, extractor),
    )


def _extractor_device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _from_model(
    generator: ImageGenerator,
    n: int,
    config: SamplerConfig,
    seed: int,
    batch_size: int,
    provenance: dict[str, Any],
) -> _Images:
    model = generator.path
    provenance |= {
        "model": str(model),
        "model_sha256": model_sha256(model),
        "recipe_sha256": generator.model.info.recipe_sha256,
        "step": generator.model.info.step,
        "sampler": config.name,
        "steps": config.steps,
        "cfg_scale": config.cfg_scale,
        "cfg_channels": config.cfg_channels,
        "nfe": config.nfe,
        "seed": seed,
        **generator.model.facts(),
    }
    batches = generator.images(range(n), config, seed, batch_size)
    return _Images(n, (image for batch, _ in batches for image in batch), str(model))


def _from_path(path: str, n: int | None) -> _Images:
    """Open a folder, zip or .npz of images, or the packaged ones."""
    if path == EMBEDDED or path.startswith(EMBEDDED + ":"):
        split = path.partition(":")[2] or "all"
        source = open_images(EMBEDDED, None, _EMBEDDED_SIZE, split=split)
        count = _enough(len(source), n, path)
        return _Images(count, (source.read(index) for index in spread(len(source), count)), path)
    count = _enough(count_images(Path(path)), n, path)
    return _Images(count, (image for _, image in read_images(Path(path), n=count)), path)


def _enough(found: int, n: int | None, path: str) -> int:
    if n is not None and n > found:
        raise InputFileError(
            "too few images", got=found, expected=f"-n {n}", where=path, fix=f"-n {found}"
        )
    return n or found


def _collect(source: _Images, extractor: FeatureExtractor, what: str) -> FeatureStatistics:
    """Run all images of a source through the extractor.

    Raises:
        InputFileError: fewer than two images.
    """
    if source.count < 2:
        raise InputFileError(
            "too few images", got=source.count, expected="at least 2", where=source.where
        )
    statistics: FeatureStatistics | None = None
    size = FEATURE_BATCH[extractor.device.type]
    started = time.monotonic()
    with console.progress(f"{what} {source.where}", source.count) as meter:
        while batch := list(itertools.islice(source.images, size)):
            features = _by_size(extractor, batch)
            if statistics is None:
                statistics = FeatureStatistics(features.shape[1], KID_SAMPLES)
            statistics.update(features)
            rate = statistics.count / (time.monotonic() - started)
            meter.update(statistics.count, f"{rate:.1f} img/s")
    assert statistics is not None, "a source of at least two images gave none"
    return statistics


def _by_size(extractor: FeatureExtractor, batch: list[Image]) -> NDArray[np.float32]:
    """Extract features; an extractor that keeps native sizes cannot stack differing ones."""
    if len({image.shape for image in batch}) == 1:
        return extractor(batch)
    return np.concatenate([extractor([image]) for image in batch])


def _open_reference(
    reference: str, n: int | None, extractor: FeatureExtractor
) -> tuple[Reference, NDArray[np.float32] | None]:
    """Return the reference's statistics and, where it is made of images, features for KID."""
    if is_statistics_file(Path(reference)):
        loaded = load_reference(Path(reference))
        loaded.require_pipeline(extractor.pipeline, reference)
        return loaded, None
    found = _from_path(reference, None)
    source = found if n is None or n >= found.count else _from_path(reference, n)
    statistics = _collect(source, extractor, "reference")
    made = Reference(statistics.mean, statistics.covariance, statistics.count, extractor.pipeline)
    return made, statistics.kept


def _distance(ours: FeatureStatistics, theirs: Reference, reference: str) -> float:
    if theirs.mean.shape != ours.mean.shape:
        raise UsageError(
            "the reference has another number of features",
            got=theirs.mean.shape[0],
            expected=ours.dim,
            where=reference,
            fix="make a reference with these features",
        )
    return frechet_distance(theirs.mean, theirs.covariance, ours.mean, ours.covariance)


def _warnings(ours: FeatureStatistics, theirs: Reference, extractor: FeatureExtractor) -> list[str]:
    found = []
    if ours.count <= ours.dim:
        found.append(
            f"{ours.count} images for {ours.dim} features: the distance is biased upwards; "
            "compare it only with distances of the same n"
        )
    if theirs.pipeline is None:
        found.append(
            "the reference does not say which features made it; that they are those of "
            f"{extractor.pipeline} is assumed"
        )
    return found
