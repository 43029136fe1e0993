"""`terdit bench --device cuda`: whole networks on a GPU, terdit and its rivals.

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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.lab.bench import rivals
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.results import OURS, AdalnRow, Figure, GpuPeaks, GpuRow
from terdit_cli.lab.bench.settings import DOWNSAMPLE, Options
from terdit_cli.model.layout import forward_operations
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import tiles as gpu_config
from terdit_cli.runtime.gpu.graph_step import GpuDiT, Step
from terdit_cli.runtime.packed import packed_network
from terdit_cli.runtime.reference import Precision

Network = Callable[[Tensor, Tensor, Tensor], Tensor]

PRECISIONS: tuple[Precision, ...] = ("int8", "bf16", "fp8")
RIVALS = ("bf16", "bf16-compiled", "int8-mm", "unpack")
QUICK_RIVALS = ("bf16", "unpack")  # what is not compiled
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
class Plan:
    """What to measure."""

    models: tuple[str, ...] = ("600m", "4.2b")
    sizes: tuple[int, ...] = (256, 512)  # pixels; after the first only terdit and plain bfloat16
    images: tuple[int, ...] = (1, 8, 32)
    repeats: int = 7
    seed: int = 0
    rivals: tuple[str, ...] = RIVALS
    most_seconds: float = 540.0
    peak_side: int = PEAK_SIDE
    copy_bytes: int = COPY_BYTES


def plan_of(options: Options) -> Plan:
    """Return what options ask for: all, or a first look."""
    full = options.full or options.what == "limits"
    return Plan(
        models=options.models,
        sizes=options.sizes or (Plan.sizes if full else Plan.sizes[:1]),
        images=options.images or (Plan.images if full else COMPILED_IMAGES),
        repeats=options.repeats,
        seed=options.seed,
        rivals=RIVALS if options.full else QUICK_RIVALS,
    )


@dataclass
class _Contender:
    who: str
    activations: str
    network: Network | None = None
    weight_bytes: int | None = None
    why_not: str | None = None  # it takes part in nothing

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Keep what it fails with, and let the others go on."""
        try:
            yield
        except _launch_errors() as error:
            self.why_not = " ".join(str(error).split())[:160]
            self.network = None


def _launch_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where a kernel does not fit a GPU: Triton has errors of its own."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (EnvironmentProblem, RuntimeError)
    return (EnvironmentProblem, RuntimeError, TritonError)


class GpuBench:
    """Measures a plan on a device: one with a usable GPU.

    Or on the CPU with Triton's interpreter, to try this very code.
    """

    def __init__(self, plan: Plan, device: torch.device, stopwatch: Stopwatch, name: str) -> None:
        self._plan, self._device, self._watch, self._name = plan, device, stopwatch, name
        self._deadline = time.monotonic() + plan.most_seconds
        self._rows: list[GpuRow] = []
        self._adaln_rows: list[AdalnRow] = []

    def measure(self) -> dict[str, Any]:
        """Measure everything: `gpu_peaks`, `gpu` and `adaln` of a `BenchResult`."""
        self._peaks = self._measure_peaks()
        for model in self._plan.models:
            for size in self._plan.sizes:
                console.note(f"bench: {model}, {size} px on {self._name}")
                self._one_network(model, size)
        return {"gpu_peaks": [self._peaks], "gpu": self._rows, "adaln": self._adaln_rows}

    def _measure_peaks(self) -> GpuPeaks:
        """Return what torch's own large products and a copy reach; None for what it cannot do."""
        plan, device = self._plan, self._device
        side = plan.peak_side
        operations = 2.0 * side**3
        halves = torch.randn(side, side, device=device).bfloat16()
        bytes_ = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
        source = torch.empty(plan.copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        one = torch.ones((), device=device)

        @functools.cache  # made in the run that is not timed; not every GPU has the type
        def small() -> Tensor:
            return halves.to(torch.float8_e4m3fn)

        def scaled() -> Tensor:
            return torch._scaled_mm(small(), small().T, one, one, out_dtype=torch.bfloat16)

        def rate(amount: float, run: Callable[[], object]) -> float | None:
            try:
                _warm_up(run)
                return amount / min(self._watch.seconds(run) for _ in range(plan.repeats))
            except RuntimeError:  # this GPU or torch lacks the type
                return None

        return GpuPeaks(
            device=self._name,
            bf16=rate(operations, lambda: halves @ halves.T),
            int8=rate(operations, lambda: torch._int_mm(bytes_, bytes_.T)),
            fp8=rate(operations, scaled),
            bandwidth=rate(2.0 * plan.copy_bytes, lambda: target.copy_(source)),
        )

    def _one_network(self, model: str, size: int) -> None:
        plan = self._plan
        first = size == plan.sizes[0]
        source = RandomModel(model, size // DOWNSAMPLE, plan.seed, self._device)
        contenders = [_Contender(OURS, precision) for precision in PRECISIONS]
        names = plan.rivals if first else plan.rivals[:1]
        contenders += [_Contender(name, rivals.arithmetic(name)) for name in names]
        for contender in contenders:
            self._load(contender, source)
        if first:
            ours = [each for each in contenders if isinstance(each.network, GpuDiT)]
            if ours and isinstance(ours[0].network, GpuDiT):
                self._tune(ours[0].network)
            for contender in ours:
                self._adaln(contender, model)
        for images in plan.images:
            self._turns(contenders, source, model, size, images)

    def _load(self, contender: _Contender, source: RandomModel) -> None:
        device = self._device
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with contender.trying():
            if contender.who == OURS:
                precision: Any = contender.activations
                contender.network = packed_network(source, gpu, device, precision)
            else:
                contender.network = rivals.RIVALS[contender.who].network(source, device)
        if device.type == "cuda" and contender.network is not None:
            contender.weight_bytes = torch.cuda.memory_allocated(device) - before

    def _turns(
        self, contenders: list[_Contender], source: RandomModel, model: str, size: int, images: int
    ) -> None:
        """Time all networks at one batch, in turns, and add the rows."""
        inputs = self._inputs(source, images)
        trials = [dataclasses.replace(each) for each in contenders]  # another batch may fit
        runs: list[Callable[[], Tensor] | None] = []
        memory: list[int | None] = []
        for trial in trials:
            run: Callable[[], Tensor] | None = None
            most: int | None = None
            compiled = trial.who != OURS and rivals.RIVALS[trial.who].compiled
            if trial.network is not None and compiled and images not in COMPILED_IMAGES:
                trial.why_not = "not compiled for this batch"
            elif trial.network is not None and time.monotonic() > self._deadline:
                trial.why_not = "out of time"
            elif trial.network is not None:
                run = functools.partial(_call, trial.network, inputs)
                with trial.trying():
                    extra = self._watch.extra_bytes(functools.partial(_warm_up, run))
                    if extra is not None and trial.weight_bytes is not None:
                        most = trial.weight_bytes + extra
            runs.append(run if trial.why_not is None else None)
            memory.append(most)
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(self._plan.repeats):
            for run, seconds in zip(runs, samples, strict=True):
                seconds += [self._watch.seconds(run)] if run is not None else []
        errors = _errors(trials, runs) if images == self._plan.images[0] else [None] * len(runs)
        operations = forward_operations(source.info.config, 2 * images)
        for trial, seconds, most, error in zip(trials, samples, memory, errors, strict=True):
            figure, peak = Figure(seconds), getattr(self._peaks, trial.activations, None)
            self._rows.append(
                GpuRow(
                    model=model, size=size, images=images, who=trial.who,
                    activations=trial.activations, figure=figure, why_not=trial.why_not,
                    operations=operations, weight_bytes=trial.weight_bytes, peak_bytes=most,
                    share=operations / figure.median / peak if seconds and peak else None,
                    error=error,
                )
            )  # fmt: skip

    def _inputs(self, source: RandomModel, images: int) -> tuple[Tensor, Tensor, Tensor]:
        config, rows = source.info.config, 2 * images
        generator = torch.Generator().manual_seed(0)
        side = config.input_size
        x = torch.randn(rows, config.in_channels, side, side, generator=generator)
        t = torch.randint(0, 1000, (rows,), generator=generator)
        y = torch.arange(rows) % config.num_classes
        return x.to(self._device), t.to(self._device), y.to(self._device)

    def _tune(self, network: GpuDiT) -> None:
        """Measure the candidate tiles of every product of the plan; the best stay in the cache."""
        config, layer = network.config, _step_of(network).layers[0]
        shapes = [
            ("plain", layer.qkv, config.dim), ("gated", layer.wo, config.dim),
            ("swiglu", layer.w13, config.dim), ("gated", layer.w2, config.ffn_width),
        ]  # fmt: skip
        for precision in PRECISIONS:
            for images in self._plan.images:
                for epilogue, matrix, width in shapes:
                    with _Contender(OURS, precision).trying():
                        self._tune_one(
                            matrix, epilogue, width, 2 * images, config.tokens, precision
                        )

    def _tune_one(
        self, matrix: Any, epilogue: Any, width: int, batch: int, tokens: int, precision: Precision
    ) -> None:
        device = self._device
        gpu.check_precision(precision, device)
        count = len(matrix.packed) // (2 if epilogue == "swiglu" else 1)
        rows = gpu.make_rows(torch.randn(batch * tokens, width, device=device), precision)
        gated = epilogue == "gated"
        gates = torch.zeros(batch, count, device=device) if gated else None
        out = torch.zeros(
            batch * tokens, count, device=device, dtype=torch.float32 if gated else torch.bfloat16
        )
        problem = gpu.problem_of(rows, matrix.alphas, count, epilogue)

        def seconds(tile: gpu_config.Tile) -> float:
            def run() -> Tensor:
                return gpu.multiply(
                    rows, matrix.packed, matrix.alphas, None, out, gates=gates, tokens=tokens,
                    swiglu=epilogue == "swiglu", tile=tile,
                )  # fmt: skip

            try:
                _warm_up(run)
                return statistics.median(self._watch.seconds(run) for _ in range(5))
            except _launch_errors():  # for want of shared memory or registers
                return float("inf")

        gpu_config.tune(problem, gpu.device_facts(device), seconds)

    def _adaln(self, contender: _Contender, model: str) -> None:
        """Time the modulations of all blocks for one image with guidance."""
        network, bandwidth = contender.network, self._peaks.bandwidth
        assert isinstance(network, GpuDiT)
        step = _step_of(network)
        c = torch.randn(2, network.config.conditioning_width, device=self._device)
        run = functools.partial(step.modulations, c)
        _warm_up(run)
        figure = Figure([self._watch.seconds(run) for _ in range(self._plan.repeats)])
        packed = step.adaln.packed.numel()
        share = packed / figure.median / bandwidth if bandwidth else None
        self._adaln_rows.append(AdalnRow(model, contender.activations, figure, packed, share))


def _call(network: Network, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.inference_mode():
        return network(*inputs)


def _warm_up(run: Callable[[], object]) -> None:
    for _ in range(WARM_UP):
        run()


def _errors(
    trials: list[_Contender], runs: list[Callable[[], Tensor] | None]
) -> list[float | None]:
    """Return each network's distance from the exact one: upstream's, which computes in float32."""
    pairs = list(zip(trials, runs, strict=True))
    exact = next((run for trial, run in pairs if trial.who == "unpack" and run), None)
    if exact is None:
        return [None] * len(runs)
    truth = exact().double()
    return [run and float((run().double() - truth).norm() / truth.norm()) for run in runs]


def _step_of(network: GpuDiT) -> Step:
    """Return the network's fused step, made now if no forward has made it."""
    step = network._step
    if step is None:
        with torch.inference_mode(False):
            step = network._step = Step(network)
    return step
