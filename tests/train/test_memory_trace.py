"""Traced steps: few blocks stand for many, processes that do not exist, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from terdit_cli.errors import UsageError
from terdit_cli.recipe import Recipe
from terdit_cli.train import memory_trace as trace
from terdit_cli.train.memory_trace import StepTracer
from terdit_cli.train.planner import plan_run


def recipe(layers: int, mode: str = "ddp", **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "a",
            "model": {
                "size": "nano", "n_layers": layers, "patch_size": 4, "multiple_of": 8,
                "num_classes": 10,
            },
            "data": {"image_size": 16, "channels": 1},
            "parallel": {"mode": mode},
            "train": {"global_batch_size": 64, "micro_batch_size": 4, "precision": "fp32"} | train,
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "gpus", "every", "accumulate", "layers"),
    [("ddp", 1, 2, False, 14), ("ddp", 2, 0, False, 8), ("fsdp", 4, 1, True, 8)],
)
def test_few_blocks_stand_for_all(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    gpus: int,
    every: int,
    accumulate: bool,
    layers: int,
) -> None:
    made = recipe(layers, mode, activation_checkpointing=every)

    def traced() -> tuple[int, trace.StepMemory, int]:
        with StepTracer(made, gpus) as tracer:
            step = tracer.step(4, accumulate, every)
            return len(tracer.network.layers), step, sum(s.local for s in tracer.parameters())

    few, estimate, values = traced()
    monkeypatch.setattr(trace, "GROUPS", layers)
    every_block, truth, all_values = traced()
    assert (few, every_block) == (5 * max(1, every), layers)
    assert values == all_values
    assert estimate.kept == truth.kept
    assert estimate.trits == truth.trits
    assert estimate.peak == pytest.approx(truth.peak, rel=0.005)


@pytest.mark.slow
def test_shards_are_parts_of_the_whole_wherever_they_lie() -> None:
    made = recipe(2, "fsdp")
    one, four = (plan_run(made, gpus) for gpus in (1, 4))
    assert four.parameters == one.parameters
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=0.01)
    assert four.optimizer_bytes == 2 * four.ema_bytes == 2 * four.weight_bytes
    # Trits are float32 where weights are whole, and bytes where they are gathered.
    assert four.codes_bytes == pytest.approx(one.codes_bytes / 4 / 4, rel=0.02)
    assert four.total_bytes < one.total_bytes
    assert (one.mode, four.mode, four.host_bytes) == ("one process", "fsdp", 0)
    offload = made.parallel.model_copy(update={"cpu_offload": True})
    there = plan_run(made.model_copy(update={"parallel": offload}), 4)
    assert there.host_bytes == four.weight_bytes + four.optimizer_bytes + four.ema_bytes
    assert there.total_bytes == four.total_bytes - there.host_bytes


@pytest.mark.slow
def test_replicas_hold_everything() -> None:
    one, two = (plan_run(recipe(2, global_batch_size=4 * gpus), gpus) for gpus in (1, 2))
    assert two.weight_bytes == one.weight_bytes
    assert two.step_bytes > one.step_bytes  # gradients lie in buckets, also during the forward
    assert two.mode == "ddp"


def test_groups_of_processes_share_copies() -> None:
    made = recipe(1, "hsdp")
    made = made.model_copy(update={"parallel": made.parallel.model_copy(update={"shard_size": 2})})
    with StepTracer(made, 8) as tracer:
        shares = tracer.parameters()
    whole = sum(share.whole for share in shares)
    assert sum(share.local for share in shares) == pytest.approx(whole / 2, rel=0.01)
    with (
        pytest.raises(UsageError, match=r"got parallel\.shard_size 2, expected a divisor of the 3"),
        StepTracer(made, 3),
    ):
        pass


def test_whatever_groups_there_were_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch numbers groups, and finds those of a mesh that it has kept by their numbers.
    monkeypatch.setattr(distributed_c10d, "_group_count", 1)
    for _ in range(2):
        with StepTracer(recipe(1, "fsdp"), 4) as tracer:
            assert tracer.step(1, False, 0).peak > 0


def test_nothing_is_left_behind() -> None:
    with StepTracer(recipe(1, "fsdp"), 4) as tracer:
        tracer.step(1, False, 0)
    assert not dist.is_initialized()
    assert "resize_" not in vars(torch.UntypedStorage)
    assert float(torch.ones(2).sum()) == 2
    with pytest.raises(UsageError, match="cannot be divided"):
        plan_run(recipe(1, "fsdp"), 5)
    assert not dist.is_initialized()
