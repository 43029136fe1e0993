"""N images by number, with their classes where they have any: what trains and what is scored.

Images keep their own sizes. What is not 8-bit RGB is converted as FID's reference code converts
it, by Pillow's convert("RGB"): grey becomes three equal channels, an alpha channel is dropped,
and orientation tags are not applied.

Shapes: N images of H x W pixels; S the side of a training image.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.data.decode import (
    FORMATS_READ,
    UnreadableImage,
    decode_with_mode,
    to_pixels,
)
from terdit_cli.data.files import ImageFiles
from terdit_cli.errors import InputFileError

Pixels = NDArray[np.uint8]

# Names of folders that are parts of a data set, not classes of it.
SPLIT_FOLDERS = frozenset(
    ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "heldout")
)


@dataclass(frozen=True)
class ImageSet:
    """N images, before any is decoded.

    `classes` is the class of each, int64 [N], an index into `class_names`; None where not every
    image has one. `class_names` of a `published` set are known beforehand: a part of it may lack
    some. `left_out` counts the files that are no images, by suffix. A set that is `sequential` is
    slow to read in any but ascending order.
    """

    where: str
    names: Sequence[str]  # what to call each image in a message
    load: Callable[[int], tuple[Image.Image, str]]
    fingerprint: Callable[[int], str]
    class_names: list[str] = field(default_factory=list)
    classes: NDArray[np.int64] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    published: bool = False
    sequential: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[Pixels, str]:
        """Return image `index`, uint8 [H, W, 3], and the mode it was stored in ("RGB", "L", ...).

        Raises:
            InputFileError: it cannot be read.
        """
        image, mode = self.load(index)
        return to_pixels(image), mode

    def cropped(self, index: int, image_size: int) -> Pixels:
        """Return image `index` cropped and resized (see `decode.center_crop`), uint8 [S, S, 3].

        Raises:
            InputFileError: it cannot be read.
        """
        return to_pixels(self.load(index)[0], image_size, self.names[index])

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, int64 [N], of a set that was opened with classes."""
        assert self.classes is not None, "checked when it was opened"
        return self.classes

    def sha256(self, indices: list[int]) -> str:
        """Return the hash of a list of images: SHA-256 of their fingerprints, in order.

        A fingerprint is for a file its path in the set, its size and a CRC: in a zip of its
        content, in a folder or tar of its last 4096 bytes; for an image of an .npz its number and
        a hash of the array's shape and CRC. So it is quick to compute, and the same images in a
        folder of another name have the same hash, but not those in a zip or in another order.
        """
        digest = hashlib.sha256()
        for index in indices:
            # File names that are not UTF-8 come with surrogates.
            digest.update(self.fingerprint(index).encode(errors="surrogatepass") + b"\n")
        return digest.hexdigest()

    @property
    def notes(self) -> list[str]:
        """What the user should know: one line on the files that are no images, if there are any."""
        if not self.left_out:
            return []
        kinds = [f"{count} {suffix}" for suffix, count in self.left_out.most_common(8)]
        more = f" and {len(self.left_out) - 8} more kinds" if len(self.left_out) > 8 else ""
        count = self.left_out.total()
        return [
            f"{self.where}: {count:,} file{'s' * (count != 1)} left out that "
            f"{'are' if count != 1 else 'is'} not read as images ({', '.join(kinds)}{more})"
        ]


def unreadable_images(images: ImageSet, indices: list[int]) -> Iterator[tuple[int, str]]:
    """Iterate over the images that cannot be read, with the reason; decodes all of them.

    Raises:
        InputFileError: the file that holds all images is damaged.
    """
    for index in indices:
        try:
            images.load(index)
        except UnreadableImage as error:
            yield index, str(error)


def file_set(where: str, files: ImageFiles, names: Sequence[str], **classes: Any) -> ImageSet:
    """Return the set of the image files `names`, in this order.

    Args:
        classes: the fields `class_names` and `classes`.

    Raises:
        InputFileError: there are none.
    """
    if not names:
        others = files.left_out.total()
        left_out = f"{others} file{'s' * (others != 1)} of other kinds" if others else "nothing"
        raise InputFileError(
            "no images found",
            got=left_out,
            expected=f"{FORMATS_READ} files",
            where=where,
            fix="give the folder, zip or tar that holds the images",
        )

    def load(index: int) -> tuple[Image.Image, str]:
        name = names[index]
        return decode_with_mode(files.read(name), f"{where}: {name}")

    def fingerprint(index: int) -> str:
        return f"{names[index]} {files.fingerprint(names[index])}"

    return ImageSet(where, names, load, fingerprint, left_out=files.left_out, **classes)


def array_set(
    where: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    origin: str | None = None,
    fingerprint: Callable[[int], str] | None = None,
) -> ImageSet:
    """Return the set of images that lie decoded in an array uint8 [N, H, W] or [N, H, W, 3].

    Args:
        origin: what to call them in messages; default `where`.
        fingerprint: default a CRC of the pixels.
    """

    def crc(index: int) -> str:
        return f"{index} {zlib.crc32(images[index].tobytes()):08x}"

    return ImageSet(
        where,
        [f"{origin or where} image {index}" for index in range(len(images))],
        lambda index: (Image.fromarray(images[index]), "RGB"),
        fingerprint or crc,
        list(class_names),
        labels,
        published=True,
    )


def folder_depth(paths: Sequence[Sequence[str]], folders: Sequence[Sequence[str]] = ()) -> int:
    """Return how many folders merely wrap all class folders.

    Args:
        paths: the parts of each image's path, at least two.
        folders: the parts of each folder's path where empty ones are known too.
    """
    depth = 0
    while (
        paths
        and min(map(len, paths)) >= depth + 3
        and len({path[depth] for path in paths}) == 1
        and len({folder[depth] for folder in folders if len(folder) > depth}) <= 1
    ):
        depth += 1
    return depth


def numbered(labels: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the classes, in the order of their numbers, and the class of each."""
    numbers, classes = np.unique(labels, return_inverse=True)
    return [str(number) for number in numbers], classes


def check_classes(where: object, images: ImageSet) -> ImageSet:
    """Return a set to train on: one whose every image has a class, and every class an image.

    Raises:
        InputFileError: it is not, or its classes are the splits of a data set.
    """
    names, count = images.class_names, len(images)
    if images.classes is None:
        raise InputFileError(
            "no training images with classes",
            got=f"{count} image{'s' * (count != 1)} without classes",
            expected="a folder of images for each class, or labels",
            where=where,
            fix="sort the images into class folders",
        )
    if len(names) >= 2 and all(name.lower() in SPLIT_FOLDERS for name in names):
        train = next((name for name in names if name.lower().startswith("train")), names[0])
        raise InputFileError(
            "these folders are parts of a data set, not classes",
            got=", ".join(names),
            expected="a folder for each class",
            where=where,
            fix=f"if {train}/ was meant: data.path={where}/{train}",
        )
    counts = np.bincount(images.classes, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty and not images.published:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise InputFileError(
            "class folders without images",
            got=", ".join(empty[:10]) + more,
            where=where,
            fix="add images or remove the folders",
        )
    return images
