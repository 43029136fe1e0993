"""Which model is meant: a path or the name of a packaged model becomes one object.

A model is a run folder, its ckpt.pt, a ternarized .safetensors, a .tdt or a folder of TerDiT's
release.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Card, read_card
from terdit_cli.model.ckpt import CKPT, Checkpoint, load_ckpt
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.read_release import ReleasedFolder, is_released_folder, released_weights
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.system.atomic import file_sha256, refuse_existing

Kind = Literal["checkpoint", "tdt", "release"]  # "tdt": also a ternarized .safetensors


@dataclass(frozen=True)
class ModelFile:
    """One model on disk, read only on demand.

    `path` is the given path, or that of a packaged model. `name` is the name of a packaged model,
    None for all others.
    """

    path: Path
    kind: Kind
    name: str | None = None

    @classmethod
    def open(cls, where: str | os.PathLike[str] | ModelFile) -> ModelFile:
        """Find a model by its path or its packaged name.

        Raises:
            InputFileError: nothing there, or a folder without a finished model.
        """
        if isinstance(where, ModelFile):
            return where
        path = catalogue.resolve(where)
        return cls(path, _kind(path), catalogue.name_of(path))

    @property
    def weights_file(self) -> Path:
        """The file that holds the weights; raises InputFileError if a release has none."""
        if self.kind == "release":
            return released_weights(self.path)
        return self.path / CKPT if self.path.is_dir() else self.path

    def size(self) -> int:
        """Return the bytes of the file that holds the weights; raises OSError."""
        return self.weights_file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file that holds the weights, in hexadecimal."""
        return file_sha256(self.weights_file)

    @cached_property
    def card(self) -> Card | None:
        """The card of a packaged model; raises InputFileError for a damaged one."""
        return None if self.name is None else read_card(self.name)

    def checkpoint(self) -> Checkpoint:
        """Read the training checkpoint.

        Raises:
            InputFileError: it is of another kind, or damaged.
        """
        if self.kind != "checkpoint":
            raise InputFileError(
                "this is not a training checkpoint",
                got=self.path.suffix or ("a folder" if self.path.is_dir() else "a file"),
                expected="ckpt.pt or its run folder",
                where=self.path,
                fix="other formats are already ternary: use `terdit pack`",
            )
        return load_ckpt(self.weights_file)

    def exported(
        self, weights: Literal["ema", "raw"] = "ema", /, **overrides: Any
    ) -> ExportedModel:
        """Open a ternary model for reading trits, scales and other tensors.

        Args:
            weights: which weights of a checkpoint.
            overrides: `DiTConfig` fields that a released folder lacks (`n_heads=32`).

        Raises:
            InputFileError: damaged.
            UsageError: a full-precision checkpoint (ternarize it first), an unnecessary override,
                or raw weights of a model that is not a checkpoint.
        """
        if self.kind != "checkpoint" and weights == "raw":
            raise UsageError(
                "--raw is for checkpoints", got="a packed or ternarized model", where=self.path,
                expected="a run folder or a ckpt.pt", fix="leave --raw out",
            )  # fmt: skip
        if self.kind == "release":
            return ReleasedFolder(self.path, **overrides)
        self.refuse_overrides(overrides)
        if self.kind == "tdt":
            return TdtFile(self.path)
        export = CheckpointExport(self.checkpoint(), weights)
        if export.fitted:
            file = self.weights_file
            raise UsageError(
                "the checkpoint is full precision",
                expected="a ternary one",
                where=file,
                fix=f"terdit ternarize {file} -o OUT.safetensors (post-training quantisation; "
                "prints its error), or train with ternary.enabled=true",
            )
        return export

    def refuse_overrides(self, overrides: dict[str, Any]) -> None:
        """Raise UsageError if there are overrides: only released folders need them."""
        if overrides:
            raise UsageError(
                "only a released TerDiT folder takes overrides",
                got=", ".join(f"{name}={value}" for name, value in overrides.items()),
                where=self.path,
                fix="leave them out: this file holds its configuration",
            )

    def refuse_output(self, output: Path, force: bool) -> None:
        """Raise UsageError if an output would overwrite this model or have a checkpoint's suffix.

        Or if it exists, unless `force`.
        """
        if output.exists() and output.samefile(self.weights_file):
            raise UsageError(
                "the output is the input", where=output, fix="give another file with -o"
            )
        if output.suffix.lower() in (".pt", ".pth"):
            raise UsageError(
                "the output has a checkpoint's suffix", got=output.name,
                expected="a name such as model.tdt", where=output, fix="give another file with -o",
            )  # fmt: skip
        refuse_existing(output, force)


def _kind(path: Path) -> Kind:
    """Return the kind of a model; raises InputFileError for a folder without a finished model."""
    if not path.is_dir():
        return "checkpoint" if path.suffix.lower() in (".pt", ".pth") else "tdt"
    if is_released_folder(path):
        return "release"
    if (path / CKPT).exists():
        return "checkpoint"
    fix = "give a run folder, ckpt.pt, .safetensors or .tdt"
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
