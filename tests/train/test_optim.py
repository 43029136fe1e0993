"""The optimizer's groups and the learning rate at its corner points."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.recipe import OptimSection
from terdit_cli.train.optim import (
    build_optimizer,
    learning_rate,
    plain_state,
    set_learning_rate,
    with_state,
)


def rates(steps: int, **fields: object) -> list[float]:
    optim = OptimSection.model_validate({"lr": 1.0, **fields})
    return [learning_rate(step, steps, optim) for step in range(steps)]


def test_constant() -> None:
    assert rates(5) == [1.0] * 5


def test_warmup_reaches_the_rate_at_its_last_step() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(2, warmup_steps=4) == [0.25, 0.5]  # a run shorter than its warm-up


def test_cosine_starts_after_the_warmup_and_ends_at_the_last_step() -> None:
    values = rates(11, schedule="cosine", final_lr_ratio=0.1)
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.55)  # half way: (1 + 0.1) / 2
    assert values[10] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    warm = rates(14, schedule="cosine", warmup_steps=3)
    assert warm[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert warm[13] == pytest.approx(0.0, abs=1e-15)
    assert rates(1, schedule="cosine") == [1.0]
    assert rates(3, schedule="cosine", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_step_drops_at_its_shares() -> None:
    values = rates(10, schedule="step", drop_at=[0.5, 0.8], drop_factor=0.5)
    assert values == [1.0] * 5 + [0.5] * 3 + [0.25] * 2
    assert rates(10, schedule="step", drop_at=[]) == [1.0] * 10
    assert rates(4, schedule="step", drop_at=[1.0], drop_factor=0.1) == [1.0] * 4
    assert rates(2, schedule="step", drop_at=[0.0], drop_factor=0.5) == [0.5, 0.5]


def test_other_schedules_ignore_the_drops() -> None:
    assert rates(4, drop_at=[0.0], drop_factor=0.1) == [1.0] * 4


def network() -> DiT:
    return DiT(DiTConfig(input_size=4, dim=16, n_layers=1, n_heads=2, multiple_of=4, num_classes=3))


def test_weight_decay_acts_on_matrices_only() -> None:
    dit = network()
    optim = OptimSection(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-7, lr=3e-4)
    optimizer = build_optimizer(dit, optim)
    decayed, kept, alphas = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == alphas["weight_decay"] == 0.0
    names = {id(p): name for name, p in dit.named_parameters()}
    assert all("norm" not in names[id(p)] for p in decayed["params"])
    assert "bias" in {names[id(p)].split(".")[-1] for p in kept["params"]}
    assert {names[id(p)].split(".")[-1] for p in alphas["params"]} == {"alphas"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert decayed["betas"] == (0.8, 0.95)
    assert (decayed["eps"], decayed["lr"]) == (1e-7, 3e-4)
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_of_blocks_alone(kind: str) -> None:
    """Without gradients only decay moves: by lr * weight_decay, the blocks' matrices alone."""
    dit = network()
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    fields = {"kind": kind, "lr": 0.5, "weight_decay": 0.25, "decayed": "blocks"}
    optimizer = build_optimizer(dit, OptimSection.model_validate(fields))
    for parameter in dit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    outside = 0
    for name, parameter in dit.named_parameters():
        value = before[name]
        if name.startswith("layers.") and name.endswith("weight") and value.dim() == 2:
            value = value * (1 - 0.5 * 0.25)
        else:
            outside += value.dim() == 2
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=0)
    assert outside == 6


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_alphas_have_a_rate_of_their_own(kind: str) -> None:
    """Nothing else moves otherwise: a step is that of ratio 1 but for the alphas' size."""
    moved = []
    for ratio in (1.0, 0.25):
        torch.manual_seed(0)
        dit = network()
        before = {name: p.detach().clone() for name, p in dit.named_parameters()}
        fields = {"kind": kind, "alpha_lr_ratio": ratio}
        optimizer = build_optimizer(dit, OptimSection.model_validate(fields))
        set_learning_rate(optimizer, 1e-2)
        for parameter in dit.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append({name: before[name] - p.detach() for name, p in dit.named_parameters()})
    for name, one in moved[0].items():
        expected = 0.25 * one if name.endswith(".alphas") else one
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-4, atol=1e-7)
        assert one.any()


def test_muon_is_for_the_matrices_of_blocks() -> None:
    """Its step has orthogonal rows or columns; AdamW moves the rest as it would by itself."""
    dit, baseline = network(), network()
    baseline.load_state_dict(dit.state_dict())
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    alone = build_optimizer(baseline, OptimSection(lr=1e-2, weight_decay=0.1))
    muon = build_optimizer(dit, OptimSection(kind="muon", lr=1e-2, weight_decay=0.1))
    torch.manual_seed(0)
    for ours, theirs in zip(dit.parameters(), baseline.parameters(), strict=True):
        ours.grad = theirs.grad = torch.randn_like(ours)
    muon.step()
    alone.step()
    adams = dict(baseline.named_parameters())
    matrices = 0
    for name, parameter in dit.named_parameters():
        if not re.fullmatch(r"layers\.0\..*(w[1-3qkvo]|adaLN_modulation\.1)\.weight", name):
            assert torch.equal(parameter, adams[name]), name
            continue
        matrices += 1
        moved = (before[name] * (1 - 1e-3) - parameter).detach()
        size = 1e-2 * 0.2 * max(moved.shape) ** 0.5
        # The iteration leaves singular values within 0.5 and 1.5 (K. Jordan's post), in bfloat16.
        values = torch.linalg.svdvals(moved / size)
        assert 0.4 < values.min() <= values.max() < 1.6, name
    assert matrices == 8


def test_the_state_of_muon_is_saved_and_loaded() -> None:
    dit, other = network(), network()
    other.load_state_dict(dit.state_dict())
    optim = OptimSection(kind="muon", lr=1e-2)
    first, second = build_optimizer(dit, optim), build_optimizer(other, optim)
    torch.manual_seed(0)
    for step in range(3):
        for ours, theirs in zip(dit.parameters(), other.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        first.step()
        if step:
            second.step()
        else:  # the other takes the first step over
            other.load_state_dict(dit.state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        set_learning_rate(first, 1e-3)
        set_learning_rate(second, 1e-3)
    for ours, theirs in zip(dit.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_8_bit_moments_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    optim = OptimSection(kind="adamw8bit")
    with pytest.raises(EnvironmentProblem, match=r"8-bit optimizer state needs torchao.*adamw8bit"):
        build_optimizer(torch.nn.Linear(2, 2), optim)


def test_8_bit_moments_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terdit_cli.train.optim.DTensor", torch.nn.Parameter)
    with pytest.raises(UsageError, match=r"state cannot be sharded.*parallel\.mode=ddp"):
        build_optimizer(torch.nn.Linear(2, 2), OptimSection(kind="adamw8bit"))


def test_8_bit_moments_as_plain_tensors() -> None:
    """Of anything with codes and scales, for torchao need not be there."""

    def moment(value: int) -> torch.Tensor:
        tensor = torch.zeros(3)
        tensor.codes = torch.full((3,), value, dtype=torch.uint8)  # type: ignore[attr-defined]
        tensor.scale = torch.full((1,), float(value))  # type: ignore[attr-defined]
        return tensor

    saved = {"a": {"exp_avg": moment(7), "step": torch.tensor(4.0)}, "lr": 0.5}
    plain = plain_state(saved)
    assert plain["a"]["exp_avg"].keys() == {"codes", "scale"}
    assert (plain["a"]["step"], plain["lr"]) == (4.0, 0.5)
    fresh = {"a": {"exp_avg": moment(0), "step": torch.tensor(0.0)}, "lr": 0.1}
    restored = with_state(fresh, plain)
    assert restored["a"]["exp_avg"] is fresh["a"]["exp_avg"]
    assert fresh["a"]["exp_avg"].codes.tolist() == [7, 7, 7]
    assert fresh["a"]["exp_avg"].scale.tolist() == [7.0]
    assert (restored["a"]["step"], restored["lr"]) == (4.0, 0.5)
