"""One process's training state and its step: losses -> clip -> AdamW -> EMA.

Every random number of step s is a function of (seed, s), so a run that is stopped at any moment
and resumed from its newest checkpoint continues bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terdit_cli.data.images import ImageSource
from terdit_cli.data.vae import Space
from terdit_cli.diffusion.process import Schedule, make_schedule
from terdit_cli.model.ckpt import save_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.ema import Ema
from terdit_cli.recipe import Recipe
from terdit_cli.train import build
from terdit_cli.train.checkpoint import Saved, load_state, save_checkpoint
from terdit_cli.train.optim import build_optimizer, learning_rate
from terdit_cli.train.parallel import (
    World,
    autocast,
    grad_accum_steps,
    prepare_network,
    seed_step,
)
from terdit_cli.train.preview import draw_preview

CKPT = "ckpt.pt"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean losses of the batch and the gradients' L2 norm before clipping."""

    loss: float
    mse: float
    vb: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """Everything that changes during a run."""

    def __init__(
        self, recipe: Recipe, source: ImageSource, space: Space, world: World, run_folder: Path
    ) -> None:
        self.recipe = recipe
        self.source = source
        self.space = space
        self.world = world
        self.run_folder = run_folder
        self.accumulate = grad_accum_steps(recipe.train, world.size)
        self.schedule: Schedule = make_schedule("")
        seed_step(recipe.seed, 0, (1 << 20) - 1, world)  # a stream no micro-batch has
        self.network: DiT = build.build_network(recipe).to(world.device)
        self.optimizer = build_optimizer(self.network, recipe.optim)
        self.ema = Ema(self.network, recipe.ema.decay, recipe.ema.warmup)
        prepare_network(self.network, recipe.train)
        self.step = 0  # optimizer steps done

    def state(self) -> dict[str, Any]:
        """Return what a resumable checkpoint holds."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, saved: Saved) -> None:
        """Continue from a checkpoint."""
        state = load_state(saved)
        self.network.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = saved.step

    def save(self) -> Saved:
        """Write a resumable checkpoint of the present step."""
        keep_last = self.recipe.checkpoint.keep_last
        return save_checkpoint(self.run_folder, self.step, self.state(), self.recipe, keep_last)

    def finish(self) -> Path:
        """Write ckpt.pt, the product of the run."""
        path = self.run_folder / CKPT
        info = build.model_info(self.recipe, self.source.class_names, self.step)
        state = self.state()
        save_ckpt(path, info, self.recipe.to_yaml(), state["model"], state["ema"])
        return path

    def preview(self) -> Path:
        """Draw the preview grid of the present step."""
        return draw_preview(
            self.ema.model, self.recipe, self.space, self.source, self.run_folder, self.step
        )

    def train_step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Run forward, backward and, when all is finite, the optimizer and the EMA.

        Args:
            images: uint8 [B, H, W, 3], this process's share of the global batch.
            labels: int64 [B].
        """
        train, device = self.recipe.train, self.world.device
        self.network.train()
        sums = torch.zeros(3, device=device)
        micro_batches = zip(
            images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True
        )
        for micro, (batch, y) in enumerate(micro_batches):
            seed_step(self.recipe.seed, self.step, micro, self.world)
            generator = torch.default_generator
            x0 = self.space.encode(batch, generator).to(device)
            t = torch.randint(0, self.schedule.num_steps, (len(x0),)).to(device)
            noise = torch.randn(x0.shape).to(device)
            with autocast(train, device):
                losses = self.schedule.training_losses(self.network, x0, t, y.to(device), noise)
            loss = losses["loss"].mean() / self.accumulate
            loss.backward()
            # Without learned sigma there is no variational bound.
            vb = losses.get("vb", torch.zeros_like(losses["loss"]))
            parts = [part.detach().mean() for part in (losses["loss"], losses["mse"], vb)]
            sums += torch.stack(parts) / self.accumulate
        limit = self.recipe.optim.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), math.inf if limit is None else limit, foreach=True
        )
        loss_value, mse, vb = sums.tolist()
        result = StepResult(loss_value, mse, vb, float(norm))
        if result.finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, train.steps, self.recipe.optim)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.network, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return result
