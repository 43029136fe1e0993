"""The goals of the CPU runtime, as set before it was built, and what a run says of each."""

from __future__ import annotations

from collections.abc import Iterable

from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.results import (
    OURS,
    SAMPLE_STEPS,
    BenchResult,
    ForwardRow,
    GemmRow,
    Goal,
    Row,
    Spread,
    certain,
    ratio,
)
from terdit_cli.lab.bench.rivals import GGML

INT8_RIVALS = ("int8-ao", "int8-mm")
MEMORY_GOAL_MIB = 480


def goals(result: BenchResult) -> list[Goal]:
    """Return the goals of what was measured, each with the figure of this run.

    Those for a whole network are set for the size 600m.
    """
    if result.agreement or result.scores:
        return _score_goals(result)
    if result.training:
        return _training_goals(result)
    whole = [*_forward_goals(result), *_memory_goals(result)] if result.model == "600m" else []
    return [*_gemm_goals(result), *whole, *_isa_goals(result)]


def _training_goals(result: BenchResult) -> list[Goal]:
    return [
        Goal(
            f"{row.name}, {row.parameters:,} parameters, compiled: step against full precision",
            1.05, row.ratio, unit="times", at_most=True,
        )
        for row in result.training
        if row.compiled
    ]  # fmt: skip


def _gemm_goals(result: BenchResult) -> list[Goal]:
    rows = {
        (row.who, row.activations if row.who == OURS else "", row.granularity, shape): row
        for row in result.gemm
        if row.threads == result.threads
        for shape in [(row.m, row.k, row.n)]
        if shape in results.GEMM_SHAPES and not _forced(result, row)
    }

    def each(activations: str, granularity: str = "tensor") -> list[GemmRow | None]:
        return [rows.get((OURS, activations, granularity, shape)) for shape in results.GEMM_SHAPES]

    def against(activations: str, *rivals: str) -> Spread | None:
        found: list[Spread | None] = []
        for ours, shape in zip(each(activations), results.GEMM_SHAPES, strict=True):
            others = (rows.get((rival, "", "tensor", shape)) for rival in rivals)
            best = _fastest(row for row in others if row is not None)
            found.append(ratio(ours, best))
        return _worst(found)

    def error(activations: str) -> Spread | None:
        errors = [row.error if row is not None else None for row in each(activations)]
        return _worst([certain(e) if e is not None else None for e in errors], at_most=True)

    def share(granularity: str) -> Spread | None:
        ours = each("int8", granularity)
        return _worst(_share_spread(row) if row is not None else None for row in ours)

    times = "times"
    return [
        Goal("GEMM int8: share of the int8 peak", 0.90, share("tensor")),
        Goal("GEMM int8, scales per group of 128: share of the peak", 0.80, share("group128")),
        Goal("GEMM int8 against ggml TQ2_0", 6.0, against("int8", GGML), unit=times),
        Goal("GEMM int8 against torch bf16", 2.1, against("int8", "bf16"), unit=times),
        Goal(
            "GEMM int8 against the best torch int8", 1.15, against("int8", *INT8_RIVALS), unit=times
        ),
        Goal(
            "GEMM int16 against torch bf16 compiled", 1.0, against("int16", "bf16-compiled"),
            unit=times,
        ),
        Goal("GEMM int16: relative error", 1e-4, error("int16"), at_most=True),
        Goal("GEMM fp32 against torch fp32", 2.4, against("fp32", "fp32"), unit=times),
        Goal("GEMM fp32: relative error", 1e-6, error("fp32"), at_most=True),
    ]  # fmt: skip


def _forced(result: BenchResult, row: Row) -> bool:
    """Return whether a row ran on another instruction set than the automatic choice."""
    return bool(result.peaks) and row.isa != result.peaks[0].isa


def _forward_goals(result: BenchResult) -> list[Goal]:
    sizes = sorted({row.size for row in result.forward})
    rows = {
        (row.who, row.activations if row.who == OURS else "", row.size, row.threads): row
        for row in result.forward
    }

    def ours(activations: str, size: int, threads: int) -> ForwardRow | None:
        return rows.get((OURS, activations, size, threads))

    def against(activations: str, size: int, *rivals: str) -> Spread | None:
        mine = ours(activations, size, result.threads)
        others = (rows.get((rival, "", size, result.threads)) for rival in rivals)
        best = _fastest(row for row in others if row is not None)
        return ratio(mine, best)

    if not sizes:
        return []
    first, times = sizes[0], "times"
    found = ours("int8", first, result.threads)
    named = f"forward {result.model}, {first} px"
    goals = [
        Goal(f"{named}: int8 against torch {label}", wanted, against("int8", first, *rivals),
              unit=times)
        for label, wanted, rivals in (
            ("bf16 compiled", 2.4, ("bf16-compiled",)),
            ("int8, the best", 1.6, INT8_RIVALS),
            ("fp32", 9.0, ("fp32",)),
            ("unpacking as upstream", 10.0, ("unpack",)),
        )
    ]  # fmt: skip
    goals += [
        Goal(f"{named}: int8, share of the peak", 0.85,
              _share_spread(found) if found is not None else None),
        Goal(f"{named}: int16 against torch bf16 compiled", 1.0,
              against("int16", first, "bf16-compiled"), unit=times),
        Goal(f"{named}: fp32 against torch fp32", 2.4, against("fp32", first, "fp32"),
              unit=times),
    ]  # fmt: skip
    single = ours("int8", first, 1)
    if result.threads > 1:
        each = ratio(found, single)
        n = result.threads
        part: Spread | None = None
        if each is not None:
            part = Spread(n / each.measured, n / each.high, n / each.low, n / each.best)
        goals.append(Goal(f"{named}: int8 on one thread, of its part of the {n}", 0.95, part))
    for size in sizes[1:]:
        for label, rivals in (("bf16 compiled", ("bf16-compiled",)), ("int8", INT8_RIVALS)):
            small, large = against("int8", first, *rivals), against("int8", size, *rivals)
            change: Spread | None = None
            if small is not None and large is not None:
                low, high = large.low / small.measured, large.high / small.measured
                change = Spread(large.measured / small.measured, low, high, large.best / small.best)
            text = f"{named} -> {size} px: change of the ratio to torch {label}"
            goals.append(Goal(text, 1.0, change, unit=times))
    return goals


def _memory_goals(result: BenchResult) -> list[Goal]:
    found = []
    mib = float(1 << 20)
    for codec in ("t2", "t5"):
        peaks = [
            row.peak_resident / mib
            for row in result.sample
            if row.codec == codec and row.steps == SAMPLE_STEPS and row.peak_resident is not None
        ]
        measured = certain(peaks[0]) if peaks else None
        text = f"`terdit sample`, {codec}: peak resident memory"
        found.append(Goal(text, MEMORY_GOAL_MIB, measured, at_most=True, unit="MiB"))
    return found


def _isa_goals(result: BenchResult) -> list[Goal]:
    forced = [row for row in result.gemm if _forced(result, row)]
    by_isa = {(row.isa, row.who, row.activations if row.who == OURS else ""): row for row in forced}
    ours, medium = by_isa.get(("avx2", OURS, "int8")), by_isa.get(("avx2", "fp32-medium", ""))
    times = ratio(ours, medium)
    plain = by_isa.get(("generic", OURS, "fp32"))
    error = plain.error if plain is not None else None
    spread = certain(error) if error is not None else None
    return [
        Goal('AVX2: GEMM int8 against torch fp32 "medium"', 2.0, times, unit="times"),
        Goal("generic C: relative error of fp32", 1e-6, spread, at_most=True),
    ]


def _score_goals(result: BenchResult) -> list[Goal]:
    distances = [row for row in result.scores if row.clean_fid.samples]
    faster, apart = None, None
    if distances:
        row = distances[0]
        ours, theirs = row.figure.samples, row.clean_fid.samples
        # Ours runs once more, before all others.
        each = [other / mine for other, mine in zip(theirs, ours[1:], strict=True)]
        measured = row.clean_fid.median / row.figure.median
        faster = Spread(measured, min(each), max(each), min(theirs) / min(ours))
        apart = certain(row.difference) if row.difference is not None else None
    errors = [
        (row.difference(row.recorded) or 0.0) / abs(row.recorded)
        for row in result.agreement
        if row.recorded
    ]
    error = certain(max(errors)) if errors else None
    return [
        Goal("Frechet distance against clean-fid's", 5.0, faster, unit="times"),
        Goal("Frechet distance: difference from clean-fid's", 1e-6, apart, at_most=True),
        Goal("Metrics: relative difference from the recorded", 1e-9, error, at_most=True),
    ]


def _share_spread(row: GemmRow | ForwardRow) -> Spread | None:
    """Return the share of the peak with the extremes that the times' own spread gives."""
    if row.share is None:
        return None
    samples = row.figure.samples
    scale = row.share * row.figure.median
    return Spread(row.share, scale / max(samples), scale / min(samples), scale / min(samples))


def _worst(found: Iterable[Spread | None], at_most: bool = False) -> Spread | None:
    values = list(found)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return (max if at_most else min)(known)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.figure.samples), key=_median, default=None)


def _median(row: Row) -> float:
    return row.figure.median
