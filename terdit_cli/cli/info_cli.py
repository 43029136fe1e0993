"""The command line of `terdit info`; no torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json

EXAMPLES = (
    "terdit info model.tdt",
    "terdit info runs/quickstart --json",
    "terdit info stats.npz",
)
SHOWN_CLASSES = 12


def info(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A model, recipe, result, reference, grid, folder of latents or set of images, or "
            "the name of a packaged model.",
        ),
    ],
    json: Json = False,
) -> None:
    """Show what is in a file: kind, sizes, classes, schedule, codec, licence, hash."""
    from terdit_cli.commands import info as command

    found = command.run(what)
    if json:
        console.result_json(command.as_json(found))
        return
    rows = [("kind", found.kind), ("path", str(Path(found.path))), *_rows(found.facts)]
    if found.classes:
        shown = ", ".join(found.classes[:SHOWN_CLASSES])
        more = ", ..." if len(found.classes) > SHOWN_CLASSES else ""
        rows.append(("classes", f"{len(found.classes)}: {shown}{more}"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        console.result(f"{name:{width}}  {text}")


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Iterate over names and texts, what is not known left out."""
    for name, value in facts.items():
        label = name.replace("_", " ")
        if value is None or value == {}:
            continue
        if isinstance(value, Mapping):
            shown = (f"{key}={item}" for key, item in value.items() if item is not None)
            yield label, ", ".join(shown)
        elif isinstance(value, bool):
            yield label, "yes" if value else "no"
        elif isinstance(value, int) and name != "seed":
            yield label, f"{value:,}"
        else:
            yield label, f"{value:.6g}" if isinstance(value, float) else str(value)
