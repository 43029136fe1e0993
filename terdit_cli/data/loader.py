"""Batches of training images in the order of `order.py`, decoded ahead of their use.

Images that lie in memory are gathered when asked for. Others are decoded by threads (Pillow
releases the interpreter's lock) while the two batches before them are in use. Either way batch
`step` is the same for any number of workers and any starting step.

Shapes: B images of this rank's share of a global batch, S pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.images import ImageSource
from terdit_cli.data.order import batch_indices, batch_positions, flip_mask

PREFETCH = 2  # batches decoded ahead

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchLoader:
    """One rank's batches: images uint8 [B, S, S, 3] and labels int64 [B].

    Use it as a context manager: leaving it stops the decoding threads. An unreadable image
    raises InputFileError in the consumer when its batch comes up.
    """

    def __init__(
        self,
        source: ImageSource,
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
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="terdit-images")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the decoding threads; images not yet begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step (0 is the first)."""
        return self._finish(step, self._start(step))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `start_step`, `start_step` + 1, ... without end."""
        ahead: deque[tuple[int, list[Future[NDArray[np.uint8]]]]] = deque()
        try:
            step = start_step
            while True:
                while len(ahead) <= PREFETCH:
                    ahead.append((step, self._start(step)))
                    step += 1
                yield self._finish(*ahead.popleft())
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def _indices(self, step: int) -> NDArray[np.int64]:
        return batch_indices(
            len(self.source), self.seed, step, self.global_batch_size, self.rank, self.world_size
        )

    def _start(self, step: int) -> list[Future[NDArray[np.uint8]]]:
        """Begin to decode a step's images; nothing to do when they lie in memory."""
        if self.source.images is not None:
            return []
        return [self._pool.submit(self.source.read, int(i)) for i in self._indices(step)]

    def _finish(self, step: int, futures: list[Future[NDArray[np.uint8]]]) -> Batch:
        indices = self._indices(step)
        if self.source.images is not None:
            images = self.source.images[indices]
        else:
            images = np.stack([future.result() for future in futures])
        if self.flip:
            mask = flip_mask(self.seed, step, self.global_batch_size, self.rank, self.world_size)
            images[mask] = images[mask, :, ::-1]
        return torch.from_numpy(images), torch.from_numpy(self.source.labels[indices])
