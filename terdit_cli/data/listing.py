"""What each source of training images holds, before any image is decoded: names, labels, classes.

Shapes: N images of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.data.decode import decode_image
from terdit_cli.data.files import FolderFiles, ZipFiles, require_folder
from terdit_cli.data.tars import TarFiles, match_shards, shards_in
from terdit_cli.errors import InputFileError
from terdit_cli.system.torchvision_shim import import_vision


@dataclass(frozen=True)
class Listing:
    """A source before decoding: `load(i)` opens image i or raises InputFileError naming it."""

    where: str
    class_names: list[str]
    labels: NDArray[np.int64]
    names: Sequence[str]
    load: Callable[[int], Image.Image]


def list_folder(root: Path) -> Listing:
    """List a folder of class folders by torchvision's rule: sorted class and file names."""
    require_folder(
        root, "folder of images", "set data.path to a folder with one folder of images a class"
    )
    names = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
    )
    if not names:
        raise _no_images(root, "no class folder")
    position = {name: label for label, name in enumerate(names)}
    folder = FolderFiles(root)
    inside = (name for name in folder.names if "/" in name)
    placed = sorted((name.split("/")[0], *name.rpartition("/")[::2]) for name in inside)
    files = [f"{subfolder}/{name}" for _, subfolder, name in placed]
    labels = np.array([position[name] for name, _, _ in placed], dtype=np.int64)
    check_classes(root, names, labels)

    def load(index: int) -> Image.Image:
        return decode_image(folder.read(files[index]), files[index])

    return Listing(str(root), names, labels, files, load)


def list_zip(path: Path) -> Listing:
    """List a zip of class folders; folders that merely wrap all class folders do not count."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        fix = "set data.source=folder" if path.is_dir() else "check the path"
        raise InputFileError("zip not found", got=got, expected="a file", where=path, fix=fix)
    archive = ZipFiles(path)
    parts = {name: name.split("/") for name in archive.names if "/" in name}
    depth = 0
    while (
        parts
        and len({split[depth] for split in parts.values()}) == 1
        and all(len(split) - depth >= 3 for split in parts.values())
    ):
        depth += 1
    files = sorted(parts, key=lambda name: parts[name])
    classes = sorted({split[depth] for split in parts.values()})
    position = {name: label for label, name in enumerate(classes)}
    labels = np.array([position[parts[name][depth]] for name in files], dtype=np.int64)
    check_classes(path, classes, labels)

    def load(index: int) -> Image.Image:
        return decode_image(archive.read(files[index]), files[index])

    return Listing(str(path), classes, labels, files, load)


def list_tars(path: Path) -> Listing:
    """List tar shards: one .tar, a folder of them or a pattern as "train-{000..009}.tar".

    The class of an image is the number in its .cls file (webdataset), else its folder inside the
    tar, else the tar's name (as ImageNet's own n01440764.tar).
    """
    shards = shards_in(path) if path.is_dir() else [path] if path.is_file() else []
    archive = TarFiles(shards or match_shards(str(path)))
    files, numbers = archive.names, archive.labels
    if archive.unlabelled is not None:
        raise InputFileError(
            "an image without a class among images with .cls files",
            got=f"no number in the .cls of {archive.unlabelled}",
            expected="a .cls file with the number of its class beside each image, or none at all",
            where=path,
            fix="complete the .cls files, or leave them out where folders or tars are the classes",
        )
    if numbers and max(numbers) >= len(files):
        raise InputFileError(
            "classes without images", got=f"a class {max(numbers)} among {len(files)} images",
            where=path, fix="number the classes from 0 on, and give all tars of the set",
        )  # fmt: skip
    if numbers:
        labels = np.array(numbers, dtype=np.int64)
        classes = [str(number) for number in range(max(numbers) + 1)]
    else:
        folders = [name.split("/")[-2].removesuffix(".tar") for name in files]
        classes = sorted(set(folders))
        position = {name: label for label, name in enumerate(classes)}
        labels = np.array([position[folder] for folder in folders], dtype=np.int64)
    check_classes(path, classes, labels)

    def load(index: int) -> Image.Image:
        return decode_image(archive.read(files[index]), files[index])

    return Listing(str(path), classes, labels, files, load)


def list_cifar10(path: Path, split: str) -> Listing:
    """List CIFAR-10 through torchvision, which unpickles only files with the known MD5 sums."""
    require_folder(path, "CIFAR-10 folder", "give the folder that holds cifar-10-batches-py")
    root = path.parent if path.name == "cifar-10-batches-py" else path
    cifar10 = import_vision("torchvision.datasets").CIFAR10
    images, labels = [], []
    for train in {"train": [True], "heldout": [False], "all": [True, False]}[split]:
        try:
            part = cifar10(root, train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise InputFileError(
                "CIFAR-10 is missing, incomplete or altered",
                got="at least one batch file without the published MD5 sum",
                expected="cifar-10-batches-py as unpacked from cifar-10-python.tar.gz",
                where=root,
                fix="unpack the archive again, or give a zip of class folders as source zip",
            ) from error
        images.append(part.data)
        labels.append(np.array(part.targets, dtype=np.int64))
    return list_arrays(np.concatenate(images), np.concatenate(labels), part.classes, "CIFAR-10")


def list_arrays(
    images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: list[str], origin: str
) -> Listing:
    """List images that lie decoded in an array uint8 [N, H, W] or [N, H, W, 3]."""
    names = [f"{origin} image {index}" for index in range(len(images))]
    return Listing(
        origin, list(class_names), labels, names, lambda index: Image.fromarray(images[index])
    )


def check_classes(path: Path, class_names: list[str], labels: NDArray[np.int64]) -> None:
    """Raise InputFileError when there is no image, or a class without one."""
    if len(labels) == 0:
        raise _no_images(path, "no images in class folders")
    counts = np.bincount(labels, minlength=len(class_names))
    empty = [class_names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise InputFileError(
            "class folders without images",
            got=", ".join(empty[:10]) + more,
            where=path,
            fix="add images or remove the folders",
        )


def _no_images(path: Path, got: str) -> InputFileError:
    return InputFileError(
        "no training images",
        got=got,
        expected="one folder of JPEG, PNG, WebP, BMP, PPM or TIFF files for each class",
        where=path,
        fix="sort the images into class folders",
    )
