"""The optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.recipe import OptimSection
from terdit_cli.train.muon import DividedMuon

# torchao's 8-bit Adam state: a byte per value and a float32 scale per block, for tensors that are
# large enough and consist of whole blocks; others stay float32.
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
LR_RATIO = "lr_ratio"  # a group's rate relative to the step's; torch's optimizers ignore it
_PARTS_8BIT = ("codes", "scale")  # what changes of a state tensor of torchao's


def build_optimizer(network: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """Return the optimizer; weight decay acts on matrices only, not on norms, biases and alphas.

    With `decayed="blocks"` on those of blocks only, not on the embedders and the last layer, which
    stay full precision: strong decay keeps ternary master weights moving, which these do not need
    (docs/lab.md).

    "muon" moves the blocks' matrices by their orthogonalised momentum (K. Jordan,
    kellerjordan.github.io/posts/muon), in steps of AdamW's size (Liu et al., arXiv 2502.16982), so
    that one learning rate serves both; AdamW moves all other parameters.

    Raises:
        EnvironmentProblem: 8-bit state without torchao.
        UsageError: 8-bit state of sharded parameters.
    """
    orthogonal: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    alphas: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if optim.kind == "muon" and is_block_matrix(name, parameter):
            orthogonal.append(parameter)
        elif _is_alphas(name):
            alphas.append(parameter)
        else:
            (decayed if _is_decayed(name, parameter, optim) else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    if alphas:
        ratio = {LR_RATIO: optim.alpha_lr_ratio}
        groups.append({"params": alphas, "weight_decay": 0.0} | ratio)
    # torch's state dicts lose the settings of a group without parameters, its rate too: a resumed
    # run could not set it. Muon leaves nothing to decay where blocks alone are decayed.
    groups = [group for group in groups if group["params"]]
    if optim.kind != "adamw8bit":
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        if optim.kind == "adamw":
            return adamw
        return JointOptimizer(DividedMuon(orthogonal, optim.lr, optim.weight_decay), adamw)
    check_8bit_state(optim, any(isinstance(p, DTensor) for p in network.parameters()))
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise EnvironmentProblem(
            "8-bit optimizer state needs torchao",
            got=f"optim.kind=adamw8bit without it ({error})",
            fix="pip install 'terdit[adamw8bit]', or set optim.kind=adamw",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, block_size=BLOCK_8BIT
    )
    return optimizer


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, with one state to save and to load.

    It has the groups and the state of all its parts, and steps them one after the other.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    def step(self, closure: Any = None) -> Any:
        """Step every part; `closure` is unused, required by torch's interface."""
        groups = iter(self.param_groups)
        for part in self._parts:
            # Loading a state replaces the old objects: the parts get the new ones.
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()


def check_8bit_state(optim: OptimSection, sharded: bool) -> None:
    """Raise UsageError if optimizer state would have to be 8-bit and sharded."""
    if sharded and optim.kind == "adamw8bit":
        raise UsageError(
            "8-bit optimizer state cannot be sharded",
            got="optim.kind=adamw8bit with parallel.mode fsdp or hsdp",
            expected="one of the two: sharding already divides the state among the processes",
            fix="set parallel.mode=ddp, or optim.kind=adamw",
        )


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a matrix of a block, which "muon" updates with Muon."""
    return name.startswith("layers.") and _is_matrix(name, parameter)


def _is_decayed(name: str, parameter: Tensor, optim: OptimSection) -> bool:
    return (is_block_matrix if optim.decayed == "blocks" else _is_matrix)(name, parameter)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    # Group alphas are a matrix in shape only: decay would shrink the weights they scale.
    return parameter.dim() >= 2 and not _is_alphas(name)


def _is_alphas(name: str) -> bool:
    return name.endswith(".alphas")


def plain_state(state: Any) -> Any:
    """Return an optimizer's state dict with 8-bit tensors as dictionaries of plain ones.

    They share memory with the optimizer's own.
    """
    if isinstance(state, dict):
        return {key: plain_state(value) for key, value in state.items()}
    if _is_8bit(state):
        return {name: getattr(state, name) for name in _PARTS_8BIT}
    return state


def with_state(state: Any, plain: Any) -> Any:
    """Return `plain`, as `plain_state` gives it, with the 8-bit tensors of `state` set to it."""
    if isinstance(state, dict):
        return {key: with_state(value, plain[key]) for key, value in state.items()}
    if not _is_8bit(state):
        return plain
    for name in _PARTS_8BIT:
        getattr(state, name).copy_(plain[name])
    return state


def _is_8bit(value: Any) -> bool:
    return isinstance(value, Tensor) and all(hasattr(value, name) for name in _PARTS_8BIT)


def state_bytes(numel: int, block_matrix: bool, optim: OptimSection) -> int:
    """Return the bytes of the state of a (local) parameter of `numel` values."""
    if optim.kind == "muon" and block_matrix:
        return 4 * numel
    if optim.kind == "adamw8bit" and numel >= SMALLEST_8BIT and numel % BLOCK_8BIT == 0:
        return 2 * (numel + 4 * numel // BLOCK_8BIT)
    return 2 * 4 * numel


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups; torchao keeps it in a tensor that must stay the same."""
    for group in optimizer.param_groups:
        own = rate * group.get(LR_RATIO, 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def learning_rate(step: int, steps: int, optim: OptimSection) -> float:
    """Return the learning rate of optimizer step `step` (counted from 0) of `steps`.

    Linear warm-up from lr / warmup_steps; then constant, a half cosine down to
    `final_lr_ratio * lr` at the last step, or a drop by `drop_factor` at each share of the run
    in `drop_at` (TerDiT, section 3.4, lowers it once).
    """
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    lr = optim.lr * warmup
    if optim.schedule == "step":
        return lr * optim.drop_factor ** sum(step >= share * steps for share in optim.drop_at)
    if optim.schedule == "cosine":
        after = step - optim.warmup_steps
        position = max(0, after) / max(1, steps - 1 - optim.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
        return lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * cosine)
    return lr
