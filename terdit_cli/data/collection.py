"""Images for scoring, by number: a folder tree, a zip, tar shards, an .npz or the packaged set.

Images keep their own sizes. What is not 8-bit RGB is converted as FID's reference code converts
it, by Pillow's convert("RGB"): grey becomes three equal channels, an alpha channel is dropped,
and orientation tags are not applied. `read` says which mode an image had, so that the caller can
tell its user.

The classes of files are their top folders, if all files lie in one; folders that merely wrap all
class folders do not count, nor does the tar that holds them. Those of an .npz are its integer
labels, as are those of tars with a .cls beside each image.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from terdit_cli.data.decode import UnreadableImage, decode_with_mode, to_pixels
from terdit_cli.data.files import FolderFiles, ImageFiles, ZipFiles
from terdit_cli.data.images import open_images
from terdit_cli.data.npz_images import NpzImages
from terdit_cli.data.tars import TarFiles, is_pattern, match_shards, shards_in
from terdit_cli.errors import InputFileError

EMBEDDED = "embedded"  # the packaged images, or "embedded:train", "embedded:heldout"
_EMBEDDED_SIZE = 28

Pixels = NDArray[np.uint8]


class ImageSet(ABC):
    """N images; `classes` is the class of each, None where they have none."""

    def __init__(
        self, where: str, count: int, class_names: list[str], classes: NDArray[np.int64] | None
    ) -> None:
        self.where = where
        self.count = count
        self.class_names = class_names
        self.classes = classes

    @abstractmethod
    def read(self, index: int) -> tuple[Pixels, str]:
        """Return image `index`, uint8 [H, W, 3], and the mode it was stored in ("RGB", "L", ...).

        Raises:
            InputFileError: it cannot be read.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return one line that changes when image `index` does, without decoding it."""

    def sha256(self, indices: list[int]) -> str:
        """Return the hash of a list of images: SHA-256 of their `describe` lines, in order.

        A line is for a file its path in the set, its size and a CRC: in a zip of its content, in a
        folder or tar of its last 4096 bytes; for an image of an .npz its number and a hash of the
        array's shape and CRC. So it is quick to compute, and the same images in a folder of another
        name have the same hash, but not those in a zip or in another order.
        """
        digest = hashlib.sha256()
        for index in indices:
            # File names that are not UTF-8 come with surrogates.
            digest.update(self.describe(index).encode(errors="surrogatepass") + b"\n")
        return digest.hexdigest()


def open_image_set(where: str) -> ImageSet:
    """Open images by what they are called on the command line.

    Raises:
        InputFileError: missing, empty, corrupt or of another kind. UsageError: a wrong split.
    """
    if where == EMBEDDED or where.startswith(EMBEDDED + ":"):
        return _PackagedSet(where)
    path = Path(where)
    if not path.exists() and is_pattern(where):
        return _tar_set(where, match_shards(where))
    if not path.exists():
        raise InputFileError("images not found", where=path, fix="check the path")
    if path.suffix.lower() == ".npz":
        return _NpzSet(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".tar":
        return _tar_set(where, [path])
    if path.suffix.lower() == ".zip":
        zipped = ZipFiles(path)
        return _FileSet(where, zipped, *_top_folders(zipped.names))
    raise InputFileError(
        "not a collection of images",
        got=path.suffix or "a file without suffix",
        expected="a folder, .zip, .tar or .npz",
        where=path,
        fix="put the images into a folder or a zip",
    )


def unreadable_images(images: ImageSet, indices: list[int]) -> Iterator[tuple[int, str]]:
    """Iterate over the images that cannot be read, with the reason; decodes all of them.

    Raises:
        InputFileError: the file that holds all images is damaged.
    """
    for index in indices:
        try:
            images.read(index)
        except UnreadableImage as error:
            yield index, str(error)


class _FileSet(ImageSet):
    def __init__(
        self,
        where: str,
        files: ImageFiles,
        class_names: list[str],
        classes: NDArray[np.int64] | None,
    ) -> None:
        if not files.names:
            raise InputFileError(
                "no images found",
                expected="JPEG, PNG, WebP, BMP, PPM or TIFF files",
                where=where,
                fix="give the folder, zip or tar that holds the images",
            )
        super().__init__(where, len(files.names), class_names, classes)
        self._files = files

    def read(self, index: int) -> tuple[Pixels, str]:
        name = self._files.names[index]
        image, mode = decode_with_mode(self._files.read(name), f"{self.where}: {name}")
        return to_pixels(image), mode

    def describe(self, index: int) -> str:
        name = self._files.names[index]
        return f"{name} {self._files.fingerprint(name)}"


def _open_folder(path: Path) -> ImageSet:
    """Open a folder of images, or of tar shards."""
    files, shards = FolderFiles(path), shards_in(path)
    if not shards:
        return _FileSet(str(path), files, *_top_folders(files.names))
    if files.names:
        raise InputFileError(
            "a folder of both tars and images",
            got=f"{shards[0].name} and {files.names[0]}",
            expected="one or the other",
            where=path,
            fix=f"move one of them away, or name the tars: '{path}/*.tar'",
        )
    return _tar_set(str(path), shards)


def _tar_set(where: str, shards: list[Path]) -> ImageSet:
    files = TarFiles(shards)
    classes = _top_folders(files.members) if files.labels is None else _numbered(files.labels)
    return _FileSet(where, files, *classes)


def _top_folders(paths: list[str]) -> tuple[list[str], NDArray[np.int64] | None]:
    """Return the names of the classes, and the class of each path; none if one has no folder."""
    parts = [path.split("/") for path in paths]
    depth = 0
    while parts and min(map(len, parts)) >= depth + 3 and len({part[depth] for part in parts}) == 1:
        depth += 1
    if not parts or min(map(len, parts)) < depth + 2:
        return [], None
    names = sorted({part[depth] for part in parts})
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[part[depth]] for part in parts])


def _numbered(labels: NDArray[np.int64] | list[int]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the classes, in the order of their numbers, and the class of each."""
    numbers, classes = np.unique(np.asarray(labels), return_inverse=True)
    return [str(number) for number in numbers], classes


class _NpzSet(ImageSet):
    def __init__(self, path: Path) -> None:
        self._images = NpzImages(path)
        labels = self._images.labels
        classes = ([], None) if labels is None else _numbered(labels)
        super().__init__(str(path), self._images.count, *classes)

    def read(self, index: int) -> tuple[Pixels, str]:
        return self._images.read(index), "RGB"

    def describe(self, index: int) -> str:
        return f"{index} {self._images.sha256()}"


class _PackagedSet(ImageSet):
    def __init__(self, where: str) -> None:
        split = where.partition(":")[2] or "all"
        self._images = open_images(EMBEDDED, None, _EMBEDDED_SIZE, split=split)
        super().__init__(where, len(self._images), self._images.class_names, self._images.labels)

    def read(self, index: int) -> tuple[Pixels, str]:
        return self._images.read(index), "RGB"

    def describe(self, index: int) -> str:
        return f"{self.where} {index}"
