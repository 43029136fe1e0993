"""The QAT loop: batches -> loss -> clip -> AdamW -> EMA -> log, preview, save, stop.

Every random number of step s is a function of (seed, s), so a run that is stopped at any moment
and resumed from its newest checkpoint continues bit for bit.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from terdit_cli import console
from terdit_cli.data.images import ImageSource
from terdit_cli.data.loader import BatchLoader
from terdit_cli.data.vae import Space
from terdit_cli.diffusion.process import Schedule, make_schedule
from terdit_cli.errors import GateFailed, Interrupted
from terdit_cli.model.ckpt import save_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.ema import Ema
from terdit_cli.recipe import Recipe
from terdit_cli.train import build
from terdit_cli.train.checkpoint import Saved, load_state, save_checkpoint
from terdit_cli.train.loggers import MetricsLog, read_metrics
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


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the stop signal received, or None.

    The first SIGINT or SIGTERM is remembered, the second acts as usual.
    """
    received: list[int] = []
    previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        # Not through a buffered file: the signal may have come in the midst of writing to it.
        text = f"{signal.Signals(number).name}: saving after this step (again to kill)\n"
        os.write(2, text.encode())

    for name in previous:
        signal.signal(name, remember)
    try:
        yield lambda: received[0] if received else None
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


class _Window:
    """Means over the steps since the last logged one, and their speed without the pauses."""

    def __init__(self) -> None:
        self._results: list[StepResult] = []
        self._started = time.monotonic()

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def skip(self, seconds: float) -> None:
        """Leave time out that went into previews and checkpoints."""
        self._started += seconds

    def entry(self, trainer: Trainer) -> dict[str, Any]:
        """Return the line to log for the window."""
        count = len(self._results)
        images = count * trainer.recipe.train.global_batch_size
        return {
            "step": trainer.step,
            "loss": sum(result.loss for result in self._results) / count,
            "mse": sum(result.mse for result in self._results) / count,
            "vb": sum(result.vb for result in self._results) / count,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": self._results[-1].grad_norm,
            "images_per_second": images / (time.monotonic() - self._started),
        }


def run_training(trainer: Trainer) -> Path:
    """Train to the recipe's last step and return the path of ckpt.pt.

    Raises:
        Interrupted: SIGINT or SIGTERM, after saving.
        GateFailed: a loss or gradient that is not finite, after saving the state before it.
        EnvironmentProblem: a checkpoint could not be written.
    """
    recipe, world = trainer.recipe, trainer.world
    steps, batch_size = recipe.train.steps, recipe.train.global_batch_size
    log = MetricsLog(trainer.run_folder, trainer.step)
    loader = BatchLoader(
        trainer.source,
        recipe.seed,
        batch_size,
        recipe.data.flip,
        world.rank,
        world.size,
        recipe.data.workers,
    )
    meter_context = console.progress(f"training {recipe.name}", steps, recipe.logging.every)
    with loader, stop_signals() as stopped, meter_context as meter:
        meter.start_at(trainer.step)
        window, status, saved_step = _Window(), "", trainer.step
        for images, labels in loader.iterate(trainer.step):
            if trainer.step >= steps:
                break
            result = trainer.train_step(images, labels)
            if not result.finite:
                raise _diverged(trainer, result)
            step = trainer.step
            window.add(result)
            if step % recipe.logging.every == 0 or step == steps:
                entry = window.entry(trainer)
                log.append(entry)
                rate = entry["images_per_second"]
                left = console.duration((steps - step) * batch_size / rate)
                status = f"loss {entry['loss']:.4f}  {rate:.0f} img/s  {left} left"
                window = _Window()
            meter.update(step, status)
            paused = time.monotonic()
            if recipe.sample.every and (step % recipe.sample.every == 0 or step == steps):
                trainer.preview()
            if step % recipe.checkpoint.every == 0 or step == steps:
                trainer.save()
                saved_step = step
                log.draw(f"{recipe.name}: step {step}")
            window.skip(time.monotonic() - paused)
            number = stopped()
            if number is not None and step < steps:
                if saved_step != step:
                    trainer.save()
                raise Interrupted(
                    f"stopped by {signal.Signals(number).name} after step {step}, saved",
                    signal_number=number,
                    fix=f"continue with: {_resume_command(trainer)}",
                )
    path = trainer.finish()
    log.draw(f"{recipe.name}: {steps} steps")
    return path


def _diverged(trainer: Trainer, result: StepResult) -> GateFailed:
    """Save the state before the step that gave `result`, and say how to go on."""
    saved = trainer.save()
    lower = trainer.recipe.optim.lr / 2
    return GateFailed(
        f"training diverged at step {trainer.step + 1}",
        got=f"loss {result.loss}, gradient norm {result.grad_norm}",
        expected="finite numbers",
        where=f"state before it saved in {saved.path}",
        fix=f"continue with a lower rate: {_resume_command(trainer)} optim.lr={lower:g}",
    )


def _resume_command(trainer: Trainer) -> str:
    folder = trainer.run_folder
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    return f"terdit train {recipe} --resume auto --out {shlex.quote(str(folder))}"


def loss_summary(run_folder: Path) -> tuple[float, float] | None:
    """Return the first and the last logged loss of a run, or None."""
    losses = [entry["loss"] for entry in read_metrics(run_folder) if entry["loss"] is not None]
    return (losses[0], losses[-1]) if losses else None
