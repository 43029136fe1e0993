"""Networks as TorchScript files: the user's own, `torchscript:FILE`.

    the file's forward: float32 [1, 3, H, W] in 0..255, at the image's own size -> [1, D]

torch.jit.load runs a TorchScript program in torch's interpreter; it does not unpickle Python.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from terdit_cli.errors import InputFileError
from terdit_cli.evaluate.feature_network import Image, Network, Outputs, first_sentence
from terdit_cli.evaluate.weights import SHORT, weights_sha256


def load_torchscript(path: Path, device: torch.device, fix: str) -> Any:
    """Return the program of a TorchScript file, ready to run; raises InputFileError."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputFileError(
            "not a TorchScript file",
            got=first_sentence(error),
            where=path,
            fix=fix,
        ) from error


def run_torchscript(function: Callable[[Tensor], Any], batch: Tensor, where: object) -> Tensor:
    """Return what a program gives for a batch [B, 3, H, W]: [B, ...].

    Raises:
        InputFileError: it fails, or gives something other than a tensor of B rows.
    """
    try:
        # No profiling: a program that is fused after its second run gives other bits from then on.
        with torch.jit.optimized_execution(False):
            output = function(batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, torch.jit.Error) as error:  # TorchScript raises either
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
        raise no_features(f"{reason} for input {list(batch.shape)}", where) from error
    if not isinstance(output, Tensor):
        raise no_features(f"a {type(output).__name__}", where)
    if not output.ndim or len(output) != len(batch):
        raise no_features(f"shape {tuple(output.shape)} for {len(batch)} images", where)
    return output


def no_features(got: str, where: object, expected: str = "finite [B, D]") -> InputFileError:
    """Return the error of a network whose output is no features."""
    return InputFileError(
        "the extractor does not give one feature vector an image",
        got=got,
        expected=expected,
        where=where,
        fix="give a network that takes float32 [B, 3, H, W] in 0..255",
    )


def torchscript(path: Path, device: torch.device) -> Network:
    """Return the network of a user's TorchScript file.

    Raises:
        InputFileError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise InputFileError("no such feature extractor", where=path, fix="torchscript:FILE")
    network = load_torchscript(path, device, "save the network with torch.jit.save")
    pipeline = f"torchscript {path.name}@{weights_sha256(path)[:SHORT]} native size"

    def prepare(image: Image) -> Tensor:
        return torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1).float()

    def forward(batch: Tensor) -> Outputs:
        return Outputs(run_torchscript(network, batch, pipeline))

    return Network(
        pipeline=pipeline,
        distance_name=f"fd-{path.stem}",
        dim=None,
        spatial_dim=None,
        classes=None,
        fixed_size=False,
        prepare=prepare,
        forward=forward,
    )
