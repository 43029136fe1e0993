"""A folder of images at any depth; its classes are folders, by torchvision's rule: sorted names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terdit_cli.data.files import (
    ImageFiles,
    is_hidden,
    is_image,
    read_bounded,
    regular_size,
    require_folder,
    tail_crc,
)
from terdit_cli.data.image_set import ImageSet, file_set, folder_depth
from terdit_cli.errors import InputFileError


class FolderFiles:
    """All images below a folder at any depth; links to folders are followed, loops are not.

    `folders` are the paths of all folders below it, with and without images.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self.folders: list[str] = []
        self.names = sorted(self._walk())

    def _walk(self) -> list[str]:
        names = []
        seen = {os.path.realpath(self.root)}
        for folder, subfolders, files in os.walk(self.root, followlinks=True, onerror=_refuse):
            subfolders[:] = [name for name in subfolders if not is_hidden(name)]
            links = {name: os.path.realpath(os.path.join(folder, name)) for name in subfolders}  # noqa: PTH118
            subfolders[:] = [name for name in subfolders if links[name] not in seen]
            seen.update(links.values())
            prefix = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if prefix == "." else prefix + "/"
            self.folders += [prefix + name for name in subfolders]
            names += [prefix + name for name in files if is_image(name, self.left_out)]
        return names

    def read(self, name: str) -> bytes:
        """Return the bytes of one file, at most MAX_FILE_BYTES.

        Raises:
            InputFileError: the file is gone, not a regular file, too large or not readable.
        """
        return read_bounded(self.root / name, name)

    def fingerprint(self, name: str) -> str:
        """Return the size of one file, and the CRC of its last bytes (see `tail_crc`).

        Raises:
            InputFileError: the file is gone or not a regular file.
        """
        path = self.root / name
        size = regular_size(path, name)
        return f"{size} {tail_crc(path, 0, size, name):08x}"


def open_folder(root: Path, with_classes: bool) -> ImageSet:
    """Open a folder of images; `with_classes` leaves those out that lie in no class folder.

    Raises:
        InputFileError: not a folder, or one without images.
    """
    require_folder(
        root, "folder of images", "give a folder with one folder of images for each class"
    )
    files = FolderFiles(root)
    return by_folders(str(root), files, files.folders, with_classes)


def by_folders(
    where: str, files: ImageFiles, folders: Sequence[str], with_classes: bool
) -> ImageSet:
    """Return image files whose classes are their top folders, those that merely wrap all aside.

    Args:
        folders: the paths of all folders where empty ones are known.
        with_classes: leave out what lies in no folder; otherwise such a file means that the set
            has no classes.
    """
    names = files.names
    if with_classes and any("/" in name for name in names):
        names = [name for name in names if "/" in name]
        if strays := len(files.names) - len(names):
            files.left_out["in no class folder"] = strays
    paths = {name: name.split("/") for name in names}
    tree = [folder.split("/") for folder in folders]
    depth = folder_depth(list(paths.values()), tree)
    if not paths or min(map(len, paths.values())) < depth + 2:
        return file_set(where, files, names)

    def order(name: str) -> tuple[str, str, str]:
        return (paths[name][depth], *name.rpartition("/")[::2])

    classes = {path[depth] for path in paths.values()}
    if with_classes:  # an empty class folder is refused later
        classes |= {folder[depth] for folder in tree if len(folder) == depth + 1}
    names = sorted(names, key=order)
    return file_set(where, files, names, **label(sorted(classes), [paths[n][depth] for n in names]))


def label(class_names: list[str], classes: Sequence[str]) -> dict[str, Any]:
    """Return the fields `class_names` and `classes` of a set, given the class of each image."""
    places = {name: place for place, name in enumerate(class_names)}
    return {
        "class_names": class_names,
        "classes": np.array([places[name] for name in classes], dtype=np.int64),
    }


def _refuse(error: OSError) -> None:
    raise InputFileError(
        "cannot list the folder of images",
        got=error.strerror,
        where=error.filename,
        fix="check the permissions",
    ) from error
