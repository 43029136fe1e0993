"""Which reader opens a path: .tdt, ternarized .safetensors, ckpt.pt, run folder or release."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import CKPT, load_ckpt
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.read_release import ReleasedFolder, is_released_folder
from terdit_cli.pack.tdt import TdtFile


def checkpoint_path(path: Path) -> Path | None:
    """Return the ckpt.pt that a path means (a file of torch.save, or in a run folder), or None.

    Raises:
        InputFileError: nothing there, or a run folder without its ckpt.pt.
    """
    if not path.exists():
        raise InputFileError("no such model", where=path, fix="check the path")
    if not path.is_dir():
        return path if path.suffix in (".pt", ".pth") else None
    if is_released_folder(path):
        return None
    if not (path / CKPT).exists():
        fix = "name a run folder, ckpt.pt, .safetensors or .tdt"
        if (path / "manifest.json").exists() or any(path.glob("checkpoints/step-*/manifest.json")):
            fix = f"export the checkpoint: terdit export {path} -o early.pt"
        elif (path / "recipe.yaml").exists():
            fix = f"finish the run: terdit train {path / 'recipe.yaml'} --resume auto --out {path}"
        raise InputFileError(
            "the folder holds no finished model",
            expected=f"{CKPT} of a run, or a released TerDiT checkpoint",
            where=path,
            fix=fix,
        )
    return path / CKPT


def refuse_output(output: Path, source: Path) -> None:
    """Raise UsageError if an output would take its own source's place, or a checkpoint's name."""
    inputs = [path for path in (source, source / CKPT) if path.exists()]
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise UsageError("the output is the input", where=output, fix="name another file with -o")
    if output.suffix in (".pt", ".pth"):
        raise UsageError(
            "the output is no checkpoint", got=output.name, expected="a name as model.tdt",
            where=output, fix="name another file with -o",
        )  # fmt: skip


def refuse_overrides(path: Path, overrides: dict[str, Any]) -> None:
    """Raise UsageError if there are overrides: only released folders lack fields."""
    if overrides:
        raise UsageError(
            "only a released TerDiT folder takes overrides",
            got=", ".join(f"{name}={value}" for name, value in overrides.items()),
            where=path,
            fix="leave them out: this file knows its configuration",
        )


def open_exported(
    path: Path, weights: Literal["ema", "raw"] = "ema", /, **overrides: Any
) -> ExportedModel:
    """Open any ternary model for reading trits, alphas and the rest.

    Args:
        path: run folder, ckpt.pt, ternarized .safetensors, .tdt or released TerDiT folder.
        weights: which weights of a checkpoint.
        overrides: `DiTConfig` fields, for released folders.

    Raises:
        InputFileError: not such a file, or damaged.
        UsageError: a full-precision checkpoint (ternarize it first), a needless override, or the
            raw weights of something else than a checkpoint.
    """
    checkpoint = checkpoint_path(path)
    if checkpoint is None and weights == "raw":
        raise UsageError(
            "--raw is for checkpoints", got="a packed or ternarized model", where=path,
            expected="a run folder or a ckpt.pt", fix="leave --raw out",
        )  # fmt: skip
    if checkpoint is None and path.is_dir():
        return ReleasedFolder(path, **overrides)
    refuse_overrides(path, overrides)
    if checkpoint is None:
        return TdtFile(path)
    export = CheckpointExport(load_ckpt(checkpoint), weights)
    if export.fitted:
        raise UsageError(
            "the checkpoint is full precision",
            expected="a ternary one",
            where=checkpoint,
            fix=f"terdit ternarize {checkpoint} -o OUT.safetensors (after-training, with an "
            "error it tells), or train with ternary.enabled=true",
        )
    return export
