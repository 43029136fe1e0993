"""Entries: what they hold, that flips are of one step, speed, waiting and MFU as defined."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from terdit_cli.model.layout import training_flops
from terdit_cli.model.ternary import TernaryLinear, ternarize
from terdit_cli.recipe import load_recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.flips import KINDS
from terdit_cli.train.loggers import read_metrics
from terdit_cli.train.optim import learning_rate
from terdit_cli.train.run_metrics import Observer, peak_memory
from terdit_cli.train.trainer import StepResult, Trainer


@pytest.fixture
def make_trainer(recipe_path: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """Return make_trainer(*overrides): one of the small recipe."""

    def make(*overrides: str) -> Trainer:
        recipe, job = load_recipe(recipe_path, overrides), Job()
        space = build.open_space(recipe, job.device)
        return Trainer(recipe, build.open_data(recipe), space, job, tmp_path)

    return make


def step(trainer: Trainer) -> StepResult:
    images = torch.randint(256, (8, 28, 28, 3), dtype=torch.uint8)
    return trainer.train_step(images, torch.arange(8))


def codes(trainer: Trainer) -> torch.Tensor:
    layers = (m for m in trainer.network.modules() if isinstance(m, TernaryLinear))
    return torch.cat([ternarize(layer.weight.detach()).flatten() for layer in layers])


@pytest.mark.parametrize("every", [1, 2, 4])
def test_flips_are_those_of_the_logged_step(
    make_trainer: Callable[..., Trainer], every: int
) -> None:
    trainer = make_trainer(f"logging.every={every}", "train.steps=6")
    observer = Observer(trainer)
    entries, expected, logged = [], [], []
    for _ in range(6):
        before = codes(trainer)
        observer.add(step(trainer))
        if observer.due:
            logged.append(trainer.step)
            entries.append(observer.log())
            expected.append((codes(trainer) != before).double().mean().item())
    observer.close()
    assert logged == {1: [1, 2, 3, 4, 5, 6], 2: [2, 4, 6], 4: [4, 6]}[every]  # and the last one
    assert [entry["flipped"]["all"] for entry in entries] == pytest.approx(expected)
    assert min(expected[1:]) > 0  # the first step only moves the last layer, which starts at 0


def test_an_entry(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer("logging.every=3", "optim.schedule=cosine")
    observer = Observer(trainer)
    observer._peak = 1e9
    torch.manual_seed(0)
    results = [step(trainer) for _ in range(3)]
    for result in results:
        observer.add(result)
    entry = observer.log()
    observer.close()
    assert entry["step"] == 3
    for name in ("loss", "mse", "vb"):
        mean = sum(getattr(result, name) for result in results) / 3
        assert entry[name] == pytest.approx(mean)
    assert entry["lr"] == learning_rate(2, trainer.recipe.train.steps, trainer.recipe.optim)
    assert entry["grad_norm"] == results[-1].grad_norm
    assert entry["skipped_steps"] == 0
    assert 0 <= entry["data_wait"] < 1
    assert entry["memory_bytes"] > 50e6
    flops = training_flops(trainer.network.config)
    assert entry["mfu"] == pytest.approx(entry["images_per_second"] * flops / 1e9)
    # The quarters' means, each weighted with its share of the images, are the loss.
    shares = [sum(r.quarter_shares[i] for r in results) / 3 for i in range(4)]
    assert sum(shares) == pytest.approx(1)
    means = list(entry["loss_by_quarter"].values())
    parts = (mean * share for mean, share in zip(means, shares, strict=True) if share)
    assert sum(parts) == pytest.approx(entry["loss"], rel=1e-5)
    for what in ("flipped", "minus", "zero", "plus"):
        assert list(entry[what]) == ["all", *KINDS]
    assert read_metrics(tmp_path) == [entry]


def test_a_quarter_without_images_has_no_loss(make_trainer: Callable[..., Trainer]) -> None:
    observer = Observer(make_trainer())
    half = StepResult(1.0, 0.8, 0.2, 0.0, 0.0, 1.0, (0.75, 0.25, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0))
    observer.add(half)
    assert observer.log()["loss_by_quarter"] == {"1": 1.5, "2": 0.5, "3": None, "4": None}


def test_skipped_steps_count_for_nothing_else(make_trainer: Callable[..., Trainer]) -> None:
    observer = Observer(make_trainer())
    observer.add(StepResult(1.0, 1.0, 0.0, 0.0, 0.0, 2.0))
    observer.add(StepResult(math.nan, math.nan, 0.0, 0.0, 0.0, math.nan))
    entry = observer.log()
    assert (entry["loss"], entry["grad_norm"], entry["skipped_steps"]) == (1.0, 2.0, 1)
    observer.add(StepResult(1.0, 1.0, 0.0, 0.0, 0.0, math.inf))
    entry = observer.log()
    assert (entry["loss"], entry["grad_norm"], entry["skipped_steps"]) == (None, None, 2)
    assert entry["images_per_second"] == 0


def test_waiting_is_counted_and_pauses_are_not(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    observer = Observer(make_trainer())

    def batches() -> Any:
        for _ in range(3):
            clock[0] += 2  # the loader needs two seconds
            yield torch.zeros(0), torch.zeros(0)

    for _ in observer.timed(batches()):
        clock[0] += 6  # a step takes six
        observer.add(StepResult(1.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        clock[0] += 50
        observer.pause(50)
    entry = observer.log()
    assert entry["data_wait"] == pytest.approx(6 / 24)
    assert entry["images_per_second"] == pytest.approx(3 * 8 / 24)
    assert "mfu" not in entry  # no peak is known of a CPU


def test_memory_of_a_process_is_its_peak() -> None:
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(40_000_000)
    assert peak_memory(torch.device("cpu")) >= before
    del block
    assert peak_memory(torch.device("cpu")) > 160e6
