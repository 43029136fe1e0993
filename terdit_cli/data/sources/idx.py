"""The idx format and Fashion-MNIST in it: the embedded subset and the full set.

idx: bytes 0 0, the type (8 = uint8), the number of axes, one big-endian uint32 for each axis,
then the values in C order. Files may be gzipped.

Shapes: N images, H and W pixels.
"""

from __future__ import annotations

import gzip
import importlib.resources
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from terdit_cli.data.files import require_folder
from terdit_cli.data.image_set import ImageSet, array_set
from terdit_cli.errors import InputFileError

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
EMBEDDED_TRAIN = 9_000  # of the 10,000 embedded images; the rest is held out
_MAX_BYTES = 1 << 30

EMBEDDED = "embedded"

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_idx(stream: IO[bytes], axes: int, where: object) -> NDArray[np.uint8]:
    """Read one uint8 array with the given number of axes; `where` is for the message.

    Raises:
        InputFileError: not idx, another type or number of axes, too large, cut or too long.
    """
    try:
        header = stream.read(4 + 4 * axes)
        if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, 8, axes]):
            raise _not_idx(f"a file that starts with {header[:4].hex(' ')}", axes, where)
        shape = struct.unpack(f">{axes}I", header[4:])
        size = math.prod(shape)
        if size > _MAX_BYTES:
            raise _not_idx(f"an array of {size} bytes", axes, where)
        values = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _not_idx(str(error), axes, where) from error
    if len(values) != size:
        relation = "more than" if len(values) > size else f"{len(values)} of"
        raise _not_idx(f"{relation} {size} values", axes, where)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def embedded_arrays(split: str) -> Arrays:
    """Return images uint8 [N, 28, 28] and labels int64 [N] of the embedded Fashion-MNIST subset.

    The splits are train (the first 9,000), heldout (the last 1,000) and all.
    """
    assets = importlib.resources.files("terdit_cli.data") / "assets"
    arrays = []
    for name, axes in (("images-idx3", 3), ("labels-idx1", 1)):
        asset = assets / f"fashion-mnist-10k-{name}-ubyte.gz"
        with asset.open("rb") as packed, gzip.GzipFile(fileobj=packed) as stream:
            arrays.append(read_idx(cast("IO[bytes]", stream), axes, asset))
    part = {
        "train": slice(0, EMBEDDED_TRAIN),
        "heldout": slice(EMBEDDED_TRAIN, None),
        "all": slice(None),
    }[split]
    return arrays[0][part], arrays[1][part].astype(np.int64)


def fashion_arrays(root: Path, split: str) -> Arrays:
    """Return images uint8 [N, 28, 28] and labels int64 [N] of the full Fashion-MNIST.

    `root` holds the four idx files, gzipped or not, directly (as distributed) or under
    `FashionMNIST/raw` (as torchvision keeps them). The splits are train (60,000), heldout (the
    10,000 of the files named t10k) and all.

    Raises:
        InputFileError: a file is missing or broken, or images and labels do not fit together.
    """
    require_folder(root, "Fashion-MNIST folder", "give the folder with its four idx files")
    prefixes = {"train": ["train"], "heldout": ["t10k"], "all": ["train", "t10k"]}[split]
    images, labels = [], []
    for prefix in prefixes:
        image_path = _find(root, f"{prefix}-images-idx3-ubyte")
        label_path = _find(root, f"{prefix}-labels-idx1-ubyte")
        images.append(_read_path(image_path, 3))
        labels.append(_read_path(label_path, 1))
        problem = _mismatch(images[-1], labels[-1])
        if problem:
            raise InputFileError(
                "images and labels do not fit together",
                got=problem,
                expected="28 x 28 images and one label from 0 to 9 for each",
                where=label_path,
                fix="take both files from one copy of Fashion-MNIST",
            )
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def _mismatch(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str | None:
    if images.shape[1:] != (28, 28):
        return f"images of {images.shape[1]} x {images.shape[2]}"
    if len(images) != len(labels):
        return f"{len(images)} images and {len(labels)} labels"
    if len(labels) == 0 or labels.max() >= len(FASHION_CLASSES):
        return f"label {labels.max()}" if len(labels) else "no images"
    return None


def _places(root: Path, name: str) -> list[Path]:
    folders = (root, root / "FashionMNIST" / "raw")
    return [folder / file for folder in folders for file in (name, f"{name}.gz")]


def _find(root: Path, name: str) -> Path:
    for place in _places(root, name):
        if place.is_file():
            return place
    raise InputFileError(
        "Fashion-MNIST file not found",
        got=f"neither {name}.gz nor {name}",
        where=root,
        fix="give the folder with its four idx files (Debian: /usr/share/datasets/fashion-mnist)",
    )


def _read_path(path: Path, axes: int) -> NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            if path.suffix != ".gz":
                return read_idx(file, axes, path)
            with gzip.GzipFile(fileobj=file) as stream:
                return read_idx(cast("IO[bytes]", stream), axes, path)
    except OSError as error:
        raise _not_idx(str(error), axes, path) from error


def _not_idx(got: str, axes: int, where: object) -> InputFileError:
    return InputFileError(
        "cannot read the idx file",
        got=got,
        expected=f"a whole uint8 array with {axes} axes",
        where=where,
        fix="copy or download the file again",
    )


def open_embedded(split: str) -> ImageSet:
    """Open the embedded Fashion-MNIST subset."""
    where = EMBEDDED if split == "all" else f"{EMBEDDED}:{split}"
    return array_set(
        where,
        *embedded_arrays(split),
        FASHION_CLASSES,
        "Fashion-MNIST subset",
        lambda index: f"{where} {index}",
    )


def open_fashion_mnist(root: Path, split: str) -> ImageSet:
    """Open the full Fashion-MNIST; see `fashion_arrays`."""
    return array_set("Fashion-MNIST", *fashion_arrays(root, split), FASHION_CLASSES)


def is_fashion_mnist(root: Path) -> bool:
    """Say whether the idx files of Fashion-MNIST lie in a folder."""
    name = "train-images-idx3-ubyte"
    return any(place.is_file() for place in _places(root, name))
