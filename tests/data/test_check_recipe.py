"""A recipe against its images: all that does not fit is told at once, and how to mend it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from terdit_cli.data.check_recipe import data_mistakes, has_images_here
from terdit_cli.errors import UsageError
from terdit_cli.recipe import Recipe, find_recipe, load_recipe, nearest_divisor

QUICKSTART = Path("recipes/quickstart.yaml")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of 64 x 64 pixels in each of three class folders."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    for label in ("ant", "bee", "cow"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for index in range(2):
            (tmp_path / "set" / label / f"{index}.png").write_bytes(stream.getvalue())
    return tmp_path / "set"


def test_everything_at_once_and_the_line_that_mends_it(images: Path) -> None:
    words = [
        "data.source=folder", f"data.path={images}", "data.image_size=64",
        "train.global_batch_size=100",
    ]  # fmt: skip
    with pytest.raises(UsageError) as caught:
        load_recipe(QUICKSTART, words, data_mistakes)
    message = str(caught.value)
    assert "the recipe has 4 mistakes" in message
    for part in (
        "data.image_size 64 must be a multiple of 7",
        "train.global_batch_size 100 must be a multiple of train.micro_batch_size 64",
        "image source 'folder' has no such split: got 'train'",
        "got 3 classes (ant, bee, cow), expected model.num_classes 10",
    ):
        assert part in message
    fix = message.partition("Fix: add ")[2].rstrip(".").split()
    assert set(fix) == {
        "model.patch_size=8", "train.global_batch_size=128", "data.split=null",
        "model.num_classes=3",
    }  # fmt: skip
    mended = load_recipe(QUICKSTART, [*words, *fix], data_mistakes)
    assert list(data_mistakes(mended)) == []


def test_the_source_of_a_path_is_named(images: Path) -> None:
    with pytest.raises(UsageError, match=r"Fix: add data\.source=folder\."):
        load_recipe(QUICKSTART, [f"data.path={images}"], data_mistakes)


def test_a_folder_named_train_among_the_classes(images: Path) -> None:
    (images / "cow").rename(images / "train")
    recipe = load_recipe(
        QUICKSTART, ["data.source=folder", f"data.path={images}", "data.split=null"]
    )
    (found,) = data_mistakes(recipe)
    assert f"if the folder train was meant: data.path={images}/train" in found.text


def test_images_that_are_elsewhere_are_not_asked_for() -> None:
    words = ["data.source=folder", "data.path=/nowhere/images", "data.split=null"]
    recipe = load_recipe(QUICKSTART, words)
    assert not has_images_here(recipe)
    assert list(data_mistakes(recipe)) == []
    assert has_images_here(load_recipe(QUICKSTART))


def test_bare_names_and_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("quickstart")).name == "quickstart.yaml"
    assert load_recipe(Path("600m")) == load_recipe(Path("recipes/600m.yaml"))
    assert isinstance(load_recipe(Path("4.2b-512")), Recipe)
    with pytest.raises(Exception, match=r"'quickstrat' \(did you mean 'quickstart'.*one of 4\.2b"):
        load_recipe(Path("quickstrat"))
    Path("quickstart").mkdir()  # of images, say
    assert find_recipe(Path("quickstart")).name == "quickstart.yaml"
    Path("600m").write_text("name: mine")  # a file of the user's comes first
    assert load_recipe(Path("600m")).name == "mine"


def test_nearest_divisors() -> None:
    assert [nearest_divisor(64, near) for near in (7, 8, 3, 100)] == [8, 8, 2, 64]
    assert nearest_divisor(28, 5) == 4
    assert nearest_divisor(13, 5) == 1
