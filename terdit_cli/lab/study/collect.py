"""What a study has found so far, read from its folder: models, their scores, and the verdict.

Nothing is computed that takes time, so pages can be made again at any moment. What was scored in
another way than the study asks for now is left out; what is not there is missing, never guessed.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study.records import (
    AnyRecord,
    Conversion,
    Folder,
    Footprint,
    Grid,
    Loss,
    Neighbours,
    Probe,
    Score,
    Training,
    differences,
    lost_by,
    model_asked,
    read,
    sampled_by,
    scored_by,
    timed_by,
)
from terdit_cli.lab.study.spec import Pair, Study, Variant
from terdit_cli.train.loggers import read_metrics

Images = NDArray[np.uint8]  # [C, K, H, W, 3]: K images of each of C classes


@dataclass(frozen=True)
class Model:
    """A variant of one seed, and all that was found of it."""

    variant: Variant
    seed: int
    training: Training | None
    conversion: Conversion | None
    losses: dict[int, Loss]  # by step
    scores: dict[tuple[int, float, int], Score]  # by step, cfg scale, n
    footprint: Footprint | None
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
    grids: dict[float, Images]  # by cfg scale
    neighbours: Neighbours | None
    nearest: Images | None  # to the grid's of the largest CFG scale, in its order
    changed: list[str]  # settings of the study that were others when it was made


@dataclass(frozen=True)
class Mean:
    """The mean over seeds, and the values behind it."""

    values: dict[int, float]  # by seed

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def spread(self) -> str:
        """Return "1.021 to 1.064", or "" where all are alike."""
        low, high = (_digits(pick(self.values.values())) for pick in (min, max))
        return "" if low == high else f"{low} to {high}"


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


@dataclass(frozen=True)
class Findings:
    """All of a study."""

    study: Study
    folder: Path
    models: list[Model]
    probe: Probe | None
    class_names: list[str] = field(default_factory=list)

    def models_of(self, name: str) -> list[Model]:
        return [model for model in self.models if model.variant.name == name]

    def finals(
        self, name: str, cfg_scale: float, n: int | None = None
    ) -> list[tuple[Model, Score]]:
        """Return the scores of a variant at its last step, by seed.

        Args:
            n: of so many images; None: of as many as all variants have.
        """
        variant = self.study.variant(name)
        key = (self.study.steps_of(variant)[-1], cfg_scale, n or self.study.evaluation.n)
        return [(m, m.scores[key]) for m in self.models_of(name) if key in m.scores]

    def distance(self, name: str, cfg_scale: float, n: int | None = None) -> Mean | None:
        """Return the distance of a variant at its last step; None where it is missing."""
        found = {m.seed: s.distance for m, s in self.finals(name, cfg_scale, n)}
        found = {seed: value for seed, value in found.items() if math.isfinite(value)}
        return Mean(found) if found else None

    def ratio(
        self, name: str, cfg_scale: float, n: int | None = None, other: str | None = None
    ) -> Mean | None:
        """Return a variant's distance : the baseline's, seed by seed; None without a common seed.

        Args:
            other: the variant to stand in the baseline's place.
        """
        pair = (name, other or self.study.headline.baseline)
        ours, theirs = (self.distance(one, cfg_scale, n) for one in pair)
        if ours is None or theirs is None:
            return None
        common = ours.values.keys() & theirs.values.keys()
        found = {seed: ours.values[seed] / theirs.values[seed] for seed in sorted(common)}
        return Mean(found) if found else None

    @property
    def distance_name(self) -> str:
        scores = (score for model in self.models for score in model.scores.values())
        return next((score.distance_name for score in scores), "distance")

    def timed(self, cost: Footprint) -> Footprint | None:
        """Return where a network's latency is: its own, or one's that differs in weights alone.

        All of a study are of one machine: times of two say nothing of two networks. It is the one
        that timed the networks of the most models.
        """
        costs = [model.footprint for model in self.models if model.footprint is not None]
        by_machine: dict[str, dict[tuple[object, ...], Footprint]] = {}
        for other in (cost, *costs):
            if other.latency:
                by_machine.setdefault(other.machine, {}).setdefault(other.kind, other)
        covered = {
            machine: sum(other.kind in kinds for other in costs)
            for machine, kinds in by_machine.items()
        }
        if not covered:
            return None
        return by_machine[max(covered, key=lambda machine: covered[machine])].get(cost.kind)

    @property
    def missing(self) -> int:
        """Return how many scores are not there; those of failed trainings do not count."""
        study, count = self.study, 0
        scales = study.evaluation.cfg_scales
        for variant in study.variants:
            for seed in study.seeds_of(variant):
                model = next((m for m in self.models_of(variant.name) if m.seed == seed), None)
                if self._failed(variant, seed):
                    continue
                for step in study.steps_at(variant, seed):
                    for n in study.images_at(variant, step):
                        wanted = ((step, scale, n) for scale in scales)
                        count += sum(model is None or key not in model.scores for key in wanted)
        return count

    def _failed(self, variant: Variant, seed: int) -> bool:
        """Return whether its training, or one that it needs, came to nothing."""
        failed = any(
            model.training is not None and model.training.failed is not None
            for model in self.models_of(variant.name)
            if model.seed == seed
        )
        needed = variant.of or variant.after
        return failed or (needed is not None and self._failed(self.study.variant(needed), seed))

    def verdict_of(self, ratio: Mean, pair: Pair) -> str:
        """Return "met" or "not met", with the steps where they are not equal."""
        study = self.study
        word = "met" if ratio.mean <= pair.goal else "not met"
        ours, theirs = (
            sum(study.steps_taken(study.variant(name))) for name in (pair.ternary, pair.baseline)
        )
        return word if ours == theirs else f"{word} in {ours:,} steps in all : {theirs:,}"

    @property
    def verdict(self) -> str:
        """Return the result in one line."""
        n = self.study.headline_images
        of = f"{self.distance_name} of {n:,} images"
        lines = []
        for pair in self.study.pairs:
            parts = []
            for scale in self.study.evaluation.cfg_scales:
                ratio = self.ratio(pair.ternary, scale, n, pair.baseline)
                if ratio is not None:
                    spread = f" ({ratio.spread})" if ratio.spread else ""
                    met = self.verdict_of(ratio, pair)
                    parts.append(f"{guidance(scale)} {ratio.mean:.3f}{spread}, {met}")
            if parts:
                who = pair_named(self.study, pair)
                lines.append(f"{of}, {who} (goal at most {pair.goal:g}): " + "; ".join(parts))
        return ". ".join(lines) or "no pair of scores yet"


def pair_named(study: Study, pair: Pair, again: bool = False) -> str:
    """Return what the ratio of a pair is called; `again`: that to `pair.again`."""
    if pair is study.headline:
        return "ternary : baseline as long" if again else "ternary : baseline"
    return f"{pair.ternary} : {pair.again if again else pair.baseline}"


def steps_named(study: Study, variant: Variant) -> str:
    """Return "8,000", or "8,000 + 8,000" of a variant that is initialised from another one."""
    return " + ".join(f"{steps:,}" for steps in study.steps_taken(variant))


def guidance(scale: float) -> str:
    """Return what a scale of classifier-free guidance is called."""
    return "no guidance" if scale == 1 else f"CFG scale {scale:g}"


def collect(study: Study, folder: Folder) -> Findings:
    """Read all that is there of a study.

    Raises:
        InputFileError: a damaged record. And what reading the variants' recipes raises.
    """
    models = []
    for variant in study.variants:
        for seed in study.seeds_of(variant):
            model = _model(study, folder, variant, seed)
            if model.training is not None or model.scores or model.metrics:
                models.append(model)
    probe = read(folder.reals / "probe.json", Probe)
    names = list(probe.per_class) if probe is not None else []
    return Findings(study, folder.path, models, probe, names)


def _model(study: Study, folder: Folder, variant: Variant, seed: int) -> Model:
    place = folder.place(variant, seed)
    asked = json.loads(json.dumps(model_asked(study, variant, seed)))
    changed: set[str] = set()
    losses, scores, grids = {}, {}, {}
    for step in study.steps_at(variant, seed):
        if (loss := _made_by(place.loss(step), Loss, lost_by(study))) is not None:
            losses[step] = loss
        for n in study.images_at(variant, step):
            for scale in study.evaluation.cfg_scales:
                how = {"evaluation": scored_by(study)}
                score = _made_by(place.score(step, scale, n), Score, how)
                if score is not None:
                    scores[step, scale, n] = score
                    changed |= set(differences(score.asked.get("model"), asked))
    # Without its images a record counts for nothing: they are generated again.
    for scale in study.evaluation.cfg_scales:
        how = sampled_by(study, scale)
        if place.grid(scale).exists() and _made_by(place.grid_record(scale), Grid, how):
            grids[scale] = _read_images(place.grid(scale))
    neighbours, nearest = None, None
    if place.nearest_images.exists():
        how = sampled_by(study, study.largest_scale)
        neighbours = _made_by(place.neighbours, Neighbours, how)
        nearest = _read_images(place.nearest_images) if neighbours else None
    footprint = _made_by(place.footprint, Footprint, timed_by(study))
    metrics = read_metrics(place.folder) or read_metrics(place.run)
    return Model(
        variant, seed, read(place.training, Training), read(place.conversion, Conversion), losses,
        scores, footprint, metrics, grids, neighbours, nearest, sorted(changed),
    )  # fmt: skip


def _made_by(path: Path, kind: type[AnyRecord], by: dict[str, Any]) -> AnyRecord | None:
    """Return a record that was made in the way that `by` asks for, whatever its model."""
    record = read(path, kind)
    if record is None:
        return None
    asked = {key: value for key, value in record.asked.items() if key in by}
    return None if differences(asked, json.loads(json.dumps(by))) else record


def _read_images(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            classes = len(np.unique(arrays["labels"]))
            flat = arrays["arr_0"]
            images: Images = flat.reshape(classes, -1, *flat.shape[1:])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputFileError(
            "not the images of a study", got=f"{type(error).__name__}: {error}", where=path,
            fix="delete the file and run the study again",
        ) from error  # fmt: skip
    return images
