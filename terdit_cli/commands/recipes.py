"""`terdit recipes`: the shipped recipes, one of them as text, and the schema of all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terdit_cli.recipe import Recipe, find_recipe, load_recipe, shipped_recipes


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe of the package."""

    name: str
    path: Path
    about: str  # the line that its file says of itself
    size: str
    image_size: int
    data: str
    steps: int
    global_batch_size: int


def run() -> list[ShippedRecipe]:
    """Return the shipped recipes, by name."""
    return [_describe(name, path) for name, path in shipped_recipes().items()]


def text(name: str) -> str:
    """Return a recipe's file.

    Raises:
        InputFileError: no recipe of that name.
    """
    path = find_recipe(Path(name))
    load_recipe(path)  # says what is wrong with a user's own
    return path.read_text(encoding="utf-8")


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _describe(name: str, path: Path) -> ShippedRecipe:
    recipe = load_recipe(path)
    comments = (
        line.lstrip("# ")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ") and not line.startswith(("# terdit", "# yaml-"))
    )
    return ShippedRecipe(
        name=name,
        path=path,
        about=next(comments, ""),
        size=recipe.model.size,
        image_size=recipe.data.image_size,
        data=recipe.data.source if recipe.data.path is None else str(recipe.data.path),
        steps=recipe.train.steps,
        global_batch_size=recipe.train.global_batch_size,
    )
