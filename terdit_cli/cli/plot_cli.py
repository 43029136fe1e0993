"""The command line of `terdit plot`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json

EXAMPLES = (
    "terdit plot runs/quickstart",
    "terdit plot runs/quickstart runs/try -o curves.html",
)


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Output file: .png, .svg or .html.")
    ] = Path("curves.png"),
    json: Json = False,
) -> None:
    """Plot training curves: losses, learning rate and trit flips."""
    from terdit_cli.commands import plot as command

    result = command.run(runs, out)
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    console.result(f"{result.out}: curves of {count}")
