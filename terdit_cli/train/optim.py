"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from terdit_cli.recipe import OptimSection


def build_optimizer(network: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """Return AdamW; weight decay acts on matrices only, not on norms, biases and alphas."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        # Alphas of groups are a matrix in shape only: decay would shrink the weights they scale.
        matrix = parameter.dim() >= 2 and not name.endswith(".alphas")
        (decayed if matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


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
