"""The page of a benchmark in Markdown: goals, tables, the roofline in words, how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from terdit_cli.console import byte_size
from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.results import (
    OURS,
    SAMPLE_STEPS,
    BenchResult,
    ForwardRow,
    GemmRow,
    Goal,
    PeakRow,
    Row,
    ratio,
)
from terdit_cli.report import markdown

NOTES = """\
Every figure is the median of {repeats} interleaved repeats (A B C A B C ...), with the smallest
and the largest beside it. Other work on the machine shows in these, and it hits threads that wait
for each other hardest; the figure of the best times is disturbed least. Rivals run on as many
threads as terdit ({threads}). All compute the same function of the same random ternary weights
(seed {seed}). GOPS count 2 M K N operations; the share is of the peak that was measured in the
same rounds for the same arithmetic (int16: half of int8's). terdit's times include the
quantisation of the activations; it takes and gives float32. The bf16 rivals are given bfloat16.
Errors are relative (L2): of a product against float64, of a network against torch fp32."""

METRIC_NOTES = """\
All metrics are computed in float64 from the same features. Costs are of synthetic features (seed
{seed}), each metric in a process of its own; making the features is not counted. The Frechet
distance takes turns with clean-fid's `frechet_distance` (scipy's `sqrtm`) in one process."""


TRAINING_NOTES = """\
Ternary and full-precision networks train in turns on the same random images; a repeat is one step:
forward, backward, AdamW, EMA. Ratios are of medians."""


class Table(NamedTuple):
    """A titled table of texts, for a terminal or a page."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return markdown.table(self.header, self.rows) + "\n"


def page(result: BenchResult) -> str:
    """Return the whole page in Markdown."""
    machine = result.machine
    load = f"; load before the run {machine.load:.1f}" if machine.load is not None else ""
    parts = [
        f"# terdit bench: {result.model}\n",
        f"{machine.cpu}, {machine.cores} cores, {byte_size(machine.memory_bytes)} of memory "
        f"({', '.join(machine.flags) or 'no special instructions'}); "
        f"torch {machine.torch}, Python {machine.python}, terdit {machine.terdit}; "
        f"{machine.date}{load}.\n",
        f"```\n{result.command}\n```\n",
        "Every number and every verdict on this page was computed by that command.\n",
    ]
    if result.gemm or result.forward:
        notes = NOTES.format(repeats=result.repeats, threads=result.threads, seed=result.seed)
        parts.append(notes + "\n")
    if result.scores:
        parts.append(METRIC_NOTES.format(seed=result.seed) + "\n")
    if result.training:
        parts.append(TRAINING_NOTES + "\n")
    if result.peaks:
        parts += ["## The roofline in words\n", roofline(result)]
    for found in tables(result):
        parts += [f"## {found.title}\n", found.markdown()]
    return "\n".join(parts)


def tables(result: BenchResult) -> list[Table]:
    """Return all tables: goals, peaks, matrix products, networks, processes."""
    known = any(goal.found is not None for goal in goals(result))
    found = [goal_table(goals(result))] if known else []
    found += [peak_table(result.peaks)] if result.peaks else []
    found += gemm_tables(result)
    found += [forward_table(result)] if result.forward else []
    found += [sample_table(result)] if result.sample else []
    found += [images_table(result)] if result.images else []
    found += [agreement_table(result)] if result.agreement else []
    found += [score_table(result)] if result.scores else []
    found += [training_table(result)] if result.training else []
    return found


def goal_table(found: Sequence[Goal], title: str = "Goals") -> Table:
    """Return goals with what was measured."""
    verdict = {True: "yes", False: "no", None: "not measured"}
    rows = []
    for goal in found:
        wanted = f"{'<=' if goal.at_most else '>='} {_g(goal.wanted)} {goal.unit}".rstrip()
        measured, low, high, best = map(_g, goal.found) if goal.found is not None else [""] * 4
        spread = f"{low} .. {high}" if low != high else ""
        rows.append((goal.text, wanted, measured, spread, best, verdict[goal.met]))
    header = ("goal", "wanted", "measured", "spread", "of the best times", "met")
    return Table(title, header, rows)


def peak_table(peaks: Sequence[PeakRow]) -> Table:
    """Return the measured peaks of the dot product instructions."""
    rows = [
        (str(peak.threads), peak.isa)
        + tuple(f"{value / 1e9:.0f}" for value in (peak.int8, peak.bf16, peak.fp32))
        for peak in peaks
    ]
    header = ("threads", "instructions", "int8 GOPS", "bf16 GOPS", "fp32 GOPS")
    return Table("Measured peaks", header, rows)


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
            shares.setdefault(_kind(product), []).append(product.share)
    if shares:
        said = (f"{kind} {min(of):.0%} to {max(of):.0%}" for kind, of in shares.items())
        words.append("Single matrix products reach of their peaks: " + "; ".join(said) + ".")
    for row in result.forward:
        timed = row.who == OURS and row.threads == result.threads and row.share is not None
        if timed and row.share is not None:
            ms, limit = row.figure.median * 1e3, row.figure.median * 1e3 * row.share
            words.append(
                f"A forward of {row.tokens} tokens with {row.activations} activations takes "
                f"{ms:.0f} ms, of which the large matrices need {limit:.0f} ms at the peak "
                f"({row.share:.0%}); attention, norms, rotary embedding, gates, quantisation and "
                f"what the products lose are the other {ms - limit:.0f} ms."
            )
    return "\n".join(words) + "\n"


def gemm_tables(result: BenchResult) -> list[Table]:
    """Return one table a shape (and instruction set, if others than the automatic one ran)."""
    groups: dict[tuple[int, int, int, int, str], list[GemmRow]] = {}
    automatic = result.peaks[0].isa if result.peaks else ""
    for row in result.gemm:
        isa = row.isa if automatic and row.isa != automatic else ""
        groups.setdefault((row.m, row.k, row.n, row.threads, isa), []).append(row)
    header = ("", "ms", "spread", "GOPS", "share", "terdit int8 is faster by", "error")
    found = []
    for (m, k, n, threads, isa), rows in groups.items():
        title = f"{k} -> {n}, {m} rows, {_threads(threads)}" + (f", {isa} forced" if isa else "")
        found.append(Table(title, header, [_gemm_cells(row, rows) for row in rows]))
    return found


def _gemm_cells(row: GemmRow, group: Sequence[GemmRow]) -> tuple[str, ...]:
    if row.why_not is not None:
        return (_not_run(row), "", "", "", "", "", "")
    return (
        row.label,
        f"{row.figure.median * 1e3:.3f}",
        _spread_ms(row, 3),
        f"{row.operations / row.figure.median / 1e9:.0f}",
        _percent(row.share),
        _faster(row, group),
        "" if row.error is None else f"{row.error:.1e}",
    )


def forward_table(result: BenchResult) -> Table:
    """Return the table of whole networks."""
    header = (
        "", "rows x tokens", "threads", "backend", "ms", "spread", "share",
        f"images/s at {SAMPLE_STEPS} steps, guided", "resident", "peak", "terdit int8 is faster by",
        "error",
    )  # fmt: skip
    rows = []
    for row in result.forward:
        group = [
            other
            for other in result.forward
            if (other.tokens, other.threads) == (row.tokens, row.threads)
        ]
        rows.append(_forward_cells(row, group))
    return Table("The whole network", header, rows)


def _forward_cells(row: ForwardRow, group: Sequence[ForwardRow]) -> tuple[str, ...]:
    place = (f"{row.batch} x {row.tokens}", str(row.threads))
    if row.why_not is not None:
        return (_not_run(row), *place, *[""] * 9)
    backend = f"{row.backend} ({row.isa})" if row.isa else row.backend
    return (
        row.label,
        *place,
        backend,
        f"{row.figure.median * 1e3:.1f}",
        _spread_ms(row, 1),
        _percent(row.share),
        f"{row.images_per_second:.3g}",
        *("" if size is None else f"{size / 2**20:.0f} MiB"
          for size in (row.resident, row.peak_resident)),
        _faster(row, group),
        "" if row.error is None else f"{row.error:.1e}",
    )  # fmt: skip


def sample_table(result: BenchResult) -> Table:
    """Return the table of whole `terdit sample` processes."""
    rows = [
        (
            row.codec,
            row.backend,
            row.activations,
            str(row.threads),
            str(row.steps),
            f"{row.seconds / row.steps * SAMPLE_STEPS:.1f}",
            "" if row.peak_resident is None else f"{row.peak_resident / 2**20:.0f} MiB",
        )
        for row in result.sample
    ]
    header = (
        "codec", "backend", "activations", "threads", "steps run",
        f"seconds an image at {SAMPLE_STEPS} steps", "peak resident",
    )  # fmt: skip
    return Table("`terdit sample`, one guided image, no VAE, loading not counted", header, rows)


def images_table(result: BenchResult) -> Table:
    """Return the table of images beside those of fp32 activations."""
    rows = [
        (
            row.activations,
            str(row.images),
            "equal" if row.psnr is None else f"{row.psnr:.1f} dB",
            "equal" if row.worst_psnr is None else f"{row.worst_psnr:.1f} dB",
            f"{row.equal:.1%}",
            str(row.largest),
        )
        for row in result.images
    ]
    header = ("activations", "images", "PSNR", "of the worst image", "equal values", "largest")
    return Table("Images beside those of fp32, same noise, dpmpp-2m, 20 steps", header, rows)


def agreement_table(result: BenchResult) -> Table:
    """Return the table of metrics by terdit and by others."""
    found = []
    for row in result.agreement:
        cells = [row.metric, row.case, f"{row.ours:.10g}"]
        for other in (row.recorded, row.clean_fid, row.torch_fidelity):
            apart = row.difference(other)
            cells += ["", ""] if other is None else [f"{other:.10g}", f"{apart:.1e}"]
        found.append(cells)
    header = ["metric", "features", "terdit"]
    for who in ("recorded", "clean-fid", "torch-fidelity"):
        header += [who, "difference"]
    return Table("Metrics of the same features", header, found)


def score_table(result: BenchResult) -> Table:
    """Return the table of what metrics cost."""
    found = []
    for row in result.scores:
        theirs = row.clean_fid.samples
        extra = None
        if row.resident is not None and row.peak_resident is not None:
            extra = row.peak_resident - row.resident
        found.append(
            (
                row.name,
                f"{row.n} x {row.dim}",
                str(row.threads),
                f"{row.figure.median:.2f}",
                f"{min(row.figure.samples):.2f} .. {max(row.figure.samples):.2f}",
                "" if row.peak_resident is None else f"{row.peak_resident / 2**20:.0f} MiB",
                "" if extra is None else f"{extra / 2**20:.0f} MiB",
                f"{row.clean_fid.median:.2f}" if theirs else "",
                f"{row.clean_fid.median / row.figure.median:.1f}" if theirs else "",
                "" if row.difference is None else f"{row.difference:.1e}",
            )
        )
    header = (
        "", "samples x features", "threads", "s", "spread", "peak resident",
        "above torch and features", "clean-fid s", "times faster", "difference",
    )  # fmt: skip
    return Table("What metrics cost, synthetic features", header, found)


def training_table(result: BenchResult) -> Table:
    """Return the table of steps, ternary beside full precision."""
    rows = [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.images} x {row.tokens}",
            row.precision + (", compiled" if row.compiled else ""),
            str(row.threads),
            f"{1e3 * row.ternary.median:.1f}",
            f"{1e3 * row.full.median:.1f}",
            f"{row.ratio.measured:.3f} ({row.ratio.low:.2f} .. {row.ratio.high:.2f})",
            f"{row.ratio.best:.3f}",
        )
        for row in result.training
    ]
    header = (
        "recipe", "parameters", "images x tokens", "arithmetic", "threads", "ternary ms",
        "full precision ms", "ratio", "of the best times",
    )  # fmt: skip
    return Table("Training steps", header, rows)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _not_run(row: Row) -> str:
    return f"{row.label} (not run: {row.why_not})"


def _kind(row: GemmRow) -> str:
    return row.activations + (" by groups of 128" if row.granularity != "tensor" else "")


def _faster(row: Row, group: Sequence[Row]) -> str:
    """Return how many times faster terdit's int8 of the same table is than `row`."""
    ours = next((one for one in group if one.who == OURS and one.activations == "int8"), None)
    if ours is None or row is ours:
        return ""
    found = ratio(ours, row)
    return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f} .. {found[2]:.2f})"


def _spread_ms(row: Row, digits: int) -> str:
    low, high = min(row.figure.samples) * 1e3, max(row.figure.samples) * 1e3
    return f"{low:.{digits}f} .. {high:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _g(value: float) -> str:
    """Format a goal's number: 0.95, 2.4, 480, 1e-06."""
    return f"{value:.3g}"
