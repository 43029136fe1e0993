"""docs/recipes.md is what the code says, and explains every key."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from terdit_cli.lab.recipe_docs import recipe_page
from terdit_cli.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a model and all that are fields of it."""
    found = [model]
    for item in model.model_fields.values():
        for option in getattr(item.annotation, "__args__", (item.annotation,)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found += models(option)
    return found


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_page(), "run `make docs`"


def test_every_key_is_explained() -> None:
    page = recipe_page()
    sections = models(Recipe)
    assert len(sections) == 14
    for section in sections:
        assert section.__doc__
        for name, item in section.model_fields.items():
            nested = section is Recipe and f"## {name}\n" in page
            assert nested or (item.description and f"| `{name}` |" in page), (section, name)
            assert nested or item.description in page
