"""`terdit train`: trains a recipe into a run folder with ckpt.pt, or plans it in a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terdit_cli import console
from terdit_cli.data.check_recipe import data_mistakes, has_images_here
from terdit_cli.data.loader import BatchSource
from terdit_cli.data.vae import Space
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import CKPT
from terdit_cli.recipe import Recipe, load_recipe, refusal
from terdit_cli.system import memory
from terdit_cli.system.atomic import atomic_path
from terdit_cli.system.gpu_memory import explained
from terdit_cli.system.job import Job, join_job
from terdit_cli.train import build
from terdit_cli.train.checkpoint import (
    FOLDER,
    RECIPE,
    Saved,
    check_checkpoint,
    complete_checkpoints,
    folder_of,
    latest_checkpoint,
    load_state,
)
from terdit_cli.train.loop import loss_summary, resume_command, run_training
from terdit_cli.train.planner import Plan, plan_run
from terdit_cli.train.preview import preview_sampler
from terdit_cli.train.run_lock import locked_run
from terdit_cli.train.trainer import Trainer

# Changing these on resume would need another network than the saved one, or optimizer state that
# was not saved.
_FIXED_SECTIONS, _FIXED_KEYS = ("model", "ternary"), ("optim.kind",)


@dataclass(frozen=True)
class TrainResult:
    """The checkpoint that was written, and the first and last loss."""

    run_folder: Path
    checkpoint: Path
    steps: int
    first_loss: float | None
    last_loss: float | None


def plan(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    gpus: int = 1,
    gpu_memory: str | None = None,
    mfu: float | None = None,
) -> tuple[Recipe, Plan]:
    """Return the resolved recipe and what its run needs; trains nothing, decodes no image.

    Images that are on this machine are checked against the recipe.

    Args:
        gpus: processes to plan for.
        gpu_memory: a GPU's name ("h100") or memory ("80GB"): adds the largest micro-batch that
            fits it and, for a name, the days.
        mfu: share of the GPUs' peak that training is expected to reach; None: 0.4.

    Raises:
        UsageError: an unknown GPU, a share of an unknown peak, a batch that does not divide over
            the processes, or images that do not fit the recipe.
    """
    recipe = load_recipe(recipe_path, overrides, data_mistakes)
    preview_sampler(recipe)
    if has_images_here(recipe):
        if found := list(data_mistakes(recipe)):
            raise refusal(found, recipe_path)
    elif recipe.data.source != "latents":
        console.note(f"{recipe.data.path} is not here: the plan is of the recipe alone")
    return recipe, plan_run(recipe, gpus, gpu_memory, mfu)


def run(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    out: Path | None = None,
) -> TrainResult:
    """Train a recipe.

    Args:
        resume: None (the folder must be new), "auto" (newest complete checkpoint of the run
            folder, or a new run) or the path of a checkpoint folder.
        out: the run folder; default runs/<name>.

    Raises:
        UsageError, InputFileError, EnvironmentProblem: before the first step.
        Interrupted, GateFailed: after saving; see `run_training`.
    """
    recipe = load_recipe(recipe_path, overrides, data_mistakes)
    preview_sampler(recipe)
    run_folder = out or build.default_run_folder(recipe)
    micro = recipe.train.micro_batch_size
    what = f"a micro-batch of {micro} images"
    fix = f"train.micro_batch_size={micro // 2}" if micro > 1 else "parallel.mode=fsdp"
    fix += ", or see what fits: --dry-run"

    def needs() -> int:
        return plan_run(recipe, job.size).total_bytes

    with (
        join_job(
            a_gpu_each=True,
            timeout_seconds=2 * recipe.parallel.hang_seconds,  # the watchdog reports first
            retry=f"continue with: {resume_command(run_folder)}",
        ) as job,
        explained(what, job.device, fix, needs),
    ):
        if job.device.type == "cpu":
            memory.require(what, needs, fix)
        trainer, checkpoint = _train(recipe, resume, run_folder, job)
    first, last = loss_summary(run_folder) or (None, None)
    return TrainResult(run_folder, checkpoint, trainer.step, first, last)


def _train(recipe: Recipe, resume: str | None, run_folder: Path, job: Job) -> tuple[Trainer, Path]:
    """Build or restore what is trained, train it, and return it with the path of ckpt.pt."""
    saved = _find_checkpoint(resume, run_folder, job)
    if saved is not None:
        _check_same_network(recipe, saved)
    build.model_config(recipe)  # an impossible network fails before any data is read
    source = build.open_data(recipe)
    space = build.open_space(recipe, job.device)
    with locked_run(run_folder, job):
        return _run(recipe, saved, source, space, run_folder, job)


def _run(
    recipe: Recipe,
    saved: Saved | None,
    source: BatchSource,
    space: Space,
    run_folder: Path,
    job: Job,
) -> tuple[Trainer, Path]:
    """Train in a locked folder; see `_train`."""
    start = recipe.train.init_from if saved is None else None
    trainer = Trainer(recipe, source, space, job, run_folder, start)
    if saved is not None:
        trainer.restore(load_state(saved, trainer.state()), saved.step)
        console.note(f"resuming {recipe.name} after step {saved.step} from {saved.path}")
    if job.is_main:
        with atomic_path(run_folder / RECIPE) as temporary:
            temporary.write_text(recipe.to_yaml(), encoding="utf-8")
    parameters = sum(p.numel() for p in trainer.network.parameters())
    console.note(
        f"training {recipe.name}: {parameters:,} parameters, {len(source):,} images, "
        f"{recipe.train.steps:,} steps of {recipe.train.global_batch_size} on {job.device}, "
        f"into {run_folder}"
    )
    return trainer, run_training(trainer, _saved_here(saved, run_folder))


def _find_checkpoint(resume: str | None, run_folder: Path, job: Job) -> Saved | None:
    """Return the checkpoint to resume from, or None for a new run."""
    newest = job.largest(max(complete_checkpoints(run_folder), default=-1))
    if resume is None:
        used = newest >= 0 or (run_folder / CKPT).exists()
        if used:
            raise UsageError(
                "the run folder already holds a run",
                where=run_folder,
                fix="resume it with --resume auto, or give another folder with --out",
            )
        return None
    if resume == "auto":
        saved = latest_checkpoint(run_folder, job)
        if saved is not None:
            return saved
        finished = (run_folder / CKPT).exists()
        if job.largest(max(newest, 0 if finished else -1)) >= 0:
            raise InputFileError(
                "no checkpoint to resume from",
                got="a finished run without checkpoints" if finished else "only damaged ones",
                where=run_folder,
                fix="restore one, or start a new run in another folder with --out",
            )
        console.note(f"no complete checkpoint in {run_folder}: starting a new run")
        return None
    if Path(resume).is_file():
        raise UsageError(
            "--resume takes a checkpoint folder", got=f"the file {Path(resume).name}",
            expected=f"RUN/{FOLDER}/step-*, which holds the state of the optimizer too",
            where=resume,
            fix=f"start a new run from these weights: train.init_from={resume}",
        )  # fmt: skip
    if (Path(resume) / FOLDER).is_dir():
        raise UsageError(
            "--resume takes a checkpoint, not a run folder", where=resume,
            fix=f"--resume auto --out {resume}, or one of {Path(resume) / FOLDER}/step-*",
        )  # fmt: skip
    saved = check_checkpoint(Path(resume), job)
    here = _saved_here(saved, run_folder)
    if newest > here:
        raise UsageError(
            "the run folder holds a later checkpoint or another run",
            got=folder_of(run_folder, int(newest)),
            expected="a folder whose newest checkpoint is the one to resume, or an empty folder",
            where=saved.path,
            fix="resume the newest with --resume auto, or give a new folder with --out",
        )
    return saved


def _saved_here(saved: Saved | None, run_folder: Path) -> int:
    """Return the step of a checkpoint if it lies in the run folder, else -1."""
    here = saved is not None and saved.path.resolve().parents[1] == run_folder.resolve()
    return saved.step if here and saved else -1


def _check_same_network(recipe: Recipe, saved: Saved) -> None:
    """Refuse a checkpoint of another network; name every other setting that changed.

    Raises:
        UsageError: `model`, `ternary` or the optimizer differ, or the checkpoint is beyond the last
            step.
    """
    old, new = (
        found.model_dump(mode="json") | {"ternary": found.ternary.said()}
        for found in (load_recipe(saved.path / RECIPE), recipe)
    )
    changed = [
        f"{section}.{key}" if isinstance(old[section], dict) else section
        for section in new
        for key in (new[section] if isinstance(new[section], dict) else [""])
        if (old[section].get(key) != new[section][key] if key else old[section] != new[section])
    ]
    fixed = [key for key in changed if key.split(".")[0] in _FIXED_SECTIONS or key in _FIXED_KEYS]
    if fixed:
        raise UsageError(
            "the checkpoint belongs to another network or optimizer",
            got=f"different {', '.join(fixed)}",
            where=saved.path,
            fix="use the recipe it was trained with, or another --out",
        )
    if saved.step > recipe.train.steps:
        raise UsageError(
            "the checkpoint is beyond the recipe's last step",
            got=f"step {saved.step}",
            expected=f"at most train.steps = {recipe.train.steps}",
            where=saved.path,
            fix="raise train.steps",
        )
    if changed:
        console.warn(f"continuing with changed settings: {', '.join(changed)}")
    planned = old["train"]["steps"]
    ends = recipe.optim.schedule == "cosine" or recipe.distill.schedule == "linear"
    if recipe.train.steps != planned and ends:
        console.warn(
            f"the schedule is stretched from {planned:,} to {recipe.train.steps:,} steps: the "
            f"learning rate after step {saved.step:,} is not that of either run from its start"
        )
