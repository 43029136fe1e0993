"""`ternary.preset`: a set of fields, spelled out in the resolved recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from terdit_cli.errors import UsageError
from terdit_cli.recipe import PRESETS, Recipe, TernarySection, load_recipe
from terdit_cli.train.build import ternary_config

PAPER = {
    "scale": "learned",
    "alpha_init": "randn",
    "adaln_norm": True,
    "granularity": "tensor",
    "activations": "none",
    "ste": "scaled",
    "ste_clip": None,
}
OTHER = {
    "scale": "absmean",
    "alpha_init": "absmean",
    "adaln_norm": False,
    "granularity": "row",
    "activations": "int8",
    "ste": "identity",
    "ste_clip": 2.5,
}
RECIPES = Path(__file__).parents[1] / "recipes"


def write(folder: Path, **ternary: object) -> Path:
    """Write a recipe with this `ternary` section, its keys in this order."""
    path = folder / "try.yaml"
    values = {
        "name": "try",
        "model": {"patch_size": 7},
        "data": {"image_size": 28, "channels": 1},
        "ternary": ternary,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def chosen(recipe: Recipe) -> dict[str, object]:
    """Return the fields that a preset is about."""
    return {name: getattr(recipe.ternary, name) for name in PAPER}


def test_paper_is_what_was_published() -> None:
    """Whatever the defaults become."""
    assert PRESETS["paper"] == PAPER
    assert PAPER.keys() == TernarySection.model_fields.keys() - {"preset", "enabled"}


def test_best_and_none_are_the_defaults(tmp_path: Path) -> None:
    default = load_recipe(write(tmp_path))
    for preset in ("best", None):
        recipe = load_recipe(write(tmp_path, preset=preset))
        assert recipe == default
        assert recipe.ternary == TernarySection()


def test_a_resolved_recipe_spells_the_set_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, preset="paper"))
    assert chosen(recipe) == PAPER
    assert yaml.safe_load(recipe.to_yaml())["ternary"] == {"enabled": True, **PAPER}
    # So the hash says what was trained, not how it was written, and a later set is no other run.
    assert recipe.sha256() == load_recipe(write(tmp_path, **PAPER)).sha256()
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert ternary_config(recipe).alpha_init == "randn"


@pytest.mark.parametrize("name", PAPER)
def test_a_field_beside_the_preset_wins(tmp_path: Path, name: str) -> None:
    """In any order in the file, and as a word after it: the ablations of the published model."""
    wanted = PAPER | {name: OTHER[name]}
    field = {name: OTHER[name]}
    assert chosen(load_recipe(write(tmp_path, preset="paper", **field))) == wanted
    assert chosen(load_recipe(write(tmp_path, **field, preset="paper"))) == wanted
    word = f"ternary.{name}={yaml.safe_dump(OTHER[name]).split()[0]}"
    assert chosen(load_recipe(write(tmp_path, preset="paper"), [word])) == wanted
    assert chosen(load_recipe(write(tmp_path), ["ternary.preset=paper", word])) == wanted
    assert chosen(load_recipe(write(tmp_path), [word, "ternary.preset=paper"])) == wanted


def test_a_preset_as_a_word_replaces_the_fields_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, enabled=False, **OTHER)
    paper = load_recipe(path, ["ternary.preset=paper"])
    assert chosen(paper) == PAPER
    assert not paper.ternary.enabled  # of no set: the baseline of a preset is this word away
    assert load_recipe(path, ["ternary.preset=best", "ternary.enabled=true"]) == load_recipe(
        write(tmp_path)
    )
    (tmp_path / "resolved.yaml").write_text(paper.to_yaml())
    again = load_recipe(tmp_path / "resolved.yaml", ["ternary.preset=best"])
    assert again.ternary == TernarySection(enabled=False)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("ternary.preset=papr", ["'papr'", "did you mean 'paper'?"]),
        ("ternary.preset=[paper]", ["ternary.preset", "paper"]),
        ("ternary.preset=yes", ["ternary.preset", "yes/no; expected"]),
        ("ternary.prest=paper", ["unknown key (did you mean 'preset'?)"]),
    ],
)
def test_presets_that_there_are_not(tmp_path: Path, word: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(write(tmp_path), [word])
    for part in ["1 mistake", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["600m", "4.2b", "4.2b-512"])
def test_the_published_recipes_are_published(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.ternary.enabled
    assert chosen(recipe) == PAPER
