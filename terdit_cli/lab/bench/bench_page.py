"""What a benchmark found as tables for a terminal, and as a page in Markdown with its notes."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from terdit_cli.console import byte_size
from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.results import (
    OURS,
    SAMPLE_STEPS,
    BenchResult,
    ForwardRow,
    GemmRow,
    ratio,
)
from terdit_cli.lab.bench.roofline import RooflineRow
from terdit_cli.report import markdown

TERMINAL = 80  # columns that every table fits in
_NAME = 20  # of these for the first column, at least
_GAP = 2  # between columns

NOTES = """\
Every figure is the median of {repeats} interleaved repeats (A B C A B C ...), with the smallest
and the largest beside it. Other work on the machine shows in these, and it hits threads that wait
for each other hardest; the figure of the best times is disturbed least. Rivals run on as many
threads as terdit ({threads}). All compute the same function of the same ternary weights
(seed {seed}). GOPS count 2 M K N operations; the share is of the peak that was measured in the
same rounds for the same arithmetic (int16: half of int8's). terdit's times include the
quantisation of the activations; it takes and gives float32. The bf16 rivals are given bfloat16.
Errors are relative (L2): of a product against float64, of a network against torch fp32."""

GPU_NOTES = """\
Networks of random weights (seed {seed}) on one device, each batch in turns, medians of {repeats}
repeats by CUDA events with the smallest and the largest beside them. I images with guidance are
2 I rows. Shares are of what torch's own large products and a copy reached on this device in the
same run. Errors are relative (L2), against upstream's way in float32. Memory is the weights and
the most that the first forwards took, graphs and compilation included."""

ROOFLINE_NOTES = """\
Counted, not measured: the least time of each matrix product of a forward by the data sheet's dense
peaks and bandwidth, codes of 2 bits and int8 activations beside a bfloat16 matrix. Attention, norms
and gates are the same for both and left out, so the whole can gain less than its products."""

METRIC_NOTES = """\
All metrics are computed in float64 from the same features. Costs are of synthetic features (seed
{seed}), each metric in a process of its own; making the features is not counted. The Frechet
distance takes turns with clean-fid's `frechet_distance` (scipy's `sqrtm`) in one process."""

TRAINING_NOTES = """\
Ternary and full-precision networks train in turns on the same random images; a repeat is one step:
forward, backward, AdamW, EMA. Ratios are of medians."""

# By heading: the cell of a row, as a format of its attributes or a function. A cell that needs what
# is None stays empty.
Columns = Mapping[str, str | Callable[[Any], str]]


class Table(NamedTuple):
    """A titled table of texts; `notes` stand below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    spare: Sequence[str] = ()  # columns that a narrow terminal does without, the first one first

    def markdown(self) -> str:
        below = "".join(f"\n{note}\n" for note in self.notes)
        return (markdown.table(self.header, self.rows) + "\n" if self.rows else "") + below

    def narrow(self) -> Table:
        """Return the table folded for 80 columns, without empty and then without spare ones."""
        header = [textwrap.fill(name, 12) for name in self.header]
        columns = list(zip(*self.rows, strict=True)) or [()] * len(header)
        shown = [index for index, column in enumerate(columns) if any(column) or not index]

        def room() -> int:
            texts = ([*header[i].splitlines(), *columns[i]] for i in shown[1:])
            return TERMINAL - sum(max(map(len, text)) + _GAP for text in texts)

        for index in map(list(self.header).index, self.spare):
            if index in shown and room() < _NAME:
                shown.remove(index)
        width = max(room(), _NAME // 2)
        rows = [
            [textwrap.fill(row[0], width), *(row[index] for index in shown[1:])]
            for row in self.rows
        ]
        return self._replace(header=[header[index] for index in shown], rows=rows)


class _Cells(string.Formatter):
    """Formats attributes of a row, with two more kinds: MiB, and `size` of bytes."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        (row,) = args
        value = row.get(key) if isinstance(row, dict) else getattr(row, str(key))
        if value is None:
            raise LookupError
        return value

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise LookupError
        if format_spec == "MiB":
            return f"{value / 2**20:.0f} MiB"
        return byte_size(value) if format_spec == "size" else format(value, format_spec)

    def cell(self, column: str | Callable[[Any], str], row: Any) -> str:
        try:
            return self.format(column, row) if isinstance(column, str) else column(row)
        except LookupError:
            return ""


def _table(title: str, rows: Iterable[Any], columns: Columns, spare: Sequence[str] = ()) -> Table:
    """Return a table of rows; those that were not run become notes."""
    rows, cells = list(rows), _Cells()
    done = [row for row in rows if getattr(row, "why_not", None) is None]
    notes = [f"{row.place} not run: {row.why_not}" for row in rows if row not in done]
    shown = [[cells.cell(column, row) for column in columns.values()] for row in done]
    return Table(title, list(columns), shown, notes, spare)


def page(result: BenchResult) -> str:
    """Return the whole page in Markdown."""
    machine = result.machine
    load = f"; load before the run {machine.load:.1f}" if machine.load is not None else ""
    parts = [
        f"# terdit bench: {result.model}\n",
        "".join(f"{peaks.device}; " for peaks in result.gpu_peaks)
        + f"{machine.cpu}, {machine.cores} cores, {byte_size(machine.memory_bytes)} of memory "
        f"({', '.join(machine.flags) or 'no special instructions'}); "
        f"torch {machine.torch}, Python {machine.python}, terdit {machine.terdit}; "
        f"{machine.date}{load}.\n",
        f"```\n{result.command}\n```\n",
        "Every number and every verdict on this page was computed by that command.\n",
    ]
    for shown, notes in (
        (result.gemm or result.forward, NOTES),
        (result.gpu, GPU_NOTES),
        (result.roofline, ROOFLINE_NOTES),
        (result.scores, METRIC_NOTES),
        (result.training, TRAINING_NOTES),
    ):
        if shown:
            words = {"repeats": result.repeats, "threads": result.threads, "seed": result.seed}
            parts.append(notes.format(**words) + "\n")
    if result.peaks:
        parts += ["## The roofline in words\n", roofline(result)]
    for found in tables(result):
        parts += [f"## {found.title}\n", found.markdown()]
    return "\n".join(parts)


def tables(result: BenchResult) -> list[Table]:
    """Return all tables: goals, peaks, matrix products, networks, processes, limits."""
    known = [goal for goal in goals(result) if goal.found is not None]
    made = [
        _table("Goals", known, _GOALS, ["of the best times", "spread"]),
        _table("Measured peaks", result.peaks, _PEAKS),
        *_gemm_tables(result),
        _forward_table(result),
        _table(_SAMPLE_TITLE, result.sample, _SAMPLE, ["activations"]),
        _table(_IMAGES_TITLE, result.images, _IMAGES),
        _table("Measured peaks", result.gpu_peaks, _GPU_PEAKS),
        _table("Whole networks", result.gpu, _GPU, ["spread", "weights", "size"]),
        _table("adaLN of all blocks, one image with guidance", result.adaln, _ADALN),
        *_roofline_tables(result),
        _table("Kernels compiled ahead", result.kernels, _KERNELS, _KERNELS_SPARE),
        _table("Metrics of the same features", result.agreement, _AGREEMENT, _AGREEMENT_SPARE),
        _table("What metrics cost, synthetic features", result.scores, _SCORES, _SCORES_SPARE),
        _table("Training steps", result.training, _TRAINING, _TRAINING_SPARE),
    ]
    return [table for table in made if table.rows or table.notes]


def roofline(result: BenchResult) -> str:
    """Say which share of the peak each part reaches and where the rest of the time goes."""
    peak = result.peaks[0]
    words = [
        f"One multiply-add counts as two operations. On {peak.threads} threads int8 has "
        f"{peak.int8 / peak.fp32:.1f} times the peak of fp32 and {peak.int8 / peak.bf16:.1f} times "
        "that of bf16: activations in 8 bits are what makes a ternary model fast here, and the "
        "other activations can at best reach their own peaks."
    ]
    shares: dict[str, list[float]] = {}
    for product in result.gemm:
        timed = product.who == OURS and (product.m, product.k, product.n) in results.GEMM_SHAPES
        usual = product.isa == peak.isa and product.threads == result.threads
        if timed and usual and product.share is not None:
            grouped = " by groups of 128" if product.granularity != "tensor" else ""
            shares.setdefault(product.activations + grouped, []).append(product.share)
    if shares:
        said = (f"{kind} {min(of):.0%} to {max(of):.0%}" for kind, of in shares.items())
        words.append("Single matrix products reach of their peaks: " + "; ".join(said) + ".")
    for row in result.forward:
        if row.who == OURS and row.threads == result.threads and row.share is not None:
            ms, limit = row.figure.ms, row.figure.ms * row.share
            words.append(
                f"A forward of {row.tokens} tokens with {row.activations} activations takes "
                f"{ms:.0f} ms, of which the large matrices need {limit:.0f} ms at the peak "
                f"({row.share:.0%}); attention, norms, rotary embedding, gates, quantisation and "
                f"what the products lose are the other {ms - limit:.0f} ms."
            )
    return "\n".join(words) + "\n"


FASTER = "terdit int8 is faster by"
_GOALS = {
    "goal": "{text}",
    "wanted": "{wanted_text}",
    "measured": "{found.measured:.3g}",
    "spread": "{found.range}",
    "of the best times": "{found.best:.3g}",
    "met": "{verdict}",
}
_PEAKS: Columns = {
    "threads": "{threads}",
    "instructions": "{isa}",
    "int8 GOPS": lambda peak: f"{peak.int8 / 1e9:.0f}",
    "bf16 GOPS": lambda peak: f"{peak.bf16 / 1e9:.0f}",
    "fp32 GOPS": lambda peak: f"{peak.fp32 / 1e9:.0f}",
}
_SAMPLE_TITLE = "`terdit sample`, one image with guidance, no VAE, loading not counted"
_SAMPLE = {
    "codec": "{codec}",
    "backend": "{backend}",
    "activations": "{activations}",
    "threads": "{threads}",
    "steps run": "{steps}",
    f"seconds per image at {SAMPLE_STEPS} steps": "{seconds_per_image:.1f}",
    "peak resident": "{peak_resident:MiB}",
}
_IMAGES_TITLE = "Images beside those of fp32, same noise, dpmpp-2m, 20 steps"
_IMAGES: Columns = {
    "activations": "{activations}",
    "images": "{images}",
    "PSNR": lambda row: _decibels(row.psnr),
    "of the worst image": lambda row: _decibels(row.worst_psnr),
    "equal values": "{equal:.1%}",
    "largest": "{largest}",
}
_GPU_PEAKS: Columns = {
    "device": "{device}",
    "bf16 TFLOPS": lambda peaks: _tera(peaks.bf16),
    "int8 TOPS": lambda peaks: _tera(peaks.int8),
    "fp8 TFLOPS": lambda peaks: _tera(peaks.fp8),
    "copy TB/s": lambda peaks: _tera(peaks.bandwidth, 2),
}
_GPU = {
    "model": "{model}",
    "size": "{size} px",
    "images": "{images}",
    "who": "{label}",
    "ms": "{figure.ms:.3f}",
    "spread": "{figure.low:.3f} .. {figure.high:.3f}",
    "share": "{share:.0%}",
    "weights": "{weight_bytes:size}",
    "memory": "{peak_bytes:size}",
    "error": "{error:.1e}",
}
_ADALN: Columns = {
    "model": "{model}",
    "precision of the step": "{activations}",
    "microseconds": lambda row: f"{1e6 * row.figure.median:.1f}",
    "packed": "{packed_bytes:size}",
    "share of the bandwidth": "{share:.0%}",
}
LIMIT = "bf16: us, limit"
_ROOFLINE: Columns = {
    "model, size, images": "{model}, {size} px, {images}",
    "product": "{product}",
    "launches x [M, K] -> N": "{shape}",
    "GOP": lambda row: f"{row.operations / 1e9:.1f}",
    "MB": lambda row: f"{row.packed_bytes / 1e6:.0f}",
    "MB bf16": lambda row: f"{row.bf16_bytes / 1e6:.0f}",
    "ops per byte": lambda row: f"{row.operations / row.packed_bytes:.0f}",
    "W2A8: us, limit": "{ternary}",
    LIMIT: "{bf16}",
    "faster at most": "{at_most:.1f}",
}
_ROOFLINE_SPARE = (
    "launches x [M, K] -> N",
    "GOP",
    "ops per byte",
    "MB bf16",
    "MB",
    "bf16: us, limit",
)
_KERNELS: Columns = {
    "chip": "sm_{sm}",
    "kernel": "{kernel}",
    "tile BN x BM x BK, warps, stages": "{tile}",
    "registers": "{registers}",
    "shared memory": "{shared:size}",
    "spilled bytes": "{spills}",
    "tensor cores": lambda each: " ".join(each["tensor_cores"]),
}
_KERNELS_SPARE = ("tensor cores", "shared memory")
_AGREEMENT: Columns = {
    "metric": "{metric}",
    "features": "{case}",
    "terdit": "{ours:.10g}",
    "recorded": "{recorded:.10g}",
    "from the recorded": lambda row: _apart(row.apart(row.recorded)),
    "clean-fid": "{clean_fid:.10g}",
    "from clean-fid's": lambda row: _apart(row.apart(row.clean_fid)),
    "torch-fidelity": "{torch_fidelity:.10g}",
    "from torch-fidelity's": lambda row: _apart(row.apart(row.torch_fidelity)),
}
_AGREEMENT_SPARE = ("torch-fidelity", "clean-fid", "recorded", "features")
_SCORES: Columns = {
    "": "{name}",
    "samples x features": "{n} x {dim}",
    "threads": "{threads}",
    "s": "{figure.median:.2f}",
    "spread": lambda row: f"{min(row.figure.samples):.2f} .. {max(row.figure.samples):.2f}",
    "peak resident": "{peak_resident:MiB}",
    "above torch and features": "{extra:MiB}",
    "clean-fid s": "{clean_fid_seconds:.2f}",
    "times faster": "{times_faster:.1f}",
    "difference": "{difference:.1e}",
}
_SCORES_SPARE = ("spread", "threads", "peak resident", "samples x features")
_TRAINING = {
    "recipe": "{name}",
    "parameters": "{parameters:,}",
    "images x tokens": "{images} x {tokens}",
    "arithmetic": "{arithmetic}",
    "threads": "{threads}",
    "ternary ms": "{ternary.ms:.1f}",
    "full precision ms": "{full.ms:.1f}",
    "ratio": "{ratio.measured:.3f} ({ratio.low:.2f} .. {ratio.high:.2f})",
    "of the best times": "{ratio.best:.3f}",
}
_TRAINING_SPARE = ("threads", "parameters", "of the best times", "images x tokens")


def _gemm_tables(result: BenchResult) -> list[Table]:
    """Return one table per shape (and instruction set, if others than the automatic one ran)."""
    groups: dict[str, list[GemmRow]] = {}
    automatic = result.peaks[0].isa if result.peaks else ""
    for row in result.gemm:
        threads = "1 thread" if row.threads == 1 else f"{row.threads} threads"
        forced = f", {row.isa} forced" if automatic and row.isa != automatic else ""
        title = f"{row.k} -> {row.n}, {row.m} rows, {threads}{forced}"
        groups.setdefault(title, []).append(row)
    columns: Columns = {
        "": "{label}",
        "ms": "{figure.ms:.3f}",
        "spread": "{figure.low:.3f} .. {figure.high:.3f}",
        "GOPS": lambda row: f"{row.operations / row.figure.median / 1e9:.0f}",
        "share": "{share:.0%}",
    }
    return [
        _table(title, rows, {**columns, **_compared(rows)}, ["spread"])
        for title, rows in groups.items()
    ]


def _forward_table(result: BenchResult) -> Table:
    columns = {
        "": "{label}",
        "rows x tokens": "{batch} x {tokens}",
        "threads": "{threads}",
        "backend": "{ran_on}",
        "ms": "{figure.ms:.1f}",
        "spread": "{figure.low:.1f} .. {figure.high:.1f}",
        "share": "{share:.0%}",
        f"images/s at {SAMPLE_STEPS} steps, with guidance": "{images_per_second:.3g}",
        "resident": "{resident:MiB}",
        "peak": "{peak_resident:MiB}",
    }
    spare = ["spread", "resident", "threads", "backend", "share", "rows x tokens"]
    return _table(
        "The whole network", result.forward, {**columns, **_compared(result.forward)}, spare
    )


def _roofline_tables(result: BenchResult) -> list[Table]:
    chips: dict[str, list[RooflineRow]] = {}
    for row in result.roofline:
        chips.setdefault(row.chip, []).append(row)
    return [
        _table(f"Limits on {chip}, by its data sheet", rows, _ROOFLINE, _ROOFLINE_SPARE)
        for chip, rows in chips.items()
    ]


def _compared(rows: Sequence[GemmRow | ForwardRow]) -> Columns:
    """Return how many times faster terdit's int8 of the same problem is, and the error."""

    def faster(row: GemmRow | ForwardRow) -> str:
        ours = next(
            (one for one in rows if (one.who, one.activations) == (OURS, "int8")
             and one.problem == row.problem), None,
        )  # fmt: skip
        found = None if row is ours else ratio(ours, row)
        return f"{found.measured:.2f} ({found.low:.2f} .. {found.high:.2f})" if found else ""

    return {FASTER: faster, "error": "{error:.1e}"}


def _apart(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _tera(rate: float | None, digits: int = 0) -> str:
    return f"{rate / 1e12:.{digits}f}" if rate else "none"
