"""Muon over several processes: each orthogonalises its share of the matrices.

torch's Muon takes 15 matrix products per matrix and step. For sharded matrices each of these is an
all-gather, and every process does all of them. Here a matrix is sent to one process and back, in
bfloat16, in which Muon computes anyway: the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RMS_OF_ADAMW = 0.2  # Liu et al., arXiv 2502.16982: size of its steps relative to the rate


class DividedMuon(torch.optim.Muon):
    """torch's Muon in steps of AdamW's size (Liu et al.), over all processes of the job.

    Either all parameters are replicated, the same in every process, or all are sharded by rows
    (FSDP2).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step as torch's Muon does; `closure` is unused, required by torch's interface."""
        if not dist.is_initialized():
            return super().step(closure)
        for settings in self.param_groups:
            parameters = [p for p in settings["params"] if p.grad is not None]
            parameters.sort(key=Tensor.numel, reverse=True)  # shares of about equal size
            group = _group(parameters)
            size = dist.get_world_size(group)
            for first in range(0, len(parameters), size):
                self._step_group(parameters[first : first + size], settings, group)
        return None

    def _step_group(
        self, parameters: list[Tensor], settings: dict[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        """Update at most as many matrices as there are processes, one per process."""
        updates = [self._update(parameter, settings) for parameter in parameters]
        if isinstance(parameters[0], DTensor):
            directions = _divided(updates, [p.shape for p in parameters], group)
        else:
            directions = _replicated(updates)
        lr = float(settings["lr"])
        for parameter, direction in zip(parameters, directions, strict=True):
            size = RMS_OF_ADAMW * lr * math.sqrt(max(parameter.shape))
            part = _local(parameter)
            part.mul_(1 - lr * settings["weight_decay"]).add_(direction, alpha=-size)

    def _update(self, parameter: Tensor, settings: dict[str, Any]) -> Tensor:
        """Return the Nesterov momentum of this process's rows, in bfloat16."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, average = _local(parameter.grad), _local(state["momentum_buffer"])
        average.lerp_(gradient, 1 - settings["momentum"])
        return gradient.lerp(average, settings["momentum"]).bfloat16()


def orthogonal(matrix: Tensor) -> Tensor:
    """Return Muon's orthogonalised update [N, K]: singular values near 1, bfloat16.

    Five Newton-Schulz steps of K. Jordan's polynomial (kellerjordan.github.io/posts/muon).
    """
    # torch's own step, from zeros and without memory, is minus that: of a wide matrix times 1.
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    parameter = nn.Parameter(torch.zeros_like(wide, dtype=torch.float32))
    parameter.grad = wide.float()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    found = parameter.detach().neg_().bfloat16()
    return found if wide is matrix else found.T


def _replicated(updates: list[Tensor]) -> list[Tensor]:
    """Return the directions of whole updates [N, K], of which process i has made the i-th."""
    rank, found = dist.get_rank(), []
    for owner, update in enumerate(updates):
        direction = orthogonal(update).contiguous() if owner == rank else torch.empty_like(update)
        found.append((direction, dist.broadcast(direction, owner, async_op=True)))
    for _, work in found:
        work.wait()
    return [direction for direction, _ in found]


def _divided(
    updates: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Return this process's rows of the directions, of which process i has computed the i-th.

    Args:
        updates: this process's rows [n, K] of each, bfloat16; n may be 0.
        shapes: [N, K] of the whole ones.
        group: the processes among which rows are divided.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent = torch.cat([update.flatten() for update in updates])
    counts = [update.numel() for update in updates] + [0] * (size - len(updates))
    parts, received = [0] * size, sent.new_empty(0)
    if rank < len(shapes):
        rows, columns = shapes[rank]
        chunk = -(-rows // size)  # like torch.chunk, with which FSDP2 shards
        parts = [columns * max(0, min(chunk, rows - i * chunk)) for i in range(size)]
        received = sent.new_empty(rows * columns)
    dist.all_to_all_single(received, sent, parts, counts, group)
    if rank < len(shapes):
        received = orthogonal(received.view(shapes[rank])).flatten()
    found = torch.empty_like(sent)
    dist.all_to_all_single(found, received, counts, parts, group)
    return [
        part.view_as(update)
        for part, update in zip(found.split(counts[: len(updates)]), updates, strict=True)
    ]


def _group(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """Return the processes that share the matrices' work; None: all."""
    first = parameters[0] if parameters else None
    if not isinstance(first, DTensor):
        return None
    return first.device_mesh.get_group(first.device_mesh.ndim - 1)  # hsdp: one copy's


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
