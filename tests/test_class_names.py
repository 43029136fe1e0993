"""Class queries: ids, names, lists, all; and what is said when nothing fits."""

from __future__ import annotations

import pytest

from terdit_cli.class_names import (
    find_class,
    find_classes,
    imagenet_class_names,
    numbers_that_are_names,
)
from terdit_cli.data.sources.idx import FASHION_CLASSES
from terdit_cli.errors import UsageError

IMAGENET = imagenet_class_names()
FASHION = [[name] for name in FASHION_CLASSES]


def test_packaged_list() -> None:
    assert len(IMAGENET) == 1000
    assert IMAGENET[0] == ["tench", "Tinca tinca", "n01440764"]
    assert IMAGENET[207] == ["golden retriever", "n02099601"]
    assert IMAGENET[999][0] == "toilet tissue"
    assert all(names and all(names) for names in IMAGENET)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("207", [207]),
        (" 207 ", [207]),
        ("golden retriever", [207]),
        ("GOLDEN Retriever", [207]),
        ("man-eating shark", [2]),
        ("3,7,9", [3, 7, 9]),
        ("9, 3 ,9", [9, 3, 9]),
        ("golden retriever,tench", [207, 0]),
        ("golden retriever, 3", [207, 3]),
        ("lion, king of beasts, Panthera leo", [291]),
        ("all", list(range(1000))),
        ("ALL", list(range(1000))),
    ],
)
def test_imagenet(query: str, expected: list[int]) -> None:
    assert find_classes(query, IMAGENET) == expected


def test_every_name_that_is_not_shared_finds_its_class() -> None:
    owners: dict[str, set[int]] = {}
    for index, names in enumerate(IMAGENET):
        for name in names:
            owners.setdefault(name.lower(), set()).add(index)
    for name in list(owners)[::9]:
        if len(owners[name]) == 1:
            assert {find_class(name, IMAGENET)} == owners[name]


def test_other_class_lists() -> None:
    assert find_classes("Sandal,Bag", FASHION) == [5, 8]
    assert find_class("t-shirt/TOP", FASHION) == 0
    assert find_classes("all", FASHION) == list(range(10))
    assert find_classes("a,b", [["a"], ["b"], ["a,b"]]) == [2]


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("goldn retriever", ["'goldn retriever'", "did you mean 'golden retriever'?", "0 to 999"]),
        ("xqzzk", ["'xqzzk'", "0 to 999", "Fix: give ids"]),
        ("1000", ["got 1000", "0 to 999", "Fix: give ids"]),
        ("-1", ["got -1", "0 to 999"]),
        ("3,1000", ["got 1000"]),
        ("3,,4", ["got ''"]),
        ("", ["got ''"]),
        ("tench,goldn retriever", ["'goldn retriever'"]),
        ("crane", ["'crane'", "134, 517", "Fix: give the id of the class"]),
        ("Maillot", ["'Maillot'", "638, 639"]),
        ("tench,crane", ["134, 517"]),
    ],
)
def test_queries_that_fit_nothing_or_too_much(query: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_classes(query, IMAGENET)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2


def test_numbers_as_names() -> None:
    """Folders 0 to 11 in the order of text: 10 is the class of that name, as everywhere else."""
    folders = [[name] for name in sorted(map(str, range(12)))]
    assert [find_class(str(number), folders) for number in (0, 2, 10)] == [0, 4, 2]
    assert find_classes("10,11", folders) == [2, 3]
    with pytest.raises(UsageError, match=r"unknown class: got '12'.*expected a class name"):
        find_class("12", folders)
    mixed = [["1"], ["cat"], ["dog"]]
    assert [find_class(query, mixed) for query in ("1", "0", "2")] == [0, 0, 2]
    ids = [[str(number)] for number in range(12)]
    assert [find_class(str(number), ids) for number in (0, 2, 10)] == [0, 2, 10]
    with pytest.raises(UsageError, match="class id out of range: got 12, expected 0 to 11"):
        find_class("12", ids)


def test_numbers_that_are_told_of() -> None:
    folders = [[name] for name in sorted(map(str, range(12)))]
    told = numbers_that_are_names("0,10,2", folders)
    assert told == "taken as names of classes, not as ids: 10 (id 2), 2 (id 4)"
    assert numbers_that_are_names("0", folders) is None
    assert numbers_that_are_names("all", folders) is None
    # A comma within a name splits nothing.
    assert numbers_that_are_names("model, 100", [["model, 100"], ["other"]]) is None


def test_accents_as_one_character_or_two() -> None:
    names = [["cafe\u0301"], ["th\u00e9"]]
    assert find_classes("caf\u00e9,the\u0301", names) == [0, 1]
    with pytest.raises(UsageError, match="did you mean"):
        find_class("cafee\u0301", names)


def test_a_class_of_imagenet_that_a_model_lacks() -> None:
    for query, told in (
        ("207", "got 207, of ImageNet 'golden retriever', expected 0 to 9 (10: T-shirt/top,"),
        ("Golden Retriever", "'Golden Retriever', class 207 of ImageNet, expected a class name"),
        ("10", "got 10, expected 0 to 9"),
    ):
        with pytest.raises(UsageError) as caught:
            find_classes(query, FASHION)
        assert told in str(caught.value)
        assert ("terdit pack" in str(caught.value)) == ("ImageNet" in told)
