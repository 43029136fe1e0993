"""`terdit train`: a recipe becomes a run folder with ckpt.pt, or, dry, a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terdit_cli import console
from terdit_cli.atomic import atomic_path
from terdit_cli.errors import UsageError
from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.train import build
from terdit_cli.train.checkpoint import RECIPE, Saved, check_checkpoint, latest_checkpoint
from terdit_cli.train.loop import loss_summary, run_training
from terdit_cli.train.memory import Plan, plan_run
from terdit_cli.train.parallel import join_world
from terdit_cli.train.preview import preview_sampler
from terdit_cli.train.trainer import CKPT, Trainer

# Changing these on resume would give another network than the one that was saved.
_FIXED_SECTIONS = ("model", "ternary")


@dataclass(frozen=True)
class TrainResult:
    """Where the product lies, and how the loss went."""

    run_folder: Path
    checkpoint: Path
    steps: int
    first_loss: float | None
    last_loss: float | None


def plan(recipe_path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Plan]:
    """Return the resolved recipe and what its run needs; trains nothing, reads no data."""
    recipe = load_recipe(recipe_path, overrides)
    preview_sampler(recipe)
    return recipe, plan_run(recipe)


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
    recipe = load_recipe(recipe_path, overrides)
    preview_sampler(recipe)
    run_folder = out or build.default_run_folder(recipe)
    saved = _find_checkpoint(resume, run_folder)
    if saved is not None:
        _check_same_network(recipe, saved)
    world = join_world()
    source = build.open_data(recipe)
    space = build.open_space(recipe, world.device)
    trainer = Trainer(recipe, source, space, world, run_folder)
    if saved is not None:
        trainer.restore(saved)
        console.note(f"resuming {recipe.name} after step {saved.step} from {saved.path}")
    with atomic_path(run_folder / RECIPE) as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")
    parameters = sum(p.numel() for p in trainer.network.parameters())
    console.note(
        f"training {recipe.name}: {parameters:,} parameters, {len(source):,} images, "
        f"{recipe.train.steps:,} steps of {recipe.train.global_batch_size} on {world.device}, "
        f"into {run_folder}"
    )
    checkpoint = run_training(trainer)
    first, last = loss_summary(run_folder) or (None, None)
    return TrainResult(run_folder, checkpoint, trainer.step, first, last)


def _find_checkpoint(resume: str | None, run_folder: Path) -> Saved | None:
    """Return the checkpoint to continue from, or None for a new run."""
    if resume is None:
        used = latest_checkpoint(run_folder) or (run_folder / CKPT).exists()
        if used:
            raise UsageError(
                "the run folder already holds a run",
                where=run_folder,
                fix="continue it with --resume auto, or name another folder with --out",
            )
        return None
    if resume == "auto":
        saved = latest_checkpoint(run_folder)
        if saved is None:
            console.note(f"no complete checkpoint in {run_folder}: starting a new run")
        return saved
    saved, newest = check_checkpoint(Path(resume)), latest_checkpoint(run_folder)
    if newest is not None and newest.step > saved.step:
        raise UsageError(
            "the run folder holds a later checkpoint than the one to resume",
            got=newest.path,
            expected=f"none after step {saved.step}",
            where=saved.path,
            fix="continue the newest with --resume auto, or into a new folder with --out",
        )
    return saved


def _check_same_network(recipe: Recipe, saved: Saved) -> None:
    """Refuse a checkpoint of another network; name every other setting that changed.

    Raises:
        UsageError: `model` or `ternary` differ, or the checkpoint is beyond the last step.
    """
    old = load_recipe(saved.path / RECIPE).model_dump(mode="json")
    new = recipe.model_dump(mode="json")
    changed = [
        f"{section}.{key}" if isinstance(old[section], dict) else section
        for section in new
        for key in (new[section] if isinstance(new[section], dict) else [""])
        if (old[section][key] != new[section][key] if key else old[section] != new[section])
    ]
    fixed = [key for key in changed if key.split(".")[0] in _FIXED_SECTIONS]
    if fixed:
        raise UsageError(
            "the checkpoint is of another network",
            got=f"other {', '.join(fixed)}",
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
