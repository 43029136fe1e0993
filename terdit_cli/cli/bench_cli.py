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
    "terdit bench 4.2b --what gemm --threads 1,2 --rivals bf16,int8-ao",
    "terdit bench model.tdt --what images --device cpu",
    "terdit bench model.tdt --what forward --rivals none --json",
    "terdit bench 600m --size 256,512 --threads 1,2 --out docs/bench.md",
    "terdit bench --what metrics --threads 1 --recorded tests/golden/metrics.json",
    "terdit bench recipes/quickstart.yaml --what training",
    "terdit bench 600m,4.2b --device cuda --out docs/gpu.md",
    "terdit bench 600m,4.2b --what roofline --gpu a100",
)
ON_GPU = ("roofline", "kernels")  # from data sheets and compilers: they need no GPU
# Options that only some benchmarks have, and which those are.
_CPU_ONLY = ("batch", "threads", "activations", "backend", "rivals", "ggml", "recorded")
_GPU_ONLY = ("images", "gpu")
_MEASURED_BY: dict[str, tuple[str, ...]] = {
    "batch": ("all", "forward"),
    "activations": ("all", "gemm", "forward", "images"),
    "rivals": ("all", "gemm", "forward"),
    "ggml": ("all", "gemm"),
    "recorded": ("metrics",),
}


def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A size (600m, 4.2b, ...: random weights), a .tdt, or a recipe.")
    ] = "600m",
    what: Annotated[
        str,
        typer.Option(
            help="gemm, forward, sample, images (of a .tdt), or all of them; metrics (eval-fid); "
            "training (of a recipe); roofline or kernels (of a GPU, which need not be present)."
        ),
    ] = "all",
    size: Annotated[str, typer.Option(help="Image sizes in pixels: 256,512.")] = "",
    batch: Annotated[
        int, typer.Option(help="Batch size of a forward pass; CFG uses two rows per image.")
    ] = 2,
    images: Annotated[
        str, typer.Option(help="Images per batch on a GPU, with CFG.  [default: 1,8,32]")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda to benchmark the GPU.")] = "cpu",
    gpu: Annotated[
        str, typer.Option(help="Data sheet for the roofline: h100, a100, l4, 4090, ...")
    ] = "h100",
    threads: Annotated[
        str, typer.Option(help="Numbers of CPU threads: 1,2.  [default: torch's]")
    ] = "",
    activations: Annotated[
        str,
        typer.Option(
            help="A comma-separated list of int8, int16, bf16, fp32. Benchmarks of a single "
            "precision use the first.  [default: all]"
        ),
    ] = "",
    backend: Annotated[str, typer.Option(help="auto, gpu, cpu or reference.")] = "auto",
    rivals: Annotated[
        str,
        typer.Option(
            help="all, none, or a comma-separated list of fp32, fp32-medium, bf16, bf16-compiled, "
            "int8-ao, int8-mm, unpack."
        ),
    ] = "all",
    ggml: Annotated[
        Path | None,
        typer.Option(help="A libggml-cpu.so: also benchmark ggml TQ2_0."),
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="Recorded metrics to compare with: a .json beside its .npz.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
    seed: Annotated[int, typer.Option(help="Random seed of weights and inputs.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a report as Markdown (.md).")
    ] = None,
    json: Json = False,
) -> None:
    """Benchmark speed, accuracy and memory against other libraries."""
    line = shlex.join(["terdit", *sys.argv[1:]])
    if what in ON_GPU or (device != "cpu" and what != "images"):
        refuse_given(context, _CPU_ONLY, "for the benchmarks of CPUs")
        from terdit_cli.lab.bench import on_gpu

        report = on_gpu.run(
            model, what, size=size, images=images, device=device, chip=gpu, repeats=repeats,
            seed=seed, output=out, command=line,
        )  # fmt: skip
        if json:
            console.result_json(on_gpu.as_json(report))
            return
        for table in on_gpu.gpu_tables(report):
            console.result_table(*table)
        return
    refuse_given(context, _GPU_ONLY, "for the benchmarks of GPUs")
    for option, kinds in _MEASURED_BY.items():
        if what not in kinds:
            refuse_given(context, (option,), f"for --what {' or '.join(kinds)}")
    from terdit_cli.lab.bench import on_cpu

    result = on_cpu.run(
        model, what, size=size, batch=batch, threads=threads, activations=activations,
        backend=backend, others=rivals, repeats=repeats, seed=seed, ggml=ggml, output=out,
        command=line, recorded=recorded, device=device,
    )  # fmt: skip
    if json:
        console.result_json(on_cpu.as_json(result))
        return
    for table in on_cpu.tables(result):
        console.result_table(*table)
