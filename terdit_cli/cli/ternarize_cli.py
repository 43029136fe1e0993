"""The command line of `terdit ternarize`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import Ema, Force, Json, weights_of
from terdit_cli.hub import catalogue

EXAMPLES = (
    "terdit ternarize runs/quickstart -o quickstart.safetensors",
    "terdit ternarize runs/baseline/ckpt.pt -o baseline.safetensors --granularity row",
)


def ternarize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="ckpt.pt, or its run folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file (.safetensors).")],
    ema: Ema = True,
    force: Force = False,
    granularity: Annotated[
        Literal["tensor", "row", "group128"] | None,
        typer.Option(
            help="Granularity of the scales that are fitted to a full-precision checkpoint.  "
            "[default: tensor]"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint to ternary weights and scales.

    Prints a table of every layer.
    """
    catalogue.resolve(checkpoint)  # a wrong path shows before torch is imported
    from terdit_cli.commands import ternarize as command

    result = command.run(checkpoint, out, weights_of(ema), granularity, force)
    if json:
        console.result_json(dataclasses.asdict(result))
    else:
        tables.print_ternarized(result)
