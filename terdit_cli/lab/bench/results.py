"""What a benchmark found.

Every figure is the median of interleaved repeats (A B C A B C ...) with its extremes; a ratio is
that of two medians of one run, its spread the extremes of the ratios repeat by repeat.

    GOPS  = 2 M K N / time        share = operations / time / measured peak of the same arithmetic
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from terdit_cli.lab.bench.rivals import GGML, GGML_LABEL, RIVALS

OURS = "terdit"
GEMM_SHAPES = ((512, 1536, 1536), (512, 1536, 4096), (512, 4096, 1536), (512, 3072, 8192))  # M K N
SMALL_SHAPE = (2, 1024, 9216)
SAMPLE_STEPS = 20  # of the images a second, with guidance: two rows an image and step


@dataclass(frozen=True)
class Figure:
    """Seconds of each repeat; empty if it was not run."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Row:
    """What GemmRow and ForwardRow share; `why_not` says why there is no figure."""

    who: str  # "terdit" or a rival's name
    threads: int
    isa: str
    activations: str  # of terdit; a rival's arithmetic
    figure: Figure
    why_not: str | None

    @property
    def label(self) -> str:
        if self.who == OURS:
            return f"terdit {self.activations}"
        return GGML_LABEL if self.who == GGML else RIVALS[self.who].label


@dataclass(frozen=True)
class GemmRow(Row):
    """One way to multiply [M, K] by [K, N]."""

    m: int
    k: int
    n: int
    granularity: str
    error: float | None  # |y - y64| / |y64| over some rows, y64 computed in float64
    share: float | None  # of the measured peak

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n

    @property
    def label(self) -> str:
        grouped = self.granularity != "tensor"
        return super().label + (", scales per group of 128" if grouped else "")


@dataclass(frozen=True)
class ForwardRow(Row):
    """One network f(x, t, y) in a process of its own; memory in bytes."""

    size: int
    batch: int
    tokens: int
    backend: str
    operations: float  # of the large matrices
    error: float | None  # against torch fp32 in the same run
    share: float | None
    resident: int | None
    peak_resident: int | None

    @property
    def images_per_second(self) -> float:
        """Images a second at 20 steps with guidance (two rows an image)."""
        return self.batch / 2 / (SAMPLE_STEPS * self.figure.median)


@dataclass(frozen=True)
class SampleRow:
    """One `terdit sample` process: seconds of the sampling alone, peak memory in bytes."""

    codec: str
    backend: str
    activations: str
    threads: int
    steps: int
    seconds: float
    peak_resident: int | None  # bytes; None where the system does not say


@dataclass(frozen=True)
class ImagesRow:
    """Images of one kind of activations beside those of fp32 from the same noise, in uint8."""

    activations: str
    images: int
    psnr: float | None  # dB over all values; None where all are equal
    worst_psnr: float | None  # of the image that differs most
    largest: int  # difference of a value
    equal: float  # share of the values


@dataclass(frozen=True)
class AgreementRow:
    """One metric of the same features, by terdit and by others; None: no such value."""

    metric: str
    case: str
    ours: float
    recorded: float | None
    clean_fid: float | None
    torch_fidelity: float | None

    def difference(self, other: float | None) -> float | None:
        """Return the absolute difference from another value of the row."""
        return None if other is None else abs(self.ours - other)


@dataclass(frozen=True)
class ScoreRow:
    """The cost of one metric of synthetic features, in a process of its own; memory in bytes."""

    name: str
    n: int  # samples of each side
    dim: int
    threads: int
    figure: Figure
    clean_fid: Figure  # its Frechet distance, in turns with ours
    difference: float | None  # of the two distances
    resident: int | None  # before, with torch and the features
    peak_resident: int | None


@dataclass(frozen=True)
class TrainingRow:
    """Steps of one recipe, ternary and in full precision, in turns."""

    name: str
    parameters: int
    images: int  # a step
    tokens: int
    precision: str
    compiled: bool
    threads: int
    ternary: Figure
    full: Figure

    @property
    def ratio(self) -> Spread:
        """Return ternary / full precision: of the medians, of the repeats, of the best times."""
        ours, theirs = self.ternary.samples, self.full.samples
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        median = self.ternary.median / self.full.median
        return Spread(median, min(each), max(each), min(ours) / min(theirs))


@dataclass(frozen=True)
class Machine:
    """Where and with what it ran."""

    cpu: str
    cores: int
    flags: list[str]
    memory_bytes: int
    load: float | None  # processes that wanted a core in the minute before
    python: str
    torch: str
    terdit: str
    date: str


@dataclass(frozen=True)
class PeakRow:
    """Measured peaks in operations a second, by thread count and instruction set."""

    threads: int
    isa: str
    int8: float
    bf16: float
    fp32: float


class Spread(NamedTuple):
    """A figure of medians, its extremes turn by turn, and the same figure of the best times.

    Other work on the machine adds to times and never takes away: what the best times say is
    disturbed least.
    """

    measured: float
    low: float
    high: float
    best: float


def certain(value: float) -> Spread:
    """Return a figure that has no spread."""
    return Spread(value, value, value, value)


@dataclass(frozen=True)
class Goal:
    """A figure that was set beforehand; `found` is None if this run did not measure it."""

    text: str
    wanted: float
    found: Spread | None
    at_most: bool = False
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found[0] <= self.wanted if self.at_most else self.found[0] >= self.wanted


@dataclass(frozen=True)
class BenchResult:
    """All of one run; what was not asked for stays empty."""

    model: str
    command: str
    seed: int
    repeats: int
    machine: Machine
    peaks: list[PeakRow] = field(default_factory=list)
    gemm: list[GemmRow] = field(default_factory=list)
    forward: list[ForwardRow] = field(default_factory=list)
    sample: list[SampleRow] = field(default_factory=list)
    images: list[ImagesRow] = field(default_factory=list)
    agreement: list[AgreementRow] = field(default_factory=list)
    scores: list[ScoreRow] = field(default_factory=list)
    training: list[TrainingRow] = field(default_factory=list)

    @property
    def threads(self) -> int:
        """The largest thread count: the one at which rivals ran."""
        rows: list[Row | ScoreRow | TrainingRow]
        rows = [*self.gemm, *self.forward, *self.scores, *self.training]
        return max((row.threads for row in rows), default=1)


def note_peaks(known: list[PeakRow], threads: int, isa: str, peaks: dict[str, float]) -> None:
    """Add the peaks of a thread count and instruction set, the first time they are measured."""
    if len(peaks) == 3 and (threads, isa) not in {(row.threads, row.isa) for row in known}:
        known.append(PeakRow(threads, isa, **peaks))


def share_of_peak(
    figure: Figure, operations: float, peaks: dict[str, float], arithmetic: str
) -> float | None:
    """Return operations / time / peak; int16 is two int8 products."""
    peak = peaks["int8"] / 2 if arithmetic == "int16" and peaks else peaks.get(arithmetic)
    if peak is None or not figure.samples:
        return None
    return operations / figure.median / peak


class Timed(Protocol):
    """A row that holds times."""

    @property
    def figure(self) -> Figure: ...


def ratio(ours: Timed | None, other: Timed | None) -> Spread | None:
    """Return how many times faster `ours` is, None where one of them was not run."""
    if ours is None or other is None or not (ours.figure.samples and other.figure.samples):
        return None
    pairs = zip(other.figure.samples, ours.figure.samples, strict=False)
    each = [theirs / mine for theirs, mine in pairs]
    best = min(other.figure.samples) / min(ours.figure.samples)
    return Spread(other.figure.median / ours.figure.median, min(each), max(each), best)
