"""`--save-images`: a folder of PNGs that holds the images of one run only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.errors import UsageError
from terdit_cli.report.grid import save_png
from terdit_cli.system.atomic import atomic_path
from terdit_cli.system.temporaries import is_temporary

FACTS_FILE = ".terdit.json"  # identifies the run
LARGEST_FACTS = 1 << 20  # bytes


@dataclass(frozen=True)
class SavedImages:
    """Images by number: 000000.png, 000001.png, ..."""

    folder: Path

    def claim(self, facts: dict[str, Any], count: int) -> None:
        """Start a folder, or continue one with the same images.

        Raises:
            UsageError: it holds other files, or more images than this run has: a later reader of
                the folder would count all of them as this run's.
        """
        path, ours = self.folder / FACTS_FILE, json.loads(json.dumps(facts))
        there = self.folder.iterdir() if self.folder.exists() else ()
        # Of a run that was killed; the first write removes them.
        found = sorted(path.name for path in there if not is_temporary(path.name))
        got = None
        if FACTS_FILE in found:
            if _read(path) != ours:
                got = "the images of another run"
            elif more := [name for name in found if _number(name) >= count]:
                got = f"{more[0]}, of a larger -n"
        elif found:
            got = found[0]
        if got is not None:
            raise UsageError(
                "the folder for the images holds other files", got=got, where=self.folder,
                expected=f"nothing, or images of this run up to {self._path(count - 1).name}",
                fix="give another folder with --save-images, or delete this one",
            )  # fmt: skip
        if FACTS_FILE not in found:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(ours, sort_keys=True), encoding="utf-8")

    def has(self, indices: Sequence[int]) -> bool:
        return all(self._path(index).exists() for index in indices)

    def write(self, indices: Sequence[int], images: Sequence[NDArray[np.uint8]]) -> None:
        for index, image in zip(indices, images, strict=True):
            save_png(Image.fromarray(image), self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"


def _number(name: str) -> int:
    """Return the number of an image from its file name; -1 for other files."""
    stem = name.removesuffix(".png")
    return int(stem) if stem.isdecimal() else -1


def _read(path: Path) -> Any:
    """Return the contents of a facts file, None if it cannot be read."""
    with path.open("rb") as file:
        text = file.read(LARGEST_FACTS)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
