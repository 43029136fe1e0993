"""`terdit eval-fid`: a model or a set of images against a reference, with gates for CI.

One pass of the images through the extractor, block by block into a work folder; then all metrics
from there. Only the two Inception pipelines' distances are called FID.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import terdit_cli
from terdit_cli import console
from terdit_cli.class_names import names_of_classes
from terdit_cli.data.image_set import ImageSet, unreadable_images
from terdit_cli.data.image_sources import open_image_set
from terdit_cli.data.images import BadImagePolicy
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate import outputs as eval_outputs
from terdit_cli.evaluate.feature_shards import FeatureShards
from terdit_cli.evaluate.features import FeatureExtractor, make_extractor
from terdit_cli.evaluate.gate import apply_limits, check_limits, failure, make_limits
from terdit_cli.evaluate.image_features import (
    LEAST_BLOCK,
    Batch,
    Source,
    conversions,
    make_features,
)
from terdit_cli.evaluate.open_reference import (
    KEPT_FEATURES,
    open_reference,
    reference_of,
)
from terdit_cli.evaluate.per_class import classes_asked_for
from terdit_cli.evaluate.reference_set import holds_images, is_statistics_file, save_reference
from terdit_cli.evaluate.request import EvalOptions, check_options
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.evaluate.scores import Asked, effect_of_bf16, recognise, score, score_classes
from terdit_cli.evaluate.statistics import spread
from terdit_cli.evaluate.summary import write_junit, write_markdown
from terdit_cli.generate.generator import (
    ImageGenerator,
    class_of,
    open_generator,
    sampler_for,
    usable_device,
)
from terdit_cli.generate.options import Labels, ModelOptions, SamplingOptions
from terdit_cli.generate.saved_images import SavedImages
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.runtime.cpu import set_threads
from terdit_cli.system.gpu_memory import ELSEWHERE, explained
from terdit_cli.system.job import Job, join_job

DEFAULT_IMAGES = 1000  # of a model


@dataclass(frozen=True)
class ModelSource:
    """Images that a model generates on demand."""

    generator: ImageGenerator
    sampler: SamplerConfig
    count: int
    seed: int
    labels: Labels
    batch_size: int
    sha256: None = None
    skipped: list[str] = field(default_factory=list)  # none

    @property
    def where(self) -> str:
        return str(self.generator.file.path)

    @property
    def class_names(self) -> list[list[str]]:
        return self.generator.class_names

    def class_id(self, image: int) -> int:
        classes = self.generator.model.info.config.num_classes
        return class_of(image, classes, self.labels, self.seed)

    def facts(self) -> dict[str, Any]:
        how = self.generator.model.facts()
        return {
            "model_sha256": self.generator.file.sha256,
            "sampler": dataclasses.asdict(self.sampler),
            "seed": self.seed,
            "labels": self.labels,
            "batch_size": self.batch_size,
            "vae": self.generator.vae,
            # Not the threads: they do not change the images.
            **{name: how[name] for name in ("backend", "isa", "activations", "weights")},
        }

    def batches(self, images: range) -> Iterator[Batch]:
        made = self.generator.images(
            images, self.sampler, self.seed, self.batch_size, labels=self.labels
        )
        for batch, _ in made:
            yield list(batch), ["RGB"] * len(batch)


@dataclass(frozen=True)
class SetSource:
    """Existing images: those of a set at `indices`."""

    images: ImageSet
    indices: list[int]
    skipped: list[str]  # the reason for each skipped image

    @property
    def where(self) -> str:
        return self.images.where

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def batch_size(self) -> int:
        return LEAST_BLOCK

    @cached_property
    def class_names(self) -> list[list[str]]:
        return names_of_classes(self.images.class_names, len(self.images.class_names))

    def class_id(self, image: int) -> int:
        return int(self.images.labels[self.indices[image]])

    def facts(self) -> dict[str, Any]:
        return {"images_sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """The hash of the list of images."""
        return self.images.sha256(self.indices)

    def batches(self, images: range) -> Iterator[Batch]:
        found = [self.images.read(self.indices[image]) for image in images]
        yield [pixels for pixels, _ in found], [mode for _, mode in found]


def open_set(where: str, n: int | None, on_bad_image: BadImagePolicy) -> SetSource:
    """Open a set of images, or the part of it that `n` asks for.

    Raises:
        InputFileError: fewer images than asked for, or than two.
    """
    images = open_image_set(where)
    for note in images.notes:
        console.note(note)
    indices = list(range(len(images)))
    skipped: list[str] = []
    if on_bad_image == "skip":
        bad = dict(unreadable_images(images, indices))
        skipped = list(bad.values())
        indices = [index for index in indices if index not in bad]
    if len(indices) < max(2, n or 0):
        raise InputFileError(
            "too few images",
            got=f"{len(indices)}" + (f" ({len(skipped)} unreadable)" if skipped else ""),
            expected=f"-n {n}" if n else "at least 2",
            where=where,
            fix=f"-n {len(indices)}" if len(indices) >= 2 else "give more images",
        )
    if n is not None:
        indices = [indices[place] for place in spread(len(indices), n)]
    return SetSource(images, indices, skipped)


def reference_images(where: str, n: int | None, on_bad_image: BadImagePolicy) -> SetSource | None:
    """Open the images of a reference; None if it is a file of statistics.

    Args:
        n: the maximum of images to take; a file of statistics is used as a whole.
    """
    path = Path(where)
    if is_statistics_file(path):
        return open_set(where, None, on_bad_image) if holds_images(path) else None
    source = open_set(where, None, on_bad_image)
    if n is not None and n < source.count:
        source = open_set(where, n, on_bad_image)
    return source


class _Download:
    """Reports every few seconds how much of an extractor's weights is downloaded."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._due = 0.0

    def __call__(self, done: int, total: int) -> None:
        if (now := time.monotonic()) >= self._due or done == total:
            self._due = now + self.SECONDS
            sizes = f"{console.byte_size(done)} of {console.byte_size(total)}"
            console.note(f"downloading the extractor's weights: {sizes}")


def run(
    options: EvalOptions,
    sampling: SamplingOptions | None = None,
    loading: ModelOptions | None = None,
    command: str = "terdit eval-fid",
) -> EvalResult | None:
    """Evaluate; returns None if there is nothing to compare, and in all but the main process.

    Args:
        sampling, loading: of `options.model`.
        command: the command line, for the provenance.

    Raises:
        UsageError, InputFileError, EnvironmentProblem. A missed gate is not raised here: see
        `require_passed`.
    """
    sampling, loading = sampling or SamplingOptions(), loading or ModelOptions()
    check_options(options)
    for name, value, least in (
        ("--batch-size", sampling.batch_size, 1),
        ("--seed", sampling.seed, 0),
    ):
        if value is not None and value < least:
            raise UsageError(
                f"wrong {name}", got=value, expected=f"at least {least}", fix=f"{name} {least}"
            )
    limits = make_limits(options.max_fid, options.min_is, options.max_regression, options.tolerance)
    baseline = None if limits.baseline is None else limits.baseline.result
    if loading.threads is not None:
        set_threads(loading.threads)
    started = time.monotonic()
    with join_job() as job, _work_folder(options.work, job) as work:
        place = usable_device(job.device_named(loading.device))
        device = str(place)
        fits = partial(explained, "the network of features", place, ELSEWHERE)
        with fits():
            extractor = make_extractor(
                options.features, options.weights, device, options.precision, _Download()
            )
        source = _open(options, sampling, replace(loading, device=device), job)
        provenance = _provenance(source, extractor, sampling.seed, command)
        warnings = list(extractor.warnings)
        reference, members = None, {}
        # The reference first: its mistakes show before hours of sampling.
        if (where := options.reference) is not None:
            compared = reference_images(where, options.n, options.on_bad_image)
            if options.per_class is not None:
                members = classes_asked_for(options.per_class, source, where, compared)
            with fits():
                reference = open_reference(where, compared, extractor, work, job)
            provenance |= reference.facts()
            warnings += check_limits(
                limits,
                pipeline=extractor.pipeline,
                n=source.count,
                n_reference=reference.statistics.count,
                provenance=provenance,
                has_score=extractor.classes is not None,
            )
        saved = None if options.save_images is None else SavedImages(options.save_images)
        keep = eval_outputs.pictures_to_keep(source, options)
        with fits():
            shards = make_features(source, extractor, work / "images", job, keep, saved)
        if not job.is_main:
            return None
        pictures = eval_outputs.Pictures(source, shards)
        if options.make_reference is not None:
            kept = KEPT_FEATURES if options.reference_features else 0
            save_reference(options.make_reference, reference_of(shards, extractor, source, kept))
        for path in options.reports(".png"):
            eval_outputs.write_grid(path, pictures)
        if reference is None:
            return None
        reference.require_dim(shards)
        per_class, recognised = {}, None
        if reference.shards is not None:
            per_class = score_classes(shards, reference.shards, members)
            recognised = recognise(shards, reference.shards, members)
        asked = Asked(options.pr_count, options.confidence, sampling.seed)
        scores = score(extractor.distance_name, shards, reference.statistics, asked)
        if recognised is not None:
            scores.metrics |= {"accuracy": recognised.all, "accuracy of reals": recognised.reals}
        warnings += [*_warnings(source, shards), *reference.warnings(source, extractor)]
        if options.precision == "bf16":
            provenance["bf16"] = effect_of_bf16(shards, reference.statistics)
        provenance["seconds"] = round(time.monotonic() - started, 1)
        result = EvalResult(
            distance_name=extractor.distance_name,
            metrics=scores.metrics,
            n=source.count,
            n_reference=reference.statistics.count,
            pipeline=extractor.pipeline,
            intervals=scores.intervals,
            per_class=per_class,
            recognised={} if recognised is None else recognised.by_class,
            curve=scores.curve,
            provenance=provenance,
            warnings=[*warnings, *scores.warnings],
        )
        result = apply_limits(result, limits)
        for path in options.reports(".xml"):
            write_junit(path, result)
        for path in options.reports(".md"):
            write_markdown(path, result, baseline)
        for path in options.reports(".html"):
            reals = None if reference.source is None else eval_outputs.Pictures(reference.source)
            features = reference.statistics.features
            eval_outputs.write_page(path, result, baseline, shards, pictures, features, reals)
        return result


def require_passed(result: EvalResult) -> None:
    """Raise GateFailed unless every gate of a result holds."""
    where = result.provenance.get("model") or result.provenance.get("images")
    if error := failure(result, where):
        raise error


@contextmanager
def _work_folder(named: Path | None, job: Job) -> Iterator[Path]:
    """Yield the folder of features: the user's, which stays, or a temporary one."""
    if named is not None:
        yield named
    elif job.is_main:
        with tempfile.TemporaryDirectory(prefix="terdit-") as folder:
            yield Path(job.broadcast(folder))
            job.wait()
    else:
        yield Path(job.broadcast(None))
        job.wait()


def _open(
    options: EvalOptions, sampling: SamplingOptions, loading: ModelOptions, job: Job
) -> Source:
    """Open what is scored."""
    if options.model is None:
        return open_set(str(options.images), options.n, options.on_bad_image)
    file = ModelFile.open(options.model)
    asked = sampler_for(file, sampling)
    generator = open_generator(file, loading)
    return ModelSource(
        generator,
        generator.fit(asked),
        options.n or DEFAULT_IMAGES,
        sampling.seed,
        options.labels,
        job.smallest(generator.batch_size(sampling.batch_size, asked.guided)),
    )


def _provenance(
    source: Source, extractor: FeatureExtractor, seed: int, command: str
) -> dict[str, Any]:
    """Return everything needed to repeat the run; `gate.ALIKE` are keys of it."""
    facts: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs, {extractor.device.type}",
        "terdit": terdit_cli.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "precision": extractor.precision,
        "seed": seed,
    }
    if isinstance(source, SetSource):
        return facts | {"images": source.where, "images_sha256": source.sha256}
    assert isinstance(source, ModelSource)
    info, sampler = source.generator.model.info, source.sampler
    return facts | {
        "model": source.where,
        "model_sha256": source.generator.file.sha256,
        "recipe_sha256": info.recipe_sha256,
        "config": dataclasses.asdict(info.config),
        "step": info.step,
        "image_size": info.image_size,
        "vae": source.generator.vae or info.space.vae,
        "sampler": sampler.name,
        "steps": sampler.steps,
        "cfg_scale": sampler.cfg_scale,
        "cfg_channels": sampler.cfg_channels,
        "eps_scale": sampler.eps_scale,
        "nfe": sampler.nfe,
        "labels": source.labels,
        **source.generator.model.facts(),
    }


def _warnings(source: Source, shards: FeatureShards) -> list[str]:
    """Return what the user should know about the images."""
    found = conversions(shards)
    if source.skipped:
        found.append(
            f"{len(source.skipped)} unreadable images were skipped, the first: {source.skipped[0]}"
        )
    return found
