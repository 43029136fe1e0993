"""The random numbers of training: a pure function of (seed, position in the stream of samples).

    key = first 128 bits of SHA-256("terdit train 1:<seed>"), counter = (0, 0, 0, p)
    sample p takes from Philox4x64-10: its timestep, whether its label is dropped, its noise and,
    where the VAE gives posteriors, the noise that samples the latents, in that order

Position p = step * global batch + place, as in `data/order.py`. So losses and gradients do not
depend on the number of processes, on micro-batches, or on where a run was resumed. A thread makes
the numbers of the next step during this one.

Shapes: B samples of this process's share of a step; latents [C, h, w].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from terdit_cli.data.order import batch_positions


class RandomNumbers(NamedTuple):
    """The random numbers of one step, on the CPU."""

    t: Tensor  # int64 [B], 0 <= t < timesteps
    dropped: Tensor  # bool [B]: the label becomes the null class
    noise: Tensor  # float32 [B, C, h, w], N(0, 1)
    encoding: Tensor | None  # float32 [B, C, h, w], N(0, 1); None for spaces without it

    def chunk(self, count: int) -> Iterable[RandomNumbers]:
        """Cut into `count` micro-batches."""
        none = [None] * count
        encoding = none if self.encoding is None else self.encoding.chunk(count)
        parts = (self.t.chunk(count), self.dropped.chunk(count), self.noise.chunk(count), encoding)
        return (RandomNumbers(*part) for part in zip(*parts, strict=True))


class RandomStream:
    """Makes the random numbers of a process's share of each step, one step ahead."""

    def __init__(
        self,
        seed: int,
        global_batch_size: int,
        place: tuple[int, int],
        latents: tuple[int, int, int],
        timestep: Callable[[float], int],
        dropout: float,
        encoding: bool,
    ) -> None:
        """Keep what the numbers depend on; `place` is (rank, number of processes)."""
        digest = hashlib.sha256(f"terdit train 1:{seed}".encode()).digest()
        self._key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
        self._global_batch_size = global_batch_size
        self._place = place
        self._latents = latents
        self._timestep = timestep
        self._dropout = dropout
        self._encoding = encoding
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="terdit-draws")
        self._ahead: tuple[int, Future[RandomNumbers]] | None = None

    def of_step(self, step: int) -> RandomNumbers:
        """Return the numbers of a step (0 is the first); the next are made in the background."""
        ready = self._ahead is not None and self._ahead[0] == step
        draws = self._ahead[1].result() if ready and self._ahead else self.draw(step)
        self._ahead = (step + 1, self._pool.submit(self.draw, step + 1))
        return draws

    def draw(self, step: int) -> RandomNumbers:
        """Return the numbers of a step."""
        positions = batch_positions(step, self._global_batch_size, *self._place)
        shape = (len(positions), 1 + self._encoding, *self._latents)
        t = np.empty(len(positions), dtype=np.int64)
        dropped = np.empty(len(positions), dtype=np.bool_)
        normals = np.empty(shape, dtype=np.float32)
        for row, position in enumerate(positions):
            counter = np.array([0, 0, 0, position], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
            which, chance = generator.random(2)
            t[row] = self._timestep(which)
            dropped[row] = chance < self._dropout
            generator.standard_normal(dtype=np.float32, out=normals[row])
        noises = torch.from_numpy(normals)
        encoding = noises[:, 1] if self._encoding else None
        return RandomNumbers(torch.from_numpy(t), torch.from_numpy(dropped), noises[:, 0], encoding)
