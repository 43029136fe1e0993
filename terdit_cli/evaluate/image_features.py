"""Images by number -> shards of features, by one process or by several.

The blocks are dealt to the processes in turn, and what is in a block does not depend on who makes
it. A run that finds blocks of its own in the folder goes on after them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.evaluate.feature_shards import Arrays, Block, FeatureShards
from terdit_cli.evaluate.features import FeatureExtractor, Features
from terdit_cli.system.job import Job

LEAST_BLOCK = 64  # images
COMPARED = 1024  # images whose features are made in both precisions, if bf16 is asked for

Image = NDArray[np.uint8]

_CONVERTED = {
    "L": "grey: three equal channels were made of one",
    "1": "black and white: three equal channels were made of one",
    "LA": "grey with an alpha channel, which was dropped",
    "RGBA": "transparent in places: the alpha channel was dropped, not put on a background",
    "P": "of a palette: its colours were taken",
    "CMYK": "CMYK: converted to RGB without a colour profile",
}


Batch = tuple[list[Image], list[str]]  # consecutive images, and the mode each was stored in


class Source(Protocol):
    """Images by number, 0 .. count - 1."""

    @property
    def where(self) -> str:
        """What it is called in messages."""

    @property
    def count(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def class_names(self) -> list[list[str]]:
        """What each class can be called; empty if these images have none."""

    def class_id(self, image: int) -> int:
        """Return the index of the class of an image that has one."""

    def facts(self) -> dict[str, Any]:
        """Return all that the images depend on."""

    @property
    def sha256(self) -> str | None:
        """The hash of the list of images; None if a model generates them."""

    @property
    def skipped(self) -> list[str]:
        """Why each image that was left out is unreadable."""

    def batches(self, images: range) -> Iterator[Batch]:
        """Iterate over images uint8 [H, W, 3] in order."""


class Saved(Protocol):
    """A folder that keeps images by number."""

    def claim(self, facts: dict[str, Any], count: int) -> None:
        """Begin the folder, or go on with that of the same images; raises UsageError."""

    def has(self, indices: range) -> bool: ...

    def write(self, indices: range, images: list[Image]) -> None: ...


def block_size(batch_size: int) -> int:
    """Return the images of a block: whole batches, and at least LEAST_BLOCK."""
    return -(-LEAST_BLOCK // batch_size) * batch_size


def make_features(
    source: Source,
    extractor: FeatureExtractor,
    folder: Path,
    job: Job,
    keep: frozenset[int] = frozenset(),
    saved: Saved | None = None,
) -> FeatureShards:
    """Return the shards of a source when all processes have made theirs.

    Args:
        keep: numbers of images to store beside their features, in blocks that are made now.
        saved: keep all of them here.

    Raises:
        UsageError: a folder holds the features or images of another run. And whatever the source
            or the extractor raises.
    """
    shards = FeatureShards(folder, source.count, block_size(source.batch_size))
    facts = source.facts() | {"pipeline": extractor.pipeline, "precision": extractor.precision}
    if job.is_main:
        if saved is not None:
            saved.claim(source.facts(), source.count)
        done = shards.claim(facts)
        if done:
            console.note(f"{folder}: going on after {done} of {source.count} images")
    job.require_shared(folder)
    mine = [block for block in shards.blocks if block.number % job.size == job.rank]
    missing = [
        block
        for block in mine
        if not shards.has(block) or not (saved is None or saved.has(block.images))
    ]
    both = extractor.with_precision("fp32") if extractor.precision == "bf16" else None

    def finish(block: Block, images: list[Image], modes: list[str]) -> None:
        if saved is not None:
            saved.write(block.images, images)
        arrays = _arrays(extractor(images))
        arrays["modes"] = np.array(modes)
        arrays["sizes"] = np.array([image.shape[:2] for image in images])
        if both is not None and block.start < COMPARED:
            arrays["pool_fp32"] = both(images).pool
        kept = [index for index in block.images if index in keep]
        if kept:
            arrays["kept"] = np.array(kept)
            arrays["images"] = np.stack([images[index - block.start] for index in kept])
        shards.write(block, arrays)

    _run(source, missing, finish, job)
    job.wait()
    return shards


def _run(
    source: Source,
    blocks: list[Block],
    finish: Callable[[Block, list[Image], list[str]], None],
    job: Job,
) -> None:
    """Make the blocks' images here while another thread finishes the block before."""
    total = sum(block.end - block.start for block in blocks)
    share = f" (1 of {job.size} processes)" if job.size > 1 else ""
    started, done = time.monotonic(), 0
    with (
        console.progress(f"{source.where}{share}", total) as meter,
        ThreadPoolExecutor(1, "features") as finisher,
    ):
        before: Future[None] | None = None
        for block in blocks:
            images: list[Image] = []
            modes: list[str] = []
            for batch, stored in source.batches(block.images):
                images += batch
                modes += stored
                done += len(batch)
                rate = done / (time.monotonic() - started)
                left = console.duration((total - done) / rate)
                meter.update(done, f"{rate:.1f} img/s, {left} left")
            if before is not None:
                before.result()
            before = finisher.submit(finish, block, images, modes)
        if before is not None:
            before.result()


def _arrays(features: Features) -> Arrays:
    arrays: Arrays = {"pool": features.pool}
    if features.spatial is not None:
        arrays["spatial"] = features.spatial
    if features.logits is not None:
        arrays["logits"] = features.logits
    return arrays


def conversions(shards: FeatureShards) -> list[str]:
    """Return a sentence for each thing about a set of images that its owner may not expect."""
    modes: Counter[str] = Counter()
    sizes: set[tuple[int, int]] = set()
    for part in shards.stream("modes"):
        modes.update(part.tolist())
    for part in shards.stream("sizes"):
        sizes |= set(map(tuple, part.tolist()))
    found = []
    for mode, count in sorted(modes.items()):
        if mode != "RGB":
            how = _CONVERTED.get(mode, f"mode {mode}: converted to RGB")
            found.append(f"{count} of {shards.count} images are {how}")
    if len(sizes) > 1:
        low, high = min(sizes), max(sizes)
        found.append(
            f"the images have {len(sizes)} sizes, {low[1]} x {low[0]} to {high[1]} x {high[0]} "
            "pixels; each is scaled by itself"
        )
    return found
