"""The reference backend: unpack one matrix, multiply in plain PyTorch. It defines what is correct.

    fp32   y = x @ (alpha * trits).T + bias
    bf16   the same, x rounded to bfloat16 (half to even)
    int8   u = rint(x * (1 / absmax * 127)),   step = absmax / 127,    absmax at least 1e-5
    int16  u = rint(x * (1 / absmax * 32512)), step = absmax / 32512
           y = (sum_k u * trits) * step * alpha + bias

The integer sums are exact and rounded to float32 once; every operation after them is rounded to
float32 in that order. Group scales: the groups' sums times their alphas, added in ascending order,
times step. A row that holds a NaN or an infinity gives NaN in all its outputs in int8 and int16.

Runs wherever PyTorch runs. At most one matrix is unpacked at a time; nothing is cached.
Shapes: N out features, K in features, G = ceil(K / 128) groups.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import ACTIVATION_FLOOR, scaled_sums, ternary_linear
from terdit_cli.pack.trits import t2_decode, t2_encode, t2_shape, t5_decode

# Precisions of the activations at run time: PRECISIONS in every backend, fp8 in gpu only.
Precision = Literal["fp32", "bf16", "int16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int16", "int8")

NAME = "reference"

INT16_LIMIT = 32512.0  # 127 * 256: u = 256 * high + low with both planes in int8


LARGEST_K = 1 << 38  # sums of int16 activations are exact in float64
FINER_ADALN: tuple[Precision, ...] = ("int8",)


class How(NamedTuple):
    """What runs a network: number of CPU threads, instruction set, and a description."""

    threads: int
    isa: str | None
    description: str


def auto_precision() -> Precision:
    """Return the precision for models that were not trained with int8 activations."""
    return "fp32"


def check_precision(precision: Precision, device: torch.device) -> None:
    """Accept every precision on every device."""


def network_class() -> type[DiT]:
    """Return the composable network."""
    return DiT


def weight_shape(rows: int, columns: int) -> tuple[int, ...]:
    """Return the shape of t2 bytes."""
    return t2_shape(rows, columns)


def from_t2(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return t2 bytes as they are."""
    return packed


def t5_to_t2(blob: Tensor, rows: int, columns: int) -> Tensor:
    """Repack a t5 blob, uint8 [t5_length(N, K)], as t2, uint8 [ceil(N/64), ceil(K/4), 64]."""
    return t2_encode(t5_decode(blob, rows, columns))


def condition_device(device: torch.device) -> torch.device:
    """Return the network's own device."""
    return device


def largest_batch(config: DiTConfig, device: torch.device, precision: Precision) -> int | None:
    """Return None: unknown."""
    return None


def how(device: torch.device) -> How:
    """Return torch's number of threads."""
    threads = torch.get_num_threads()
    return How(threads, None, f"threads {threads}")


def available(device: torch.device) -> str | None:
    """Return None: this backend needs nothing (others return why they cannot run)."""
    return None


def matmul(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    precision: Precision,
) -> Tensor:
    """Compute x [..., K] @ (alpha * trits).T + bias -> [..., N] from t2 bytes, in float32.

    Args:
        x: float [..., K]; the result has its dtype.
        packed: uint8 [ceil(N/64), ceil(K/4), 64], the t2 codec.
        alphas: float32 [1], [N] or [N, G].
        bias: float32 [N] or None.
        shape: (N, K).
        precision: of x; "fp32" and "int8" are those of training.

    Raises:
        ValueError: another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    trits = t2_decode(packed, *shape)
    values = x.float()
    if precision == "int16":
        y = _int16_linear(values, trits, alphas, bias)
    else:
        if precision == "bf16":
            values = values.bfloat16().float()
        activations: Literal["none", "int8"] = "int8" if precision == "int8" else "none"
        y = ternary_linear(values, trits.float(), alphas, bias, activations)
    return y.to(x.dtype)


def _int16_linear(x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the int16 product: sums below 32512 * K < 2^53 are exact in float64, in any order."""
    limit = x.abs().amax(dim=-1, keepdim=True).clamp_min(ACTIVATION_FLOOR)
    u = (x * (limit.reciprocal() * INT16_LIMIT)).round().double()
    step = limit / torch.full_like(limit, INT16_LIMIT)  # a division on CUDA too
    y = scaled_sums(u, step, trits.double(), alphas)
    return y if bias is None else y + bias
