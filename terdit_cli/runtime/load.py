"""`load_model`: the network f(x, t, y) from any file or folder that holds one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from terdit_cli.errors import UsageError
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.ckpt import Checkpoint
from terdit_cli.model.dit import DiT
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.model.restore import restore_network
from terdit_cli.runtime.backends import Backend, choose_backend, resolve_activations
from terdit_cli.runtime.packed import packed_network
from terdit_cli.runtime.reference import Precision
from terdit_cli.system import gpu_memory


@dataclass(frozen=True)
class LoadedModel:
    """A network ready to sample, its metadata, and how it runs."""

    network: DiT
    info: ModelInfo
    device: torch.device
    runs_on: Backend | None  # of a packed model
    backend: str  # its name; "torch" or "torch-compile" for a checkpoint
    precision: Precision
    threads: int
    isa: str | None
    reason: str  # for a line on stderr: what runs, and why

    @property
    def conditions(self) -> torch.device:
        """The device for y and t."""
        return self.device if self.runs_on is None else self.runs_on.condition_device(self.device)

    def largest_batch(self, guided: bool) -> int | None:
        """Return how many images at once fit in the free memory; None: unknown.

        Args:
            guided: with CFG, each image is two of the network's rows.
        """
        if self.runs_on is None:
            return None
        rows = self.runs_on.largest_batch(self.info.config, self.device, self.precision)
        return rows // 2 if rows is not None and guided else rows

    def facts(self) -> dict[str, Any]:
        """Return how it runs, for the provenance of a result."""
        return {
            "backend": self.backend,
            "isa": self.isa,
            "threads": self.threads,
            "activations": self.precision,
            "weights": self.info.weights,
        }


def load(
    where: str | os.PathLike[str] | ModelFile,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    weights: Literal["ema", "raw"] = "ema",
    activations: str = "auto",
    compiled: bool = False,
    **overrides: Any,
) -> LoadedModel:
    """Load a network together with its metadata.

    Args:
        where: run folder, ckpt.pt, ternarized .safetensors, .tdt, released TerDiT folder, or the
            name of a packaged model.
        device: of the network.
        backend: "auto" or a backend's name; packed models only.
        weights: of a checkpoint, the EMA or those of the last step; packed models have one set.
        activations: "auto" or a precision; packed models only.
        compiled: compile the blocks with torch.compile on the first call; checkpoints only,
            because packed models have kernels of their own.
        overrides: `DiTConfig` fields that a released folder lacks (`n_heads=32`).

    Raises:
        InputFileError, UsageError, EnvironmentProblem: see `ModelFile`, `choose_backend` and
            `resolve_activations`. EnvironmentProblem: the weights do not fit the GPU's memory.
    """
    file, device = ModelFile.open(where), torch.device(device)
    with gpu_memory.explained("the model's weights", device, gpu_memory.ELSEWHERE, file.size):
        return _load(file, device, backend, weights, activations, compiled, overrides)


def _load(
    file: ModelFile,
    device: torch.device,
    backend: str,
    weights: Literal["ema", "raw"],
    activations: str,
    compiled: bool,
    overrides: dict[str, Any],
) -> LoadedModel:
    if file.kind == "checkpoint":
        file.refuse_overrides(overrides)
        for flag, asked in (("--backend", backend), ("--activations", activations)):
            if asked != "auto":
                raise UsageError(
                    f"{flag} is for packed models",
                    got=f"{flag} {asked} for a checkpoint",
                    where=file.weights_file,
                    fix=f"terdit pack {file.path} -o model.tdt, then use that",
                )
        return _from_checkpoint(file.checkpoint(), weights, device, compiled)
    if compiled:
        raise UsageError(
            "--compile is for checkpoints", got="a packed or ternarized model", where=file.path,
            expected="a run folder or a ckpt.pt", fix="leave --compile out",
        )  # fmt: skip
    choice = choose_backend(backend, device)
    with file.exported(weights, **overrides) as model:
        trained = model.info.ternary.activations
        precision = resolve_activations(activations, trained, choice.backend)
        network = packed_network(model, choice.backend, device, precision)
    how = choice.backend.how(device)
    why = "as trained" if trained == "int8" else "as asked" if activations != "auto" else "auto"
    return LoadedModel(
        network=network,
        info=model.info,
        device=device,
        runs_on=choice.backend,
        backend=choice.backend.NAME,
        precision=precision,
        threads=how.threads,
        isa=how.isa,
        reason=f"{choice.reason}, {how.description}, activations {precision} ({why})",
    )


def load_model(
    path_or_name: str | os.PathLike[str] | ModelFile,
    device: str | torch.device = "cpu",
    activations: str = "auto",
    backend: str = "auto",
    **overrides: Any,
) -> DiT:
    """Return the network f(x, t, y) of a model, in eval mode; see `load`.

    If torch was imported before terdit_cli.load_model, its waiting threads spin as long as its
    OpenMP library has them; else as `system/openmp.py` says.
    """
    return load(path_or_name, device, backend, activations=activations, **overrides).network


def _from_checkpoint(
    checkpoint: Checkpoint,
    weights: Literal["ema", "raw"],
    device: torch.device,
    compiled: bool,
) -> LoadedModel:
    info = replace(checkpoint.info, weights=weights)
    kind = "ternary master weights" if info.ternary.enabled else "full precision"
    network = restore_network(checkpoint, device, weights)
    if compiled:
        for block in network.layers:
            block.compile()
    return LoadedModel(
        network=network,
        info=info,
        device=device,
        runs_on=None,
        backend="torch-compile" if compiled else "torch",
        precision="int8" if info.ternary.enabled and info.ternary.activations == "int8" else "fp32",
        threads=torch.get_num_threads(),
        isa=None,
        reason=f"torch ({kind}, {weights}, not packed{', compiled' if compiled else ''})",
    )
