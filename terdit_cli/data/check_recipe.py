"""A recipe against the images that it names: what does not fit, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from terdit_cli.data.image_sources import open_labelled, source_of
from terdit_cli.data.patterns import is_pattern
from terdit_cli.errors import InputFileError, TerditError, UsageError
from terdit_cli.recipe import Mistake, Recipe

SHOWN_CLASSES = 5


def has_images_here(recipe: Recipe) -> bool:
    """Say whether the recipe's images can be looked at on this machine."""
    data = recipe.data
    if data.source == "latents":
        return False
    path = data.path
    return path is None or path.exists() or is_pattern(str(path))


def data_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    """Iterate over what does not fit between a recipe and its images; none is decoded."""
    data = recipe.data
    if data.path is not None and data.source == "embedded" and data.path.exists():
        yield Mistake(
            f"{data.path} looks like the source {source_of(data.path)}",
            f"data.source={source_of(data.path)}",
        )
        return
    if not has_images_here(recipe) or (data.path is None) != (data.source == "embedded"):
        return
    try:
        images = open_labelled(data.source, data.path, data.split)
    except UsageError as error:  # of the split
        yield Mistake(error.problem, "data.split=null")
        try:
            images = open_labelled(data.source, data.path)
        except TerditError:
            return
    except InputFileError as error:
        yield Mistake(str(error).rstrip("."))
        return
    yield from class_mistakes(recipe, images.class_names)


def class_mistakes(recipe: Recipe, names: list[str]) -> Iterable[Mistake]:
    """Return the mistake of another number of classes than the model has, if it is one."""
    count = len(names)
    if count == recipe.model.num_classes:
        return []
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if count > SHOWN_CLASSES else "")
    hint = ""
    if any(name.lower() == "train" for name in names):
        hint = f"; if the folder train was meant: data.path={recipe.data.path}/train"
    return [
        Mistake(
            f"the data has another number of classes than the model: got {count} classes "
            f"({shown}), expected model.num_classes {recipe.model.num_classes}{hint}",
            f"model.num_classes={count}",
        )
    ]
