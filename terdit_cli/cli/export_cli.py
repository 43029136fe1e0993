"""The command line of `terdit export`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json
from terdit_cli.errors import InputFileError

EXAMPLES = (
    "terdit export runs/quickstart",
    "terdit export runs/quickstart/checkpoints/step-00000600 -o early.pt",
)


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Output file (.pt).  [default: ckpt.pt in the run folder]"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export a run's newest or a given checkpoint as a single file."""
    if not run.exists():  # shows before torch is imported
        raise InputFileError(
            "no such run", where=run, fix="give a run folder such as runs/quickstart"
        )
    from terdit_cli.commands import export as command

    result = command.run(run, out)
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    console.result(f"{result.out}: step {result.step}, from {result.checkpoint}")
