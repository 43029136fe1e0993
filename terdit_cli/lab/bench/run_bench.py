"""`terdit bench`: how fast, how exact and how small, next to everything else one could use.

Each figure is the median of interleaved repeats: all contenders take turns, so that what else
the machine does hits them alike.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import statistics
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import terdit_cli
from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.generate.generator import usable_device
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.lab.bench import (
    activation_error,
    compiled_kernels,
    cpu_networks,
    cuda_networks,
    gemm,
    rivals,
)
from terdit_cli.lab.bench.bench_page import Table, page, tables
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.results import BenchResult, ForwardRow, GemmRow, Machine, PeakRow
from terdit_cli.lab.bench.roofline import analyse
from terdit_cli.lab.bench.settings import DOWNSAMPLE, METRICS, Options, parse
from terdit_cli.model.dit import build_config
from terdit_cli.model.ternary import Activations
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.runtime.backends import choose_backend, resolve_activations
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.system.atomic import check_writable, write_whole
from terdit_cli.system.gpus import find_gpu

__all__ = ["Table", "as_json", "parse", "run", "tables"]

BUSY = 0.5  # load average above which a warning is due
# Of a CPU's flags, those that decide how fast it multiplies.
FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "asimddp", "i8mm",
)  # fmt: skip
LIMITS_OF = "h100"


def run(options: Options, output: Path | None = None) -> BenchResult:
    """Measure, and write the page to `output`, an .md file.

    Raises:
        UsageError, InputFileError, EnvironmentProblem.
    """
    if output is not None:
        if output.suffix != ".md":
            raise UsageError(
                "unknown kind of page", got=output.suffix, expected=".md", where=output,
                fix="--out bench.md",
            )  # fmt: skip
        check_writable(output)
    machine = _machine()
    if machine.load is not None and machine.load > BUSY and options.what != "limits":
        console.warn(f"the machine is busy (load {machine.load:.1f}): timings will be noisy")
    found = _measure(options)
    result = BenchResult(
        model=METRICS if options.of_metrics else "training" if options.recipe else options.subject,
        command=options.command, seed=options.seed, repeats=options.repeats,
        machine=machine, **found,
    )  # fmt: skip
    if output is not None:
        write_whole(output, page(result))
    return result


def _measure(options: Options) -> dict[str, Any]:
    """Return what was asked for: fields of `BenchResult`."""
    if options.of_metrics:
        from terdit_cli.lab.bench import metrics_bench  # of SciPy: not for a first look

        return metrics_bench.measure(options)
    if options.recipe is not None:
        from terdit_cli.lab.bench import training_steps  # of all that trains

        return {"training": training_steps.compare(options)}
    if options.on_gpu:
        counted = options.what == "limits"
        found = _limits(options, (options.device if counted else "") or LIMITS_OF)
        return found if counted else found | _on_cuda(options)
    return _on_cpu(options)


def _limits(options: Options, chip: str) -> dict[str, Any]:
    """Count what a chip's data sheet allows, and with `full` compile the kernels ahead."""
    plan, limits = cuda_networks.plan_of(options), find_gpu(chip)
    kernels: list[dict[str, Any]] = []
    if options.full and options.what == "limits":
        if importlib.util.find_spec("triton") is None:
            raise EnvironmentProblem("Triton is not installed", fix="pip install 'terdit[gpu]'")
        if gpu.kernels().INTERPRETED:
            raise EnvironmentProblem("Triton runs its interpreter", fix="unset TRITON_INTERPRET")
        for target in compiled_kernels.TARGETS:
            console.note(f"bench: compiling for sm_{target}")
            kernels += compiled_kernels.table(target)
    rows = [
        row
        for name in plan.models
        for pixels in plan.sizes
        for count in plan.images
        for row in analyse(
            build_config(name, input_size=pixels // DOWNSAMPLE, qk_norm=True), limits, count, name,
            pixels,
        )
    ]  # fmt: skip
    return {"roofline": rows, "kernels": kernels}


def _on_cuda(options: Options) -> dict[str, Any]:
    place = torch.device(options.device)
    if torch.cuda.is_available():
        usable_device(options.device)  # refuses a number that no GPU has
    if (why_not := gpu.available(place)) is not None:
        raise EnvironmentProblem(
            "there is no GPU to measure", got=why_not,
            expected="an NVIDIA GPU of compute capability 8.0 or newer, and Triton",
            fix="terdit bench 600m --what limits counts without one",
        )  # fmt: skip
    name = torch.cuda.get_device_name(place)
    with torch.cuda.device(place):  # whose stream the events are recorded on
        watch = cuda_networks.CudaStopwatch(place)
        bench = cuda_networks.GpuBench(cuda_networks.plan_of(options), place, watch, name)
        return bench.measure()


def _on_cpu(options: Options) -> dict[str, Any]:
    if options.ggml is not None:
        rivals.open_ggml(options.ggml)
    choice = choose_backend(options.backend, usable_device(options.device or "cpu"))
    file = None if options.models else ModelFile.open(options.subject)
    trained: Activations = "none"
    if file is not None:  # a bad one is found before the work
        with file.exported() as model:
            trained = model.info.ternary.activations
    options = replace(
        options, backend=choice.backend.NAME, activations=options.activations_of(trained)
    )
    for name in options.activations:
        resolve_activations(name, trained, choice.backend)
    console.note(f"bench: {choice.reason}")
    peaks: list[PeakRow] = []
    found: dict[str, Any] = {"peaks": peaks}
    if options.what in ("gemm", "all"):
        found["gemm"] = gemm.measure(options, peaks)
    if options.what == "gemm":
        return found
    with tempfile.TemporaryDirectory(prefix="terdit-bench-") as name:
        folder = Path(name)
        path = folder / "t2.tdt"
        if file is None:
            console.note(f"bench: making random weights of {options.subject}")
            made = RandomModel(options.subject, options.input_sizes[0], options.seed)
            write_tdt(made, path, "t2", "fp32")
        elif file.kind == "tdt":
            path = file.path
        else:
            write_tdt(file.exported(), path, "t2", "fp32")
        if options.what in ("network", "all"):
            found["forward"] = cpu_networks.measure(options, path, folder, peaks)
        if options.full and options.what in ("network", "all"):
            found["sample"] = cpu_networks.sample(options, path, folder)
        if options.what in ("images", "all") and file is not None:
            found["images"] = activation_error.compare(options, path, trained)
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
    rows: list[GemmRow | ForwardRow] = [*result.gemm, *result.forward]
    for row, value in zip(rows, [*values["gemm"], *values["forward"]], strict=True):
        if not row.figure.samples:
            continue
        samples = [seconds * 1e3 for seconds in row.figure.samples]
        value |= {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}
        if isinstance(row, GemmRow):
            value["gops"] = row.operations / row.figure.median / 1e9
        else:
            value["images_per_second"] = row.images_per_second
    values["goals"] = [
        dataclasses.asdict(goal)
        | {"found": goal.found._asdict() if goal.found else None, "met": goal.met}
        for goal in goals(result)
    ]
    return values
