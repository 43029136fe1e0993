"""`terdit export`: a checkpoint of a run becomes one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import CKPT, load_ckpt
from terdit_cli.system import memory
from terdit_cli.system.job import Job
from terdit_cli.train.checkpoint import (
    FOLDER,
    MANIFEST,
    Saved,
    check_checkpoint,
    latest_checkpoint,
)
from terdit_cli.train.write_ckpt import write_ckpt

# Suffix -> the function that writes the file.
FORMATS: dict[str, Callable[[Saved, Path], None]] = {".pt": write_ckpt}


@dataclass(frozen=True)
class ExportResult:
    """What was written from which checkpoint."""

    checkpoint: Path
    out: Path
    step: int


def run(source: Path, out: Path | None = None) -> ExportResult:
    """Write a checkpoint as one file, in one process and with little memory.

    Args:
        source: a run folder, whose newest undamaged checkpoint is taken, or a checkpoint folder.
        out: the file to write, with a suffix in `FORMATS`; default ckpt.pt in the run folder.

    Raises:
        InputFileError: no checkpoint there, or a damaged one.
        UsageError: ckpt.pt would take the place of that of another step, or an unknown suffix.
        EnvironmentProblem: disk full or not writable.
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UsageError(
            "unknown export format", got=out.name,
            expected="a name that ends in " + ", ".join(FORMATS), fix="-o ckpt.pt",
        )  # fmt: skip
    job = Job()
    if (source / MANIFEST).exists():
        saved, folder = check_checkpoint(source, job), source.resolve().parent
        run_folder = folder.parent if folder.name == FOLDER else source
    else:
        newest, run_folder = latest_checkpoint(source, job), source
        if newest is None:
            raise InputFileError(
                "there is no complete checkpoint", where=source,
                fix="give a run folder or one of its checkpoints/step-* folders",
            )  # fmt: skip
        saved = newest
    path = out or run_folder / CKPT
    if out is None and _step_of(path) not in (None, saved.step):
        raise UsageError(
            "the run's ckpt.pt is from another step", got=f"step {_step_of(path)}",
            expected=f"step {saved.step}, that of the checkpoint", where=path,
            fix="write another file: -o early.pt",
        )  # fmt: skip
    with memory.explained(f"exporting {saved.path}"):
        FORMATS[path.suffix.lower()](saved, path)
    return ExportResult(saved.path, path, saved.step)


def _step_of(path: Path) -> int | None:
    """Return the step of a ckpt.pt; None if it is absent, or damaged and to be written again."""
    try:
        return load_ckpt(path).info.step
    except InputFileError:
        return None
