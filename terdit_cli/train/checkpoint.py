"""Resumable checkpoints: `checkpoints/step-00001000/` with state.pt and, last, manifest.json.

A checkpoint is written into a hidden folder and renamed when complete; the manifest, which holds
the size and SHA-256 of every file, is its last file. So a killed or failed save is recognisable
and the one before it survives. Masters, EMA and optimizer are saved; data order and noise are
functions of the step (`data/order.py`, `train/parallel.py`) and need no state.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terdit_cli import console
from terdit_cli.atomic import sync_folder, write_problem
from terdit_cli.errors import InputFileError
from terdit_cli.model.ckpt import load_tensors, save_tensors
from terdit_cli.recipe import Recipe

STATE, RECIPE, MANIFEST = "state.pt", "recipe.yaml", "manifest.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # optimizer steps done


def save_checkpoint(
    run_folder: Path, step: int, state: dict[str, Any], recipe: Recipe, keep_last: int
) -> Saved:
    """Save `state` after `step` optimizer steps, then delete all but the newest `keep_last`.

    Checkpoints of later steps, left by a continuation that this one replaces, go too.

    Raises:
        EnvironmentProblem: disk full or not writable; earlier checkpoints are untouched.
    """
    final = run_folder / FOLDER / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tensors(state, temporary / STATE)
        (temporary / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        files = {name: _fingerprint(temporary / name) for name in (STATE, RECIPE)}
        manifest = {"step": step, "recipe_sha256": recipe.sha256(), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _sync_files(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_problem(final, error) from error
    saved = _complete(run_folder)
    kept = [item for item in saved if item.step <= step][:keep_last]
    for old in saved:
        if old not in kept:
            shutil.rmtree(old.path, ignore_errors=True)
    return Saved(final, step)


def latest_checkpoint(run_folder: Path) -> Saved | None:
    """Return the newest complete checkpoint of a run; incomplete ones are named and skipped."""
    folder = run_folder / FOLDER
    if folder.is_dir():
        for left in sorted(folder.glob(".step-*.tmp")):
            console.warn(f"skipping an incomplete checkpoint: {left}")
    for saved in _complete(run_folder):
        try:
            check_checkpoint(saved.path)
        except InputFileError as error:
            console.warn(f"skipping a damaged checkpoint: {error}")
            continue
        return saved
    return None


def check_checkpoint(path: Path) -> Saved:
    """Return a checkpoint folder's step after checking its files against the manifest.

    Raises:
        InputFileError: not a checkpoint, incomplete or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, files = int(manifest["step"]), dict(manifest["files"])
        for name in (STATE, RECIPE):
            expected = files[name]
            if _fingerprint(path / name) != expected:
                raise ValueError(f"{name} is not what the manifest says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(
            "not a complete checkpoint",
            got=error,
            expected=f"a folder with {STATE}, {RECIPE} and {MANIFEST}",
            where=path,
            fix="use --resume auto to take the newest complete one",
        ) from error
    return Saved(path, step)


def load_state(saved: Saved) -> dict[str, Any]:
    """Load a checkpoint's state (tensors and plain types only)."""
    state = load_tensors(saved.path / STATE)
    missing = {"model", "ema", "optimizer"} - set(state)
    if missing:
        raise InputFileError(
            "the checkpoint lacks a part", got=f"no {', '.join(sorted(missing))}", where=saved.path
        )
    return state


def _complete(run_folder: Path) -> list[Saved]:
    """Return the checkpoints that have a manifest, newest first."""
    folders = [path.parent for path in (run_folder / FOLDER).glob("step-*/" + MANIFEST)]
    steps = {folder: folder.name.removeprefix("step-") for folder in folders}
    saved = [Saved(folder, int(step)) for folder, step in steps.items() if step.isdecimal()]
    return sorted(saved, key=lambda item: -item.step)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync_files(folder: Path) -> None:
    import os

    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
