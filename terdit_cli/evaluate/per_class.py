"""`--per-class`: which images of the two sides are of the same class.

A class of one side is that class of the other with which it shares a name: a folder n02099601 of
ImageNet is a model's "golden retriever". Labels that are numbers are ids where the other side has
names, and names where it has numbers too: of the folders 1, 2 and 10, the label 10 means the last.
"""

from __future__ import annotations

from terdit_cli import console
from terdit_cli.class_names import find_classes, numbers_that_are_names, shown_names
from terdit_cli.errors import UsageError
from terdit_cli.evaluate.image_features import Source
from terdit_cli.evaluate.scores import ClassMembers, class_members

Names = list[list[str]]  # what each class can be called, the name to show first


def classes_asked_for(asked: str, ours: Source, where: str, theirs: Source | None) -> ClassMembers:
    """Return the images of each class of a query on both sides, by the name to show.

    Args:
        where, theirs: the reference, and its images where it has any.

    Raises:
        UsageError: an unknown class, too few images of one, or a side without classes.
    """
    for side, place, images in (
        ("images", ours.where, ours),
        ("a reference", where, theirs),
    ):
        if images is None or not images.class_names:
            raise UsageError(
                "--per-class needs classes on both sides",
                got=f"{side} without classes",
                expected="images in class folders, an .npz of images with labels, or a model",
                where=place,
                fix="leave --per-class out",
            )
    assert theirs is not None, "it has classes"
    if _numbers(ours.class_names) and not _numbers(theirs.class_names):
        known = theirs.class_names
        our_places, their_places = _by_id(ours, known), list(range(len(known)))
    else:
        known = ours.class_names
        our_places = list(range(len(known)))
        if _numbers(theirs.class_names) and not _numbers(known):
            their_places = _by_id(theirs, known)
        else:
            called = [set(group) for group in known]
            their_places = [_by_name(group, called) for group in theirs.class_names]
    if asked.strip().lower() == "all":
        wanted = sorted(set(our_places))
    else:
        wanted = find_classes(asked, known)
        if (line := numbers_that_are_names(asked, known)) is not None:
            console.note(line)
    shown = [*shown_names(known), ""]  # -1, the last: a class that our side does not have
    return class_members(
        _of_each_image(ours, our_places, shown),
        _of_each_image(theirs, their_places, shown),
        [shown[place] for place in wanted],
    )


def _numbers(names: Names) -> bool:
    return all(group[0].isdecimal() for group in names)


def _by_id(source: Source, known: Names) -> list[int]:
    """Return the ids that a side's labels are.

    Raises:
        UsageError: one is out of range.
    """
    ids = [int(group[0]) for group in source.class_names]
    if max(ids) >= len(known):
        raise UsageError(
            "a label that is no class of the other side",
            got=max(ids),
            expected=f"0 to {len(known) - 1}, {known[0][0]} to {known[-1][0]}",
            where=source.where,
            fix="give both sides the same classes, or leave --per-class out",
        )
    return ids


def _by_name(names: list[str], known: list[set[str]]) -> int:
    """Return the place of the class that shares the most names, -1 if none or several do.

    ImageNet has two classes "crane": a folder named by wnid shares two names with one of them.
    """
    shared = [len(group.intersection(names)) for group in known]
    most = max(shared)
    return shared.index(most) if most and shared.count(most) == 1 else -1


def _of_each_image(source: Source, places: list[int], shown: list[str]) -> list[str]:
    return [shown[places[source.class_id(image)]] for image in range(source.count)]
