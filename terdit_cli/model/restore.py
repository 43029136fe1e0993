"""Networks built without values, then given a checkpoint's tensors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from terdit_cli.errors import InputFileError
from terdit_cli.model import mapped
from terdit_cli.model.ckpt import Checkpoint
from terdit_cli.model.dit import DiT, DiTConfig, LinearFactory


def empty_network(config: DiTConfig, linear: LinearFactory, kind: type[DiT] = DiT) -> DiT:
    """Return a network without values, on the meta device, for a state dict to be assigned to."""
    with torch.device("meta"), _NothingToFill():
        return kind(config, linear)


def restore_network(
    checkpoint: Checkpoint, device: torch.device, weights: Literal["ema", "raw"] = "ema"
) -> DiT:
    """Return the trained network of a checkpoint, float32 master weights, frozen, eval mode.

    On the CPU its tensors stay mapped from a local file.

    Raises:
        InputFileError: the tensors do not match the checkpoint's own configuration; in a forward
            pass: the file was changed in place.
    """
    network = empty_network(checkpoint.info.config, checkpoint.info.ternary.linear())
    state = {key: value.float() for key, value in checkpoint.state_dict(weights).items()}
    try:
        if device.type == "cpu":
            mapped.keep(network, state, checkpoint.path)
        else:
            network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputFileError(
            "the checkpoint does not fit its own configuration",
            got=" ".join(str(error).split())[:400],
            where=checkpoint.path,
            fix="copy it again",
        ) from error
    return network.to(device).eval().requires_grad_(False)


class _NothingToFill(TorchFunctionMode):
    """Skip normal initial values: on the meta device, where there is nothing to fill, they import
    torch._dynamo, which takes 70 MB and more than a second.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **kwargs)
