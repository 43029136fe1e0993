"""`terdit bench --device cuda`; `--what roofline` and `--what kernels` need no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import terdit_cli
from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem, UsageError, did_you_mean
from terdit_cli.generate.generator import usable_device
from terdit_cli.lab.bench import compiled_kernels as gpu_compile
from terdit_cli.lab.bench.cuda_networks import CudaStopwatch, GpuFindings, Plan, measure
from terdit_cli.lab.bench.cuda_page import GpuReport, gpu_goals, gpu_page, gpu_tables
from terdit_cli.lab.bench.roofline import RooflineRow, analyse
from terdit_cli.lab.bench.settings import DOWNSAMPLE, numbers, words
from terdit_cli.model.dit import SIZES, build_config
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.system.atomic import write_whole
from terdit_cli.system.gpus import find_gpu

ROOFLINE, KERNELS = "roofline", "kernels"
LARGEST_IMAGES = 256

__all__ = ["as_json", "gpu_tables", "run"]


def run(
    model: str = "600m,4.2b",
    what: str = "all",
    size: str = "",
    images: str = "",
    device: str = "cuda",
    chip: str = "h100",
    repeats: int = 7,
    seed: int = 0,
    output: Path | None = None,
    command: str = "terdit bench --device cuda",
) -> GpuReport:
    """Measure on a GPU, or only count.

    Args:
        model: named sizes, comma separated.
        what: "all" to measure and count, "roofline" to count, "kernels" to count and to compile
            the kernels ahead.
        size: image sizes in pixels, "" for 256,512.
        images: guided images a batch, "" for 1,8,32.
        device: "cuda" or "cuda:N"; where nothing is measured it does not matter.
        chip: whose data sheet bounds the products.
        output: the .md file to write.

    Raises:
        UsageError: unknown sizes or chips; EnvironmentProblem: no usable GPU.
    """
    plan = Plan(
        models=words(model),
        sizes=numbers("--size", size) or Plan.sizes,
        images=numbers("--images", images) or Plan.images,
        repeats=repeats,
        seed=seed,
    )
    _check(plan, what, output)
    limits = find_gpu(chip)
    findings, why_not = GpuFindings(), None
    compiled: list[dict[str, Any]] = []
    if what == KERNELS:
        _require_compiler()
        for target in gpu_compile.TARGETS:
            console.note(f"bench: compiling for sm_{target}")
            compiled += gpu_compile.table(target)
    if what != "all":
        why_not = "nothing was measured"
    else:
        if device.partition(":")[0] != "cuda":
            raise UsageError(
                "the device cannot be used", got=repr(device), expected="cpu, cuda or cuda:1",
                fix="--device cuda",
            )  # fmt: skip
        place = torch.device(device)
        if torch.cuda.is_available():
            usable_device(device)  # refuses a number that no GPU has
        why_not = gpu.available(place)
        if why_not is not None:
            raise EnvironmentProblem(
                "there is no GPU to measure",
                got=why_not,
                expected="an NVIDIA GPU of compute capability 8.0 or newer, and Triton",
                fix="terdit bench --what roofline counts without one",
            )
        name = torch.cuda.get_device_name(place)
        with torch.cuda.device(place):  # whose stream the events are recorded on
            findings = measure(plan, place, CudaStopwatch(place), name)
    rows: list[RooflineRow] = []
    for name in plan.models:
        for pixels in plan.sizes:
            config = build_config(name, input_size=pixels // DOWNSAMPLE, qk_norm=True)
            for count in plan.images:
                rows += analyse(config, limits, count, name, pixels)
    report = GpuReport(
        command=command,
        machine=f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"terdit {terdit_cli.__version__}",
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seed=seed,
        repeats=repeats,
        why_not=why_not,
        findings=findings,
        roofline=rows,
        kernels=compiled,
    )
    if output is not None:
        write_whole(output, gpu_page(report))
    return report


def _require_compiler() -> None:
    """Raise EnvironmentProblem where Triton cannot compile."""
    if importlib.util.find_spec("triton") is None:
        raise EnvironmentProblem("Triton is not installed", fix="pip install 'terdit[gpu]'")
    if gpu.kernels().INTERPRETED:
        raise EnvironmentProblem("Triton runs its interpreter", fix="unset TRITON_INTERPRET")


def _check(plan: Plan, what: str, output: Path | None) -> None:
    """Raise UsageError for what cannot be measured or written."""
    if what not in ("all", ROOFLINE, KERNELS):
        raise UsageError(
            "wrong --what for a GPU", got=repr(what), expected=f"all, {ROOFLINE} or {KERNELS}",
            fix="--what all",
        )  # fmt: skip
    for name in plan.models:
        if name not in SIZES:
            raise UsageError(
                "unknown model size", got=repr(name) + did_you_mean(name, SIZES),
                expected="of " + ", ".join(SIZES), fix="terdit bench 600m,4.2b --device cuda",
            )  # fmt: skip
    for pixels in plan.sizes:
        if pixels < 2 * DOWNSAMPLE or pixels % (2 * DOWNSAMPLE):
            raise UsageError(
                "wrong --size", got=pixels, expected=f"a multiple of {2 * DOWNSAMPLE}",
                fix="--size 256",
            )  # fmt: skip
    for count in plan.images:
        if not 1 <= count <= LARGEST_IMAGES:
            raise UsageError("wrong --images", got=count, expected=f"1 to {LARGEST_IMAGES}")
    if output is not None and output.suffix != ".md":
        raise UsageError(
            "unknown kind of page", got=output.suffix, expected=".md", where=output,
            fix="--out gpu.md",
        )  # fmt: skip


def as_json(report: GpuReport) -> dict[str, Any]:
    """Return plain JSON types, with the goals beside the figures."""
    goals = [
        dataclasses.asdict(goal)
        | {"found": goal.found._asdict() if goal.found else None, "met": goal.met}
        for goal in gpu_goals(report.findings)
    ]
    return dataclasses.asdict(report) | {"goals": goals}
