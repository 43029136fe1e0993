"""What a benchmark on a GPU found, and what was counted without one, as tables and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from terdit_cli.console import byte_size
from terdit_cli.lab.bench.cpu_page import Table, goal_table
from terdit_cli.lab.bench.cuda_networks import GpuFindings, GpuRow
from terdit_cli.lab.bench.results import OURS, Goal, Spread, ratio
from terdit_cli.lab.bench.roofline import RooflineRow

GOAL_IMAGES, GOAL_SIZE = 8, 256

NOTES = """\
Networks of random weights (seed {seed}) on one device, each batch in turns, medians of {repeats}
repeats by CUDA events with the smallest and the largest beside them. I images with guidance are
2 I rows. Shares are of what torch's own large products and a copy reached on this device in the
same run. Errors are relative (L2), against upstream's way in float32. Memory is the weights and
the most that the first forwards took, graphs and compilation included."""

ROOFLINE_NOTES = """\
Counted, not measured: the least time of each matrix product of a forward by the data sheet's dense
peaks and bandwidth, codes of 2 bits and int8 activations beside a bfloat16 matrix. Attention, norms
and gates are the same for both and left out, so the whole can gain less than its products."""


@dataclass(frozen=True)
class GpuReport:
    """One run: where, what was found, what was counted."""

    command: str
    machine: str
    date: str
    seed: int
    repeats: int
    why_not: str | None  # the reason why nothing was measured
    findings: GpuFindings
    roofline: list[RooflineRow]
    kernels: list[dict[str, Any]]  # compiled ahead, as `gpu_compile.table` gives them


def gpu_goals(findings: GpuFindings) -> list[Goal]:
    """Return the goals set for an H100, with what was measured."""
    goals = []
    for model in ("600m", "4.2b"):
        for who, activations, other, wanted in (
            ("W2A8", "int8", "bf16-compiled", 1.5),
            ("W2A16", "bf16", "bf16-compiled", 1.0),
            ("W2A8", "int8", "unpack", 8.0),
        ):
            ours = _row(findings, model, OURS, activations)
            theirs = _row(findings, model, other)
            name = "torch bf16 compiled" if other == "bf16-compiled" else "upstream's way"
            text = f"{model}, {GOAL_IMAGES} guided images, {GOAL_SIZE} px: {who} against {name}"
            goals.append(Goal(text, wanted, ratio(ours, theirs), unit="times"))
    small = _row(findings, "4.2b", OURS, "int8", images=1)
    peak = small.peak_bytes / 1e9 if small and small.peak_bytes else None
    found = Spread(peak, peak, peak, peak) if peak else None
    goals.append(Goal("4.2b, one guided image: GPU memory", 2.5, found, at_most=True, unit="GB"))
    shares = [row.share for row in findings.adaln if row.share is not None]
    found = Spread(min(shares), min(shares), max(shares), max(shares)) if shares else None
    text = "adaLN of one guided image: share of the bandwidth, the least of all"
    goals.append(Goal(text, 0.8, found))
    return goals


def _row(
    findings: GpuFindings, model: str, who: str, activations: str = "", images: int = GOAL_IMAGES
) -> GpuRow | None:
    for row in findings.rows:
        same = (row.model, row.who, row.images, row.size) == (model, who, images, GOAL_SIZE)
        if same and activations in ("", row.activations):
            return row
    return None


def gpu_tables(report: GpuReport) -> list[Table]:
    """Return all tables of a run."""
    findings = report.findings
    found = (
        [goal_table(gpu_goals(findings), "Goals (H100)")]
        if findings.device or report.why_not
        else []
    )
    if findings.device:
        found += [_peak_table(findings), _forward_table(findings.rows), _adaln_table(findings)]
    found += roofline_tables(report.roofline)
    return found + ([_kernel_table(report.kernels)] if report.kernels else [])


def _peak_table(findings: GpuFindings) -> Table:
    peaks = findings.peaks
    rates = [peaks.bf16, peaks.int8, peaks.fp8]
    cells = [f"{rate / 1e12:.0f}" if rate else "none" for rate in rates]
    copied = f"{peaks.bandwidth / 1e12:.2f}" if peaks.bandwidth else "none"
    header = ("device", "bf16 TFLOPS", "int8 TOPS", "fp8 TFLOPS", "copy TB/s")
    return Table("Measured peaks", header, [(str(findings.device), *cells, copied)])


def _forward_table(rows: Sequence[GpuRow]) -> Table:
    lines = []
    for row in rows:
        batch = (row.model, f"{row.size} px", str(row.images), row.label)
        if not row.figure.samples:
            lines.append((*batch, row.why_not or "not run", "", "", "", "", ""))
            continue
        samples = [1e3 * seconds for seconds in row.figure.samples]
        lines.append(
            (
                *batch,
                f"{1e3 * row.figure.median:.3f}",
                f"{min(samples):.3f} .. {max(samples):.3f}",
                "" if row.share is None else f"{row.share:.0%}",
                "" if row.weight_bytes is None else byte_size(row.weight_bytes),
                "" if row.peak_bytes is None else byte_size(row.peak_bytes),
                "" if row.error is None else f"{row.error:.1e}",
            )
        )
    header = (
        "model", "size", "images", "who", "ms", "spread", "share", "weights", "memory", "error",
    )  # fmt: skip
    return Table("Whole networks", header, lines)


def _adaln_table(findings: GpuFindings) -> Table:
    rows = [
        (
            row.model,
            row.activations,
            f"{1e6 * row.figure.median:.1f}",
            byte_size(row.packed_bytes),
            "" if row.share is None else f"{row.share:.0%}",
        )
        for row in findings.adaln
    ]
    header = ("model", "precision of the step", "microseconds", "packed", "share of the bandwidth")
    return Table("adaLN of all blocks, one guided image", header, rows)


def roofline_tables(rows: Sequence[RooflineRow]) -> list[Table]:
    """Return one table for each chip."""
    found = []
    for chip in dict.fromkeys(row.chip for row in rows):
        lines = []
        for row in rows:
            if row.chip != chip:
                continue
            lines.append(
                (
                    f"{row.model}, {row.size} px, {row.images}", row.product, row.shape,
                    f"{row.operations / 1e9:.1f}", f"{row.packed_bytes / 1e6:.0f}",
                    f"{row.bf16_bytes / 1e6:.0f}", f"{row.operations / row.packed_bytes:.0f}",
                    f"{1e6 * row.ternary.seconds:.0f} {row.ternary.limit}".strip(),
                    f"{1e6 * row.bf16.seconds:.0f} {row.bf16.limit}".strip(),
                    f"{row.at_most:.1f}",
                )
            )  # fmt: skip
        header = (
            "model, size, images", "product", "launches x [M, K] -> N", "GOP", "MB", "MB bf16",
            "ops a byte", "W2A8: us, limit", "bf16: us, limit", "faster at most",
        )  # fmt: skip
        found.append(Table(f"Limits on {chip}, by its data sheet", header, lines))
    return found


def _kernel_table(kernels: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            f"sm_{each['sm']}", each["kernel"], each.get("tile", ""), str(each["registers"]),
            byte_size(each["shared"]), str(each["spills"]), " ".join(each["tensor_cores"]),
        )
        for each in kernels
    ]  # fmt: skip
    header = (
        "chip", "kernel", "tile BN x BM x BK, warps, stages", "registers", "shared memory",
        "spilled bytes", "tensor cores",
    )  # fmt: skip
    return Table("Kernels compiled ahead", header, rows)


def gpu_page(report: GpuReport) -> str:
    """Return the page in Markdown."""
    where = report.findings.device or f"no GPU ({report.why_not})"
    parts = [
        "# terdit bench on GPUs\n",
        f"{where}; {report.machine}; {report.date}.\n",
        f"```\n{report.command}\n```\n",
        "Every number on this page was computed by that command.\n",
    ]
    if report.findings.device:
        parts.append(NOTES.format(seed=report.seed, repeats=report.repeats) + "\n")
    for table in gpu_tables(report):
        if table.title.startswith("Limits") and ROOFLINE_NOTES + "\n" not in parts:
            parts.append(ROOFLINE_NOTES + "\n")
        parts += [f"## {table.title}\n", table.markdown()]
    return "\n".join(parts)
