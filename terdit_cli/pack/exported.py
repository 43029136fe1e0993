"""An exported model: trits, alphas and the rest, one tensor at a time.

Every format that can be sampled from or packed gives this view, so that `pack` and `load_model`
know no formats, and a 4.2b model is converted with one tensor in memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from torch import Tensor

from terdit_cli.model.info import ModelInfo

# The eight large matrices of a block, as in upstream's state dict.
MATRICES = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "adaLN_modulation.1",
)


def matrix_names(n_layers: int) -> list[str]:
    """Return the module paths of all ternary matrices of a network."""
    return [f"layers.{index}.{name}" for index in range(n_layers) for name in MATRICES]


class ExportedModel(AbstractContextManager["ExportedModel"], Protocol):
    """A ternary model in some file; use as a context manager."""

    info: ModelInfo

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


class StateDictModel(ExportedModel):
    """The part that formats with a flat state dict share; `_state` is mapped, not read."""

    _state: dict[str, Tensor]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def ternary_names(self) -> list[str]:
        return matrix_names(self.info.config.n_layers)

    def rest_names(self) -> list[str]:
        names = self.ternary_names()
        ternary = {f"{name}.{part}" for name in names for part in ("weight", "alphas")}
        return [key for key in self._state if key not in ternary]

    def rest(self, name: str) -> Tensor:
        return self._state[name]
