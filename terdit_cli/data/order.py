"""Which images a step sees: a pure function of (seed, step), with nothing to save or restore.

The endless stream of samples has positions p = 0, 1, 2, ...: step s takes the positions
s*G .. s*G + G - 1 (G the global batch size), rank r of W every W-th of them from r on. Position p
shows image permutation(seed, p // n)[p mod n] of n images. So each epoch shows each image exactly
once, also where a batch crosses the border of two epochs, and the union over the ranks does not
depend on their number.

Every generator is seeded with the first 63 bits of SHA-256 over the text "purpose:seed:counter".
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.errors import UsageError


def stream_seed(purpose: str, seed: int, counter: int) -> int:
    """Return the generator seed, 0 <= s < 2**63, for one use of randomness."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{counter}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batch_positions(
    step: int, global_batch_size: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return the stream positions int64 [G / W] of one rank's share of a step.

    Raises:
        UsageError: the global batch does not divide evenly over the ranks.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UsageError(
            "the global batch does not divide over the processes",
            got=f"global_batch_size {global_batch_size} for {world_size} processes",
            expected=f"a positive multiple of {world_size}",
            fix=f"set global_batch_size to {max(1, global_batch_size // world_size) * world_size}",
        )
    if not 0 <= rank < world_size or step < 0:
        raise ValueError(f"rank {rank} of {world_size}, step {step}")
    first = step * global_batch_size
    return np.arange(first + rank, first + global_batch_size, world_size, dtype=np.int64)


@lru_cache(maxsize=2)  # a batch can cross one border of epochs
def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the read-only order int64 [n] in which an epoch shows n images."""
    generator = torch.Generator().manual_seed(stream_seed("order", seed, epoch))
    order = torch.randperm(n, generator=generator).numpy()
    order.flags.writeable = False
    return order


def batch_indices(
    n: int, seed: int, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Return the image indices int64 [G / W] of one rank's share of a step, 0 <= i < n.

    Raises:
        UsageError: the global batch does not divide evenly over the ranks.
    """
    if n < 1:
        raise ValueError(f"{n} images")
    positions = batch_positions(step, global_batch_size, rank, world_size)
    epochs, offsets = np.divmod(positions, n)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permutation(n, seed, int(epoch))[offsets[here]]
    return indices


def flip_mask(
    seed: int,
    step: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    probability: float = 0.5,
) -> NDArray[np.bool_]:
    """Return bool [G / W]: which of one rank's images of a step are mirrored left to right.

    Raises:
        UsageError: the global batch does not divide evenly over the ranks.
    """
    positions = batch_positions(step, global_batch_size, rank, world_size)
    generator = torch.Generator().manual_seed(stream_seed("flip", seed, step))
    chances = torch.rand(global_batch_size, generator=generator).numpy()
    return chances[positions - step * global_batch_size] < probability
