"""CIFAR-10 through torchvision, which unpickles only files with the known MD5 sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from terdit_cli.data.files import require_folder
from terdit_cli.data.image_set import ImageSet, array_set
from terdit_cli.errors import InputFileError
from terdit_cli.system.torchvision_shim import import_vision

_FOLDER = "cifar-10-batches-py"


def is_cifar10(path: Path) -> bool:
    """Say whether a folder is, or holds, cifar-10-batches-py."""
    return (path / _FOLDER).is_dir() or (path.name == _FOLDER and path.is_dir())


def open_cifar10(path: Path, split: str) -> ImageSet:
    """Open CIFAR-10 from the folder that holds cifar-10-batches-py, or that one itself.

    Raises:
        InputFileError: missing, incomplete or altered.
    """
    require_folder(path, "CIFAR-10 folder", f"give the folder that holds {_FOLDER}")
    root = path.parent if path.name == _FOLDER else path
    cifar10 = import_vision("torchvision.datasets").CIFAR10
    images, labels = [], []
    for train in {"train": [True], "heldout": [False], "all": [True, False]}[split]:
        try:
            part = cifar10(root, train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise InputFileError(
                "CIFAR-10 is missing, incomplete or altered",
                got="at least one batch file without the published MD5 sum",
                expected=f"{_FOLDER} as unpacked from cifar-10-python.tar.gz",
                where=root,
                fix="unpack the archive again, or give a zip of class folders as source zip",
            ) from error
        images.append(part.data)
        labels.append(np.array(part.targets, dtype=np.int64))
    return array_set("CIFAR-10", np.concatenate(images), np.concatenate(labels), part.classes)
