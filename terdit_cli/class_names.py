"""Turns what a user types into class ids: ids, names, lists of either, and `all`.

A class can have several names (ImageNet's synonyms); a name that several classes share is
refused with their ids.
"""

from __future__ import annotations

import importlib.resources
import json
import unicodedata
from collections import Counter

from terdit_cli.errors import UsageError, did_you_mean


def _imagenet() -> list[tuple[str, list[str]]]:
    """Return (wnid, names) of ImageNet's 1000 classes in the standard order (sorted by wnid)."""
    asset = importlib.resources.files("terdit_cli.data") / "assets" / "imagenet_classes.json"
    classes = json.loads(asset.read_text(encoding="utf-8"))
    return [(classes[str(index)][0], classes[str(index)][1]) for index in range(len(classes))]


def imagenet_class_names() -> list[list[str]]:
    """Return the names of ImageNet's 1000 classes, wnids last, in the standard order."""
    return [[*names, wnid] for wnid, names in _imagenet()]


def names_of_classes(stored: list[str], num_classes: int) -> list[list[str]]:
    """Return the names of each class of a model, the one to show first.

    ImageNet's names stand in for a model of 1000 classes that stores none and for folders named
    by wnid; classes without any name have their number as name.
    """
    if not stored and num_classes == 1000:
        return imagenet_class_names()
    if not stored:
        return [[str(index)] for index in range(num_classes)]
    by_wnid = {group[-1]: group for group in imagenet_class_names()}
    return [by_wnid.get(name, [name]) for name in stored]


def shown_names(names: list[list[str]]) -> list[str]:
    """Return the first name of each class, with its id where several share it: crane (134)."""
    counts = Counter(group[0] for group in names)
    return [
        group[0] if counts[group[0]] == 1 else f"{group[0]} ({index})"
        for index, group in enumerate(names)
    ]


def find_class(query: str, names: list[list[str]]) -> int:
    """Return the id of the class meant by one of its names, in any case, or by its id.

    A number that is a class's name means that class, and where all names are numbers nothing
    else: of the folders 1, 2 and 10 the class 10 is the last.

    Raises:
        UsageError: an id out of range, an unknown name (with the nearest one), or a name that
            several classes share (with their ids).
    """
    query = query.strip()
    found = _matches(query, names)
    if len(found) == 1:
        return found[0]
    if found:
        owners = ", ".join(map(str, found))
        raise UsageError(
            "ambiguous class name",
            got=f"{query!r}, a name that classes {owners} share",
            fix=f"give the id of the class: one of {owners}",
        )
    by_id = not all(group[0].isdecimal() for group in names) or _are_ids(names)
    if by_id and query.removeprefix("-").isdecimal():
        if 0 <= int(query) < len(names):
            return int(query)
        of_imagenet = _in_imagenet(query, names)
        raise UsageError(
            "class id out of range",
            got=query + of_imagenet,
            expected=f"0 to {len(names) - 1} ({_some(names)})",
            fix=_OTHER_MODEL if of_imagenet else _FIX,
        )
    near = did_you_mean(_folded(query), [_folded(name) for group in names for name in group])
    of_imagenet = "" if near else _in_imagenet(query, names)
    ids = f" or an id from 0 to {len(names) - 1}" if by_id else ""
    raise UsageError(
        "unknown class",
        got=repr(query) + near + of_imagenet,
        expected=f"a class name{ids} ({_some(names)})",
        fix=_OTHER_MODEL if of_imagenet else _FIX,
    )


def find_classes(query: str, names: list[list[str]]) -> list[int]:
    """Return the class ids for `all`, one class, or a comma-separated list, in its order.

    A name that matches as a whole is not split at its commas.

    Raises:
        UsageError: as `find_class`, for the first part that does not name one class.
    """
    if query.strip().lower() == "all":
        return list(range(len(names)))
    if "," not in query or _matches(query.strip(), names):
        return [find_class(query, names)]
    return [find_class(part, names) for part in query.split(",")]


def numbers_that_are_names(query: str, names: list[list[str]]) -> str | None:
    """Return a line on the numbers in a query that name classes of other ids, None without any."""
    whole = query.strip()
    parts = [whole] if _matches(whole, names) else [part.strip() for part in query.split(",")]
    found = {part: find_class(part, names) for part in parts if part.isdecimal()}
    taken = [f"{part} (id {place})" for part, place in found.items() if int(part) != place]
    return f"taken as names of classes, not as ids: {', '.join(taken)}" if taken else None


def _some(names: list[list[str]]) -> str:
    """Return how many classes there are, and the first of them."""
    first = ", ".join(group[0] for group in names[:_SHOWN])
    return f"{len(names)}: {first}{', ...' if len(names) > _SHOWN else ''}"


def _in_imagenet(query: str, names: list[list[str]]) -> str:
    """Return which class of ImageNet a query means, where the classes are not ImageNet's."""
    imagenet = imagenet_class_names()
    if len(names) == len(imagenet):
        return ""
    # A number little out of range is a slip.
    if query.isdecimal() and 2 * len(names) <= int(query) < len(imagenet):
        return f", of ImageNet {imagenet[int(query)][0]!r}"
    found = _matches(query, imagenet)
    return f", class {found[0]} of ImageNet" if found else ""


_SHOWN = 10
_OTHER_MODEL = (
    "name a model of ImageNet with --model, such as a folder of TerDiT's release packed with "
    "`terdit pack`"
)
_FIX = "give ids (207), names (golden retriever), a list (3,7,9) or all"


def _matches(query: str, names: list[list[str]]) -> list[int]:
    """Return the ids of the classes with that name, or whose joined names it is.

    Joined as ImageNet's lists have them, without the wnid, which comes last here.
    """
    wanted = _folded(query)
    return [
        index
        for index, group in enumerate(names)
        if wanted
        in (_folded(name) for name in [*group, ", ".join(group), ", ".join(group[:-1])] if name)
    ]


def _are_ids(names: list[list[str]]) -> bool:
    return all(group[0] == str(index) for index, group in enumerate(names))


def _folded(name: str) -> str:
    """Return a name for comparing, whatever its case and encoding of accents (macOS uses two)."""
    return unicodedata.normalize("NFC", name).casefold()
