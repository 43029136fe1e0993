"""The ordered list of backends, and the choice among them with its reasons.

A backend is a module with everything specific to it: see `Backend`. `auto` takes the first that
is available. A backend that the user names and that is not available is an error, never a silent
fallback. A new backend is one file and one entry of `BACKENDS`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, UsageError, did_you_mean
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import Activations
from terdit_cli.runtime import cpu, reference
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.reference import How, Precision


class Backend(Protocol):
    """One way to run a network of packed trits."""

    NAME: str
    PRECISIONS: tuple[Precision, ...]
    LARGEST_K: int  # inputs of a matrix, at most
    # Activations whose adaLN projections run in int16: one row per image, which scales all tokens.
    FINER_ADALN: tuple[Precision, ...]

    def auto_precision(self) -> Precision:
        """Return the precision for models that were not trained with int8 activations."""

    def available(self, device: torch.device) -> str | None:
        """Return the reason why this backend cannot run on a device, or None."""

    def check_precision(self, precision: Precision, device: torch.device) -> None:
        """Raise EnvironmentProblem if a device does not support a precision."""

    def network_class(self) -> type[DiT]:
        """Return the class that runs a network of `PackedTernaryLinear`."""

    def weight_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape in which a matrix [rows, columns] is kept, uint8."""

    def from_t2(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Return the bytes of a matrix as they are kept, from the codec t2 on the same device."""

    def t5_to_t2(self, blob: Tensor, rows: int, columns: int) -> Tensor:
        """Return the t2 bytes of a matrix stored by the codec t5."""

    def condition_device(self, device: torch.device) -> torch.device:
        """Return the device for y and t."""

    def largest_batch(
        self, config: DiTConfig, device: torch.device, precision: Precision
    ) -> int | None:
        """Return how many rows of a batch fit in the free memory; None: unknown."""

    def how(self, device: torch.device) -> How:
        """Return a description of what runs on a device."""

    def matmul(
        self,
        x: Tensor,
        packed: Tensor,
        alphas: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        precision: Precision,
    ) -> Tensor: ...


BACKENDS: tuple[Backend, ...] = (gpu, cpu, reference)


def backend_named(name: str) -> Backend | None:
    """Return the backend of that name, None where there is none."""
    return next((backend for backend in BACKENDS if name == backend.NAME), None)


@dataclass(frozen=True)
class Choice:
    """The chosen backend and the reason, for a line on stderr."""

    backend: Backend
    reason: str


def choose_backend(name: str, device: torch.device) -> Choice:
    """Choose a backend: `name` is "auto" or a backend; $TERDIT_BACKEND stands in for "auto".

    Raises:
        UsageError: an unknown name.
        EnvironmentProblem: a named backend that cannot run here, with the reason.
    """
    variable = os.environ.get("TERDIT_BACKEND") if name == "auto" else None
    name = variable or name
    named = backend_named(name)
    if named is None and name != "auto":
        known = ["auto", *(backend.NAME for backend in BACKENDS)]
        raise UsageError(
            "unknown backend",
            got=repr(name) + did_you_mean(name, known),
            expected="one of " + ", ".join(known),
            where="TERDIT_BACKEND" if variable else None,
            fix="unset TERDIT_BACKEND" if variable else "--backend auto",
        )
    if named is not None and (reason := named.available(device)) is not None:
        elsewhere = [
            f"--device {kind}"
            for kind in ("cuda", "cpu")
            if kind != device.type and named.available(torch.device(kind)) is None
        ]
        auto = "unset TERDIT_BACKEND" if variable else "use --backend auto"
        raise EnvironmentProblem(
            f"backend {name!r} cannot run",
            got=reason,
            where=f"device {device}" + (", TERDIT_BACKEND" if variable else ""),
            fix=" or ".join([auto, *elsewhere]),
        )
    if named is not None:
        return Choice(named, f"backend {name} (as asked)")
    reasons = {backend.NAME: backend.available(device) for backend in BACKENDS}
    usable = next(backend for backend in BACKENDS if reasons[backend.NAME] is None)
    why = "; ".join(f"not {key}: {reason}" for key, reason in reasons.items() if reason)
    return Choice(usable, f"backend {usable.NAME}" + (f" ({why})" if why else ""))


def resolve_activations(requested: str, trained: Activations, backend: Backend) -> Precision:
    """Return the precision of the activations: `requested` is "auto" or a precision.

    A model trained with int8 activations runs in int8 only.

    Raises:
        UsageError: an unknown name, a precision that the backend lacks, or other activations than
            those trained with.
    """
    known = ["auto", *dict.fromkeys(name for each in BACKENDS for name in each.PRECISIONS)]
    if requested not in known:
        raise UsageError(
            "unknown activations",
            got=repr(requested) + did_you_mean(requested, known),
            expected="one of " + ", ".join(known),
            fix="set --activations",
        )
    if trained == "int8" and requested not in ("auto", "int8"):
        raise UsageError(
            "this model was trained with int8 activations and needs them",
            got=f"--activations {requested}",
            expected="auto or int8",
            fix="--activations auto",
        )
    if trained == "int8":
        return "int8"
    if requested == "auto":
        return backend.auto_precision()
    for precision in backend.PRECISIONS:
        if precision == requested:
            return precision
    raise UsageError(
        f"the {backend.NAME} backend has no {requested} activations",
        got=f"--activations {requested}",
        expected="auto, " + ", ".join(backend.PRECISIONS),
        fix="--activations auto",
    )
