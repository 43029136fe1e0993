"""What a study leaves on disk: one small JSON file a finding, whole or absent.

    RUNS/<study>/study.yaml                       the study, resolved
    RUNS/<study>/reals/                           training images, their features, the probe
    RUNS/<study>/<variant>/seed-0/run/            the run folder of `terdit train`
                                  step-00005000.pt            the model at a scored step
                                  step-00005000.safetensors   ... ternarized; .tdt: packed
                                  started.json                what a training was started with
                                  train.json                  how it was trained; or why it failed
                                  metrics.jsonl               what was logged of it
                                  convert.json                ... or ternarized, or packed
                                  losses/step-00005000.json
                                  scores/step-00005000-cfg-2-n-10000.json
                                  grids/cfg-2.npz, .json      images from the same noise
                                  grids/nearest.npz, .json    the nearest training images
                                  footprint.json              bytes, memory, operations, latency

Each record says in `asked` what it depends on; where that has changed since, it is made again.
What is not JSON, nor a grid, only serves to make the rest: without it, what is recorded stays, and
a model that something missing needs is trained again.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study.spec import Evaluation, Study, Variant, recipe_of
from terdit_cli.recipe import Recipe
from terdit_cli.system.atomic import atomic_path
from terdit_cli.train.loggers import FILE as METRICS

LARGEST_RECORD = 16 << 20  # bytes
# What a model does not depend on: the name, where the data lie, how it is logged and kept.
_OUTSIDE = ("name", "logging", "sample", "checkpoint", "parallel")
_OUTSIDE_DATA = ("path", "workers")


class Record(BaseModel):
    """A finding; `asked` is what it depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    asked: dict[str, Any]
    command: str
    machine: str
    date: str
    seconds: float  # of a training: of all its sittings; else of the call that finished it


class Training(Record):
    """A finished training; `failed` holds the reason of one that diverged."""

    steps: int
    failed: str | None = None


class Started(Record):
    """What half-done work beside it depends on: it goes on only where that is the same."""


class Conversion(Record):
    """A variant's files, made of another's without training; `command` has a line for each."""


class Grid(Record):
    """Images of every class from the noise that all models share, in the .npz beside it."""


class Neighbours(Record):
    """The training images nearest to a Grid's, in the .npz beside it; RMS of 0 to 255 levels."""

    distances: list[float]
    held_out: list[float] | None  # of as many images that no model has seen
    searched: int


class Loss(Record):
    """The loss of the averaged weights on images and noise that are always the same."""

    loss: float
    mse: float
    vb: float
    quarters: list[float]  # loss by quarter of the timesteps, the least noise first
    n: int
    images: str  # which


class Accuracy(BaseModel):
    """Of the linear probe on generated images: whether they look like their class."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    all: float
    per_class: dict[str, float]


class Nearest(BaseModel):
    """Distances of samples to their nearest training image, beside those between the reals."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    median: float
    real_median: float
    closest: float
    real_closest: float
    share_closer: float  # of samples, closer to a real than 99 % of the reals are to theirs
    looked_at: int
    searched: int


class Score(Record):
    """One model's distance and what goes with it."""

    step: int
    cfg_scale: float
    n: int
    evaluation: dict[str, Any]  # the JSON of eval-fid
    accuracy: Accuracy | None
    nearest: Nearest | None

    @property
    def distance_name(self) -> str:
        return str(self.evaluation["distance_name"])

    @property
    def distance(self) -> float:
        return self.metric(self.distance_name) or float("nan")

    def metric(self, name: str) -> float | None:
        """Return a metric, None where it was not computed or is not finite."""
        value = self.evaluation["metrics"].get(name)
        return float(value) if isinstance(value, int | float) else None


class Footprint(Record):
    """What a model costs: on disk, in memory, in operations, in time."""

    form: str  # what was measured: "t2" or "t5" of a .tdt, or "ckpt.pt"
    parameters: int
    ternary: int  # of these
    file_bytes: dict[str, int]  # by form: "bf16", "fp32", "t2", "t5"
    forward_flops: int  # of one image, one pass
    nfe: int
    latency: list[float]  # seconds per image, one at a time; repeats; none: not known
    peak_bytes: int  # resident, of the process that drew them
    backend: str
    isa: str | None
    activations: str
    threads: int

    @property
    def bytes(self) -> int:
        """Return the bytes on disk: of the packed file, or of bfloat16 weights."""
        return self.file_bytes.get(self.form) or self.file_bytes["bf16"]

    @property
    def kind(self) -> tuple[object, ...]:
        """Return what tells networks apart that take different times, on one machine."""
        network = (self.parameters, self.form, self.backend, self.activations)
        return (*network, self.nfe, self.threads)


class Probe(Record):
    """The linear probe: how well it does on real images that it was not trained on."""

    accuracy: float
    per_class: dict[str, float]
    trained_on: int
    held_out: int


AnyRecord = TypeVar("AnyRecord", bound=Record)


class Place:
    """Where one variant of one seed lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.started = folder / "started.json"
        self.training = folder / "train.json"
        self.metrics = folder / METRICS
        self.conversion = folder / "convert.json"
        self.footprint = folder / "footprint.json"
        self.neighbours = folder / "grids" / "nearest.json"
        self.nearest_images = folder / "grids" / "nearest.npz"

    def model(self, step: int, variant: Variant) -> Path:
        kind = "pt" if variant.is_trained else "tdt" if variant.pack else "safetensors"
        return self.folder / f"step-{step:08d}.{kind}"

    def loss(self, step: int) -> Path:
        return self.folder / "losses" / f"step-{step:08d}.json"

    def score(self, step: int, cfg_scale: float, n: int) -> Path:
        return self.folder / "scores" / f"step-{step:08d}-cfg-{cfg_scale:g}-n-{n}.json"

    def features(self, step: int, cfg_scale: float) -> Path:
        """Return the work folder of the scores of a step, whatever their number of images."""
        return self.folder / "scores" / f"step-{step:08d}-cfg-{cfg_scale:g}.work"

    def features_started(self, step: int, cfg_scale: float) -> Path:
        return self.features(step, cfg_scale).with_suffix(".json")

    def grid(self, cfg_scale: float) -> Path:
        return self.folder / "grids" / f"cfg-{cfg_scale:g}.npz"

    def grid_record(self, cfg_scale: float) -> Path:
        return self.grid(cfg_scale).with_suffix(".json")


@dataclass(frozen=True)
class Folder:
    """Where a study lies."""

    path: Path

    def place(self, variant: Variant, seed: int) -> Place:
        return Place(self.path / variant.name / f"seed-{seed}")

    @property
    def reals(self) -> Path:
        return self.path / "reals"


def essence(recipe: Recipe) -> dict[str, Any]:
    """Return what a trained model depends on."""
    values = recipe.model_dump(mode="json", exclude=set(_OUTSIDE))
    for name in _OUTSIDE_DATA:
        values["data"].pop(name)
    return values | {"ternary": recipe.ternary.said()}


def model_asked(study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    """Return what a variant's models depend on, and an eps_scale of its own."""
    if variant.of is not None:
        source = model_asked(study, study.variant(variant.of), seed)
        packing = variant.pack.model_dump() if variant.pack else None
        asked = {"of": source, "ternarize": variant.ternarize, "pack": packing}
        return asked if variant.eps_scale == 1 else asked | {"eps_scale": variant.eps_scale}
    asked = {"recipe": essence(recipe_of(study, variant, seed))}
    if variant.after is not None:
        asked["after"] = model_asked(study, study.variant(variant.after), seed)
    return asked


def scored_by(study: Study) -> dict[str, Any]:
    """Return what a score depends on beside the model, its step, n and guidance."""
    evaluation = study.evaluation.model_dump(mode="json")
    unused = ("n", "curve_n", "cfg_scales", "loss_n", "grid", "weights")
    return {key: value for key, value in evaluation.items() if key not in unused}


def lost_by(study: Study) -> dict[str, Any]:
    """Return what a loss depends on beside the model and its step."""
    return {"loss_n": study.evaluation.loss_n}


def sampled_by(study: Study, cfg_scale: float) -> dict[str, Any]:
    """Return what images from the same noise depend on beside the model."""
    fields = {"sampler", "sampling_steps", "cfg_channels", "seed", "batch_size", "grid"}
    return {"drawing": study.evaluation.model_dump(include=fields), "cfg_scale": cfg_scale}


def timed_by(study: Study) -> dict[str, Any]:
    """Return what a footprint depends on beside the model."""
    evaluation = study.evaluation
    return {
        "sampler": evaluation.sampler,
        "sampling_steps": evaluation.sampling_steps,
        "cfg_scale": study.largest_scale,
    }


def differences(old: Any, new: Any, defaults: Any = None, path: str = "") -> list[str]:
    """Return the dotted paths at which two `asked` differ.

    A field that recipes or evaluations did not have when `old` was written counts as its default:
    a newer terdit asks for more, and what was made before stays good.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [path]
    found: list[str] = []
    for key in {**old, **new}:
        inner = f"{path}.{key}" if path else key
        known = defaults if isinstance(defaults, dict) else {}
        if defaults is None and key in _DEFAULTS:
            known = {key: _DEFAULTS[key]()}
        if key in old and key in new:
            found += differences(old[key], new[key], known.get(key), inner)
        elif key in old or key not in known or new[key] != known[key]:
            found.append(inner)
    return found


_DEFAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "recipe": functools.cache(lambda: essence(Recipe(name="x"))),
    "evaluation": lambda: Evaluation().model_dump(mode="json"),
}


def stamp() -> dict[str, Any]:
    """Return `machine` and `date` of a record that is made now."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return " ".join((names[0] if names else platform.processor() or platform.machine()).split())


def save(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Return a record, None where there is none.

    Raises:
        InputFileError: damaged, or of another kind or version.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_RECORD + 1)
        if len(text) > LARGEST_RECORD:
            raise ValueError(f"more than {LARGEST_RECORD} bytes")
        return kind.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise InputFileError(
            f"not a {kind.__name__.lower()} of a study",
            got=" ".join(str(error).split())[:300],
            where=path,
            fix="delete it: the study makes it again",
        ) from error


def current(path: Path, kind: type[AnyRecord], asked: dict[str, Any]) -> AnyRecord | None:
    """Return a record if it is there and was made of what is asked now."""
    record = read(path, kind)
    if record is None or differences(record.asked, json.loads(json.dumps(asked))):
        return None
    return record
