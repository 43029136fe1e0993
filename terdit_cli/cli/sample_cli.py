"""The command line of `terdit sample`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Force, Json
from terdit_cli.generate.options import ModelOptions, SamplingOptions
from terdit_cli.hub import catalogue

EXAMPLES = (
    "terdit sample --prompt-class sneaker",
    'terdit sample --prompt-class "Ankle boot" -n 4',
    "terdit sample --model model.tdt --prompt-class 207 --steps 50 --sampler dpmpp-2m",
    "terdit sample --model runs/quickstart --prompt-class all -n 8 -o samples.npz",
    "torchrun --nproc-per-node 2 -m terdit_cli sample --model model.tdt --prompt-class all "
    "-n 50 -o samples/",
)


def sample(
    *,
    prompt_class: Annotated[
        str, typer.Option(help="Class id or name, a comma-separated list of them, or all.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model file, run folder or packaged model.  [default: TERDIT_MODEL, the only .tdt "
            "here, the newest run, or the packaged model with that class]"
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images per class.")] = 1,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help=".png: a labelled grid; .npz: an array; otherwise a folder of PNGs."
        ),
    ] = "sample.png",
    force: Force = False,
    sampling: SamplingOptions,
    loading: ModelOptions,
    json: Json = False,
) -> None:
    """Generate images of named classes."""
    if model is not None:
        catalogue.resolve(model)  # a wrong path shows before torch is imported
    from terdit_cli.commands import sample as command

    result = command.run(
        prompt_class, model, n=n, output=out, force=force, sampling=sampling, loading=loading
    )
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    rate = result.images * result.nfe / result.seconds
    images = "1 image" if result.images == 1 else f"{result.images} images"
    console.result(
        f"{result.output}: {images}, {result.nfe} NFE each, "
        f"{console.duration(result.seconds)}, {rate:.3g} NFE/s"
    )
