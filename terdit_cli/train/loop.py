"""The run: batches -> steps -> log, preview, save, stop."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from terdit_cli import console
from terdit_cli.data.loader import BatchLoader
from terdit_cli.errors import GateFailed, Interrupted
from terdit_cli.train.loggers import MetricsLog, read_metrics
from terdit_cli.train.trainer import StepResult, Trainer


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
