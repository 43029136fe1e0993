"""The reference backend: unpack one matrix, multiply in plain PyTorch. The definition of correct.

Runs wherever PyTorch runs. At most one matrix is unpacked at a time; nothing is cached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from terdit_cli.model.ternary import Activations, ternary_linear
from terdit_cli.pack.trits import t2_decode

NAME = "reference"


def available(device: torch.device) -> str | None:
    """Return None: there is nothing this backend needs (else: the reason why it cannot run)."""
    return None


def matmul(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activations: Activations,
) -> Tensor:
    """Compute x [..., K] @ (alpha * trits).T + bias -> [..., N] from t2 bytes.

    Args:
        x: float [..., K].
        packed: uint8 [ceil(N/64), ceil(K/4), 64], the t2 codec.
        alphas: float32 [1], [N] or [N, ceil(K/128)].
        bias: float [N] or None.
        shape: (N, K).
        activations: "int8" quantises x per token as training did.
    """
    trits = t2_decode(packed, *shape).to(x.dtype)
    return ternary_linear(x, trits, alphas.to(x.dtype), bias, activations)
