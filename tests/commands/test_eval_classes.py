"""`--per-class`: the two sides name their classes in different ways, and in different orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.class_names import imagenet_class_names
from terdit_cli.commands.eval_fid import SetSource
from terdit_cli.data.image_set import ImageSet
from terdit_cli.errors import UsageError
from terdit_cli.evaluate.per_class import classes_asked_for
from terdit_cli.evaluate.result import EvalResult


def source(names: list[str], where: str = "a set") -> SetSource:
    """Two images of each class, in the order of the classes; nothing to see on them."""

    def load(index: int) -> tuple[Image.Image, str]:
        raise AssertionError("nobody looks at image", index)

    labels = np.arange(len(names)).repeat(2)
    images = ImageSet(where, list(map(str, labels)), load, str, names, labels)
    return SetSource(images, list(range(len(images))), [])


def places(asked: str, ours: list[str], theirs: list[str]) -> dict[str, tuple[int, int]]:
    """Return the place of each class on both sides."""
    members = classes_asked_for(asked, source(ours), "the reference", source(theirs))
    for fakes, reals in members.values():
        assert fakes[1] == fakes[0] + 1
        assert reals[1] == reals[0] + 1
    return {name: (fakes[0] // 2, reals[0] // 2) for name, (fakes, reals) in members.items()}


NUMBERS = [str(number) for number in range(12)]  # as labels; folders come as 0, 1, 10, 11, 2, ...


def test_numbers_on_both_sides_are_names() -> None:
    as_folders = sorted(NUMBERS)
    expected = {name: (as_folders.index(name), int(name)) for name in as_folders}
    assert places("all", as_folders, NUMBERS) == expected
    assert places("10,2", as_folders, NUMBERS) == {"10": (2, 10), "2": (4, 2)}
    assert places("30", ["2", "30"], ["30", "2"]) == {"30": (1, 0)}
    with pytest.raises(UsageError, match="got 0 of '3' in the reference"):
        places("all", ["1", "2", "3"], ["0", "1", "2"])
    with pytest.raises(UsageError, match="unknown class: got '1', expected a class name"):
        places("1", ["2", "30"], ["30", "2"])


def test_numbers_of_one_side_are_ids_of_the_other() -> None:
    animals = ["ant", "bee", "cow"]
    assert places("all", animals, ["0", "1", "2"]) == {"ant": (0, 0), "bee": (1, 1), "cow": (2, 2)}
    assert places("cow,0", animals, ["0", "2"]) == {"cow": (2, 1), "ant": (0, 0)}
    # As `sample -o images.npz` writes them: all of the images are all that is asked for.
    assert places("all", ["1", "2"], animals) == {"bee": (0, 1), "cow": (1, 2)}
    assert places("bee", ["1", "2"], animals) == {"bee": (0, 1)}
    with pytest.raises(UsageError, match=r"got 3, expected 0 to 2, ant to cow \(the real ones\)"):
        classes_asked_for("all", source(animals), "x", source(["0", "3"], "the real ones"))


def test_names_in_another_order() -> None:
    found = places("all", ["cow", "ant"], ["ant", "bee", "cow"])
    assert found == {"cow": (0, 2), "ant": (1, 0)}


@pytest.mark.slow
def test_imagenet_s_folders_are_its_classes() -> None:
    """Two classes are called crane, two maillot: their wnids tell which is which."""
    wnids = [names[-1] for names in imagenet_class_names()]
    cranes = [134, 517]
    some = [wnids[index] for index in (207, *cranes)]
    found = places("all", some, wnids[::-1])
    assert list(found) == ["golden retriever", "crane (1)", "crane (2)"]
    assert [999 - real for _, real in found.values()] == [207, *cranes]
    assert len(places("all", wnids, wnids)) == 1000
    assert places("n02099601", wnids, wnids) == {"golden retriever": (207, 207)}
    assert places("134", wnids, wnids) == {"crane (134)": (134, 134)}
    with pytest.raises(UsageError, match="classes 134, 517 share"):
        places("crane", wnids, wnids)


def test_a_name_that_could_be_either_of_two_classes_is_neither() -> None:
    wnids = [names[-1] for names in imagenet_class_names()]
    with pytest.raises(UsageError, match="got 0 of 'crane' in the reference"):
        places("all", ["crane"], [wnids[0], wnids[1]])


def test_classes_are_checked_before_hours_of_work(
    evaluate: Callable[..., EvalResult], tmp_path: Path
) -> None:
    real, work = str(tmp_path / "real.npz"), tmp_path / "work"
    np.savez(real, arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=[0, 0, 1, 1])
    with pytest.raises(UsageError, match="class id out of range: got 2"):
        evaluate(images=real, reference=real, per_class="2", work=work)
    assert not work.exists()
