"""The command line of `terdit recipes`; no torch here."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json
from terdit_cli.errors import UsageError

EXAMPLES = (
    "terdit recipes",
    "terdit recipes show quickstart > mine.yaml",
    "terdit train quickstart",
    "terdit recipes --schema > recipe.schema.json",
)


def recipes(
    action: Annotated[
        str | None, typer.Argument(metavar="[show]", help="Print a recipe's file.")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which one.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")
    ] = False,
    json: Json = False,
) -> None:
    """List the shipped recipes, or show one.

    Their names stand for their files in every verb: terdit train quickstart.
    """
    from terdit_cli.commands import recipes as command

    if action not in (None, "show") or (action is None) != (name is None):
        raise UsageError(
            "what to do with recipes is not clear",
            got=" ".join(word for word in (action, name) if word),
            expected="nothing, or show NAME",
            fix=f"terdit recipes show {name or action if action != 'show' else 'quickstart'}",
        )
    if schema:
        console.result_json(command.schema())
    elif name is not None:
        console.result(command.text(name).rstrip("\n"))
    elif json:
        console.result_json({"recipes": [dataclasses.asdict(found) for found in command.run()]})
    else:
        header = ("name", "model", "pixels", "steps", "about")
        rows = [
            (
                found.name,
                found.size,
                found.image_size,
                f"{found.steps:,}",
                textwrap.shorten(found.about, 36, placeholder=" ..."),
            )
            for found in command.run()
        ]
        console.result_table("shipped recipes: terdit train NAME", header, rows)
