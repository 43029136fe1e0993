"""A small study, and a folder of invented findings of it: shapes of real ones, numbers of none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terdit_cli.lab.study.records import (
    Accuracy,
    Folder,
    Footprint,
    Grid,
    Loss,
    Nearest,
    Neighbours,
    Probe,
    Score,
    Training,
    lost_by,
    model_asked,
    sampled_by,
    save,
    scored_by,
    timed_by,
)
from terdit_cli.lab.study.spec import Study, Variant, load_study

RECIPE = """\
name: small
model:
  {size: nano, n_layers: 2, dim: 32, n_heads: 2, patch_size: 7, multiple_of: 16, num_classes: 10}
ternary: {granularity: tensor}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, flip: false, workers: 1}
train: {steps: 40, global_batch_size: 8, micro_batch_size: 8, precision: fp32}
optim: {lr: 3e-3}
ema: {decay: 0.9}
sample: {every: 0}
logging: {every: 10}
"""
STUDY = """\
# terdit study small.yaml
name: small
title: Small models
recipe: recipe.yaml
seeds: [0, 1]
steps: [10, 20, 40]
headline: {ternary: ternary, baseline: baseline}
variants:
  - {name: baseline, label: full precision, question: "What is there to lose?",
     overrides: [ternary.enabled=false]}
  - {name: ternary, label: ternary, question: "What does training ternary lose?"}
  - {name: no-norm, label: no norm after adaLN, question: "Is the norm needed?",
     overrides: [ternary.adaln_norm=false], seeds: [0]}
  - {name: ptq, label: "PTQ, per row", question: "Is training needed?",
     of: baseline, ternarize: row}
  - {name: packed, label: packed int8, question: "What does packing cost?", of: ternary,
     pack: {codec: t5, rest: bf16, activations: int8}, seeds: [0]}
bars:
  - {title: Equal steps, variants: [baseline, ternary, no-norm, ptq]}
grids: [baseline, ternary, ptq]
evaluation: {n: 40, curve_n: 20, sampling_steps: 3, batch_size: 20, loss_n: 64, grid: 2}
"""
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
]  # fmt: skip
QUALITY = {
    "baseline": 1.0,
    "ternary": 1.06,
    "no-norm": 1.31,
    "ptq": 4.2,
    "packed": 1.09,
    "warm": 1.02,
}
STAMP = {"machine": "a processor, 2 CPUs, Linux", "date": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """The path of a study, its recipe beside it."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = tmp_path / "small.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def study(study_file: Path) -> Study:
    return load_study(study_file)


@pytest.fixture
def invent() -> Callable[[Study, Folder], None]:
    """Return invent(study, folder): writes findings of every variant and seed."""
    return _invent


def _invent(study: Study, folder: Folder) -> None:
    shares = {name: 0.9 - 0.02 * index for index, name in enumerate(CLASSES)}
    probe = Probe(
        asked={}, command="terdit eval-fid", seconds=9.0, **STAMP, accuracy=0.91,
        per_class=shares, trained_on=900, held_out=100,
    )  # fmt: skip
    save(folder.reals / "probe.json", probe)
    for variant in study.variants:
        for seed in study.seeds_of(variant):
            _invent_model(study, folder, variant, seed)


def _invent_model(study: Study, folder: Folder, variant: Variant, seed: int) -> None:
    place = folder.place(variant, seed)
    asked = model_asked(study, variant, seed)
    about: dict[str, Any] = {"command": f"terdit of {variant.name}", "seconds": 12.0, **STAMP}
    quality = QUALITY[variant.name] * (1 + 0.03 * seed)
    if variant.is_trained:
        save(place.training, Training(asked=asked, steps=40, **about))
        place.run.mkdir(parents=True)
        lines = [_line(step, variant) for step in range(1, 41)]
        (place.run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    steps = study.steps_of(variant)
    for step in steps:
        loss = 0.04 * quality**0.3 * (1 + 8 / step)
        quarters = [loss * factor for factor in (2.4, 0.8, 0.5, 0.3)]
        save(
            place.loss(step),
            Loss(asked=lost_by(study), **about, loss=loss, mse=0.9 * loss, vb=0.1 * loss,
                 quarters=quarters, n=64, images="64 held-out images"),
        )  # fmt: skip
        for n in study.images_at(variant, step):
            for scale in study.evaluation.cfg_scales:
                distance = quality * (20 + 600 / step) * (1 + 4 / n) / scale**0.3
                save(
                    place.score(step, scale, n),
                    _score(study, asked, about, step, scale, n, distance, shares_of(quality)),
                )
    rng = np.random.default_rng(0)
    for scale in study.evaluation.cfg_scales:
        path = place.grid(scale)
        path.parent.mkdir(parents=True, exist_ok=True)
        images = rng.integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
        np.savez(path, arr_0=images, labels=np.arange(20) // 2)
        save(place.grid_record(scale), Grid(asked=sampled_by(study, scale), **about))
    packed = variant.name != "baseline"
    scale = max(study.evaluation.cfg_scales)
    if variant.name in study.paired:
        near = {"distances": [30.5, 12.5, 31.5], "held_out": [29.5, 13.5, 33.5], "searched": 1000}
        save(place.neighbours, Neighbours(asked=sampled_by(study, scale), **about, **near))
        np.savez(place.nearest_images, arr_0=images[::-1], labels=np.arange(20) // 2)
    sizes = {"bf16": 19_000_000, "fp32": 38_000_000} | (
        {"t5": 2_100_000, "t2": 2_600_000} if packed else {}
    )
    latency = [0.021, 0.024, 0.022] if packed else [0.06, 0.058, 0.066]
    save(
        place.footprint,
        Footprint(
            asked=timed_by(study), **about, parameters=9_500_000,
            form="t2" if packed else "ckpt.pt",
            ternary=9_300_000 if packed else 0, file_bytes=sizes, forward_flops=412_000_000,
            nfe=6, latency=latency, peak_bytes=300_000_000, backend="cpu" if packed else "torch",
            isa="avx2" if packed else None, activations="int8" if packed else "fp32", threads=2,
        ),
    )  # fmt: skip


def shares_of(quality: float) -> dict[str, float]:
    return {name: max(0.1, 0.95 - 0.05 * quality - 0.01 * i) for i, name in enumerate(CLASSES)}


def _score(
    study: Study, asked: dict[str, Any], about: dict[str, Any], step: int, scale: float, n: int,
    distance: float, shares: dict[str, float],
) -> Score:  # fmt: skip
    metrics = {
        "fd-efficientnet-lite0": distance, "KID": distance / 900, "precision": 0.7, "recall": 0.5,
    }  # fmt: skip
    evaluation = {
        "distance_name": "fd-efficientnet-lite0", "metrics": metrics, "n": n, "n_reference": 1000,
        "pipeline": "efficientnet-lite0, 224 x 224",
    }  # fmt: skip
    return Score(
        asked={"model": asked, "evaluation": scored_by(study)}, **about, step=step,
        cfg_scale=scale, n=n, evaluation=evaluation,
        accuracy=Accuracy(all=float(np.mean(list(shares.values()))), per_class=shares),
        nearest=Nearest(median=9.1, real_median=9.4, closest=2.2, real_closest=1.4,
                        share_closer=0.011, looked_at=n, searched=1000),
    )  # fmt: skip


def _line(step: int, variant: Variant) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "step": step, "loss": 1 / step, "mse": 0.9 / step, "vb": 0.1 / step, "lr": 1e-3,
        "images_per_second": 200.0,
    }  # fmt: skip
    if variant.name != "baseline":
        zero = 0.31 + 0.1 * math.tanh(step / 20)
        rest = (1 - zero) / 2
        entry |= {
            "minus": {"all": rest}, "zero": {"all": zero}, "plus": {"all": rest},
            "flipped": {"all": 0.1 / step},
        }  # fmt: skip
    return entry
