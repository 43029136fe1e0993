"""`load_model`: the network f(x, t, y) from any file or folder that holds one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import Checkpoint, load_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.info import ModelInfo
from terdit_cli.pack.sources import checkpoint_path, open_exported, refuse_overrides
from terdit_cli.runtime.backends import choose_backend
from terdit_cli.runtime.packed import packed_network


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to sample, what it says of itself, and how it runs."""

    network: DiT
    info: ModelInfo
    backend: str  # for a line on stderr: which, and why


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    backend: str = "auto",
    weights: Literal["ema", "raw"] = "ema",
    **overrides: Any,
) -> LoadedModel:
    """Load a network together with its description.

    Args:
        path: run folder, ckpt.pt, ternarized .safetensors, .tdt or released TerDiT folder.
        device: where the network lives.
        backend: "auto" or a backend's name; packed models only.
        weights: of a ckpt.pt, the average or the raw weights.
        overrides: `DiTConfig` fields that a released folder does not show (`n_heads=32`).

    Raises:
        InputFileError, UsageError, EnvironmentProblem: see `open_exported`, `choose_backend`.
    """
    path, device = Path(path), torch.device(device)
    checkpoint = checkpoint_path(path)
    choice = choose_backend(backend, device)
    if checkpoint is not None:
        refuse_overrides(path, overrides)
        if backend != "auto":
            raise UsageError(
                "backends run packed models",
                got=f"--backend {backend} for a checkpoint",
                where=checkpoint,
                fix=f"terdit pack {path} -o model.tdt, then sample from that",
            )
        opened = load_ckpt(checkpoint)
        network = _masters(opened, weights).to(device)
        kind = "ternary masters" if opened.info.ternary.enabled else "full precision"
        return LoadedModel(network, opened.info, f"torch ({kind}, not packed)")
    with open_exported(path, weights, **overrides) as model:
        return LoadedModel(packed_network(model, choice.backend, device), model.info, choice.reason)


def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", **overrides: Any
) -> DiT:
    """Return the network f(x, t, y) of a model file or folder, in eval mode; see `load`."""
    return load(path, device, **overrides).network


def _masters(checkpoint: Checkpoint, weights: Literal["ema", "raw"]) -> DiT:
    """Rebuild the training network of a checkpoint with its float32 masters."""
    with torch.device("meta"):
        network = DiT(checkpoint.info.config, checkpoint.info.ternary.linear())
    try:
        network.load_state_dict(checkpoint.state_dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise InputFileError(
            "the checkpoint does not fit its own configuration",
            got=" ".join(str(error).split())[:400],
            where=checkpoint.path,
            fix="copy it again",
        ) from error
    return network.eval().requires_grad_(False)
