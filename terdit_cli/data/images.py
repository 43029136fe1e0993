"""Labelled training images of one size.

A set that fits in memory is decoded once, in threads, which also finds every unreadable image
before the first step; a larger one is read image by image.

Shapes: N images of S x S pixels, uint8 [S, S, 3].
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.image_set import ImageSet
from terdit_cli.data.image_sources import open_labelled
from terdit_cli.errors import InputFileError, UsageError

MEMORY_LIMIT = 1 << 30  # bytes of decoded pixels up to which a set is kept in memory

BadImagePolicy = Literal["error", "skip"]
Progress = Callable[[int, int], None]


class TrainingImages(ABC):
    """N labelled images of one size.

    `labels` is int64 [N], `class_names` names the labels, `images` is uint8 [N, S, S, 3] when the
    set lies in memory, `skipped` lists the unreadable images left out so far, and `notes` what
    else the user should know.
    """

    def __init__(
        self,
        class_names: list[str],
        labels: NDArray[np.int64],
        image_size: int,
        notes: Sequence[str] = (),
    ) -> None:
        self.class_names = class_names
        self.labels = labels
        self.image_size = image_size
        self.images: NDArray[np.uint8] | None = None
        self.skipped: list[str] = []
        self.notes = notes

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> NDArray[np.uint8]:
        """Return image `index` as uint8 [S, S, 3]; safe to call from several threads."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call image `index` in a message."""

    @property
    def rows_a_task(self) -> int:
        """How many rows of a batch one thread should fill at once."""
        return 1 if self.images is None else 1 << 16

    def allocate(self, count: int) -> torch.Tensor:
        """Return room for a batch: uint8 [count, S, S, 3]."""
        return torch.empty((count, self.image_size, self.image_size, 3), dtype=torch.uint8)

    def fill(
        self, out: torch.Tensor, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> None:
        """Fill rows of a batch with images, some of them mirrored left to right."""
        rows = out.numpy()
        if self.images is not None:
            np.take(self.images, indices, axis=0, out=rows)
            rows[mirrored] = rows[mirrored, :, ::-1]
            return
        for row, index, mirror in zip(rows, indices.tolist(), mirrored.tolist(), strict=True):
            image = self.read(index)
            row[:] = image[:, ::-1] if mirror else image


def open_images(
    source: str,
    path: Path | None,
    image_size: int,
    on_bad_image: BadImagePolicy = "error",
    split: str | None = None,
    on_progress: Progress | None = None,
) -> TrainingImages:
    """Open a set of labelled images, cropped and resized to `image_size` pixels.

    Args:
        source, path, split: which; see `image_sources.open_labelled`.
        on_bad_image: stop at unreadable images, or leave them out.
        on_progress: called with (images done, images in all) while a set is decoded.

    Raises:
        UsageError: an unknown source, split or policy, a missing or a superfluous path.
        InputFileError: missing, empty or corrupt data; unreadable images, counted and named.
    """
    _check(image_size, on_bad_image)
    images = open_labelled(source, path, split)
    if len(images) * image_size * image_size * 3 <= MEMORY_LIMIT:
        return _MemoryImages(images, image_size, on_bad_image, on_progress)
    if images.sequential:
        raise InputFileError(
            "too many images in a compressed file to be read in any order",
            got=f"{len(images)} of {image_size} pixels",
            expected=f"at most {MEMORY_LIMIT >> 20} MiB of pixels",
            where=path,
            fix="save them with numpy.savez, uncompressed",
        )
    return _LazyImages(images, image_size, on_bad_image)


class _MemoryImages(TrainingImages):
    """All images decoded at the start into one array."""

    def __init__(
        self,
        source: ImageSet,
        image_size: int,
        on_bad_image: BadImagePolicy,
        on_progress: Progress | None,
    ) -> None:
        super().__init__(source.class_names, source.labels, image_size, source.notes)
        count = len(source)
        pixels = np.empty((count, image_size, image_size, 3), dtype=np.uint8)

        def decode(chunk: range) -> list[tuple[int, str]]:
            bad = []
            for index in chunk:
                try:
                    pixels[index] = source.cropped(index, image_size)
                except InputFileError as error:
                    bad.append((index, error.problem))
            return bad

        # The first images tell what one costs: for tiny ones threads lose more time over the
        # interpreter's lock than they win.
        bad: dict[int, str] = {}
        costs = []
        done = min(64, count)
        for index in range(done):
            began = time.perf_counter()
            bad.update(decode(range(index, index + 1)))
            costs.append(time.perf_counter() - began)
        is_slow = sorted(costs)[done // 2] > 0.5e-3 and not source.sequential  # seconds
        chunks = [range(start, min(start + 64, count)) for start in range(done, count, 64)]
        with ThreadPoolExecutor((os.cpu_count() or 1) if is_slow else 1) as pool:
            futures = {pool.submit(decode, chunk): len(chunk) for chunk in chunks}
            try:
                for future in as_completed(futures):
                    if on_progress is not None:
                        on_progress(done, count)
                    bad.update(future.result())
                    done += futures[future]
            except BaseException:  # Ctrl-C: do not decode the rest first
                pool.shutdown(cancel_futures=True)
                raise
        if on_progress is not None:
            on_progress(done, count)
        self._names = source.names
        self._kept = np.arange(count)
        if bad:
            if on_bad_image == "error" or len(bad) == count:
                raise _too_many_bad(bad, source)
            self.skipped = [source.names[index] for index in sorted(bad)]
            self._kept = np.setdiff1d(self._kept, list(bad))
            pixels, self.labels = pixels[self._kept], source.labels[self._kept]
        self.images = pixels
        self._pixels = pixels

    def read(self, index: int) -> NDArray[np.uint8]:
        return self._pixels[index]

    def name(self, index: int) -> str:
        return self._names[int(self._kept[index])]


class _LazyImages(TrainingImages):
    """Images decoded when asked for.

    An unreadable image is replaced by the next readable one of its class (in the order of the
    listing, from the last to the first), so that labels stay true and every run, worker count
    and rank sees the same images.
    """

    def __init__(self, source: ImageSet, image_size: int, on_bad_image: BadImagePolicy) -> None:
        super().__init__(source.class_names, source.labels, image_size, source.notes)
        self._source = source
        self._on_bad_image = on_bad_image
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def read(self, index: int) -> NDArray[np.uint8]:
        try:
            return self._decode(index)
        except InputFileError as error:
            if self._on_bad_image == "error":
                raise
            first_error = error
        self._record(index)
        same_class = np.flatnonzero(self.labels == self.labels[index])
        start = int(np.searchsorted(same_class, index))
        for other in map(int, np.roll(same_class, -start)[1:]):
            try:
                return self._decode(other)
            except InputFileError:
                self._record(other)
        class_name = self.class_names[int(self.labels[index])]
        raise InputFileError(
            f"class {class_name!r} has no readable image",
            got=str(first_error),
            where=self._source.where,
            fix="repair the images or remove the class",
        )

    def _decode(self, index: int) -> NDArray[np.uint8]:
        return self._source.cropped(index, self.image_size)

    def _record(self, index: int) -> None:
        with self._lock:
            if index not in self._bad:
                self._bad.add(index)
                self.skipped.append(self._source.names[index])

    def name(self, index: int) -> str:
        return self._source.names[index]


def _check(image_size: int, on_bad_image: str) -> None:
    if on_bad_image not in ("error", "skip"):
        raise UsageError(
            "unknown policy for unreadable images",
            got=repr(on_bad_image),
            expected="error or skip",
            where="data.on_bad_image",
        )
    if image_size < 1:
        raise UsageError("bad image size", got=image_size, expected="at least 1 pixel")


def _too_many_bad(bad: dict[int, str], source: ImageSet) -> InputFileError:
    count = len(source)
    order = sorted(bad)
    more = f", and {len(bad) - 10} more" if len(bad) > 10 else ""
    return InputFileError(
        f"{len(bad)} of {count} images unreadable",
        got=", ".join(source.names[index] for index in order[:10])
        + more
        + f"; the first: {bad[order[0]]}",
        where=source.where,
        fix="repair or remove them"
        + (", or leave them out with data.on_bad_image=skip" if len(bad) < count else ""),
    )
