"""Labelled training images of one size, from seven kinds of sources.

Every source is first listed (names, labels, how to open one image), then wrapped: a set that
fits in memory is decoded once, in threads, which also finds every unreadable image before the
first step; a larger one is read image by image.

Shapes: N images of S x S pixels, uint8 [S, S, 3].
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.decode import to_pixels
from terdit_cli.data.idx import FASHION_CLASSES, embedded_arrays, fashion_arrays
from terdit_cli.data.listing import (
    Listing,
    list_arrays,
    list_cifar10,
    list_folder,
    list_tars,
    list_zip,
)
from terdit_cli.data.parquet import list_parquet
from terdit_cli.errors import InputFileError, UsageError, did_you_mean

SOURCES = ("embedded", "folder", "zip", "tars", "parquet", "cifar10", "fashion-mnist")
SPLITS = ("train", "heldout", "all")
MEMORY_LIMIT = 1 << 30  # bytes of decoded pixels up to which a set is kept in memory

BadImagePolicy = Literal["error", "skip"]
Progress = Callable[[int, int], None]


class ImageSource(ABC):
    """N labelled images of one size.

    `labels` is int64 [N], `class_names` names the labels, `images` is uint8 [N, S, S, 3] when the
    set lies in memory, `skipped` lists the unreadable images left out so far.
    """

    def __init__(self, class_names: list[str], labels: NDArray[np.int64], image_size: int) -> None:
        self.class_names = class_names
        self.labels = labels
        self.image_size = image_size
        self.images: NDArray[np.uint8] | None = None
        self.skipped: list[str] = []

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
) -> ImageSource:
    """Open a set of labelled images, cropped and resized to `image_size` pixels.

    Args:
        source: embedded (Fashion-MNIST, 10,000 images), folder or zip (of class folders), tars
            (one .tar or a folder of them), parquet (of Hugging Face's datasets), cifar10
            (torchvision's cifar-10-batches-py), fashion-mnist (the full set's idx files).
        path: the folder or zip; None for embedded.
        on_bad_image: stop at unreadable images, or leave them out.
        split: train, heldout or all; None means train, and all for a source that has no splits.
        on_progress: called with (images done, images in all) while a set is decoded.

    Raises:
        UsageError: an unknown source, split or policy, a missing or a superfluous path.
        InputFileError: missing, empty or corrupt data; unreadable images, counted and named.
    """
    _check(image_size, on_bad_image)
    listing = list_images(source, path, split)
    if len(listing.labels) * image_size * image_size * 3 <= MEMORY_LIMIT:
        return _MemoryImages(listing, image_size, on_bad_image, on_progress)
    return _LazyImages(listing, image_size, on_bad_image)


def list_images(source: str, path: Path | None, split: str | None = None) -> Listing:
    """List a set of labelled images without decoding any; see `open_images`.

    Raises:
        UsageError: an unknown source or split, a missing or a superfluous path.
        InputFileError: missing or empty data.
    """
    split = _check_source(source, path, split)
    if path is None:
        return list_arrays(*embedded_arrays(split), FASHION_CLASSES, "Fashion-MNIST subset")
    if source == "folder":
        return list_folder(path)
    if source == "zip":
        return list_zip(path)
    if source == "tars":
        return list_tars(path)
    if source == "parquet":
        return list_parquet(path)
    if source == "cifar10":
        return list_cifar10(path, split)
    return list_arrays(*fashion_arrays(path, split), FASHION_CLASSES, "Fashion-MNIST")


class _MemoryImages(ImageSource):
    """All images decoded at the start into one array."""

    def __init__(
        self,
        listing: Listing,
        image_size: int,
        on_bad_image: BadImagePolicy,
        on_progress: Progress | None,
    ) -> None:
        super().__init__(listing.class_names, listing.labels, image_size)
        count = len(listing.labels)
        pixels = np.empty((count, image_size, image_size, 3), dtype=np.uint8)

        def decode(chunk: range) -> list[tuple[int, str]]:
            bad = []
            for index in chunk:
                try:
                    pixels[index] = to_pixels(listing.load(index), image_size, listing.names[index])
                except InputFileError as error:
                    bad.append((index, str(error)))
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
        is_slow = sorted(costs)[done // 2] > 0.5e-3  # seconds
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
        self._names = listing.names
        self._kept = np.arange(count)
        if bad:
            if on_bad_image == "error" or len(bad) == count:
                raise _too_many_bad(bad, listing)
            self.skipped = [listing.names[index] for index in sorted(bad)]
            self._kept = np.setdiff1d(self._kept, list(bad))
            pixels, self.labels = pixels[self._kept], listing.labels[self._kept]
        self.images = pixels
        self._pixels = pixels

    def read(self, index: int) -> NDArray[np.uint8]:
        return self._pixels[index]

    def name(self, index: int) -> str:
        return self._names[int(self._kept[index])]


class _LazyImages(ImageSource):
    """Images decoded when asked for.

    An unreadable image is replaced by the next readable one of its class (in the order of the
    listing, from the last to the first), so that labels stay true and every run, worker count
    and rank sees the same images.
    """

    def __init__(self, listing: Listing, image_size: int, on_bad_image: BadImagePolicy) -> None:
        super().__init__(listing.class_names, listing.labels, image_size)
        self._listing = listing
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
            where=self._listing.where,
            fix="repair the images or remove the class",
        )

    def _decode(self, index: int) -> NDArray[np.uint8]:
        return to_pixels(self._listing.load(index), self.image_size, self._listing.names[index])

    def _record(self, index: int) -> None:
        with self._lock:
            if index not in self._bad:
                self._bad.add(index)
                self.skipped.append(self._listing.names[index])

    def name(self, index: int) -> str:
        return self._listing.names[index]


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


def _check_source(source: str, path: Path | None, split: str | None) -> str:
    """Check where images come from and return the split."""
    if source not in SOURCES:
        raise UsageError(
            "unknown image source",
            got=repr(source) + did_you_mean(source, SOURCES),
            expected=f"one of {', '.join(SOURCES)}",
            where="data.source",
        )
    if (path is None) != (source == "embedded"):
        raise UsageError(
            f"image source {source!r} " + ("needs a path" if path is None else "takes no path"),
            got=path,
            where="data.path",
            fix="set data.path" if path is None else "remove data.path or set data.source=folder",
        )
    has_splits = source in ("embedded", "cifar10", "fashion-mnist")
    split = split or ("train" if has_splits else "all")
    if split not in (SPLITS if has_splits else ("all",)):
        raise UsageError(
            f"image source {source!r} has no such split",
            got=repr(split),
            expected=f"one of {', '.join(SPLITS)}" if has_splits else "all",
            where="data.split",
            fix=None if has_splits else "set data.split=null, or give each split by itself",
        )
    return split


def _too_many_bad(bad: dict[int, str], listing: Listing) -> InputFileError:
    count = len(listing.labels)
    order = sorted(bad)
    more = f", and {len(bad) - 10} more" if len(bad) > 10 else ""
    first = bad[order[0]].partition(" Fix: ")[0].rstrip(".")
    return InputFileError(
        f"{len(bad)} of {count} images unreadable",
        got=", ".join(listing.names[index] for index in order[:10])
        + more
        + f"; the first: {first}",
        where=listing.where,
        fix="repair or remove them"
        + (", or leave them out with data.on_bad_image=skip" if len(bad) < count else ""),
    )
