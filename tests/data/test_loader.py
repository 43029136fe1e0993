"""Batches: the same for any worker count and start, flips, errors and shutdown."""

from __future__ import annotations

import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from terdit_cli.data.images import TrainingImages
from terdit_cli.data.loader import PREFETCH, BatchLoader
from terdit_cli.data.order import batch_indices, flip_mask
from terdit_cli.errors import InputFileError, UsageError


class Made(TrainingImages):
    """37 made-up images, in memory or decoded slowly in a different order than asked for."""

    def __init__(self, in_memory: bool, bad: int | None = None) -> None:
        count, size = 37, 4
        super().__init__(["even", "odd"], np.arange(count) % 2, size)
        shape = (count, size, size, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.images = self.pixels if in_memory else None
        self.bad = bad
        self.reads: list[int] = []

    def read(self, index: int) -> np.ndarray:
        self.reads.append(index)
        if index == self.bad:
            raise InputFileError("unreadable image", where=self.name(index))
        time.sleep(0.0003 * (index % 3))
        return self.pixels[index]

    def name(self, index: int) -> str:
        return f"image {index}"


def take(loader: BatchLoader, start: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with loader:
        return list(islice(loader.iterate(start), count))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_batches_follow_the_order(in_memory: bool, flip: bool) -> None:
    source = Made(in_memory)
    before = source.pixels.copy()
    batches = take(BatchLoader(source, 5, 8, flip), 0, 10)
    for step, (images, labels) in enumerate(batches):
        indices = batch_indices(37, 5, step, 8)
        expected = before[indices]
        if flip:
            mask = flip_mask(5, step, 8)
            expected[mask] = expected[mask][:, :, ::-1]
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), expected)
        assert labels.tolist() == (indices % 2).tolist()
    assert np.array_equal(source.pixels, before)  # flipping must not touch the source


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_any_worker_count_and_start(in_memory: bool, workers: int) -> None:
    reference = take(BatchLoader(Made(True), 1, 6, True), 0, 12)
    resumed = take(BatchLoader(Made(in_memory), 1, 6, True, workers=workers), 7, 5)
    for (images, labels), (others, other_labels) in zip(reference[7:], resumed, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    with BatchLoader(Made(in_memory), 1, 6, True, workers=workers) as loader:
        assert torch.equal(loader.batch(9)[0], reference[9][0])


def test_ranks_together_are_the_global_batch() -> None:
    whole, labels = BatchLoader(Made(True), 1, 12, True).batch(4)
    for rank in range(3):
        with BatchLoader(Made(False), 1, 12, True, rank, 3) as loader:
            images, own = loader.batch(4)
        assert torch.equal(images, whole[rank::3])
        assert torch.equal(own, labels[rank::3])


def test_error_comes_up_with_its_batch() -> None:
    order = [batch_indices(37, 0, step, 4) for step in range(9)]
    source = Made(False, bad=int(order[3][1]))
    with BatchLoader(source, 0, 4, False) as loader:
        stream = loader.iterate()
        for _ in range(3):
            next(stream)
        with pytest.raises(InputFileError, match=f"image {source.bad}"):
            next(stream)


def test_nothing_of_later_batches_is_read() -> None:
    order = [batch_indices(37, 0, step, 4) for step in range(6)]
    earlier = {int(index) for batch in order[:5] for index in batch}
    source = Made(False, bad=next(int(index) for index in order[5] if int(index) not in earlier))
    with BatchLoader(source, 0, 4, False) as loader:
        assert len(list(loader.iterate(1, 5))) == 4
        assert not list(loader.iterate(5, 5))
        assert source.bad not in source.reads
        with pytest.raises(InputFileError, match=f"image {source.bad}"):
            list(loader.iterate(1, 6))


def test_prefetch_is_bounded_and_threads_end() -> None:
    threads = threading.active_count()
    source = Made(False)
    with BatchLoader(source, 0, 4, False, workers=3) as loader:
        stream = loader.iterate()
        next(stream)
        deadline = time.monotonic() + 5
        while len(source.reads) < 4 * (1 + PREFETCH) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert len(source.reads) == 4 * (1 + PREFETCH)
    assert threading.active_count() == threads


def test_leaving_drops_what_has_not_begun() -> None:
    source = Made(False)
    with BatchLoader(source, 0, 2000, False, workers=1) as loader:
        loader.iterate()
        stream = loader.iterate()
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(source.reads) < 2 * 2000


def test_batch_that_does_not_divide_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="global_batch_size 10 for 3 processes"):
        BatchLoader(Made(True), 0, 10, False, 0, 3)
