"""A ckpt.pt of given tensors, without a training."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from terdit_cli.model.ckpt import ckpt_values, save_tensors
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.system.atomic import atomic_path


def save_ckpt(
    path: Path, info: ModelInfo, recipe: str, model: dict[str, Tensor], ema: dict[str, Tensor]
) -> None:
    with atomic_path(path) as temporary:
        save_tensors(ckpt_values(info.to_dict(), recipe, model, ema), temporary)
