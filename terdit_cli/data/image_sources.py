"""The table of where images come from, and how a set is found by what a user types.

Everything that can be trained on can be scored, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from terdit_cli.data.image_set import ImageSet, check_classes
from terdit_cli.data.patterns import is_pattern
from terdit_cli.data.sources.cifar10 import is_cifar10, open_cifar10
from terdit_cli.data.sources.folder import open_folder
from terdit_cli.data.sources.idx import (
    EMBEDDED,
    is_fashion_mnist,
    open_embedded,
    open_fashion_mnist,
)
from terdit_cli.data.sources.npz_images import open_npz
from terdit_cli.data.sources.parquet import open_parquet
from terdit_cli.data.sources.tars import open_tars, shards_in
from terdit_cli.data.sources.zips import open_zip
from terdit_cli.errors import InputFileError, UsageError, did_you_mean

SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True)
class ImageSource:
    """One kind of place.

    Attributes:
        open: from (path, split, with_classes) to the set; `path` is empty for the embedded one.
        finds: says whether an existing path, or a pattern, is such a place.
        splits: the parts that can be asked for; () for none, None for those that it names itself.
        scored: the part that is scored where none is named.
    """

    open: Callable[[Path, str, bool], ImageSet]
    finds: Callable[[Path], bool]
    splits: tuple[str, ...] | None = ()
    scored: str = "train"


def _has_suffix(suffix: str) -> Callable[[Path], bool]:
    return lambda path: path.suffix.lower() == suffix and not path.is_dir()


def _holds_parquet(path: Path) -> bool:
    if not path.is_dir():
        return path.suffix.lower() == ".parquet"
    return any(True for folder in (path, path / "data") for _ in folder.glob("*.parquet"))


def _holds_tars(path: Path) -> bool:
    if not path.is_dir():
        return path.suffix.lower() == ".tar" or is_pattern(str(path))
    return bool(shards_in(path))


# In the order in which a path is tried: a folder of images is what no other kind is.
SOURCES: dict[str, ImageSource] = {
    EMBEDDED: ImageSource(
        lambda _, split, __: open_embedded(split), lambda _: False, SPLITS, "all"
    ),
    "cifar10": ImageSource(lambda path, split, _: open_cifar10(path, split), is_cifar10, SPLITS),
    "fashion-mnist": ImageSource(
        lambda path, split, _: open_fashion_mnist(path, split), is_fashion_mnist, SPLITS
    ),
    "zip": ImageSource(
        lambda path, _, with_classes: open_zip(path, with_classes), _has_suffix(".zip")
    ),
    "npz": ImageSource(
        lambda path, _, with_classes: open_npz(path, with_classes), _has_suffix(".npz")
    ),
    "parquet": ImageSource(
        lambda path, split, _: open_parquet(path, split or None), _holds_parquet, None
    ),
    "tars": ImageSource(lambda path, _, with_classes: open_tars(path, with_classes), _holds_tars),
    "folder": ImageSource(
        lambda path, _, with_classes: open_folder(path, with_classes), Path.is_dir
    ),
}


def has_held_out(source: str) -> bool:
    """Return whether a source has a split that no model is trained on."""
    return source in SOURCES and SOURCES[source].splits == SPLITS


def open_labelled(source: str, path: Path | None, split: str | None = None) -> ImageSet:
    """Open images to train on: each with a class, and an image for each class.

    Args:
        source: a row of SOURCES.
        path: where they are; None for the embedded ones.
        split: None means train, and everything of a source that has no splits.

    Raises:
        UsageError: an unknown source or split, a missing or a superfluous path.
        InputFileError: missing, empty or damaged data.
    """
    if source not in SOURCES:
        raise UsageError(
            "unknown image source",
            got=repr(source) + did_you_mean(source, SOURCES),
            expected=f"one of {', '.join(SOURCES)}",
            where="data.source",
        )
    if (path is None) != (source == EMBEDDED):
        raise UsageError(
            f"image source {source!r} " + ("needs a path" if path is None else "takes no path"),
            got=path,
            where="data.path",
            fix="set data.path" if path is None else "remove data.path or set data.source=folder",
        )
    images = SOURCES[source].open(
        path or Path(), _split(source, split, "train", "data.split"), True
    )
    return check_classes(path or source, images)


def open_image_set(where: str) -> ImageSet:
    """Open images to score by what they are called on the command line.

    Args:
        where: a path of any kind, a pattern of tars or parquet files, or `embedded`; with :SPLIT
            for one part of a data set that has parts.

    Raises:
        InputFileError: missing, empty, damaged or of another kind. UsageError: a wrong split.
    """
    name, split = find_images(where)
    path = Path(name)
    source = EMBEDDED if name == EMBEDDED else source_of(path)
    row = SOURCES[source]
    return row.open(path, _split(source, split, row.scored, where), False)


def source_of(path: Path) -> str:
    """Return which row of SOURCES an existing path, or a pattern, is.

    Raises:
        InputFileError: none.
    """
    found = next((source for source, row in SOURCES.items() if row.finds(path)), None)
    if found is None:
        raise InputFileError(
            "not a collection of images",
            got=path.suffix or "a file without suffix",
            expected="a folder, .zip, .tar, .npz or .parquet",
            where=path,
            fix="put the images into a folder or a zip",
        )
    return found


def find_images(where: str) -> tuple[str, str]:
    """Return (path, split) of what is called so on the command line, without opening it.

    Raises:
        InputFileError: nothing there.
    """
    name, _, split = where.rpartition(":")
    if Path(where).exists() or not name:
        name, split = where, ""
    if name != EMBEDDED and not Path(name).exists() and not is_pattern(name):
        raise InputFileError("images not found", where=where, fix="check the path")
    return name, split


def _split(source: str, split: str | None, default: str, where: str) -> str:
    """Return the part of a source that is meant, "" for all of one that has none.

    Raises:
        UsageError: it has no such part.
    """
    splits = SOURCES[source].splits
    if splits is None:
        return split or ""
    if not split:
        return default if splits else ""
    if split not in splits and not (split == "all" and not splits):
        raise UsageError(
            f"image source {source!r} has no such split",
            got=repr(split),
            expected=f"one of {', '.join(splits)}" if splits else "all",
            where=where,
            fix=None if splits else "leave the split out, or give each part by itself",
        )
    return split
