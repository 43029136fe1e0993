"""The command line of `terdit pack`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import Ema, Force, Json, weights_of
from terdit_cli.errors import UsageError
from terdit_cli.hub import catalogue

EXAMPLES = (
    "terdit pack runs/quickstart -o quickstart.tdt",
    "terdit pack runs/quickstart -o small.tdt --codec t5 --rest bf16",
    "terdit pack 3B_1180000/ -o terdit-4.2b.tdt",
)


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder, ckpt.pt, ternarized .safetensors, or a folder of TerDiT's release.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Metadata missing from the checkpoint: n_heads=32."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file (.tdt).")] = Path(
        "model.tdt"
    ),
    codec: Annotated[
        Literal["t2", "t5"],
        typer.Option(
            help="t2: 2 bits/weight, memory-mapped. t5: 1.6 bits/weight, unpacked at load."
        ),
    ] = "t2",
    rest: Annotated[
        Literal["bf16", "fp32"],
        typer.Option(help="Dtype of non-ternary tensors; fp32 keeps the outputs bit for bit."),
    ] = "fp32",
    ema: Ema = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Pack a ternary model into one verified .tdt file."""
    catalogue.resolve(source)  # a wrong path shows before torch is imported
    from terdit_cli.commands import pack as command

    fields = _parse_fields(overrides or [])
    result = command.run(source, out, codec, rest, weights_of(ema), fields, force)
    if json:
        console.result_json(dataclasses.asdict(result) | {"ratio": result.ratio})
        return
    tables.print_packed(result)


def _parse_fields(words: list[str]) -> dict[str, Any]:
    """Parse `n_heads=32` words into configuration fields; values are numbers."""
    fields: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            fields[key] = int(text) if text.lstrip("-").isdecimal() else float(text)
        except ValueError:
            raise UsageError(
                "an override is not KEY=NUMBER", got=repr(word), fix="write it as n_heads=32"
            ) from None
    return fields
