"""The goals of the runtimes, as set before they were built, and what a run says of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.results import (
    OURS,
    SAMPLE_STEPS,
    BenchResult,
    ForwardRow,
    GemmRow,
    Goal,
    GpuRow,
    Row,
    Spread,
    certain,
    ratio,
)
from terdit_cli.lab.bench.rivals import GGML

INT8_RIVALS = ("int8-ao", "int8-mm")
MEMORY_GOAL_MIB = 480
GPU_IMAGES, GPU_SIZE = 8, 256  # of the goals on an H100


def goals(result: BenchResult) -> list[Goal]:
    """Return the goals of what was measured, each with the figure of this run.

    Those for a whole network on a CPU are set for the size 600m.
    """
    if result.agreement or result.scores:
        return _score_goals(result)
    if result.training:
        return _training_goals(result)
    if result.gpu or result.roofline:
        return _gpu_goals(result)
    whole = [*_forward_goals(result), *_memory_goals(result)] if result.model == "600m" else []
    return [*_gemm_goals(result), *whole, *_isa_goals(result)]


def _times(text: str, wanted: float, found: Spread | None) -> Goal:
    return Goal(text, wanted, found, unit="times")


def _training_goals(result: BenchResult) -> list[Goal]:
    return [
        Goal(
            f"{row.name}, {row.parameters:,} parameters, compiled: step against full precision",
            1.05, row.ratio, unit="times", at_most=True,
        )
        for row in result.training
        if row.compiled
    ]  # fmt: skip


def _key(row: Row) -> tuple[str, str]:
    """Return who it is; a rival has one arithmetic only."""
    return row.who, row.activations if row.who == OURS else ""


def _against(ours: Row | None, rivals: Iterable[Row | None]) -> Spread | None:
    """Return how many times faster ours is than the fastest of the rivals."""
    ran = [row for row in rivals if row is not None and row.figure.samples]
    return ratio(ours, min(ran, key=lambda row: row.figure.median, default=None))


def _gemm_goals(result: BenchResult) -> list[Goal]:
    """Return the goals of the products; the worst shape decides."""
    rows: list[dict[tuple[str, ...], GemmRow]] = [
        {
            (*_key(row), row.granularity): row
            for row in result.gemm
            if row.threads == result.threads
            and (row.m, row.k, row.n) == shape
            and not _forced(result, row)
        }
        for shape in results.GEMM_SHAPES
    ]

    def against(activations: str, *rivals: str) -> Spread | None:
        return _worst(
            _against(
                each.get((OURS, activations, "tensor")),
                [each.get((rival, "", "tensor")) for rival in rivals],
            )
            for each in rows
        )

    def error(activations: str) -> Spread | None:
        found = [each.get((OURS, activations, "tensor")) for each in rows]
        return _worst([_certain(row.error if row else None) for row in found], at_most=True)

    def share(granularity: str) -> Spread | None:
        return _worst(_share(each.get((OURS, "int8", granularity))) for each in rows)

    return [
        Goal("GEMM int8: share of the int8 peak", 0.90, share("tensor")),
        Goal("GEMM int8, scales per group of 128: share of the peak", 0.80, share("group128")),
        _times("GEMM int8 against ggml TQ2_0", 6.0, against("int8", GGML)),
        _times("GEMM int8 against torch bf16", 2.1, against("int8", "bf16")),
        _times("GEMM int8 against the best torch int8", 1.15, against("int8", *INT8_RIVALS)),
        _times("GEMM int16 against torch bf16 compiled", 1.0, against("int16", "bf16-compiled")),
        Goal("GEMM int16: relative error", 1e-4, error("int16"), at_most=True),
        _times("GEMM fp32 against torch fp32", 2.4, against("fp32", "fp32")),
        Goal("GEMM fp32: relative error", 1e-6, error("fp32"), at_most=True),
    ]


def _forced(result: BenchResult, row: GemmRow) -> bool:
    """Return whether a row ran on another instruction set than the automatic choice."""
    return bool(result.peaks) and row.isa != result.peaks[0].isa


def _forward_goals(result: BenchResult) -> list[Goal]:
    sizes = sorted({row.size for row in result.forward})
    if not sizes:
        return []
    rows = {(*_key(row), row.size, row.threads): row for row in result.forward}
    first, most = sizes[0], result.threads

    def ours(activations: str, size: int = first, threads: int = most) -> ForwardRow | None:
        return rows.get((OURS, activations, size, threads))

    def against(activations: str, size: int, *rivals: str) -> Spread | None:
        others = [rows.get((rival, "", size, most)) for rival in rivals]
        return _against(ours(activations, size), others)

    named = f"forward {result.model}, {first} px"
    found = [
        _times(f"{named}: {mine} against torch {label}", wanted, against(mine, first, *rivals))
        for mine, label, wanted, rivals in (
            ("int8", "bf16 compiled", 2.4, ("bf16-compiled",)),
            ("int8", "int8, the best", 1.6, INT8_RIVALS),
            ("int8", "fp32", 9.0, ("fp32",)),
            ("int8", "unpacking as upstream", 10.0, ("unpack",)),
            ("int16", "bf16 compiled", 1.0, ("bf16-compiled",)),
            ("fp32", "fp32", 2.4, ("fp32",)),
        )
    ]
    found.insert(4, Goal(f"{named}: int8, share of the peak", 0.85, _share(ours("int8"))))
    if most > 1:
        each = ratio(ours("int8"), ours("int8", threads=1))
        part = each and Spread(
            most / each.measured, most / each.high, most / each.low, most / each.best
        )
        found.append(Goal(f"{named}: int8 on one thread, of its part of the {most}", 0.95, part))
    for size in sizes[1:]:
        for label, rivals in (("bf16 compiled", ("bf16-compiled",)), ("int8", INT8_RIVALS)):
            small, large = against("int8", first, *rivals), against("int8", size, *rivals)
            change: Spread | None = None
            if small is not None and large is not None:
                low, high = large.low / small.measured, large.high / small.measured
                change = Spread(large.measured / small.measured, low, high, large.best / small.best)
            text = f"{named} -> {size} px: change of the ratio to torch {label}"
            found.append(_times(text, 1.0, change))
    return found


def _memory_goals(result: BenchResult) -> list[Goal]:
    peaks = {
        row.codec: row.peak_resident / 2**20
        for row in result.sample
        if row.steps == SAMPLE_STEPS and row.peak_resident is not None
    }
    return [
        Goal(f"`terdit sample`, {codec}: peak resident memory", MEMORY_GOAL_MIB,
             _certain(peaks.get(codec)), at_most=True, unit="MiB")
        for codec in ("t2", "t5")
    ]  # fmt: skip


def _isa_goals(result: BenchResult) -> list[Goal]:
    rows = {(row.isa, *_key(row)): row for row in result.gemm if _forced(result, row)}
    times = ratio(rows.get(("avx2", OURS, "int8")), rows.get(("avx2", "fp32-medium", "")))
    plain = rows.get(("generic", OURS, "fp32"))
    return [
        _times('AVX2: GEMM int8 against torch fp32 "medium"', 2.0, times),
        Goal("generic C: relative error of fp32", 1e-6, _certain(plain.error if plain else None),
             at_most=True),
    ]  # fmt: skip


def _gpu_goals(result: BenchResult) -> list[Goal]:
    """Return the goals set for an H100."""

    def row(model: str, who: str, activations: str, images: int = GPU_IMAGES) -> GpuRow | None:
        wanted = (model, who, activations, images, GPU_SIZE)
        keys = ((r.model, *_key(r), r.images, r.size) for r in result.gpu)
        return next((r for r, key in zip(result.gpu, keys, strict=True) if key == wanted), None)

    found = [
        _times(
            f"{model}, {GPU_IMAGES} images with guidance, {GPU_SIZE} px: {who} against {name}",
            wanted, ratio(row(model, OURS, activations), row(model, other, "")),
        )
        for model in ("600m", "4.2b")
        for who, activations, other, name, wanted in (
            ("W2A8", "int8", "bf16-compiled", "torch bf16 compiled", 1.5),
            ("W2A16", "bf16", "bf16-compiled", "torch bf16 compiled", 1.0),
            ("W2A8", "int8", "unpack", "upstream's way", 8.0),
        )
    ]  # fmt: skip
    small = row("4.2b", OURS, "int8", images=1)
    memory = small and small.peak_bytes and certain(small.peak_bytes / 1e9)
    shares = [row.share for row in result.adaln if row.share is not None]
    return [
        *found,
        Goal("4.2b, one image with guidance: GPU memory", 2.5, memory or None, at_most=True,
             unit="GB"),
        Goal("adaLN of one image with guidance: share of the bandwidth, the least of all", 0.8,
             Spread(min(shares), min(shares), max(shares), max(shares)) if shares else None),
    ]  # fmt: skip


def _score_goals(result: BenchResult) -> list[Goal]:
    row = next((row for row in result.scores if row.clean_fid.samples), None)
    faster: Spread | None = None
    if row is not None:
        ours, theirs = row.figure.samples, row.clean_fid.samples
        # Ours runs once more, before all others.
        each = [other / mine for other, mine in zip(theirs, ours[1:], strict=True)]
        measured = row.clean_fid.median / row.figure.median
        faster = Spread(measured, min(each), max(each), min(theirs) / min(ours))
    errors = [
        (row.apart(row.recorded) or 0.0) / abs(row.recorded)
        for row in result.agreement
        if row.recorded
    ]
    return [
        _times("Frechet distance against clean-fid's", 5.0, faster),
        Goal("Frechet distance: difference from clean-fid's", 1e-6,
             _certain(row.difference if row else None), at_most=True),
        Goal("Metrics: relative difference from the recorded", 1e-9,
             _certain(max(errors, default=None)), at_most=True),
    ]  # fmt: skip


def _certain(value: float | None) -> Spread | None:
    return None if value is None else certain(value)


def _share(row: GemmRow | ForwardRow | None) -> Spread | None:
    """Return the share of the peak with the extremes that the times' own spread gives."""
    if row is None or row.share is None:
        return None
    scale = 1e3 * row.share * row.figure.median  # over ms
    high = scale / row.figure.low
    return Spread(row.share, scale / row.figure.high, high, high)


def _worst(found: Iterable[Spread | None], at_most: bool = False) -> Spread | None:
    """Return the worst of all, None where one is not known."""
    values: Sequence[Spread | None] = list(found)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return (max if at_most else min)(known)
