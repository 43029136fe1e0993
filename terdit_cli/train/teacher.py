"""The teacher of a distilled run: a trained network whose predictions the student learns.

The noise cannot be recovered exactly from a noisy image, so it is a target of high variance; a
teacher predicts its mean. Both see the same noisy images, timesteps and labels, the dropped
ones too (Hinton et al., arXiv 1503.02531; of noise predictions: Kim et al., arXiv 2305.15798).
If they have the same width, the student may also learn the output of the teacher's last block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from terdit_cli.errors import UsageError
from terdit_cli.model.ckpt import Checkpoint, ckpt_in, load_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.model.restore import restore_network
from terdit_cli.recipe import DistillSection, Recipe
from terdit_cli.train import build

_SAME = ("in_channels", "input_size", "num_classes", "null_class")


def load_teacher(recipe: Recipe, device: torch.device) -> DiT | None:
    """Return the EMA network of `distill.teacher`, frozen; None if there is none.

    Every process holds all of it.

    Raises:
        InputFileError: no checkpoint of terdit.
        UsageError: other images or classes than those of the recipe's model.
    """
    checkpoint = open_teacher(recipe)
    if checkpoint is None:
        return None
    network = restore_network(checkpoint, device)
    if recipe.train.compile:
        for block in network.layers:
            block.compile()
    return network


def teacher_weight(step: int, steps: int, distill: DistillSection) -> float:
    """Return the weight of the teacher in optimizer step `step` (counted from 0) of `steps`.

    A teacher speeds up the first steps, but the student ends with its errors: with "linear" the
    weight falls to 0 by the last step. The weight of features is separate and constant.
    """
    return distill.weight * (1 - step / steps if distill.schedule == "linear" else 1)


class FeatureMatch:
    """Compares the last blocks' outputs of student and teacher in their last forward passes."""

    def __init__(self, student: DiT, teacher: DiT, weight: float) -> None:
        """Hook into both networks.

        Args:
            weight: of the difference in the objective.

        Raises:
            UsageError: they have hidden states of different widths.
        """
        if student.config.dim != teacher.config.dim:
            raise UsageError(
                "the teacher's features have another width",
                got=f"dim {teacher.config.dim}",
                expected=f"dim {student.config.dim}, that of the recipe's model",
                where="distill.features",
                fix="set distill.features=0, or distil from a model of the same width",
            )
        self.weight = weight
        self._seen: dict[str, Tensor] = {}
        # Not the blocks themselves: torch.compile would have to trace the hook.
        for name, network in (("student", student), ("teacher", teacher)):
            network.final_layer.register_forward_pre_hook(
                lambda _, inputs, name=name: self._seen.update({name: inputs[0]})
            )

    def difference(self) -> Tensor:
        """Return mean (h - h_teacher)^2 / mean h_teacher^2 of each image, float32 [B]."""
        ours, theirs = (self._seen.pop(name).float() for name in ("student", "teacher"))
        size = theirs.square().mean(dim=(1, 2))
        return (ours - theirs).square().mean(dim=(1, 2)) / size


def open_teacher(recipe: Recipe) -> Checkpoint | None:
    """Return the checkpoint of `distill.teacher`, mapped and checked; None where there is none.

    Raises:
        As `load_teacher`.
    """
    path = recipe.distill.teacher
    if path is None:
        return None
    checkpoint = load_ckpt(ckpt_in(path))
    theirs, ours = _inputs(checkpoint.info), _inputs(build.model_info(recipe, [], 0))
    other = [name for name in ours if theirs[name] != ours[name]]
    if other:
        raise UsageError(
            "the teacher has different inputs from the student",
            got=", ".join(f"{name} {theirs[name]}" for name in other),
            expected=", ".join(f"{name} {ours[name]}" for name in other),
            where=f"distill.teacher {path}",
            fix="distil from a model with the same image size, channels and classes",
        )
    return checkpoint


def _inputs(info: ModelInfo) -> dict[str, object]:
    """Return what two networks must share to take the same inputs."""
    space = {"space": info.space.kind, "scale_factor": info.space.scale_factor}
    config = {name: getattr(info.config, name) for name in _SAME}
    return {**config, "image_size": info.image_size, **space}
