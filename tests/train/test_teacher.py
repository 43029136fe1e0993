"""A run that learns from a trained model."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import terdit_cli.train.teacher
from terdit_cli.commands.train import TrainResult
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.metadata import SpaceInfo
from terdit_cli.recipe import DistillSection, load_recipe
from terdit_cli.runtime.load import load_model
from terdit_cli.train.planner import plan_run
from terdit_cli.train.teacher import load_teacher, teacher_weight

Train = Callable[..., TrainResult]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """Return the run folder of a full-precision model of a width of its own."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(folder, "ternary.enabled=false", "model.dim=48", "train.steps=12")
    return folder


@pytest.mark.slow
def test_the_difference_to_the_teacher_falls(train: Train, teacher: Path, tmp_path: Path) -> None:
    words = (f"distill.teacher={teacher}", "logging.every=10")
    train(tmp_path / "run", *words, "distill.weight=1", "train.steps=60", "optim.lr=5e-3")
    differences = [entry["distill"] for entry in logged(tmp_path / "run")]
    assert differences[-1] < 0.7 * differences[0]


@pytest.mark.slow
def test_the_weight_of_the_teacher_over_a_run(train: Train, teacher: Path, tmp_path: Path) -> None:
    def weights(**options: Any) -> list[float]:
        distill = DistillSection(weight=0.8, **options)
        return [teacher_weight(step, 4, distill) for step in range(4)]

    assert weights() == [0.8] * 4
    assert weights(schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    # A run is told apart from one of constant weight from the second step on.
    words = [f"distill.teacher={teacher}", "train.steps=2", "logging.every=1", "optim.lr=1e-2"]
    for schedule in ("constant", "linear"):
        train(tmp_path / schedule, *words, f"distill.schedule={schedule}", "distill.weight=1")
    constant, linear = (
        load_ckpt(tmp_path / schedule / "ckpt.pt").model for schedule in ("constant", "linear")
    )
    assert any(not torch.equal(constant[name], linear[name]) for name in constant)


def test_a_run_without_a_teacher_logs_no_difference(whole_run: Path) -> None:
    assert all("distill" not in entry for entry in logged(whole_run))


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    train: Train, teacher: Path, tmp_path: Path
) -> None:
    words = [f"train.init_from={teacher}", f"distill.teacher={teacher / 'ckpt.pt'}"]
    words += ["ternary.enabled=false", "model.dim=48", "train.steps=1", "logging.every=1"]
    train(tmp_path / "run", *words)
    assert logged(tmp_path / "run")[0]["distill"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_the_features_of_the_last_block_are_learned(
    train: Train, teacher: Path, tmp_path: Path, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Features could get lost in the graphs, which are as users have them; C++ would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    words = [f"distill.teacher={teacher}", "distill.weight=0", "distill.features=10"]
    words += ["model.dim=48", "train.steps=30", "logging.every=10", f"train.compile={compiled}"]
    train(tmp_path / "run", *words, "optim.lr=5e-3")
    differences = [entry["distill_features"] for entry in logged(tmp_path / "run")]
    assert differences[-1] < 0.6 * differences[0]


@pytest.mark.slow
def test_features_of_a_copy_are_equal_and_of_a_wider_one_refused(
    train: Train, teacher: Path, tmp_path: Path
) -> None:
    words = [f"distill.teacher={teacher}", "distill.features=1", "train.steps=1"]
    copied = [f"train.init_from={teacher}", "ternary.enabled=false", "model.dim=48"]
    train(tmp_path / "copy", *words, *copied, "logging.every=1")
    assert logged(tmp_path / "copy")[0]["distill_features"] == 0.0
    with pytest.raises(UsageError, match="another width") as caught:
        train(tmp_path / "narrow", *words)
    assert "got dim 48, expected dim 32" in str(caught.value)


def test_the_teacher_is_the_averaged_network_frozen(recipe_path: Path, teacher: Path) -> None:
    recipe = load_recipe(recipe_path, [f"distill.teacher={teacher}"])
    network = load_teacher(recipe, torch.device("cpu"))
    assert network is not None
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        assert torch.equal(network(x, t, y), load_model(teacher)(x, t, y))


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_run(
    train: Train, teacher: Path, tmp_path: Path, assert_same_run: Callable[..., None]
) -> None:
    word = f"distill.teacher={teacher}"
    train(tmp_path / "whole", word)
    # The newest checkpoint and what came after it are lost.
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000040")
    (tmp_path / "run" / "ckpt.pt").unlink()
    train(tmp_path / "run", word, resume="auto")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_plan_counts_the_teacher(recipe_path: Path, teacher: Path) -> None:
    alone = plan_run(load_recipe(recipe_path))
    both = plan_run(load_recipe(recipe_path, [f"distill.teacher={teacher}"]))
    tensors = load_ckpt(teacher / "ckpt.pt").ema.values()
    assert alone.teacher_bytes == 0
    assert both.teacher_bytes == 4 * sum(tensor.numel() for tensor in tensors)
    assert both.total_bytes == alone.total_bytes + both.teacher_bytes
    # A wider network's forward pass beside a narrower one's forward and backward passes.
    assert alone.flops_per_step / 3 < both.flops_per_step - alone.flops_per_step


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("model.num_classes=11", "num_classes 10, null_class 10"),
        ("model.class_dropout_prob=0", "null_class 10"),
        ("data.image_size=56", "input_size 28"),
        ("data.channels=3", "in_channels 1"),
    ],
)
def test_a_teacher_of_other_images_is_refused(
    recipe_path: Path, teacher: Path, word: str, problem: str
) -> None:
    recipe = load_recipe(recipe_path, [f"distill.teacher={teacher}", word])
    with pytest.raises(UsageError, match="different inputs from the student") as caught:
        load_teacher(recipe, torch.device("cpu"))
    assert f"got {problem}" in str(caught.value)


def test_a_teacher_of_other_latents_is_refused(
    recipe_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same shape, but are other numbers."""
    found = load_ckpt(teacher / "ckpt.pt")
    info = dataclasses.replace(found.info, space=SpaceInfo("vae", "a", 0.5), image_size=224)
    other = dataclasses.replace(found, info=info)
    monkeypatch.setattr(terdit_cli.train.teacher, "load_ckpt", lambda _: other)
    recipe = load_recipe(recipe_path, [f"distill.teacher={teacher}"])
    with pytest.raises(UsageError, match=r"got image_size 224, space vae, scale_factor 0\.5"):
        load_teacher(recipe, torch.device("cpu"))


def test_no_teacher_there(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"none\.pt"):
        train(tmp_path / "run", f"distill.teacher={tmp_path / 'none.pt'}")
    assert not (tmp_path / "run").exists()
