"""Noise that belongs to an image: a pure function of (seed, image index, draw).

    key  = first 128 bits of SHA-256("terdit noise 1:<seed>:<index>:<draw>")
    bits = Philox4x64-10 with that key, counter from 1
    z    = sqrt(-2 ln u1) (cos, sin)(2 pi u2)             (Box-Muller, float64 -> float32)

So an image does not depend on the batch it is generated in, on the number of workers, or on which
other images or earlier draws were asked for, and every device gets the same numbers, made on the
CPU. torch.Generator would not do: its CPU engine keeps 32 bits of the seed, and a run of 50,000
images with 250 draws each would repeat thousands of them. Philox's bits are fixed by its paper
(Salmon et al. 2011), while the normals of torch and numpy may change with a release.

Shapes: B images, C channels, H, W pixels or latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from terdit_cli.errors import UsageError


class ImageNoise:
    """The initial noise and that of every step for the images of one batch."""

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ) -> None:
        """Keep what the draws depend on: a seed and image indices >= 0, and (C, H, W).

        Raises UsageError for a negative seed.
        """
        if seed < 0:
            raise UsageError(
                "the seed must not be negative",
                got=seed,
                expected="an integer from 0 up",
                where="--seed",
                fix="--seed 0",
            )
        if any(index < 0 for index in indices):
            raise ValueError(f"negative image index in {list(indices)}")
        self.seed, self.indices, self.shape, self.device = seed, tuple(indices), shape, device

    def initial(self) -> Tensor:
        """Return the noise that sampling starts from: [B, C, H, W] float32."""
        return self._draw("initial")

    def __call__(self, k: int) -> Tensor:
        """Return the draw of sampling step k (0 = the first, noisiest): [B, C, H, W] float32."""
        if k < 0:
            raise ValueError(f"negative sampling step {k}")
        return self._draw(str(k))

    def _draw(self, draw: str) -> Tensor:
        rows = np.empty((len(self.indices), math.prod(self.shape)), dtype=np.float32)
        for row, index in zip(rows, self.indices, strict=True):
            row[:] = unit_normals(f"terdit noise 1:{self.seed}:{index}:{draw}", rows.shape[1])
        return torch.from_numpy(rows).reshape(len(self.indices), *self.shape).to(self.device)


def unit_normals(key: str, count: int) -> np.ndarray:
    """Return `count` independent N(0, 1) numbers, float64 [count], the same for the same key."""
    digest = hashlib.sha256(key.encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    pairs = -(-count // 2)
    raw = bits.random_raw(2 * pairs).reshape(2, pairs) >> np.uint64(11)  # 53 bits, exact in float64
    radius = np.sqrt(-2.0 * np.log((raw[0] + np.uint64(1)) * 2.0**-53))  # u1 in (0, 1]: log finite
    angle = (2.0 * np.pi * 2.0**-53) * raw[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
