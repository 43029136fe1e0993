"""What a benchmark found.

Every figure is the median of interleaved repeats (A B C A B C ...) with its extremes; a ratio is
that of two medians of one run, its spread the extremes of the ratios repeat by repeat.

    GOPS  = 2 M K N / time        share = operations / time / measured peak of the same arithmetic
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from terdit_cli.lab.bench.rivals import GGML, GGML_LABEL, RIVALS
from terdit_cli.lab.bench.roofline import RooflineRow

OURS = "terdit"
GEMM_SHAPES = ((512, 1536, 1536), (512, 1536, 4096), (512, 4096, 1536), (512, 3072, 8192))  # M K N
SMALL_SHAPE = (2, 1024, 9216)
SAMPLE_STEPS = 20  # of the images per second, with guidance: two rows per image and step


@dataclass(frozen=True)
class Figure:
    """Seconds of each repeat; empty if it was not run."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def ms(self) -> float:
        return 1e3 * self.median

    @property
    def low(self) -> float:
        """The shortest, in ms."""
        return 1e3 * min(self.samples)

    @property
    def high(self) -> float:
        """The longest, in ms."""
        return 1e3 * max(self.samples)


@dataclass(frozen=True)
class Row:
    """What the rows of products and networks share; `why_not` says why there is no figure."""

    who: str  # "terdit" or a rival's name
    activations: str  # of terdit; a rival's arithmetic
    figure: Figure
    why_not: str | None
    error: float | None  # |y - exact| / |exact|
    share: float | None  # of the measured peak of the same arithmetic

    @property
    def label(self) -> str:
        if self.who == OURS:
            return f"terdit {self.activations}"
        return GGML_LABEL if self.who == GGML else RIVALS[self.who].label

    @property
    def place(self) -> str:
        """Whom a note is of."""
        return self.label


@dataclass(frozen=True)
class GemmRow(Row):
    """One way to multiply [M, K] by [K, N]; the error is of some rows, against float64."""

    threads: int
    isa: str
    m: int
    k: int
    n: int
    granularity: str

    @property
    def problem(self) -> tuple[object, ...]:
        """What rows of one problem have in common."""
        return (self.m, self.k, self.n, self.threads, self.isa)

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n

    @property
    def label(self) -> str:
        grouped = self.granularity != "tensor"
        return super().label + (", scales per group of 128" if grouped else "")


@dataclass(frozen=True)
class ForwardRow(Row):
    """One network f(x, t, y) in a process of its own; memory in bytes.

    The error is that against torch's fp32 in the same run.
    """

    threads: int
    isa: str
    size: int
    batch: int
    tokens: int
    backend: str
    operations: float  # of the large matrices
    resident: int | None
    peak_resident: int | None

    @property
    def problem(self) -> tuple[object, ...]:
        return (self.tokens, self.threads)

    @property
    def place(self) -> str:
        return f"{self.label}, {self.batch} x {self.tokens},"

    @property
    def ran_on(self) -> str:
        return f"{self.backend} ({self.isa})" if self.isa else self.backend

    @property
    def images_per_second(self) -> float:
        """Images per second at 20 steps with classifier-free guidance (two rows per image)."""
        return self.batch / 2 / (SAMPLE_STEPS * self.figure.median)


@dataclass(frozen=True)
class GpuRow(Row):
    """One network at one batch on a GPU; the error is that against upstream's way in float32."""

    model: str
    size: int  # of the images, pixels
    images: int
    operations: float  # of the large matrices
    weight_bytes: int | None  # of all tensors of the network
    peak_bytes: int | None  # weights and the first forwards, graphs and compilation included

    @property
    def place(self) -> str:
        return f"{self.model}, {self.size} px, {self.images}: {self.label}"


@dataclass(frozen=True)
class AdalnRow:
    """The modulations of all blocks for one image with guidance: a product of two rows."""

    model: str
    activations: str
    figure: Figure
    packed_bytes: int
    share: float | None  # of the measured bandwidth, counting packed bytes


@dataclass(frozen=True)
class GpuPeaks:
    """What a GPU reaches in large operations of torch's: operations and bytes per second."""

    device: str
    bf16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    bandwidth: float | None = None


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

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.steps * SAMPLE_STEPS


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

    def apart(self, other: float | None) -> float | None:
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

    @property
    def extra(self) -> int | None:
        """Bytes above torch and the features, at the peak."""
        if self.resident is None or self.peak_resident is None:
            return None
        return self.peak_resident - self.resident

    @property
    def clean_fid_seconds(self) -> float | None:
        return self.clean_fid.median if self.clean_fid.samples else None

    @property
    def times_faster(self) -> float | None:
        return self.clean_fid.median / self.figure.median if self.clean_fid.samples else None


@dataclass(frozen=True)
class TrainingRow:
    """Steps of one recipe, ternary and in full precision, in turns."""

    name: str
    parameters: int
    images: int  # per step
    tokens: int
    precision: str
    compiled: bool
    threads: int
    ternary: Figure
    full: Figure

    @property
    def arithmetic(self) -> str:
        return self.precision + (", compiled" if self.compiled else "")

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
    """Measured peaks in operations per second, by thread count and instruction set."""

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

    @property
    def range(self) -> str:
        low, high = f"{self.low:.3g}", f"{self.high:.3g}"
        return f"{low} .. {high}" if low != high else ""


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

    @property
    def verdict(self) -> str:
        return "yes" if self.met else "no"

    @property
    def wanted_text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.wanted:.3g} {self.unit}".rstrip()


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
    gpu_peaks: list[GpuPeaks] = field(default_factory=list)
    gpu: list[GpuRow] = field(default_factory=list)
    adaln: list[AdalnRow] = field(default_factory=list)
    roofline: list[RooflineRow] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)  # see `compiled_kernels.table`

    @property
    def threads(self) -> int:
        """The largest thread count: the one at which rivals ran."""
        rows: list[GemmRow | ForwardRow | ScoreRow | TrainingRow]
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
