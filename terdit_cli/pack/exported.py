"""An exported model: trits, alphas and other tensors, one tensor at a time.

Every format that can be sampled from or packed offers this view, so that `pack` and `load_model`
need not know formats, and a 4.2b model is converted with one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from terdit_cli.errors import InputFileError
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.layout import matrix_names
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.model.restore import empty_network
from terdit_cli.model.ternary import TernaryConfig


class ExportedModel(AbstractContextManager["ExportedModel"], Protocol):
    """A ternary model in some file; use as a context manager."""

    info: ModelInfo
    path: Path | None  # the file that the tensors are mapped from, if any

    def ternary_names(self) -> list[str]:
        """Return the module paths of the ternary matrices ("layers.0.attention.wq", ...)."""
        ...

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Return (N, K) of a ternary matrix without loading it."""
        ...

    def trits(self, name: str) -> Tensor:
        """Return the trits of a matrix, int8 [N, K]."""
        ...

    def alphas(self, name: str) -> Tensor:
        """Return the scales of a matrix, float32 [1], [N] or [N, G]."""
        ...

    def rest_names(self) -> list[str]:
        """Return the state dict keys of all other tensors."""
        ...

    def rest(self, name: str) -> Tensor:
        """Return one of the other tensors in its stored dtype."""
        ...


def count_weights(model: ExportedModel) -> int:
    """Return the number of ternary weights."""
    shapes = (model.matrix_shape(name) for name in model.ternary_names())
    return sum(rows * columns for rows, columns in shapes)


def check_fit(
    config: DiTConfig,
    ternary: TernaryConfig,
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
    fix: str,
) -> None:
    """Check the tensors of a file against the network that it declares.

    Args:
        shapes: of all tensors, by state dict name; for matrices, that of their trits.

    Raises:
        InputFileError: a missing tensor, an additional one, or one of another shape.
    """
    network = empty_network(config, ternary.linear())
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    for key in sorted({*expected, *shapes}):
        if shapes.get(key) != expected.get(key):
            raise InputFileError(
                "the weights do not match the model's own configuration",
                got=f"{key} of shape {list(shapes[key])}" if key in shapes else f"no {key}",
                expected=f"shape {list(expected[key])}" if key in expected else "no such tensor",
                where=where,
                fix=fix,
            )


class StateDictModel(ExportedModel):
    """Common base of formats with a flat state dict; `_state` is mapped, not read."""

    _state: dict[str, Tensor]
    _where: Path

    def __exit__(self, *error: object) -> None:
        return None

    def ternary_names(self) -> list[str]:
        return matrix_names(self.info.config)

    def rest_names(self) -> list[str]:
        names = self.ternary_names()
        ternary = {f"{name}.{part}" for name in names for part in ("weight", "alphas")}
        return [key for key in self._state if key not in ternary]

    def rest(self, name: str) -> Tensor:
        return self._finite(name)

    def _finite(self, key: str) -> Tensor:
        """Return a tensor; InputFileError if a value is infinite or not a number.

        Such a master weight would silently become zeros. Checked in float32, in which it is used:
        float64 has numbers that are infinite there.
        """
        tensor = self._state[key]
        if not tensor.float().isfinite().all():
            raise InputFileError(
                "the model holds values that are not finite",
                got=key,
                where=self._where,
                fix="use an earlier checkpoint: this training has diverged",
            )
        return tensor
