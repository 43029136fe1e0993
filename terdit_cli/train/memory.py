"""What a run will need, without running it: parameters, bytes and operations from a fake model.

The network is built and one training forward is traced on tensors that have shapes but no data
(torch's FakeTensorMode), so a 4.2b model is planned on a laptop. Activations are the tensors that
autograd would keep for the backward pass of one micro-batch, each storage counted once; with
activation checkpointing those are the blocks' inputs, and the one block that is recomputed comes
on top for a moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from terdit_cli.model.dit import DiT
from terdit_cli.model.ternary import TernaryLinear
from terdit_cli.recipe import Recipe
from terdit_cli.train import build
from terdit_cli.train.parallel import autocast, grad_accum_steps

FP32_BYTES = 4
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Plan:
    """Sizes of one process's run; bytes are of float32 masters, gradients and moments."""

    parameters: int
    ternary: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activation_bytes: int
    steps: int
    images: int
    grad_accum_steps: int
    flops_per_step: int

    @property
    def ternary_share(self) -> float:
        return self.ternary / self.parameters

    @property
    def total_bytes(self) -> int:
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.ema_bytes
            + self.activation_bytes
        )


def count_ternary(network: DiT) -> int:
    """Return the number of ternary weights."""
    layers = (module for module in network.modules() if isinstance(module, TernaryLinear))
    return sum(layer.weight.numel() for layer in layers)


def plan_run(recipe: Recipe) -> Plan:
    """Work out what a run of the recipe needs; nothing of its size is allocated."""
    train = recipe.train
    with FakeTensorMode():
        network = build.build_network(recipe)
        network.activation_checkpointing = train.activation_checkpointing
        network.train()
        parameters = sum(p.numel() for p in network.parameters())
        ternary = count_ternary(network)
        activation_bytes, flops = _trace(network, recipe)
    weight_bytes = parameters * FP32_BYTES
    return Plan(
        parameters=parameters,
        ternary=ternary,
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        optimizer_bytes=ADAM_MOMENTS * weight_bytes,
        ema_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        steps=train.steps,
        images=train.steps * train.global_batch_size,
        grad_accum_steps=grad_accum_steps(train, world_size=1),
        flops_per_step=flops * train.global_batch_size // train.micro_batch_size,
    )


def _trace(network: DiT, recipe: Recipe) -> tuple[int, int]:
    """Return (bytes kept for the backward pass, operations forward + backward) of a micro-batch."""
    config, batch = network.config, recipe.train.micro_batch_size
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    own = {p.untyped_storage()._cdata for p in network.parameters()}
    x0 = torch.zeros(batch, config.in_channels, config.input_size, config.input_size)
    t = torch.zeros(batch, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(recipe.train, torch.device("cpu")),
        ):
            output = network(x0, t, t)
        output.float().square().mean().backward()  # the real loss keeps as little of its own
    held = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    return held, counter.get_total_flops()
