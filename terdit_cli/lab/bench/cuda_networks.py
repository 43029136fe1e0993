"""`terdit bench --device cuda`: whole networks on a GPU, terdit and its rivals, and their limits.

Every contender is a network f(x, t, y) of the same random weights on the device. All that fit run
in turns, a batch after the other, timed by CUDA events; the chip's own peaks are measured in the
same run. What does not fit, or would take too long, is left out and says why.

Images I come with guidance: a forward has 2 I rows.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.lab.bench import rivals
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.results import OURS, Figure
from terdit_cli.lab.bench.settings import DOWNSAMPLE
from terdit_cli.model.layout import forward_operations
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import tiles as gpu_config
from terdit_cli.runtime.gpu.graph_step import GpuDiT, Step
from terdit_cli.runtime.packed import packed_network
from terdit_cli.runtime.reference import Precision

Network = Callable[[Tensor, Tensor, Tensor], Tensor]

PRECISIONS: tuple[Precision, ...] = ("int8", "bf16", "fp8")
RIVALS = ("bf16", "bf16-compiled", "int8-mm", "unpack")
COMPILED_IMAGES = (8,)  # batches at which compiled rivals run: each compilation takes a minute
WARM_UP = 3
PEAK_SIDE = 8192  # of the square matrices of the measured peaks
COPY_BYTES = 1 << 30


class Stopwatch(Protocol):
    """Times calls and the memory they take."""

    def seconds(self, run: Callable[[], object]) -> float: ...

    def extra_bytes(self, run: Callable[[], object]) -> int | None: ...


class CudaStopwatch:
    """CUDA events around a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds between the call's first and last kernel."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        """Return the most memory that tensors took during the call beyond those before it."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        run()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


@dataclass(frozen=True)
class GpuRow:
    """One network at one batch."""

    model: str
    size: int  # of the images, pixels
    images: int
    who: str  # "terdit" or a rival's name
    activations: str
    figure: Figure
    why_not: str | None
    operations: float  # of the large matrices
    share: float | None  # of the measured peak of the same arithmetic
    weight_bytes: int | None  # of all tensors of the network
    peak_bytes: int | None  # weights and the first forwards, graphs and compilation included
    error: float | None  # |y - exact| / |exact| of the outputs, exact: upstream's way in float32

    @property
    def label(self) -> str:
        return f"terdit {self.activations}" if self.who == OURS else rivals.RIVALS[self.who].label


@dataclass(frozen=True)
class AdalnRow:
    """The modulations of all blocks for one guided image: a product of two rows."""

    model: str
    activations: str
    figure: Figure
    packed_bytes: int
    share: float | None  # of the measured bandwidth, counting packed bytes


@dataclass(frozen=True)
class GpuPeaks:
    """What the device reaches in large operations of torch's: operations and bytes a second."""

    bf16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    bandwidth: float | None = None


@dataclass
class GpuFindings:
    """All of one run; empty where there was no GPU."""

    device: str | None = None
    peaks: GpuPeaks = field(default_factory=GpuPeaks)
    rows: list[GpuRow] = field(default_factory=list)
    adaln: list[AdalnRow] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    models: tuple[str, ...] = ("600m", "4.2b")
    sizes: tuple[int, ...] = (256, 512)  # pixels; after the first only terdit and plain bfloat16
    images: tuple[int, ...] = (1, 8, 32)
    repeats: int = 7
    seed: int = 0
    most_seconds: float = 540.0
    peak_side: int = PEAK_SIDE
    copy_bytes: int = COPY_BYTES


def measure(plan: Plan, device: torch.device, stopwatch: Stopwatch, name: str) -> GpuFindings:
    """Measure everything of a plan.

    Args:
        device: with a usable GPU; or the CPU with Triton's interpreter, to try this very code.
        name: of the device.
    """
    started = time.monotonic()
    found = GpuFindings(device=name)
    found.peaks = measure_peaks(plan, device, stopwatch)
    for model in plan.models:
        for size in plan.sizes:
            console.note(f"bench: {model}, {size} px on {name}")
            left = plan.most_seconds - (time.monotonic() - started)
            _one_network(plan, found, model, size, device, stopwatch, left)
    found.seconds = time.monotonic() - started
    return found


def measure_peaks(plan: Plan, device: torch.device, stopwatch: Stopwatch) -> GpuPeaks:
    """Return what torch's own large products and a copy reach; None for what it cannot do."""
    side = plan.peak_side
    operations = 2.0 * side**3
    halves = torch.randn(side, side, device=device).bfloat16()
    bytes_ = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
    source = torch.empty(plan.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    one = torch.ones((), device=device)
    small: list[Tensor] = []

    def scaled() -> Tensor:
        if not small:  # made in the run that is not timed; not every GPU has the type
            small.append(halves.to(torch.float8_e4m3fn))
        return torch._scaled_mm(small[0], small[0].T, one, one, out_dtype=torch.bfloat16)

    def rate(amount: float, run: Callable[[], object]) -> float | None:
        try:
            _repeated(run)()
            return amount / min(stopwatch.seconds(run) for _ in range(plan.repeats))
        except (RuntimeError, NotImplementedError):
            return None

    return GpuPeaks(
        bf16=rate(operations, lambda: halves @ halves.T),
        int8=rate(operations, lambda: torch._int_mm(bytes_, bytes_.T)),
        fp8=rate(operations, scaled),
        bandwidth=rate(2.0 * plan.copy_bytes, lambda: target.copy_(source)),
    )


@dataclass
class _Contender:
    who: str
    activations: str
    network: Network | None = None
    weight_bytes: int | None = None
    why_not: str | None = None

    def give_up(self, error: Exception) -> None:
        self.why_not = " ".join(str(error).split())[:160]
        self.network = None


def _one_network(
    plan: Plan,
    found: GpuFindings,
    model: str,
    size: int,
    device: torch.device,
    stopwatch: Stopwatch,
    seconds_left: float,
) -> None:
    first = size == plan.sizes[0]
    source = RandomModel(model, size // DOWNSAMPLE, plan.seed, device)
    contenders = [_Contender(OURS, precision) for precision in PRECISIONS]
    names = RIVALS if first else RIVALS[:1]
    contenders += [_Contender(name, rivals.arithmetic(name)) for name in names]
    for contender in contenders:
        _load(contender, source, device)
    if first:
        ours = [each.network for each in contenders if isinstance(each.network, GpuDiT)]
        if ours:
            _tune(ours[0], plan, device, stopwatch)
            found.adaln += _adaln(contenders, model, plan, device, stopwatch, found.peaks)
    deadline = time.monotonic() + seconds_left
    for images in plan.images:
        found.rows += _turns(
            plan, contenders, source, model, size, images, device, stopwatch, found.peaks, deadline
        )


def _launch_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where a kernel does not fit a GPU: Triton has errors of its own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


@contextmanager
def _why_not(contender: _Contender) -> Iterator[None]:
    """Keep what a contender fails with, and let the others go on."""
    try:
        yield
    except EnvironmentProblem as error:
        contender.give_up(error)
    except _launch_errors() as error:
        contender.give_up(error)


def _load(contender: _Contender, source: RandomModel, device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with _why_not(contender):
        if contender.who == OURS:
            precision: Any = contender.activations
            contender.network = packed_network(source, gpu, device, precision)
        else:
            contender.network = rivals.RIVALS[contender.who].network(source, device)
    if device.type == "cuda" and contender.network is not None:
        contender.weight_bytes = torch.cuda.memory_allocated(device) - before


def _inputs(
    source: RandomModel, images: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    config, rows = source.info.config, 2 * images
    generator = torch.Generator().manual_seed(0)
    side = config.input_size
    x = torch.randn(rows, config.in_channels, side, side, generator=generator)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    y = torch.arange(rows) % config.num_classes
    return x.to(device), t.to(device), y.to(device)


def _turns(
    plan: Plan,
    contenders: list[_Contender],
    source: RandomModel,
    model: str,
    size: int,
    images: int,
    device: torch.device,
    stopwatch: Stopwatch,
    peaks: GpuPeaks,
    deadline: float,
) -> list[GpuRow]:
    """Time all networks at one batch, in turns."""
    inputs = _inputs(source, images, device)
    running: list[tuple[_Contender, Callable[[], Tensor], int | None]] = []
    skipped: dict[int, str] = {}
    for contender in contenders:
        trial = dataclasses.replace(contender)
        if trial.network is None:
            continue
        compiled = contender.who != OURS and rivals.RIVALS[contender.who].compiled
        if compiled and images not in COMPILED_IMAGES:
            skipped[id(contender)] = "not compiled for this batch"
            continue
        if time.monotonic() > deadline:
            skipped[id(contender)] = "out of time"
            continue
        run = _call(trial.network, inputs)
        with _why_not(trial):
            extra = stopwatch.extra_bytes(_repeated(run))
            whole = None
            if extra is not None and contender.weight_bytes is not None:
                whole = contender.weight_bytes + extra
            running.append((contender, run, whole))
        if trial.why_not:
            skipped[id(contender)] = trial.why_not
    samples: dict[int, list[float]] = {id(contender): [] for contender, _, _ in running}
    for _ in range(plan.repeats):
        for contender, run, _ in running:
            samples[id(contender)].append(stopwatch.seconds(run))
    operations = forward_operations(source.info.config, 2 * images)
    memory = {id(contender): peak for contender, _, peak in running}
    rows = []
    for contender in contenders:
        figure = Figure(samples.get(id(contender), []))
        peak_rate = getattr(peaks, contender.activations, None)
        share = operations / figure.median / peak_rate if figure.samples and peak_rate else None
        rows.append(
            GpuRow(
                model=model, size=size, images=images, who=contender.who,
                activations=contender.activations, figure=figure,
                why_not=contender.why_not or skipped.get(id(contender)),
                operations=operations, share=share, weight_bytes=contender.weight_bytes,
                peak_bytes=memory.get(id(contender)), error=None,
            )
        )  # fmt: skip
    return _with_errors(rows, running, images == plan.images[0])


def _call(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return network(*inputs)

    return run


def _repeated(run: Callable[[], object]) -> Callable[[], None]:
    def warm_up() -> None:
        for _ in range(WARM_UP):
            run()

    return warm_up


def _with_errors(
    rows: list[GpuRow],
    running: list[tuple[_Contender, Callable[[], Tensor], int | None]],
    wanted: bool,
) -> list[GpuRow]:
    """Add each network's distance from the exact one: upstream's, which computes in float32."""
    exact = next((run for contender, run, _ in running if contender.who == "unpack"), None)
    if exact is None or not wanted:
        return rows
    truth = exact().double()
    errors = {
        (contender.who, contender.activations): float(
            (run().double() - truth).norm() / truth.norm()
        )
        for contender, run, _ in running
    }
    return [dataclasses.replace(row, error=errors.get((row.who, row.activations))) for row in rows]


def _step_of(network: GpuDiT) -> Step:
    """Return the network's fused step, made now if no forward has made it."""
    step = network._step
    if step is None:
        with torch.inference_mode(False):
            step = network._step = Step(network)
    return step


def _tune(network: GpuDiT, plan: Plan, device: torch.device, stopwatch: Stopwatch) -> None:
    """Measure the candidate tiles of every product of the plan; the best stay in the cache."""
    step = _step_of(network)
    config, layer = network.config, step.layers[0]
    shapes = [
        ("plain", layer.qkv, config.dim), ("gated", layer.wo, config.dim),
        ("swiglu", layer.w13, config.dim), ("gated", layer.w2, config.ffn_width),
    ]  # fmt: skip
    for precision in PRECISIONS:
        for images in plan.images:
            for epilogue, matrix, width in shapes:
                with _why_not(_Contender(OURS, precision)):
                    _tune_one(
                        matrix, epilogue, width, 2 * images, config.tokens, precision, device,
                        stopwatch,
                    )  # fmt: skip


def _tune_one(
    matrix: Any,
    epilogue: gpu_config.Epilogue | str,
    width: int,
    batch: int,
    tokens: int,
    precision: Precision,
    device: torch.device,
    stopwatch: Stopwatch,
) -> None:
    gpu.check_precision(precision, device)
    count = len(matrix.packed) // (2 if epilogue == "swiglu" else 1)
    rows = gpu.make_rows(torch.randn(batch * tokens, width, device=device), precision)
    gated = epilogue == "gated"
    gates = torch.zeros(batch, count, device=device) if gated else None
    out = torch.zeros(
        batch * tokens, count, device=device, dtype=torch.float32 if gated else torch.bfloat16
    )
    kind: Any = epilogue
    problem = gpu.problem_of(rows, matrix.alphas, count, kind)

    def seconds(tile: gpu_config.Tile) -> float:
        def run() -> Tensor:
            return gpu.multiply(
                rows, matrix.packed, matrix.alphas, None, out, gates=gates, tokens=tokens,
                swiglu=epilogue == "swiglu", tile=tile,
            )  # fmt: skip

        try:
            _repeated(run)()
            return statistics.median(stopwatch.seconds(run) for _ in range(5))
        except _launch_errors():  # for want of shared memory or registers
            return float("inf")

    gpu_config.tune(problem, gpu.device_facts(device), seconds)


def _adaln(
    contenders: list[_Contender],
    model: str,
    plan: Plan,
    device: torch.device,
    stopwatch: Stopwatch,
    peaks: GpuPeaks,
) -> list[AdalnRow]:
    """Time the modulations of all blocks for one guided image."""
    rows = []
    for contender in contenders:
        network = contender.network
        if not isinstance(network, GpuDiT):
            continue
        step = _step_of(network)
        c = torch.randn(2, network.config.conditioning_width, device=device)
        run = functools.partial(step.modulations, c)
        _repeated(run)()
        figure = Figure([stopwatch.seconds(run) for _ in range(plan.repeats)])
        packed = step.adaln.packed.numel()
        share = packed / figure.median / peaks.bandwidth if peaks.bandwidth else None
        rows.append(AdalnRow(model, contender.activations, figure, packed, share))
    return rows
