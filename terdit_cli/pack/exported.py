"""An exported model: trits, alphas and the rest, one tensor at a time.

Every format that can be sampled from or packed gives this view, so that `pack` and `load_model`
know no formats, and a 4.2b model is converted with one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from terdit_cli.model.info import ModelInfo


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


def tensors(model: ExportedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the state dict of the ternarized form: `.trits`, `.alphas`, then the rest."""
    for name in model.ternary_names():
        yield f"{name}.trits", model.trits(name)
        yield f"{name}.alphas", model.alphas(name)
    for name in model.rest_names():
        yield name, model.rest(name)
