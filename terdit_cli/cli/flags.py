"""Options that several verbs share; no torch here."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Annotated, Literal

import typer

from terdit_cli.errors import UsageError


class CfgChannels(StrEnum):
    """Which channels classifier-free guidance changes."""

    three = "3"
    all = "all"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
# What sample and eval-fid share.
# No value: what the card of a packaged model advises, for others the published sampler.
Steps = Annotated[
    int | None, typer.Option(help="Sampling steps.  [default: 250, or a packaged model's own]")
]
Sampler = Annotated[
    str | None,
    typer.Option(help="ddpm, ddim, dpmpp-2m, unipc or euler.  [default: ddpm, or its own]"),
]
CfgScale = Annotated[
    float | None, typer.Option(help="Guidance; 1 is off.  [default: 4, or its own]")
]
EpsScale = Annotated[
    float | None,
    typer.Option(help="Factor of the predicted noise; 1 is off.  [default: 1, or its own]"),
]
GuidedChannels = Annotated[
    CfgChannels, typer.Option(help="Guided channels: 3 as published, or all.")
]
Seed = Annotated[int, typer.Option(help="Image i is a function of (seed, i).")]
BatchSize = Annotated[int, typer.Option(help="Images drawn at once.")]
BatchSizeThatFits = Annotated[
    int | None,
    typer.Option(help="Images drawn at once.  [default: 8, or fewer if a GPU's memory asks it]"),
]
BackendName = Annotated[str, typer.Option(help="auto, gpu, cpu or reference.")]
Activations = Annotated[
    str, typer.Option(help="Of packed models: auto, int8, int16, bf16, fp32; on some GPUs fp8.")
]
Threads = Annotated[
    int | None,
    typer.Option(envvar="TERDIT_THREADS", help="CPU threads.  [default: torch's]"),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1.  [default: a GPU if there is one]")
]
Vae = Annotated[str | None, typer.Option(help="VAE folder or hub id instead of the model's.")]
RawWeights = Annotated[
    bool,
    typer.Option("--ema/--raw", help="The averaged weights of a checkpoint, or the raw ones."),
]


def chosen_weights(ema: bool) -> Literal["ema", "raw"]:
    """Return what `RawWeights` chose, by its name in the library."""
    return "ema" if ema else "raw"


def refuse_given(context: typer.Context, names: Collection[str], only: str) -> None:
    """Raise UsageError if one of these parameters stands on the command line and would do nothing.

    Args:
        only: what they are for.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            raise UsageError(f"{flag} would do nothing here: it is {only}", fix=f"leave {flag} out")
