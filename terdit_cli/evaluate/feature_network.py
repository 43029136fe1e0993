"""What the extractor needs to know of a network, whichever it is.

    image uint8 [H, W, 3] --prepare (CPU, one thread an image)--> float32 [3, h, w]
    batch float32 [B, 3, h, w] --forward (any device)--> Outputs

B images, D features, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terdit_cli.system.torchvision_shim import import_vision

Image = NDArray[np.uint8]


class Outputs(NamedTuple):
    """What a network gives for a batch, float32 or bfloat16."""

    pool: Tensor  # [B, D]
    spatial: Tensor | None = None  # [B, S]
    logits: Tensor | None = None  # [B, C]


@dataclass(frozen=True)
class Network:
    """A network with its weights on a device, and the exact way images go in."""

    pipeline: str  # network, file and resize: what must agree between two sets of features
    distance_name: str  # "FID" for Inception's two pipelines, else "fd-<extractor>"
    dim: int | None  # None: known after the first batch
    spatial_dim: int | None
    classes: int | None
    fixed_size: bool  # whether `prepare` gives one size, whatever the image's
    prepare: Callable[[Image], Tensor]
    forward: Callable[[Tensor], Outputs]
    warnings: tuple[str, ...] = ()


def first_sentence(error: Exception) -> str:
    """Return what an error of torch says before it goes on to advice: at most 160 characters."""
    text = re.sub(r"^Error\(s\) in loading state_dict for \w+:", "", str(error)).strip()
    return re.split(r"\. |\n", text or type(error).__name__, maxsplit=1)[0][:160]


def clean_resize(size: int) -> Callable[[Image], Tensor]:
    """Return clean-fid's resize: antialiased bicubic, one channel at a time, never rounded.

    Returns:
        a function: uint8 [H, W, 3] -> float32 [3, size, size], values in 0..255.
    """
    resize = import_vision("cleanfid.resize").make_resizer("PIL", False, "bicubic", (size, size))

    def prepare(image: Image) -> Tensor:
        return torch.from_numpy(resize(image)).permute(2, 0, 1)

    return prepare
