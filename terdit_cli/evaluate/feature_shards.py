"""Features on disk, block by block: any process may make a block, and a killed run goes on.

Block b holds images b * size .. (b + 1) * size - 1. Its features depend on the run's facts and on b
alone, so the blocks of one process and of eight are the same, and so is everything that
is computed from them in order; and a run of more or fewer images goes on in the same folder, where
only a last block that is not full is made again. A block is one uncompressed .npz, written whole
or not at all; the CRC of each of its arrays is checked when it is read.

    folder/run.json            the facts: another run must not go on here
    folder/block-00000012.npz  pool [B, D], and where they exist spatial, logits, pool_fp32,
                               and pictures: `kept` [k] (image numbers) and `images` [k, H, W, 3]
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.system.atomic import atomic_path, remove_file

FACTS_FILE = "run.json"
_MOST_FACTS = 1 << 20  # bytes of run.json
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Block:
    """A stretch of the images: its number, its first image and the one after its last."""

    number: int
    start: int
    end: int

    @property
    def images(self) -> range:
        return range(self.start, self.end)


class FeatureShards:
    """The blocks of one set of images in one folder; see the module."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.folder, self.count, self.size = folder, count, size

    @property
    def blocks(self) -> list[Block]:
        starts = range(0, self.count, self.size)
        return [
            Block(number, start, min(start + self.size, self.count))
            for number, start in enumerate(starts)
        ]

    def claim(self, facts: dict[str, Any]) -> int:
        """Begin a run, or go on with the one that was stopped here; returns its finished images.

        Raises:
            UsageError: the folder holds the features of another run; says what differs.
            InputFileError: its facts cannot be read. EnvironmentProblem: it cannot be written.
        """
        path = self.folder / FACTS_FILE
        ours = json.loads(json.dumps(facts | {"block": self.size}))
        if path.exists():
            theirs = _read_facts(path)
            names = sorted(set(ours) | set(theirs))
            unlike = [name for name in names if ours.get(name) != theirs.get(name)]
            if unlike:
                raise UsageError(
                    "the work folder holds the features of another run",
                    got="; ".join(f"{name} {theirs.get(name)!r}" for name in unlike),
                    expected="; ".join(f"{name} {ours.get(name)!r}" for name in unlike),
                    where=self.folder,
                    fix="name another folder with --work, or delete this one",
                )
        else:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(ours, indent=2, sort_keys=True))
        return sum(block.end - block.start for block in self.blocks if self.has(block))

    def path(self, block: Block) -> Path:
        return self.folder / f"block-{block.number:08d}.npz"

    def has(self, block: Block) -> bool:
        """Return whether a block is there and whole; one that is damaged or shorter is removed."""
        path = self.path(block)
        if not path.exists():
            return False
        try:
            with zipfile.ZipFile(path) as archive:
                whole = archive.testzip() is None
            rows = self._load(path, "pool") if whole else None
            if rows is not None and len(rows) == len(block.images):
                return True
        except _UNREADABLE:
            pass
        remove_file(path)
        return False

    def write(self, block: Block, arrays: Arrays) -> None:
        with atomic_path(self.path(block)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read(self, block: Block, name: str) -> NDArray[Any] | None:
        """Return one array of a block, None where this run has none of that name.

        Raises:
            InputFileError: missing or damaged since it was written.
        """
        path = self.path(block)
        try:
            return self._load(path, name)
        except _UNREADABLE as error:
            raise InputFileError(
                "a block of features cannot be read",
                got=str(error) or type(error).__name__,
                where=path,
                fix="run the command again: missing blocks are made anew",
            ) from error

    @staticmethod
    def _load(path: Path, name: str) -> NDArray[Any] | None:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name] if name in arrays.files else None

    def stream(self, name: str) -> Iterator[NDArray[Any]]:
        """Iterate over one array of all blocks, in the order of the images; nothing if absent."""
        for block in self.blocks:
            part = self.read(block, name)
            if part is None:
                return
            yield part

    def rows(self, name: str, indices: Sequence[int] | None = None) -> NDArray[Any] | None:
        """Return one array's rows of all images, or of some in ascending order: [N, ...]."""
        if indices is None:
            parts = list(self.stream(name))
        else:
            wanted, parts = np.asarray(indices), []
            for block in self.blocks:
                inside = wanted[(wanted >= block.start) & (wanted < block.end)] - block.start
                if not len(inside):
                    continue
                part = self.read(block, name)
                if part is None:
                    return None
                parts.append(part[inside])
        return np.concatenate(parts) if parts else None

    def pictures(self) -> dict[int, NDArray[np.uint8]]:
        """Return the images that were kept beside their features, by number."""
        kept: dict[int, NDArray[np.uint8]] = {}
        for block in self.blocks:
            numbers, images = self.read(block, "kept"), self.read(block, "images")
            if numbers is not None and images is not None:
                kept |= dict(zip(numbers.tolist(), images, strict=True))
        return kept


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_FACTS:
            raise ValueError(f"{path.stat().st_size} bytes")
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputFileError(
            "a work folder's run cannot be read",
            got=str(error),
            where=path,
            fix="delete the folder, or name another with --work",
        ) from error
    return facts
