"""`terdit bench`: how fast, how exact and how small, next to everything else one could use.

Each figure is the median of interleaved repeats: all contenders take turns, so that what else
the machine does hits them alike.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

import terdit_cli
from terdit_cli import console
from terdit_cli.errors import UsageError
from terdit_cli.generate.generator import usable_device
from terdit_cli.lab.bench import activation_error as bench_images
from terdit_cli.lab.bench import cpu_networks as network
from terdit_cli.lab.bench import gemm, rivals
from terdit_cli.lab.bench import metrics_bench as metrics
from terdit_cli.lab.bench import training_steps as bench_training
from terdit_cli.lab.bench.cpu_page import page, tables
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.results import BenchResult, ForwardRow, GemmRow, Goal, Machine, PeakRow
from terdit_cli.lab.bench.settings import Options, What, numbers, words
from terdit_cli.model.dit import SIZES
from terdit_cli.pack.tdt import TdtFile, write_tdt
from terdit_cli.runtime.backends import choose_backend, resolve_activations
from terdit_cli.system.atomic import check_writable, write_whole

__all__ = ["as_json", "run", "tables"]

BUSY = 0.5  # load average above which a warning is due
# Of a CPU's flags, those that decide how fast it multiplies.
FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimddp", "i8mm",
)  # fmt: skip


def run(
    model: str = "600m",
    what: str = "all",
    size: str = "",
    batch: int = 2,
    threads: str = "",
    activations: str = "",
    backend: str = "auto",
    others: str = "all",
    repeats: int = 7,
    seed: int = 0,
    ggml: Path | None = None,
    output: Path | None = None,
    command: str = "terdit bench",
    recorded: Path | None = None,
    device: str = "cpu",
) -> BenchResult:
    """Measure, and write the page to `output`.

    Args:
        model: a named size, for random weights, a .tdt, or a recipe.
        what: "gemm", "forward", "sample", "images" (of a .tdt), "all" of these, "metrics" (of
            `terdit eval-fid`, no model) or "training" (of a recipe, with overrides after it).
        size, threads, activations, others: comma separated; "" is the default of each; `others`
            are the rivals, "all" or "none".
        batch: rows of a forward; an image with guidance is two.
        ggml: the libggml-cpu.so of a build of the user's.
        output: the .md file to write.
        command: how it was called, for the page.
        recorded: a .json of metrics that others computed, for "metrics".
        device: where images are drawn; all else is of CPUs (`bench_gpu.py` is of GPUs).

    Raises:
        UsageError, InputFileError, EnvironmentProblem.
    """
    options = Options(
        model=model,
        what=cast(What, what),
        sizes=numbers("--size", size),
        batch=batch,
        threads=tuple(sorted(numbers("--threads", threads), reverse=True))
        or (torch.get_num_threads(),),
        activations=words(activations) or Options.activations,
        backend=backend,
        rivals={"all": tuple(rivals.RIVALS), "none": ()}.get(others, words(others)),
        repeats=repeats,
        seed=seed,
        ggml=ggml,
        recorded=recorded,
        command=command,
    )
    if output is not None and output.suffix != ".md":
        raise UsageError(
            "unknown kind of page", got=output.suffix, expected=".md", where=output,
            fix="--out bench.md",
        )  # fmt: skip
    if output is not None:
        check_writable(output)
    if ggml is not None:
        rivals.open_ggml(ggml)
    choice = choose_backend(backend, usable_device(device))
    if model not in SIZES and what != "training":
        with TdtFile(Path(model)) as file:  # a bad file is found before the work
            trained = file.info.ternary.activations
        if trained == "int8" and not activations:
            options = dataclasses.replace(options, activations=("int8",))
        for name in options.activations:
            resolve_activations(name, trained, choice.backend)
    console.note(f"bench: {choice.reason}")
    machine = _machine()
    if machine.load is not None and machine.load > BUSY:
        console.warn(f"the machine is busy (load {machine.load:.1f}): timings will be noisy")
    options = dataclasses.replace(options, backend=choice.backend.NAME)
    result = _measure(options, machine, device)
    if output is not None:
        write_whole(output, page(result))
    return result


def _measure(options: Options, machine: Machine, device: str) -> BenchResult:
    without_model = options.what in ("metrics", "training")
    result = BenchResult(
        model=options.what if without_model else options.model,
        command=options.command,
        seed=options.seed,
        repeats=options.repeats,
        machine=machine,
    )
    if options.what == "metrics":
        agreement, scores = metrics.measure(options)
        return dataclasses.replace(result, agreement=agreement, scores=scores)
    if options.what == "training":
        return dataclasses.replace(result, training=bench_training.compare(options))
    return dataclasses.replace(result, **_measure_model(options, device))


def _measure_model(options: Options, device: str) -> dict[str, Any]:
    """Return what was asked for of a model: fields of `BenchResult`."""
    peaks: list[PeakRow] = []
    found: dict[str, Any] = {"peaks": peaks}
    if options.what in ("gemm", "all"):
        found["gemm"] = gemm.measure(options, peaks)
    with tempfile.TemporaryDirectory(prefix="terdit-bench-") as name:
        folder = Path(name)
        path = Path(options.model)
        if options.what != "gemm" and options.model in SIZES:
            console.note(f"bench: making random weights of {options.model}")
            path = folder / "t2.tdt"
            made = RandomModel(options.model, options.input_sizes[0], options.seed)
            write_tdt(made, path, "t2", "fp32")
        if options.what in ("forward", "all"):
            found["forward"] = network.measure(options, path, folder, peaks)
        if options.what in ("sample", "all"):
            found["sample"] = network.sample(options, path, folder)
        if options.what in ("images", "all") and options.model not in SIZES:
            found["images"] = bench_images.compare(
                path, options.backend, options.activations, options.seed, device
            )
    return found


def _machine() -> Machine:
    """Describe this machine from /proc, as far as there is one."""
    about: dict[str, str] = {}
    for path in ("/proc/meminfo", "/proc/cpuinfo"):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        about |= {key.strip(): value.strip() for key, value in pairs}
    flags = about.get("flags", about.get("Features", "")).split()
    return Machine(
        cpu=about.get("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        flags=[flag for flag in FLAGS if flag in flags],
        memory_bytes=1024 * int(about.get("MemTotal", "0 kB").split()[0]),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        torch=torch.__version__,
        terdit=terdit_cli.__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def as_json(result: BenchResult) -> dict[str, Any]:
    """Return plain JSON types, with what is computed from the samples beside them."""
    values = dataclasses.asdict(result) | {"threads": result.threads}
    for table in ("gemm", "forward"):
        rows: list[GemmRow] | list[ForwardRow] = getattr(result, table)
        for row, value in zip(rows, values[table], strict=True):
            if not row.figure.samples:
                continue
            samples = [seconds * 1e3 for seconds in row.figure.samples]
            value |= {
                "ms": statistics.median(samples),
                "ms_min": min(samples),
                "ms_max": max(samples),
            }
            if isinstance(row, GemmRow):
                value["gops"] = row.operations / row.figure.median / 1e9
            if isinstance(row, ForwardRow):
                value["images_per_second"] = row.images_per_second
    values["goals"] = [_goal_json(goal) for goal in goals(result)]
    return values


def _goal_json(goal: Goal) -> dict[str, Any]:
    found = goal.found._asdict() if goal.found is not None else None
    return dataclasses.asdict(goal) | {"found": found, "met": goal.met}
