"""Where generated images go: a labelled grid (.png), an array (.npz) or a folder of PNGs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from terdit_cli.errors import UsageError
from terdit_cli.system.atomic import check_writable, make_folder, refuse_existing, remove_file

SOFTWARE = "software"  # text key of a PNG that names the program
GRID_LIMIT = 256  # images in one grid
FOLDER_LIMIT = 10_000_000


@dataclass(frozen=True)
class ImageOutput:
    """A path, and the format written there."""

    path: Path
    kind: Literal["grid", "array", "folder"]

    @classmethod
    def named(cls, where: str | os.PathLike[str]) -> ImageOutput:
        """Return the output that a name stands for.

        A name stands for a folder if it ends in a slash, if that folder exists, or if the text
        after its last dot is not a suffix: v1.5, cfg-1.5-seed-0.

        Raises:
            UsageError: a suffix of another kind of file.
        """
        text = os.fspath(where)
        path = Path(text)
        suffix = path.suffix.lower()
        if (
            text.endswith(os.sep)
            or os.path.isdir(path)  # noqa: PTH112 - False where it may not be looked at
            or not re.fullmatch(r"\.[a-z]\w{0,4}", suffix)
        ):
            return cls(path, "folder")
        if suffix == ".png":
            return cls(path, "grid")
        if suffix == ".npz":
            return cls(path, "array")
        raise UsageError(
            "unknown output format",
            got=path.suffix,
            expected=".png (a grid), .npz (an array) or a folder",
            where=path,
            fix=f"-o {path.with_suffix('.png')}, or -o {path}/ for a folder",
        )

    def check(self, force: bool) -> None:
        """Refuse, before any work, an output that is not writable or would overwrite a file.

        A grid made by `terdit sample` may be overwritten: its text says how to make it again.

        Raises:
            UsageError: it exists, and not `force`. EnvironmentProblem: not writable.
        """
        if self.kind == "folder":
            if os.path.isfile(self.path):  # noqa: PTH113
                raise UsageError(
                    "the output folder is a file", where=self.path, fix="give another with -o"
                )
            check_writable(self.path / "file")
            there = next((path for path in self.path.glob("*.png") if path.is_file()), None)
            if there is not None:
                refuse_existing(there, force, "the folder holds images")
            return
        check_writable(self.path)
        if not (self.kind == "grid" and read_grid(self.path) is not None):
            refuse_existing(self.path, force)

    def clear(self) -> None:
        """Make the folder, and remove the images that an earlier call left there.

        Otherwise those that are not written again would seem to be this call's.

        Raises:
            EnvironmentProblem: not writable.
        """
        make_folder(self.path)
        for path in self.path.glob("*.png"):
            if re.fullmatch(r"\d{6,}-class\d{4,}\.png", path.name) and not path.is_dir():
                remove_file(path)

    def image_path(self, number: int, class_id: int) -> Path:
        """Return where image `number` of a folder is written."""
        return self.path / f"{number:06d}-class{class_id:04d}.png"

    def check_count(self, count: int, image_size: int) -> None:
        """Refuse more images than fit in a grid, in a folder or, for an array, in memory.

        Raises:
            UsageError: too many.
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits = {"grid": GRID_LIMIT, "array": memory // (3 * image_size**2)}
        limit = limits.get(self.kind, FOLDER_LIMIT)
        if count > limit:
            raise UsageError(
                "too many images",
                got=count,
                expected=f"at most {limit:,}",
                where=self.path,
                fix="generate fewer with -n"
                if self.kind == "folder"
                else "write a folder: -o samples/",
            )


def read_grid(path: Path) -> dict[str, str] | None:
    """Return what `terdit sample` wrote into a PNG: seed, sampler, hashes; None of other files."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
            size = f"{image.width} x {image.height}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return {"pixels": size, **texts} if texts.get(SOFTWARE, "").startswith("terdit ") else None
