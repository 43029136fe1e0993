"""`terdit recipes` and `terdit init`: finding and making a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from terdit_cli.commands import init, recipes
from terdit_cli.data.check_recipe import data_mistakes
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.recipe import load_recipe
from terdit_cli.train.suggest import look_at, recipe_text, suggest

ROOT = Path(__file__).parents[2]


def make_images(root: Path, classes: int, each: int, size: tuple[int, int], colour: bool) -> Path:
    generator = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for index in range(each):
            shape = (size[1], size[0], 3) if colour else (size[1], size[0])
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_the_shipped_recipes(terdit: Callable[..., Any]) -> None:
    found = {recipe.name: recipe for recipe in recipes.run()}
    assert set(found) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert all(recipe.about and not recipe.about.startswith("terdit") for recipe in found.values())
    listed = terdit("recipes")
    assert listed.code == 0
    assert all(name in listed.out for name in found)
    assert max(map(len, listed.out.splitlines())) <= 80
    shown = terdit("recipes", "show", "quickstart")
    assert shown.out.strip() == (ROOT / "recipes" / "quickstart.yaml").read_text().strip()
    assert yaml.safe_load(shown.out)["name"] == "quickstart"
    assert "did you mean 'quickstart'" in terdit("recipes", "show", "quickstrat").err
    assert terdit("recipes", "quickstart").err.endswith("Fix: terdit recipes show quickstart.\n")


def test_the_schema_is_that_of_the_code_and_of_the_shipped_recipes() -> None:
    kept = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert kept == json.loads(json.dumps(recipes.schema())), "run `make docs`"
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert "# yaml-language-server: $schema=recipe.schema.json\n" in path.read_text()
        values = yaml.safe_load(path.read_text())
        assert set(values) <= set(kept["properties"])


@pytest.mark.parametrize(
    ("side", "colour", "classes", "expected"),
    [
        ((64, 64), True, 3, {"image_size": 64, "channels": 3, "patch_size": 8}),
        ((28, 28), False, 2, {"image_size": 28, "channels": 1, "patch_size": 4}),
        ((37, 37), True, 2, {"image_size": 37, "channels": 3, "patch_size": 1}),
        ((200, 150), True, 2, {"image_size": 64, "channels": 3, "patch_size": 8}),
        ((20, 9), False, 1, {"image_size": 8, "channels": 1, "patch_size": 1}),
    ],
)
def test_what_is_chosen_trains(
    side: tuple[int, int], colour: bool, classes: int, expected: dict[str, int], tmp_path: Path
) -> None:
    data = make_images(tmp_path / "my images", classes, 5, side, colour)
    facts = look_at(data)
    assert (facts.images, facts.colour) == (5 * classes, colour)
    values = suggest(facts, gpus=0)
    path = tmp_path / "first.yaml"
    path.write_text(recipe_text(values, facts, path))
    recipe = load_recipe(path, more=data_mistakes)
    assert list(data_mistakes(recipe)) == []
    assert recipe.name == "my-images"
    assert recipe.data.path == data
    found = {**recipe.data.model_dump(), **recipe.model.model_dump()}
    assert {key: found[key] for key in expected} == expected
    assert recipe.train.global_batch_size % recipe.train.micro_batch_size == 0


@pytest.mark.parametrize(
    ("images", "size"), [(900_000, "600m"), (60_000, "base"), (2_000, "small")]
)
def test_what_is_chosen_for_a_gpu(images: int, size: str, tmp_path: Path) -> None:
    facts = look_at(make_images(tmp_path / "set", 2, 2, (300, 280), True))
    values = suggest(type(facts)(**{**vars(facts), "images": images}), gpus=8)
    assert values["model"]["size"] == size
    assert (values["data"]["image_size"], values["model"]["patch_size"]) == (256, 2)
    path = tmp_path / "gpu.yaml"
    path.write_text(recipe_text(values, facts, path))
    recipe = load_recipe(path, more=data_mistakes)
    assert (recipe.input_size, recipe.in_channels) == (32, 4)


@pytest.mark.slow
def test_init_writes_a_recipe_and_says_what_it_takes(
    terdit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "cats", 2, 6, (16, 16), True)
    costs = {"muon": 0.5, "adamw": 0.4}
    monkeypatch.setattr(init, "seconds_per_step", lambda recipe: costs[recipe.optim.kind])
    done = terdit("init", "--data", "cats")
    assert done.code == 0, done.err
    assert "12 colour images, 16 pixels, in 2 classes (class 0, class 1)" in done.out
    assert "about 25m 00s on this machine" in done.out
    assert done.out.endswith("\nterdit train cats.yaml\n")
    assert load_recipe(Path("cats.yaml")).optim.kind == "muon"
    costs["adamw"] = 0.2  # a CPU without bfloat16
    assert "about 10m 00s" in terdit("init", "--data", "cats", "-o", "b.yaml").out
    assert load_recipe(Path("b.yaml")).optim.kind == "adamw"
    again = terdit("init", "--data", "cats")
    assert (again.code, "the output exists: got cats.yaml" in again.err) == (2, True)
    values = json.loads(terdit("init", "--data", "cats", "--force", "--gpu", "h100", "--json").out)
    assert (values["images"], values["classes"]) == (12, ["class 0", "class 1"])
    assert values["seconds"] > 0
    done = terdit("init", "--data", "cats", "--force", "--gpu", "h100", "--gpus", 8)
    assert "at 40% MFU" in done.out
    assert done.out.endswith("torchrun --nproc-per-node 8 -m terdit_cli train cats.yaml\n")
    done = terdit("train", "cats.yaml", "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize("gpus", [1, 3, 8, 64, 512])
def test_a_batch_divides_over_the_gpus(gpus: int, tmp_path: Path) -> None:
    facts = look_at(make_images(tmp_path / "set", 2, 2, (64, 64), True))
    train = suggest(type(facts)(**{**vars(facts), "images": 60_000}), gpus)["train"]
    assert train["global_batch_size"] % (gpus * train["micro_batch_size"]) == 0
    assert 192 <= train["global_batch_size"] <= 512


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("photos.yaml", "photos"),
        ("caf\u00e9 au lait.v2.yaml", "caf-au-lait"),
        ("---.yaml", "first"),
    ],
)
def test_names_that_a_recipe_can_have(path: str, name: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "it's: #1 [a]", 1, 2, (8, 8), False)
    facts = look_at(data)
    values = suggest(facts, 0, tmp_path / path)
    assert values["name"] == name
    (tmp_path / path).write_text(recipe_text(values, facts, tmp_path / path), encoding="utf-8")
    assert load_recipe(tmp_path / path, more=data_mistakes).data.path == data


def test_first_steps_that_cannot_be_made(terdit: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="images not found"):
        look_at(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "1.png")
    with pytest.raises(InputFileError, match="no training images with classes"):
        look_at(tmp_path / "flat")
    with pytest.raises(UsageError, match=r"a recipe is a YAML file: got x\.json"):
        init.run(None, tmp_path / "x.json")
    assert terdit("init", "--gpu", "h1000", "-o", tmp_path / "a.yaml").code == 2


def test_a_measured_step_takes_time() -> None:
    recipe = load_recipe(Path("quickstart"), ["model.size=nano", "train.micro_batch_size=8"])
    assert init.seconds_per_step(recipe) > 0
