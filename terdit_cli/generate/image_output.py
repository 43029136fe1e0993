"""Where generated images go: a labelled grid (.png), an array (.npz) or a folder of PNGs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from terdit_cli.errors import UsageError
from terdit_cli.system.atomic import check_writable, make_folder, refuse_existing

SOFTWARE = "software"  # key of a PNG's text that says what made it
GRID_LIMIT = 256  # images in one picture
FOLDER_LIMIT = 10_000_000


@dataclass(frozen=True)
class ImageOutput:
    """A path, and what is written there."""

    path: Path
    kind: Literal["grid", "array", "folder"]

    @classmethod
    def named(cls, where: str | os.PathLike[str]) -> ImageOutput:
        """Return what a name stands for.

        A name is a folder's if it ends in a slash, if a folder is there, or if what follows its
        last dot is no suffix: v1.5, cfg-1.5-seed-0.

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
            "unknown kind of output",
            got=path.suffix,
            expected=".png (a grid), .npz (an array) or a folder",
            where=path,
            fix=f"-o {path.with_suffix('.png')}, or -o {path}/ for a folder",
        )

    def check(self, force: bool) -> None:
        """Refuse, before any work, what cannot be written or would take another file's place.

        A grid that `terdit sample` made may be replaced: its text says how to make it again.

        Raises:
            UsageError: it exists, and not `force`. EnvironmentProblem: not writable.
        """
        if self.kind == "folder":
            if os.path.isfile(self.path):  # noqa: PTH113
                raise UsageError(
                    "the output folder is a file", where=self.path, fix="name another with -o"
                )
            check_writable(self.path / "file")
            there = next((path for path in self.path.glob("*.png") if path.is_file()), None)
            if there is not None:
                refuse_existing(there, force, "the folder holds images")
            return
        check_writable(self.path)
        if not (self.kind == "grid" and _is_ours(self.path)):
            refuse_existing(self.path, force)

    def clear(self) -> None:
        """Make the folder, and remove the images that an earlier call left there.

        Those that are not written again would pass for this call's.

        Raises:
            EnvironmentProblem: not writable.
        """
        make_folder(self.path)
        for path in self.path.glob("*.png"):
            if re.fullmatch(r"\d{6,}-class\d{4,}\.png", path.name):
                path.unlink(missing_ok=True)

    def image_path(self, number: int, class_id: int) -> Path:
        """Return where image `number` of a folder is written."""
        return self.path / f"{number:06d}-class{class_id:04d}.png"

    def check_count(self, count: int, image_size: int) -> None:
        """Refuse more images than a picture, a folder or, for an array, the memory holds.

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


def _is_ours(path: Path) -> bool:
    """Say whether a PNG was made by `terdit sample`."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return str(image.info.get(SOFTWARE, "")).startswith("terdit ")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
