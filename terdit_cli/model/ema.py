"""The exponential moving average of master weights and alphas.

    ema <- ema + (1 - decay) * (weights - ema)     after every optimizer step

Averaged are the float32 masters, never the trits: ternarize after averaging. Starts as a copy of
the initial model, as in DiT. Source: Large-DiT's training (decay 0.9999, no warm-up); the
optional warm-up min(decay, (1 + step) / (10 + step)) is that of TensorFlow's
ExponentialMovingAverage, so that short runs are not dominated by their random start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The averages, placed and sharded as the parameters are; `averages` is the state dict."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.decay = decay
        self.warmup = warmup
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self._of(model), list(model.parameters()), weight=1 - decay)

    @torch.no_grad()
    def load(self, averages: dict[str, Tensor]) -> None:
        """Take over averages of the same names and shapes."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Swap the averages into `model`, in evaluation mode, and back again afterwards."""
        training = model.training
        model.eval()
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)
            model.train(training)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for average, parameter in zip(self._of(model), model.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _of(self, model: nn.Module) -> list[Tensor]:
        return [self.averages[name] for name, _ in model.named_parameters()]
