"""The metrics of a run: one entry every `logging.every` steps, made by all processes.

    observer = Observer(trainer)
    for images, labels in observer.timed(batches):      counts the time spent waiting for data
        observer.add(trainer.train_step(images, labels))
        if observer.due: entry = observer.log()         every so many steps

Means are over the finite steps since the last entry. `flipped` is the share of trits that changed
in the logged step.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from terdit_cli import console
from terdit_cli.model.layout import training_flops
from terdit_cli.system.gpus import device_peak
from terdit_cli.train.curves import draw_run
from terdit_cli.train.flips import FlipMeter
from terdit_cli.train.loggers import open_logs
from terdit_cli.train.watchdog import Stragglers

if TYPE_CHECKING:
    from terdit_cli.train.trainer import StepResult, Trainer

Batch = tuple[torch.Tensor, torch.Tensor]


class Observer:
    """Gathers steps into entries and writes them to metrics.jsonl and the recipe's other logs."""

    def __init__(self, trainer: Trainer) -> None:
        """Open the logs, on the main process; all processes must call."""
        self._trainer = trainer
        recipe, job = trainer.recipe, trainer.job
        self._logs = open_logs(trainer.run_folder, recipe, trainer.step) if job.is_main else []
        self._flips = FlipMeter(trainer.network)
        self._stragglers = Stragglers(job)
        self._image_flops = training_flops(trainer.network.config)
        self._peak: float | None = None
        if job.device.type == "cuda" and recipe.train.precision == "bf16":
            self._peak = device_peak(torch.cuda.get_device_name(job.device))
        self.skipped = 0  # steps without finite numbers, since this process started
        self._skipped_images = len(trainer.source.skipped)  # unreadable images already reported
        self._restart()

    def _restart(self) -> None:
        self._results: list[StepResult] = []
        self._waited = 0.0
        self._started = time.monotonic()
        if self._trainer.job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._trainer.job.device)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, counting the time that the loop waits for each."""
        iterator = iter(batches)
        while True:
            begun = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - begun
            if batch is None:
                return
            yield batch

    def add(self, result: StepResult) -> None:
        """Add a step; one that was not finite counts as skipped. All processes must call."""
        if result.finite:
            self._results.append(result)
        else:
            self.skipped += 1
        if self._logged(self._trainer.step + 1) and not self.due:
            self._flips.measure()

    @property
    def due(self) -> bool:
        """Return whether the last step should be logged."""
        return self._logged(self._trainer.step)

    def _logged(self, step: int) -> bool:
        recipe = self._trainer.recipe
        return step % recipe.logging.every == 0 or step == recipe.train.steps

    def pause(self, seconds: float) -> None:
        """Exclude the time of previews and checkpoints."""
        self._started += seconds

    def log(self) -> dict[str, Any]:
        """Write and return the entry of the steps since the last one; all processes must call."""
        trainer, results = self._trainer, self._results
        job = trainer.job
        seconds = time.monotonic() - self._started
        rate = len(results) * trainer.recipe.train.global_batch_size / seconds
        entry: dict[str, Any] = {
            "step": trainer.step,
            "loss": _mean([result.loss for result in results]),
            "mse": _mean([result.mse for result in results]),
            "vb": _mean([result.vb for result in results]),
            "loss_by_quarter": _quarters(results),
            **self._distilled(results),
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "grad_norm": results[-1].grad_norm if results else None,
            "images_per_second": rate,
            "data_wait": job.largest(self._waited / seconds),  # share of the time, slowest process
            "memory_bytes": int(job.largest(peak_memory(job.device))),  # largest process
            "skipped_steps": self.skipped,
            **self._flips.measure(),
        }
        steps = max(1, len(results))
        self._stragglers.compare(self._waited / steps, seconds / steps)
        if self._peak is not None:
            entry["mfu"] = rate * self._image_flops / (job.size * self._peak)
        for log in self._logs:
            log.append(entry)
        self._warn_of_skipped_images()
        self._restart()
        return entry

    def _warn_of_skipped_images(self) -> None:
        """Warn of unreadable images that were skipped since the last entry."""
        names = self._trainer.source.skipped
        if len(names) > self._skipped_images:
            self._skipped_images = len(names)
            console.warn(f"{len(names)} unreadable images skipped so far, last: {names[-1]}")

    def _distilled(self, results: list[StepResult]) -> dict[str, Any]:
        distill = self._trainer.recipe.distill
        entry = {}
        if distill.teacher is not None:
            entry["distill"] = _mean([result.distill for result in results])
            if distill.features:
                entry["distill_features"] = _mean([result.features for result in results])
        return entry

    def plot(self, title: str) -> None:
        """Plot loss.png, on the main process."""
        if self._trainer.job.is_main:
            draw_run(self._trainer.run_folder, title)

    def close(self) -> None:
        """Finish the logs."""
        for log in self._logs:
            log.close()


def peak_memory(device: torch.device) -> int:
    """Return the largest bytes in use: since the last entry on a GPU, ever by a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _quarters(results: list[StepResult]) -> dict[str, float | None]:
    """Return the mean loss of each quarter of the timesteps; None for one without samples."""
    losses = [sum(parts) for parts in zip(*(r.quarter_losses for r in results), strict=True)]
    shares = [sum(parts) for parts in zip(*(r.quarter_shares for r in results), strict=True)]
    pairs = zip(losses, shares, strict=True)
    return {str(i): loss / share if share else None for i, (loss, share) in enumerate(pairs, 1)}
