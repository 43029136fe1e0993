"""The run: batches -> steps -> log, preview, save, stop."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from terdit_cli import console
from terdit_cli.data.loader import BatchLoader
from terdit_cli.errors import GateFailed, Interrupted
from terdit_cli.system.signals import STOP_SIGNALS
from terdit_cli.train.checkpoint import RECIPE, complete_checkpoints, folder_of
from terdit_cli.train.loggers import read_metrics
from terdit_cli.train.run_metrics import Observer
from terdit_cli.train.stop import stop_signals
from terdit_cli.train.trainer import StepResult, Trainer
from terdit_cli.train.watchdog import Watchdog

PLOT_SECONDS = 60.0  # the least between two plots of the curves: each takes half a second


def run_training(trainer: Trainer, saved_step: int = -1) -> Path:
    """Train to the recipe's last step and return the path of ckpt.pt.

    All processes must call. Together with the losses of a step they exchange whether to stop, so
    that all stop after the same step.

    Args:
        saved_step: the step of the newest checkpoint in the run folder.

    Raises:
        Interrupted: SIGINT or SIGTERM on any process, after saving.
        GateFailed: more steps in a row than `train.max_skipped`, or the last step, without finite
            losses and gradients. The checkpoints from before stay as they are.
        EnvironmentProblem: a checkpoint could not be written.
    """
    recipe, job = trainer.recipe, trainer.job
    steps, batch_size = recipe.train.steps, recipe.train.global_batch_size
    observer = Observer(trainer)
    loader = BatchLoader(
        trainer.source,
        recipe.seed,
        batch_size,
        recipe.data.flip,
        job.rank,
        job.size,
        recipe.data.workers,
    )
    meter_context = console.progress(f"training {recipe.name}", steps, recipe.logging.every)
    watchdog = Watchdog(
        job, recipe.parallel.hang_seconds, f"continue with: {resume_command(trainer.run_folder)}"
    )
    with (
        loader,
        stop_signals() as stop,
        meter_context as meter,
        closing(observer),
        watchdog,
        _no_half_save(trainer),
    ):
        meter.start_at(trainer.step)
        status, skipped, save_due, plotted = "", 0, False, time.monotonic()
        for images, labels in observer.timed(loader.iterate(trainer.step, steps)):
            failed = trainer.checkpoints.failed
            result = trainer.train_step(images, labels, (*stop.flags, failed))
            watchdog.beat()
            step = trainer.step
            observer.add(result)
            skipped = 0 if result.finite else skipped + 1
            if skipped > recipe.train.max_skipped or (skipped and step == steps):
                with watchdog.paused():
                    raise _diverged(trainer, result, skipped)
            if not result.finite:
                console.warn(f"step {step} skipped: {_loss_and_norm(result)}")
            *stops, failed = result.notices
            if failed:
                trainer.checkpoints.wait()
            if observer.due:
                entry = observer.log()
                rate = entry["images_per_second"]
                left = console.duration((steps - step) * batch_size / rate) if rate else "?"
                loss = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
                status = f"loss {loss}  {rate:.0f} img/s  {left} left"
            meter.update(step, status)
            paused = time.monotonic()
            save_due |= step % recipe.checkpoint.every == 0 or step == steps
            # A state that gives nothing finite must not replace one that did.
            if save_due and result.finite:
                with watchdog.paused():  # for the checkpoint before it
                    trainer.save()
                saved_step, save_due = step, False
                if paused - plotted > PLOT_SECONDS:
                    plotted = paused
                    observer.plot(f"{recipe.name}: step {step}")
            if recipe.sample.every and (step % recipe.sample.every == 0 or step == steps):
                with watchdog.paused():  # many steps of many images may outlast a hang
                    trainer.preview()
            observer.pause(time.monotonic() - paused)
            if any(stops) and step < steps:
                with watchdog.paused():
                    if saved_step != step:
                        trainer.save()
                    trainer.checkpoints.wait()
                stop.heed()
                number = max(n for n, wanted in zip(STOP_SIGNALS, stops, strict=True) if wanted)
                raise Interrupted(
                    f"stopped by {number.name} after step {step}, saved",
                    signal_number=number,
                    fix=f"resume with: {resume_command(trainer.run_folder)}",
                )
        with watchdog.paused():
            if saved_step != trainer.step:
                trainer.save()
            trainer.checkpoints.wait()
    path = trainer.finish()
    observer.plot(f"{recipe.name}: {steps} steps")
    return path


@contextmanager
def _no_half_save(trainer: Trainer) -> Iterator[None]:
    """Remove a half-written checkpoint after a failure, since it may be what fills the disk.

    With several processes the others may have ended, and a save waits for all: then the next run
    removes it.
    """
    try:
        yield
    except BaseException:
        if trainer.job.size == 1:
            trainer.checkpoints.abandon()
        raise


def _diverged(trainer: Trainer, result: StepResult, skipped: int) -> GateFailed:
    """Return the error for `skipped` steps in a row, the last of which gave `result`.

    Resuming from this state would fail again: skipped steps change nothing, and data and noise
    depend only on the step. What helps is a lower learning rate from an earlier checkpoint, in a
    new folder.
    """
    trainer.checkpoints.wait()
    good = trainer.step - skipped
    run_folder = trainer.run_folder
    earlier = next((step for step in complete_checkpoints(run_folder) if step < good), None)
    words = [] if earlier is None else ["--resume", str(folder_of(run_folder, earlier))]
    words += ["--out", f"{run_folder}-lower", f"optim.lr={trainer.recipe.optim.lr / 2:g}"]
    return GateFailed(
        f"training diverged at step {good + 1}",
        got=f"{_loss_and_norm(result)} in step {trainer.step}",
        expected="finite numbers in the last step"
        if trainer.step == trainer.recipe.train.steps
        else f"finite numbers after at most {skipped - 1} skipped steps",
        where=run_folder,
        fix=f"try a lower learning rate: terdit train {_recipe_of(run_folder)} {shlex.join(words)}",
    )


def _loss_and_norm(result: StepResult) -> str:
    return f"loss {result.loss}, gradient norm {result.grad_norm}"


def resume_command(run_folder: Path) -> str:
    """Return the command line that resumes a run."""
    out = shlex.quote(str(run_folder))
    return f"terdit train {_recipe_of(run_folder)} --resume auto --out {out}"


def _recipe_of(run_folder: Path) -> str:
    return shlex.quote(str(run_folder / RECIPE))


def loss_summary(run_folder: Path) -> tuple[float, float] | None:
    """Return the first and the last logged loss of a run, or None."""
    losses = [entry["loss"] for entry in read_metrics(run_folder) if entry["loss"] is not None]
    return (losses[0], losses[-1]) if losses else None
