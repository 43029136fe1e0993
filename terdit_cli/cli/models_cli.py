"""The command line of `terdit models`; no torch here."""

from __future__ import annotations

import dataclasses
import shlex
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json

if TYPE_CHECKING:
    from terdit_cli.commands.models import PackagedModel

EXAMPLES = (
    "terdit models",
    "terdit models fashion-mnist",
    "terdit models --json",
)


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this model's card.")
    ] = None,
    json: Json = False,
) -> None:
    """List the packaged models, or show the card of one.

    sample and eval-fid take each NAME as --model.
    """
    from terdit_cli.commands import models as command

    found = command.run(name)
    if json:
        values = [_as_json(model) for model in found]
        console.result_json({"models": values} if name is None else values[0])
    elif name is not None:
        _print_card(found[0])
    elif found:
        _print_list(found)
    else:
        console.note("no packaged models")


def _as_json(model: PackagedModel) -> dict[str, Any]:
    fields = {item.name: getattr(model, item.name) for item in dataclasses.fields(model)}
    return fields | {"card": model.card.model_dump()}


def _print_list(models: list[PackagedModel]) -> None:
    header = ("name", "bytes", "parameters", "classes", "score", "data")
    rows = []
    for model in models:
        metric, value = model.card.score
        rows.append(
            (
                model.name,
                f"{model.file_bytes:,}",
                f"{model.parameters:,}",
                len(model.classes),
                f"{metric} {value:.4g}",
                textwrap.shorten(model.card.data, 60, placeholder=" ..."),
            )
        )
    console.result_table("packaged models", header, rows)


def _print_card(model: PackagedModel) -> None:
    card, advice = model.card, model.card.sampler
    some_class = shlex.quote(model.classes[0])
    rows = [
        ("file", f"{model.path} ({model.file_bytes:,} bytes)"),
        ("parameters", f"{model.parameters:,}, {model.ternary / model.parameters:.1%} ternary"),
        ("images", f"{model.image_size} x {model.image_size}"),
        ("classes", ", ".join(model.classes)),
        ("data", card.data),
        ("licence", card.licence),
        ("trained", f"recipe {card.recipe}, {card.steps:,} steps, seed {card.seed}"),
        *([("initialised from", card.began_with)] if card.began_with else []),
        *((metric, f"{value:.4g}") for metric, value in card.scores.items()),
        ("measured", card.measured),
        (
            "sampler",
            f"{advice.name}, {advice.steps} steps, cfg scale {advice.cfg_scale:g}, "
            f"eps scale {advice.eps_scale:g}",
        ),
        ("limits", card.limits),
        ("try", f"terdit sample --model {model.name} --prompt-class {some_class} -n 4"),
    ]
    width = max(len(name) for name, _ in rows)
    console.result(model.name)
    for name, text in rows:  # not a table: that would fold the long ones
        console.result(f"  {name:{width}}  {text}")
    console.result(f"\n{card.text.strip()}")
