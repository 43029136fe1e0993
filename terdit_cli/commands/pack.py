"""`terdit pack`: any ternary model becomes one verified .tdt file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from terdit_cli import console
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import RestDtype, write_tdt
from terdit_cli.pack.trits import CODECS
from terdit_cli.system import memory

FP32_BYTES = 4


@dataclass(frozen=True)
class PackResult:
    """Sizes of the written file; bits per weight are those of the ternary matrices."""

    output: Path
    codec: str
    rest: str
    parameters: int  # ternary weights, alphas and all others
    ternary: int
    file_bytes: int
    fp32_bytes: int
    bits_per_weight: float
    seconds: float

    @property
    def ratio(self) -> float:
        return self.fp32_bytes / self.file_bytes


def run(
    source: Path,
    output: Path,
    codec: Literal["t2", "t5"] = "t2",
    rest: RestDtype = "fp32",
    weights: Literal["ema", "raw"] = "ema",
    overrides: Mapping[str, Any] | None = None,
    force: bool = False,
) -> PackResult:
    """Pack a model, read the result back and verify it before it appears under its name.

    Args:
        source: ckpt.pt, run folder, ternarized .safetensors, .tdt or released TerDiT folder.
        output: the .tdt to write.
        codec: t2 (2 bits per weight, mapped at load) or t5 (1.6 bits, unpacked at load).
        rest: dtype of everything that is not ternary; fp32 keeps the outputs bit for bit.
        weights: of a checkpoint, the EMA or those of the last step.
        overrides: `DiTConfig` fields that a released folder lacks (n_heads=32).
        force: overwrite an existing output.

    Raises:
        InputFileError, UsageError, EnvironmentProblem.
    """
    file = ModelFile.open(source)
    file.refuse_output(output, force)
    started = time.monotonic()
    with (
        memory.explained(f"packing {file.path}", needs=file.size),
        file.exported(weights, **(overrides or {})) as model,
    ):
        steps = 2 * len(model.ternary_names()) + len(model.rest_names())
        with console.progress(f"packing {output.name}", steps) as meter:
            write_tdt(model, output, codec, rest, lambda done, total: meter.update(done))
        ternary = count_weights(model)
        scales = sum(model.alphas(name).numel() for name in model.ternary_names())
        others = sum(model.rest(name).numel() for name in model.rest_names())
        shapes = [model.matrix_shape(name) for name in model.ternary_names()]
    packed = sum(math.prod(CODECS[codec].shape(*shape)) for shape in shapes)
    parameters = ternary + scales + others
    return PackResult(
        output=output,
        codec=codec,
        rest=rest,
        parameters=parameters,
        ternary=ternary,
        file_bytes=output.stat().st_size,
        fp32_bytes=parameters * FP32_BYTES,
        bits_per_weight=8 * packed / ternary,
        seconds=time.monotonic() - started,
    )
