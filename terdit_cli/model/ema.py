"""The exponential moving average of master weights and alphas.

    ema <- ema + (1 - decay) * (weights - ema)     after every optimizer step

Averaged are the float32 masters, never the trits: ternarize after averaging. Starts as a copy of
the initial model, as in DiT. Source: Large-DiT's training (decay 0.9999, no warm-up); the
optional warm-up min(decay, (1 + step) / (10 + step)) is that of TensorFlow's
ExponentialMovingAverage, so that short runs are not dominated by their random start.
"""

from __future__ import annotations

import copy

import torch

from terdit_cli.model.dit import DiT


class Ema:
    """Keeps an averaged copy of a model, on the model's own device."""

    def __init__(self, model: DiT, decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: DiT, step: int) -> None:
        """Move the average towards `model` after optimizer step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(
            list(self.model.parameters()), list(model.parameters()), weight=1 - decay
        )
