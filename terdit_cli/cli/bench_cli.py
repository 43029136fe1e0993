"""The command line of `terdit bench`; no torch here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli.flags import Json, refuse_given

EXAMPLES = (
    "terdit bench",
    "terdit bench fashion-mnist --full --out bench.md",
    "terdit bench model.tdt --what images",
    "terdit bench 4.2b --what gemm --threads 1,2 --rivals bf16,int8-ao",
    "terdit bench 600m,4.2b --device cuda --full --out gpu.md",
    "terdit bench 600m,4.2b --what limits --device a100",
    "terdit bench recipes/quickstart.yaml train.precision=fp32 --full",
    "terdit bench tests/golden/metrics.json --full",
)


def bench(
    context: typer.Context,
    subject: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUBJECT [KEY=VALUE...]",
            help="A model (packaged name, path, or sizes 600m, 4.2b, ... with random weights); a "
            "recipe.yaml and overrides: its training steps; `metrics`, or a .json of recorded "
            "ones: the metrics of eval-fid.  [default: fashion-mnist]",
            show_default=False,
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            help="Of a model: network (whole forwards), gemm (single matrix products), images "
            "(what int8 and other activations change), limits (of a GPU that need not be here), "
            "or all (that a CPU can measure)."
        ),
    ] = "network",
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="All activations and rivals, more repeats, sampling, compiled kernels: minutes. "
            "Without it a first look of seconds.",
        ),
    ] = False,
    size: Annotated[
        str, typer.Option(help="Image sizes in pixels, for random weights.  [default: 256]")
    ] = "",
    images: Annotated[
        str,
        typer.Option(help="Images per batch, each two rows with guidance; several on a GPU: 1,8."),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda or cuda:1; of `limits` the GPU whose data sheet counts: h100, l4, ..."
        ),
    ] = "",
    threads: Annotated[
        str, typer.Option(help="Numbers of CPU threads: 1,2.  [default: torch's]")
    ] = "",
    activations: Annotated[
        str,
        typer.Option(help="Of int8, int16, bf16, fp32; the first is used everywhere."),
    ] = "",
    rivals: Annotated[
        str,
        typer.Option(
            help="all, none, or of fp32, fp32-medium, bf16, bf16-compiled, int8-ao, int8-mm, "
            "unpack; and the path of a libggml-cpu.so for ggml's TQ2_0."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a report as Markdown (.md).")
    ] = None,
    json: Json = False,
) -> None:
    """Benchmark speed, exactness and memory on this CPU or a GPU, beside rivals."""
    from terdit_cli.lab.bench import run_bench

    line = shlex.join(["terdit", *sys.argv[1:]])
    options = run_bench.parse(
        subject or [], what, full, size, images, device, threads, activations, rivals, line
    )
    refuse_given(context, options.unused, "for other benchmarks")
    result = run_bench.run(options, out)
    if json:
        console.result_json(run_bench.as_json(result))
        return
    for table in map(run_bench.Table.narrow, run_bench.tables(result)):
        if table.rows:
            console.result_table(table.title, table.header, table.rows)
        for note in table.notes:
            console.result(note)
