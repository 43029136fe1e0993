"""`terdit ternarize`: converts a checkpoint to ternary weights and scales, with a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from terdit_cli.errors import UsageError
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.ternary import Granularity, absmean
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.system import memory


@dataclass(frozen=True)
class LayerReport:
    """One ternary matrix: its trits, scales and error against the master weight."""

    name: str
    shape: tuple[int, int]
    minus: float  # share of -1
    zero: float
    plus: float
    gamma: float
    alpha: float  # mean over the scales
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class TernarizeResult:
    """What was written; `fitted` tells a post-training fit from an exact conversion."""

    output: Path
    weights: str
    fitted: bool
    relative_error: float  # mean over the matrices, weighted by their size
    layers: list[LayerReport]


def run(
    checkpoint: Path,
    output: Path,
    weights: Literal["ema", "raw"] = "ema",
    granularity: Granularity | None = None,
    force: bool = False,
) -> TernarizeResult:
    """Ternarize a checkpoint into a safetensors file.

    Args:
        checkpoint: ckpt.pt or run folder; full precision is fitted (post-training quantisation).
        weights: the EMA weights or those of the last step.
        granularity: scales of a post-training fit (default "tensor"); an error for a ternary
            checkpoint, whose scales were trained.
        force: overwrite an existing output.

    Raises:
        InputFileError, UsageError, EnvironmentProblem.
    """
    file = ModelFile.open(checkpoint)
    found = file.checkpoint()
    file.refuse_output(output, force)
    export = CheckpointExport(found, weights, granularity or "tensor")
    if granularity is not None and not export.fitted:
        raise UsageError(
            "the scales of a ternary checkpoint are trained, not fitted",
            got=f"granularity {granularity}",
            expected=f"no --granularity: this checkpoint has {export.info.ternary.granularity}",
            where=file.weights_file,
            fix="leave --granularity out",
        )
    with memory.explained(f"ternarizing {file.path}", needs=file.size):
        layers = [_report(export, name) for name in export.ternary_names()]
        write_tdt(export, output, codec="int8", rest="fp32")
    sizes = [shape[0] * shape[1] for shape in (layer.shape for layer in layers)]
    mean_error = sum(
        layer.relative_error * size for layer, size in zip(layers, sizes, strict=True)
    ) / sum(sizes)
    return TernarizeResult(output, weights, export.fitted, mean_error, layers)


def _report(export: CheckpointExport, name: str) -> LayerReport:
    trits = export.trits(name)
    error = export.matrix_error(name)
    count = trits.numel()
    return LayerReport(
        name=name,
        shape=export.matrix_shape(name),
        minus=int((trits == -1).sum()) / count,
        zero=int((trits == 0).sum()) / count,
        plus=int((trits == 1).sum()) / count,
        gamma=float(absmean(export.master(name))),
        alpha=float(export.alphas(name).mean()),
        relative_error=error.relative_error,
        cosine=error.cosine,
    )
