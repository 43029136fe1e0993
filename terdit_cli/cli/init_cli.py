"""The command line of `terdit init`; no torch here."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Force, Json
from terdit_cli.errors import InputFileError

EXAMPLES = (
    "terdit init --data photos/ -o photos.yaml",
    "terdit init --data imagenet/train --gpu h100 --gpus 8",
)


def init(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images: a folder of class folders, zip, tars, parquet, .npz, ...  "
            "[default: the packaged Fashion-MNIST images]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The recipe to write.  [default: named after the data]"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU|SIZE",
            help="Choose for this GPU: h100, a100, 4090, ... or 24GB.  [default: this machine]",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a first recipe for your images, with what training it will take."""
    if data is not None and not data.exists():  # shows before torch is imported
        raise InputFileError("images not found", where=data, fix="check the path")
    from terdit_cli.commands import init as command

    result = command.run(data, out, gpu, gpus, force)
    plan, recipe = result.plan, result.recipe
    if json:
        values = {
            "output": result.output,
            "recipe": recipe.model_dump(mode="json"),
            "images": result.facts.images,
            "classes": result.facts.class_names,
            "seconds": result.seconds,
            "plan": dataclasses.asdict(plan),
        }
        console.result_json(values)
        return
    size = console.byte_size
    if result.seconds is None:
        time = "not known for this GPU"
    elif plan.peak_flops is None:
        time = f"about {console.duration(result.seconds)} on this machine"
    else:  # a small network reaches less
        time = f"at least {console.duration(result.seconds)}, at {plan.mfu:.0%} MFU"
    for name, text in (
        ("data", result.facts.describe()),
        (
            "recipe",
            f"{result.output}: model {recipe.model.size}, {plan.parameters:,} parameters, "
            f"{recipe.data.image_size} pixels, patch {recipe.model.patch_size}",
        ),
        ("training", f"{plan.steps:,} steps of {recipe.train.global_batch_size} images"),
        ("memory", f"{size(plan.total_bytes)} of each process, besides what torch itself takes"),
        ("time", time),
    ):
        console.result(f"{name:<9} {text}")
    train = f"torchrun --nproc-per-node {gpus} -m terdit_cli" if gpus > 1 else "terdit"
    console.result(f"\n{train} train {shlex.quote(str(result.output))}")
