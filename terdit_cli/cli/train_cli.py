"""The command line of `terdit train`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import Json, refuse_given

EXAMPLES = (
    "terdit train recipes/quickstart.yaml",
    "terdit train recipes/quickstart.yaml optim.lr=1e-3 train.steps=200 --out runs/try",
    "terdit train recipes/quickstart.yaml --resume auto",
    "torchrun --nproc-per-node 8 -m terdit_cli train recipes/600m.yaml",
    "terdit train recipes/4.2b.yaml --dry-run --gpus 64 --gpu-memory h100",
)


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to override.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Resume from the newest checkpoint of the run, or from PATH.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder.  [default: runs/<name of the recipe>]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, operations and days; train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to plan for (dry run).")] = 1,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="GPU|SIZE",
            help="GPU or memory size to plan for (dry run): h100, a100, ..., 80GB. Adds the "
            "largest micro-batch and, for a named GPU, the training days.",
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="Assumed MFU: share of peak FLOP/s (dry run).  [default: 0.4]"),
    ] = None,
    json: Json = False,
) -> None:
    """Train the model of a recipe using quantisation-aware training.

    With --dry-run, only print a plan: memory, operations and days.
    """
    if dry_run:
        refuse_given(context, ("resume", "out"), "for training")
    else:
        refuse_given(context, ("gpus", "gpu_memory", "mfu"), "for a --dry-run")
    from terdit_cli.data.check_recipe import data_mistakes
    from terdit_cli.recipe import load_recipe

    load_recipe(recipe, overrides or [], data_mistakes)  # mistakes show before torch is imported
    from terdit_cli.commands import train as command

    if dry_run:
        tables.print_plan(*command.plan(recipe, overrides or [], gpus, gpu_memory, mfu), json)
        return
    result = command.run(recipe, overrides or [], resume, out)
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    losses = (
        f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
        if result.first_loss is not None and result.last_loss is not None
        else ""
    )
    console.result(f"trained {result.steps} steps, {losses}{result.checkpoint}")
