"""The command line of `terdit study`; no torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json

EXAMPLES = (
    "terdit study recipes/studies/quick.yaml",
    "terdit study recipes/studies/fashion-mnist.yaml data.path=/path/to/fashion-mnist",
    "terdit study recipes/studies/fashion-mnist.yaml --only ternary,baseline",
    "terdit study recipes/studies/fashion-mnist.yaml recipes/studies/cifar10.yaml --render",
)


def study(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY.yaml... [KEY=VALUE...]",
            help="Studies, and recipe keys to override in all of them.",
        ),
    ],
    only: Annotated[str, typer.Option(metavar="VARIANT,...", help="Only these variants.")] = "",
    render: Annotated[
        bool, typer.Option("--render", help="Only write the report from existing results.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the studies' runs.")] = Path("runs/studies"),
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Report (.md); an .html and figures are written beside it."
        ),
    ] = Path("runs/results.md"),
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="<folder>",
            help="Also write the results of each study into FOLDER as one archive.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train and score the variants of a study, and write a report.

    Rerun to resume; only missing variants are run.
    """
    from terdit_cli.lab.study import run_study as command

    result = command.run(
        [Path(word) for word in words if "=" not in word],
        [word for word in words if "=" in word],
        [name.strip() for name in only.split(",") if name.strip()],
        render, runs, out, keep,
    )  # fmt: skip
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    for name, verdict in zip(result.studies, result.verdicts, strict=True):
        console.result(f"{name}: {verdict}")
    console.result(f"{result.page} and {result.html} written")
    if result.missing:
        console.note(f"{result.missing} scores are still missing: rerun the command")
