"""Batches of training data in the order of `order.py`, gathered ahead of their use.

Threads fill the two batches after the one in use: they decode images (Pillow releases the
interpreter's lock) or copy rows of mapped latents. Batch `step` is the same for any number of
threads and any starting step.

Shapes: B rows, this rank's share of a global batch; a row is an image uint8 [S, S, 3] or the
moments bfloat16 [2C, h, w] of one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.order import batch_indices, batch_positions, flip_mask

PREFETCH = 2  # batches filled ahead

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchSource(Protocol):
    """N labelled training images, in whatever form the space they go to encodes."""

    class_names: list[str]
    labels: NDArray[np.int64]
    skipped: list[str]  # unreadable images left out so far

    def __len__(self) -> int: ...

    @property
    def rows_a_task(self) -> int:
        """How many rows of a batch one thread should fill at once."""

    def allocate(self, count: int) -> torch.Tensor:
        """Return room for `count` rows."""

    def fill(
        self, out: torch.Tensor, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> None:
        """Fill rows with images by number, some mirrored; called from several threads."""


class _Pending(NamedTuple):
    rows: torch.Tensor
    labels: torch.Tensor
    tasks: list[Future[None]]


class BatchLoader:
    """One rank's batches: rows [B, ...] and labels int64 [B].

    Use it as a context manager: leaving it stops the threads. An unreadable image or a damaged
    shard raises InputFileError in the consumer when its batch comes up.
    """

    def __init__(
        self,
        source: BatchSource,
        seed: int,
        global_batch_size: int,
        flip: bool,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
    ) -> None:
        batch_positions(0, global_batch_size, rank, world_size)  # refuse a bad split at the start
        self.source = source
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.flip = flip
        self.rank = rank
        self.world_size = world_size
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="terdit-data")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; rows not yet begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step (0 is the first)."""
        return _finish(self._start(step))

    def iterate(self, start_step: int = 0, end_step: int | None = None) -> Iterator[Batch]:
        """Yield the batches of `start_step`, `start_step` + 1, ... up to `end_step` (without it).

        No image of a later batch is touched: what is wrong with it is no reason to stop.
        """
        ahead: deque[_Pending] = deque()
        try:
            steps = itertools.count(start_step) if end_step is None else range(start_step, end_step)
            for step in steps:
                ahead.append(self._start(step))
                if len(ahead) > PREFETCH:
                    yield _finish(ahead.popleft())
            while ahead:
                yield _finish(ahead.popleft())
        finally:
            for pending in ahead:
                for task in pending.tasks:
                    task.cancel()

    def _start(self, step: int) -> _Pending:
        """Begin to fill the batch of a step."""
        place = (step, self.global_batch_size, self.rank, self.world_size)
        indices = batch_indices(len(self.source), self.seed, *place)
        if self.flip:
            mirrored = flip_mask(self.seed, *place)
        else:
            mirrored = np.zeros(len(indices), dtype=np.bool_)
        rows = self.source.allocate(len(indices))
        stride = self.source.rows_a_task
        parts = [slice(first, first + stride) for first in range(0, len(indices), stride)]
        tasks = [
            self._pool.submit(self.source.fill, rows[part], indices[part], mirrored[part])
            for part in parts
        ]
        return _Pending(rows, torch.from_numpy(self.source.labels[indices]), tasks)


def _finish(pending: _Pending) -> Batch:
    for task in pending.tasks:
        task.result()
    return pending.rows, pending.labels
