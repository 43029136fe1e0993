"""What a process of the job needs to know of its place: rank, device, share, seeds."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from terdit_cli.data.order import stream_seed
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.dit import DiT
from terdit_cli.recipe import TrainSection


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int
    size: int
    device: torch.device


def join_world() -> World:
    """Find out rank, number of processes and device.

    Raises:
        EnvironmentProblem: started by torchrun with more than one process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise EnvironmentProblem(
            "this version trains with one process",
            got=f"WORLD_SIZE={size}",
            expected=1,
            fix="start `terdit train` without torchrun",
        )
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def grad_accum_steps(train: TrainSection, world_size: int) -> int:
    """Return how many micro-batches of one process make its share of a global batch.

    Raises:
        UsageError: the global batch does not divide exactly.
    """
    share = train.micro_batch_size * world_size
    if train.global_batch_size % share:
        raise UsageError(
            "the global batch does not divide over the processes",
            got=f"train.global_batch_size {train.global_batch_size}",
            expected=f"a multiple of micro_batch_size {train.micro_batch_size} x {world_size}",
            fix=f"set train.global_batch_size={max(1, train.global_batch_size // share) * share}",
        )
    return train.global_batch_size // share


def seed_step(seed: int, step: int, micro: int, world: World) -> None:
    """Seed all of torch's generators for one micro-batch: nothing random outlives it.

    So timesteps, noise and label dropout are a function of (seed, step, micro, rank) and a
    resumed run draws what the uninterrupted one would have drawn.
    """
    counter = (step << 20 | micro) * world.size + world.rank
    torch.manual_seed(stream_seed("train", seed, counter))


def prepare_network(network: DiT, train: TrainSection) -> nn.Module:
    """Apply activation checkpointing and torch.compile (block by block, keeping the keys)."""
    network.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        for block in network.layers:
            block.compile()
    return network


def autocast(train: TrainSection, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 or plain float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16")
