"""Resumable checkpoints: `checkpoints/step-00001000/`, sharded, complete or absent.

    __0_0.distcp ...   the shards of each process, and .metadata: see `sharded_tensors.py`
    recipe.yaml        the resolved recipe
    manifest.json      step, time, model metadata, size and SHA-256 of every file; written last

Everything goes into a hidden folder. When every process has written and synced its shards, the
main one writes the manifest, and renames the folder. So a killed or failed save is recognisable,
and the one before it survives. `save` copies the state and returns; the copy is written while
training continues, one checkpoint at a time.

Master weights, EMA and optimizer state are saved. Settings are the recipe's; data order and random
numbers are functions of the step (`data/order.py`, `rng.py`) and need no state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem, InputFileError, TerditError
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.recipe import CheckpointSection, Recipe
from terdit_cli.system.atomic import sync_folder, write_problem
from terdit_cli.system.job import Job
from terdit_cli.train.sharded_tensors import (
    METADATA,
    Fingerprint,
    ShardReader,
    ShardWriter,
    fingerprint,
    flatten,
)

RECIPE, MANIFEST = "recipe.yaml", "manifest.json"
FOLDER = "checkpoints"
LARGEST_MANIFEST = 1 << 24  # bytes
WRITE_SECONDS = 1800  # for which processes wait for each other's disks
_UNREADABLE = 1 << 40  # more than any number of files
_PLAIN_NAME = re.compile(r"\.?\w[\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    step: int  # optimizer steps done
    saved_at: float  # seconds since 1970
    info: dict[str, Any]  # ModelInfo
    files: dict[str, Fingerprint]


class CheckpointWriter:
    """Writes the checkpoints of a run; all processes call the same methods at the same steps."""

    def __init__(self, run_folder: Path, recipe: Recipe, info: ModelInfo, job: Job) -> None:
        self._run_folder = run_folder
        self._recipe = recipe
        self._info = info
        self._job = job
        if job.is_main:  # before any process writes: new_group waits for all
            for left in (run_folder / FOLDER).glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        # A separate group: the run's other collectives continue meanwhile.
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_SECONDS))
            if job.size > 1
            else None
        )
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Start to save `state` after `step` optimizer steps and return its future folder.

        The state may change as soon as this returns. When all is written, all but the newest
        `keep_last` and the keepers are deleted, and checkpoints of later steps, left by a
        continuation that this one replaces.

        Raises:
            EnvironmentProblem: the save before this one failed; see `wait`.
        """
        self.wait()
        final = folder_of(self._run_folder, step)

        def publish(files: dict[str, Fingerprint]) -> None:
            self._publish(final, step, files)

        writer = ShardWriter(_hidden(final), publish)
        pending = dcp.async_save(flatten(state), storage_writer=writer, process_group=self._group)
        assert isinstance(pending, Future)
        self._pending = (final, pending)
        return final

    @property
    def failed(self) -> bool:
        """Whether a save has failed whose error `wait` has not raised yet."""
        if self._pending is None or not self._pending[1].done():
            return False
        return self._pending[1].exception() is not None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            EnvironmentProblem: disk full or not writable; earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        (final, pending), self._pending = self._pending, None
        error = pending.exception()
        if error is None:
            return
        if self._job.is_main:
            shutil.rmtree(_hidden(final), ignore_errors=True)
        raise _explain(final, error) from error

    def abandon(self) -> None:
        """Wait for the save in progress, even if it fails; a half-written save is removed."""
        with suppress(TerditError):
            self.wait()

    def _publish(self, final: Path, step: int, files: dict[str, Fingerprint]) -> None:
        """Turn a hidden folder into a checkpoint; on the main process only."""
        hidden = _hidden(final)
        for name, mark in files.items():
            _check_arrived(hidden / name, mark["bytes"])
        _write(hidden / RECIPE, self._recipe.to_yaml())
        manifest = {
            "step": step,
            "saved_at": time.time(),
            "processes": self._job.size,
            "recipe_sha256": self._recipe.sha256(),
            "info": replace(self._info, step=step).to_dict(),
            "files": files | {RECIPE: fingerprint(hidden / RECIPE)},
        }
        _write(hidden / MANIFEST, json.dumps(manifest, indent=2))
        sync_folder(hidden)
        shutil.rmtree(final, ignore_errors=True)
        hidden.rename(final)
        sync_folder(final.parent)
        _prune(self._run_folder, step, self._recipe.checkpoint)


def folder_of(run_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_folder / FOLDER / f"step-{step:08d}"


def _hidden(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _check_arrived(path: Path, size: int) -> None:
    """Raise unless this process sees a file that another one has written."""
    if path.exists() and path.stat().st_size == size:
        return
    raise EnvironmentProblem(
        "the parts of a checkpoint are in different places",
        got=f"no {path.name} of {size} bytes, which another process has written",
        expected="a run folder that all machines share",
        where=path.parent,
        fix="give a folder on shared storage with --out",
    )


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _explain(final: Path, error: BaseException) -> TerditError:
    """Return the error for a failed save of any process."""
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
        error = next((e for e in failures if isinstance(e, OSError | TerditError)), failures[0])
    if isinstance(error, TerditError):
        return error
    if isinstance(error, OSError):
        return write_problem(final, error)
    return EnvironmentProblem(
        "a checkpoint was not written",
        got=str(error).split("\n")[0][:300] or type(error).__name__,
        where=final,
        fix="resume from the checkpoint before it with --resume auto",
    )


def _prune(run_folder: Path, step: int, section: CheckpointSection) -> None:
    complete = complete_checkpoints(run_folder)
    kept = set([n for n in complete if n <= step][: section.keep_last])
    if section.keep_every_hours is not None:
        kept |= _keepers({n: path for n, path in complete.items() if n <= step}, section)
    for number, path in complete.items():
        if number not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _keepers(complete: dict[int, Path], section: CheckpointSection) -> set[int]:
    """Return the oldest step, and each that is `keep_every_hours` younger than the one before."""
    assert section.keep_every_hours is not None
    kept: set[int] = set()
    due = 0.0
    for step in sorted(complete):
        try:
            saved_at = read_manifest(complete[step]).saved_at
        except InputFileError:
            continue
        if saved_at >= due:
            kept.add(step)
            due = saved_at + 3600 * section.keep_every_hours
    return kept


def complete_checkpoints(run_folder: Path) -> dict[int, Path]:
    """Return the folders that have a manifest, by step, newest first."""
    folders = [path.parent for path in (run_folder / FOLDER).glob("step-*/" + MANIFEST)]
    steps = [(folder.name.removeprefix("step-"), folder) for folder in folders]
    numbered = {int(step): folder for step, folder in steps if step.isdecimal()}
    return {
        step: folder
        for step, folder in sorted(numbered.items(), reverse=True)
        if folder == folder_of(run_folder, step)
    }


def latest_checkpoint(run_folder: Path, job: Job) -> Saved | None:
    """Return the newest undamaged checkpoint of a run; all processes must call.

    Incomplete and damaged ones are named and skipped.
    """
    if job.is_main:
        folder = run_folder / FOLDER
        without = {p for p in folder.glob("step-*") if p.is_dir() and not (p / MANIFEST).exists()}
        for left in sorted({*folder.glob(".step-*.tmp"), *without}):
            console.warn(f"skipping an incomplete checkpoint: {left}")
    # Network folders may not look the same to all processes yet: the main one decides.
    steps = list(complete_checkpoints(run_folder)) if job.is_main else []
    while (step := int(job.largest(steps.pop(0) if steps else -1))) >= 0:
        try:
            return check_checkpoint(folder_of(run_folder, step), job)
        except InputFileError as error:
            console.warn(f"skipping a damaged checkpoint: {error}")
    return None


def check_checkpoint(path: Path, job: Job) -> Saved:
    """Return a checkpoint after checking its files against the manifest; all processes must call.

    Raises:
        InputFileError: not a checkpoint, incomplete or damaged.
    """
    saved, bad = None, _UNREADABLE
    try:
        saved, bad = read_manifest(path), 0
        for number, name in list(enumerate(sorted(saved.files), 1))[job.rank :: job.size]:
            if not _is_intact(path / name, saved.files[name]):
                bad = number
    except InputFileError as error:
        reason = error
    bad = int(job.largest(bad))
    if bad >= _UNREADABLE or saved is None:
        raise _incomplete(path, "a manifest that another process cannot read") if saved else reason
    if bad:
        raise _incomplete(path, f"{sorted(saved.files)[bad - 1]} is not what the manifest says")
    return saved


def _is_intact(path: Path, expected: Fingerprint) -> bool:
    try:
        whole = path.is_file() and path.stat().st_size == expected["bytes"]
        return whole and fingerprint(path) == expected
    except OSError:
        return False


def read_manifest(path: Path) -> Saved:
    """Return the manifest of a checkpoint folder, without reading the other files.

    Raises:
        InputFileError: no manifest, or not one of a checkpoint.
    """
    try:
        with (path / MANIFEST).open("rb") as file:
            values = json.loads(file.read(LARGEST_MANIFEST))
        files: dict[str, Fingerprint] = {
            _plain_name(name): {"bytes": int(mark["bytes"]), "sha256": str(mark["sha256"])}
            for name, mark in values["files"].items()
        }
        saved = Saved(
            path, int(values["step"]), float(values["saved_at"]), dict(values["info"]), files
        )
        missing = {RECIPE, METADATA} - set(files)
        if missing or saved.step < 0:
            raise ValueError(f"a manifest without {', '.join(sorted(missing)) or 'a step'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _incomplete(path, f"{type(error).__name__}: {error}") from error
    return saved


def _plain_name(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"a file name {name[:100]!r}")
    return name


def _incomplete(path: Path, got: str) -> InputFileError:
    return InputFileError(
        "not a complete checkpoint",
        got=got,
        expected=f"a folder with shards, {METADATA}, {RECIPE} and {MANIFEST}",
        where=path,
        fix="use --resume auto to take the newest complete one",
    )


def load_state(saved: Saved, state: dict[str, Any]) -> dict[str, Any]:
    """Fill the tensors of `state`, or this process's shards of them, and return it.

    The numbers of reading and writing processes may differ; all must call.

    Raises:
        InputFileError: a tensor that the checkpoint lacks or has in another shape.
    """
    ShardReader(saved.path, saved.files).read(flatten(state))
    return state
