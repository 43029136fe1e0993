"""Clipping of the straight-through estimator, against the plain rule; sharded in test_parallel."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from terdit_cli.data.loader import BatchLoader
from terdit_cli.errors import UsageError
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import TernaryLinear, absmean
from terdit_cli.recipe import load_recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.ste import clip_straight_through
from terdit_cli.train.trainer import Trainer

CONFIG = DiTConfig(input_size=4, dim=18, n_layers=2, n_heads=3, multiple_of=7, num_classes=3)


def network() -> DiT:
    torch.manual_seed(0)
    dit = DiT(CONFIG)
    for parameter in dit.parameters():
        parameter.data = torch.randn_like(parameter)
        parameter.grad = torch.randn_like(parameter)
    return dit


def masters(dit: DiT) -> list[torch.nn.Parameter]:
    return [layer.weight for layer in dit.modules() if isinstance(layer, TernaryLinear)]


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("limit", [0.25, 1.0, 2.5, 100.0])
def test_masters_beyond_the_limit_get_no_gradient(limit: float) -> None:
    dit = network()
    before = {name: (p.detach().clone(), grad(p).clone()) for name, p in dit.named_parameters()}
    owned = {id(weight) for weight in masters(dit)}
    assert len(owned) == 16
    clip_straight_through(dit, limit)
    for name, parameter in dit.named_parameters():
        value, gradient = before[name]
        assert torch.equal(parameter, value), name
        if id(parameter) in owned:
            beyond = value.abs() > limit * absmean(value)
            assert limit == 100 or 0.01 < beyond.float().mean() < 0.9
            gradient = torch.where(beyond, 0.0, gradient)
        assert torch.equal(grad(parameter), gradient), name


def test_gradients_that_are_not_finite_stay_so() -> None:
    """A step with one is skipped; it must not pass because the clip hid it."""
    dit = network()
    weight = masters(dit)[3]
    weight.data[1, 2] = 50.0
    grad(weight)[1, 2] = math.inf
    clip_straight_through(dit, 2.0)
    assert not grad(weight)[1, 2].isfinite()


def test_a_network_without_ternary_layers_or_gradients() -> None:
    full = DiT(CONFIG, torch.nn.Linear)
    clip_straight_through(full, 2.0)
    bare = DiT(CONFIG)
    clip_straight_through(bare, 2.0)
    assert all(parameter.grad is None for parameter in bare.parameters())


RECIPE = """\
name: clipped
model:
  {size: nano, n_layers: 1, dim: 32, n_heads: 2, patch_size: 7, multiple_of: 16, num_classes: 10}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, flip: false, workers: 1}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 4, precision: fp32}
sample: {every: 0}
"""


def one_step(folder: Path, *words: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Return parameters before and after a step that starts without zeros, and its norm."""
    (folder / "clipped.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "clipped.yaml", words)
    source = build.open_data(recipe)
    trainer = Trainer(recipe, source, build.open_space(recipe, torch.device("cpu")), Job(), folder)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    with BatchLoader(source, 0, 8, flip=False, rank=0, world_size=1, workers=1) as loader:
        result = trainer.train_step(*next(iter(loader.iterate(0))))
    after = {name: p.detach() for name, p in trainer.network.named_parameters()}
    return before, after, result.grad_norm


def test_a_step_of_adamw_leaves_far_masters_alone(tmp_path: Path) -> None:
    before, after, clipped = one_step(tmp_path, "ternary.ste_clip=1.5")
    _, free, norm = one_step(tmp_path)
    assert clipped < norm  # what is cut off is not part of the norm
    for name, value in before.items():
        if not name.startswith("layers.") or value.dim() != 2:
            continue
        beyond = value.abs() > 1.5 * absmean(value)
        assert torch.equal(after[name][beyond], value[beyond]), name
        assert (after[name] != value)[~beyond].float().mean() > 0.9, name
        assert (free[name] != value)[beyond].float().mean() > 0.9, name


def test_a_limit_that_no_master_reaches_changes_nothing(tmp_path: Path) -> None:
    _, clipped, norm = one_step(tmp_path, "ternary.ste_clip=1e6")
    _, free, free_norm = one_step(tmp_path)
    assert norm == free_norm
    assert all(torch.equal(clipped[name], value) for name, value in free.items())


@pytest.mark.parametrize("value", ["0", "-1", "true", "[2]"])
def test_limits_that_are_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "clipped.yaml").write_text(RECIPE)
    with pytest.raises(UsageError, match=r"ternary\.ste_clip"):
        load_recipe(tmp_path / "clipped.yaml", [f"ternary.ste_clip={value}"])
