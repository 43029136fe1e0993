"""The matrix products: terdit and its rivals on the shapes of the published models.

M rows of activations, K -> N; all ways take turns in one process per thread count.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.lab.bench import results, rivals
from terdit_cli.lab.bench.results import OURS, Figure, GemmRow, PeakRow
from terdit_cli.lab.bench.settings import Options
from terdit_cli.lab.bench.worker import Process
from terdit_cli.runtime import cpu
from terdit_cli.runtime.backends import choose_backend

# What keeps torch's libraries on AVX2 when terdit is told to use no more than that.
TORCH_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PLAIN_C_PART = 8  # plain C takes long: it gets so many times fewer rows


def measure(options: Options, peaks: list[PeakRow]) -> list[GemmRow]:
    """Time the shapes on every thread count; with `full` one of them on other instruction sets.

    All activations and rivals run with the most threads, with fewer only the first activation.
    What the peaks are is added to `peaks`.

    Raises:
        EnvironmentProblem: a process of terdit's own failed.
    """
    first, most = options.activations[0], options.thread_counts[0]
    rows: list[GemmRow] = []
    for threads in options.thread_counts:
        used = options.activations if threads == most else (first,)
        ways = [(OURS, name, "tensor") for name in used]
        if threads == most:
            ways += [(OURS, first, "group128"), *_ways(options.gemm_rivals)]
        shapes = results.GEMM_SHAPES if options.full else results.GEMM_SHAPES[:2]
        with Process(threads) as process:
            for shape in (*shapes, results.SMALL_SHAPE):
                rows += _one_shape(options, process, threads, shape, ways, peaks)
    how = choose_backend(options.backend, torch.device("cpu")).backend.how(torch.device("cpu"))
    if how.isa is None or "TERDIT_ISA" in os.environ or not options.full:
        return rows
    m, k, n = results.GEMM_SHAPES[1]
    plain = tuple(name for name in ("fp32", "fp32-medium") if name in options.rivals)
    for isa in cpu.isas_usable():
        if isa == rows[0].isa:
            continue
        limits = {} if isa.startswith("avx512") else TORCH_AVX2
        shape = (m // PLAIN_C_PART if isa == "generic" else m, k, n)
        ways = [(OURS, "int8", "tensor"), (OURS, "fp32", "tensor"), *_ways(plain)]
        with Process(most, {"TERDIT_ISA": isa, **limits}) as process:
            rows += _one_shape(options, process, most, shape, ways, peaks)
    return rows


def _ways(names: Sequence[str]) -> list[tuple[str, str, str]]:
    return [(name, rivals.arithmetic(name), "tensor") for name in names]


def _one_shape(
    options: Options,
    process: Process,
    threads: int,
    shape: tuple[int, int, int],
    ways: list[tuple[str, str, str]],
    peaks: list[PeakRow],
) -> list[GemmRow]:
    """Time all ways, (who, activations, granularity), for one shape (M, K, N)."""
    m, k, n = shape
    console.note(f"bench: {k} -> {n}, {m} rows, threads {threads}")
    answer = process.ask(
        "gemm",
        shape=shape,
        ways=ways,
        backend=options.backend,
        repeats=options.repeats,
        seed=options.seed,
        ggml=str(options.ggml or ""),
    )
    if "rows" not in answer:
        raise EnvironmentProblem("a benchmark process failed", got=answer["why_not"])
    results.note_peaks(peaks, threads, answer["isa"], answer["peaks"])
    rows = []
    for row in answer["rows"]:
        figure = Figure(row.pop("samples"))
        share = results.share_of_peak(figure, 2.0 * m * k * n, answer["peaks"], row["activations"])
        where = {"threads": threads, "isa": answer["isa"], "m": m, "k": k, "n": n}
        rows.append(GemmRow(figure=figure, share=share, **row, **where))
    return rows
