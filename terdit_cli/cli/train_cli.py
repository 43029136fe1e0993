"""The command line of `terdit train`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import Json
from terdit_cli.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EXAMPLES = (
    "terdit train recipes/quickstart.yaml",
    "terdit train recipes/quickstart.yaml optim.lr=1e-3 train.steps=200 --out runs/try",
    "terdit train recipes/quickstart.yaml --resume auto",
    "torchrun --nproc-per-node 8 -m terdit_cli train recipes/600m.yaml",
    "terdit train recipes/4.2b.yaml --dry-run --gpus 64 --gpu-memory h100",
    "terdit train --plot runs/quickstart runs/try -o curves.png",
    "terdit train --export runs/quickstart/checkpoints/step-00000600 -o early.pt",
)
CURVES = Path("curves.png")
# What may stand beside the option that says not to train, and beside none.
_OPTIONS = {
    "": ("--resume", "--out"),
    "--dry-run": ("--gpus", "--gpu-memory", "--mfu"),
    "--export": ("--out",),
    "--plot": ("--out",),
}


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="The recipe, a YAML file. With --export and --plot: a run folder.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Recipe fields to change. With --plot: more run folders."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue from the newest checkpoint of the run, or from PATH.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Run folder.  [default: runs/<name of the recipe>]  With --export and --plot: "
            "the file to write.  [default: ckpt.pt in the run folder; curves.png]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, work and days; train nothing.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Of a dry run: how many.  [default: 1]")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="GPU|SIZE",
            help="Of a dry run: h100, a100, ... or 80GB. Adds the largest micro-batch and, of a "
            "GPU known by name, the days.",
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Of a dry run: share of the GPUs' peak that training reaches.  [default: 0.4]"
        ),
    ] = None,
    export: Annotated[
        bool,
        typer.Option(
            "--export", help="Write ckpt.pt from a run folder, or one of its checkpoints."
        ),
    ] = False,
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Draw the curves of runs as a .png, .svg or .html."),
    ] = False,
    json: Json = False,
) -> None:
    """Train a recipe with the quantiser in the forward (QAT) into a run folder.

    Or plan it without training (--dry-run), or draw or export what runs left (--plot, --export).
    """
    words = overrides or []
    modes = {"--dry-run": dry_run, "--export": export, "--plot": plot}
    options = {"--resume": resume, "--out": out, "--gpus": gpus, "--gpu-memory": gpu_memory,
               "--mfu": mfu}  # fmt: skip
    _check_together(
        [name for name, chosen in modes.items() if chosen],
        [name for name, value in options.items() if value is not None],
    )
    if export and words:
        raise UsageError(
            "one run is exported at a time", got=" ".join(words), expected="nothing after the run",
            fix="export them one after another",
        )  # fmt: skip
    from terdit_cli.commands import train as command

    if dry_run:
        resolved, plan = command.plan(recipe, words, gpus or 1, gpu_memory, mfu)
        tables.print_plan(resolved, plan, json)
    elif export:
        exported = command.export(recipe, out)
        _print(f"{exported.out}: step {exported.step}, from {exported.checkpoint}", exported, json)
    elif plot:
        plotted = command.plot([recipe, *map(Path, words)], out or CURVES)
        count = "1 run" if not words else f"{1 + len(words)} runs"
        _print(f"{plotted.out}: curves of {count}", plotted, json)
    else:
        result = command.run(recipe, words, resume, out)
        losses = (
            f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}, "
            if result.first_loss is not None and result.last_loss is not None
            else ""
        )
        _print(f"trained {result.steps} steps, {losses}{result.checkpoint}", result, json)


def _check_together(chosen: list[str], given: list[str]) -> None:
    """Raise UsageError for options that do not go together.

    Args:
        chosen: those of --dry-run, --export and --plot that were given.
        given: the others that were.
    """
    if len(chosen) > 1:
        raise UsageError(
            "these options do not go together", got=" and ".join(chosen), expected="one of them",
            fix=f"leave {chosen[1]} out",
        )  # fmt: skip
    mode = chosen[0] if chosen else ""
    for name in given:
        if name in _OPTIONS[mode]:
            continue
        places = [other or "training" for other, names in _OPTIONS.items() if name in names]
        raise UsageError(
            f"{name} belongs to {' and '.join(places)}",
            got=f"{name} with {mode}" if mode else f"{name} without --dry-run",
            fix=f"leave {name} out" if mode else "add --dry-run",
        )


def _print(sentence: str, result: DataclassInstance, json: bool) -> None:
    """Print a result, as a sentence or as JSON."""
    if json:
        console.result_json(dataclasses.asdict(result))
    else:
        console.result(sentence)
