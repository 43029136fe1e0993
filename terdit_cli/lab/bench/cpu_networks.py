"""Whole networks, each in a process of its own, taking turns; and whole `terdit sample` runs."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.lab.bench import results, rivals
from terdit_cli.lab.bench.goals import INT8_RIVALS
from terdit_cli.lab.bench.results import OURS, Figure, ForwardRow, PeakRow, SampleRow
from terdit_cli.lab.bench.settings import DOWNSAMPLE, Options
from terdit_cli.lab.bench.worker import (
    ARITHMETICS,
    SETTLE_SECONDS,
    Process,
    thread_variables,
    with_input_size,
)
from terdit_cli.lab.children import run_terdit
from terdit_cli.model.layout import forward_operations
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import TdtFile, write_tdt
from terdit_cli.runtime.backends import choose_backend

# At image sizes after the first, only these rivals run.
FASTEST_RIVALS = ("bf16-compiled", *INT8_RIVALS)
LOADED_AT_ONCE = 2  # nothing is timed meanwhile
SPARE_BYTES = 400 << 20  # of a process with torch, beside its weights
REFERENCE_STEPS = 2  # the reference backend is slow: it does not finish its image


def available_bytes() -> int | None:
    """Return the memory that new processes can have, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kilobytes) * 1024 for kilobytes in found), None)


@dataclass
class _Contender:
    """A network that takes part in the turns of one image size."""

    who: str
    activations: str
    threads: int
    process: Process | None = None
    why_not: str | None = None
    backend: str = ""
    isa: str = ""
    seconds: list[float] = field(default_factory=list)
    output: NDArray[np.float32] | None = None
    resident: int | None = None  # bytes
    peak_resident: int | None = None

    def distance_from(self, exact: NDArray[np.float32] | None) -> float | None:
        """Return |output - exact| / |exact|, or None where one of them is missing."""
        if self.output is None or exact is None:
            return None
        return float(np.linalg.norm(self.output - exact) / np.linalg.norm(exact))


def measure(options: Options, model: Path, folder: Path, peaks: list[PeakRow]) -> list[ForwardRow]:
    """Time the network of a .tdt, terdit and its rivals, at each image size all in turns.

    With the most threads and at the first size everything runs; with fewer threads the first
    activation only, at further sizes that and the fastest rivals.

    Raises:
        InputFileError: the file; EnvironmentProblem: a process of terdit's own failed.
    """
    with TdtFile(model) as file:
        info, weights = file.info, count_weights(file)
    rows: list[ForwardRow] = []
    sizes = options.input_sizes or (info.config.input_size,)
    for index, input_size in enumerate(sizes):
        sized = with_input_size(info, input_size)
        with ExitStack() as stack:
            contenders = _contenders(options, first=index == 0)
            _leave_out_what_does_not_fit(contenders, weights)
            console.note(
                f"bench: loading {len(contenders)} networks of {sized.config.tokens} tokens"
            )
            with ThreadPoolExecutor(LOADED_AT_ONCE) as pool:
                list(pool.map(partial(_load, options, model, sized, stack), contenders))
            medians = _turns(options, contenders, peaks)
            rows += _rows(options, contenders, medians, sized, folder)
    return rows


def _contenders(options: Options, first: bool) -> list[_Contender]:
    most, fewer = options.thread_counts[0], options.thread_counts[1:] if first else ()
    used = options.activations if first else options.activations[:1]
    ours = [_Contender(OURS, name, most) for name in used]
    ours += [_Contender(OURS, options.activations[0], threads) for threads in fewer]
    others = [name for name in options.rivals if first or name in FASTEST_RIVALS]
    return ours + [_Contender(name, rivals.arithmetic(name), most) for name in others]


def _leave_out_what_does_not_fit(contenders: list[_Contender], weights: int) -> None:
    """Set `why_not` of each rival that memory has no room for beside those before it."""
    free = available_bytes()
    if free is None:
        return
    used = 0
    for contender in contenders:
        needed = SPARE_BYTES
        if contender.who != OURS:
            needed += int(weights * rivals.RIVALS[contender.who].bytes_per_weight)
        if contender.who != OURS and used + needed > free:
            left = max(0, free - used)
            contender.why_not = (
                f"needs {needed / 1e9:.1f} GB of memory, {left / 1e9:.1f} GB are free"
            )
        else:
            used += needed


def _load(
    options: Options, model: Path, info: ModelInfo, stack: ExitStack, contender: _Contender
) -> None:
    """Start a process with a network in it and let it run once."""
    if contender.why_not is not None:
        return
    contender.process = stack.enter_context(Process(contender.threads))
    answer = contender.process.ask(
        "load",
        who=contender.who,
        model=str(model),
        input_size=info.config.input_size,
        batch=options.batch,
        backend=options.backend,
        activations=contender.activations,
        seed=options.seed,
    )
    if "why_not" in answer and contender.who == OURS:
        raise EnvironmentProblem("a benchmark process failed", got=answer["why_not"])
    contender.why_not = answer.get("why_not")
    contender.backend, contender.isa = answer.get("backend", ""), answer.get("isa", "")


def _turns(
    options: Options, contenders: list[_Contender], known: list[PeakRow]
) -> dict[int, dict[str, float]]:
    """Let the loaded networks run in turns, and the peaks with them, in terdit's processes.

    Returns the median peaks by threads and arithmetic; the contenders keep their seconds.
    """
    running = [(each, each.process) for each in contenders if each.process is not None]
    meters = {each.threads: process for each, process in running if each.who == OURS}
    peaks: dict[int, dict[str, list[float]]] = {threads: {} for threads in meters}
    isa = ""
    with console.progress("bench: forwards", options.repeats) as meter:
        for repeat in range(options.repeats):
            for threads, process in meters.items():
                for what in ARITHMETICS:
                    answer = process.ask("peak", what=what)
                    isa = answer.get("isa", "")
                    if answer.get("peak") is not None:
                        peaks[threads].setdefault(what, []).append(answer["peak"])
            for contender, process in running:
                if contender.why_not is not None:
                    continue
                time.sleep(SETTLE_SECONDS)
                answer = process.ask("run")
                contender.why_not = answer.get("why_not")
                contender.seconds += [answer["seconds"]] if "seconds" in answer else []
            meter.update(repeat + 1)
    medians = {
        threads: {what: statistics.median(each) for what, each in of.items()}
        for threads, of in peaks.items()
    }
    for threads, of in medians.items():
        results.note_peaks(known, threads, isa, of)
    return medians


def _rows(
    options: Options,
    contenders: list[_Contender],
    peaks: dict[int, dict[str, float]],
    info: ModelInfo,
    folder: Path,
) -> list[ForwardRow]:
    """Ask every process for its memory and its output, and make the rows."""
    path = folder / "output.npy"
    for contender in contenders:
        if contender.process is not None and contender.why_not is None:
            answer = contender.process.ask("finish", output=str(path))
            contender.resident = answer.get("resident")
            contender.peak_resident = answer.get("peak_resident")
            contender.output = np.load(path) if "resident" in answer else None
    exact = next((each.output for each in contenders if each.who == "fp32"), None)
    operations = forward_operations(info.config, options.batch)
    rows = []
    for each in contenders:
        figure, limits = Figure([] if each.why_not else each.seconds), peaks[each.threads]
        rows.append(
            ForwardRow(
                who=each.who,
                threads=each.threads,
                isa=each.isa,
                activations=each.activations,
                figure=figure,
                why_not=each.why_not,
                size=info.config.input_size * DOWNSAMPLE,
                batch=options.batch,
                tokens=info.config.tokens,
                backend=each.backend,
                operations=operations,
                error=each.distance_from(exact),
                share=results.share_of_peak(figure, operations, limits, each.activations),
                resident=each.resident,
                peak_resident=each.peak_resident,
            )
        )
    return rows


def sample(options: Options, model: Path, folder: Path) -> list[SampleRow]:
    """Run `terdit sample` for one image: with t2 and t5, then on the reference backend.

    Raises:
        ChildFailed: one of them failed.
    """
    file = TdtFile(model)
    with file:
        if file.info.space.kind != "pixel":
            console.note("bench: this model needs its VAE to sample: not run")
            return []
        write_tdt(file, folder / "t5.tdt", "t5", "fp32")
        t2 = file.codec(file.ternary_names()[0]) == "t2"
    runs = [(folder / "t5.tdt", "t5", options.backend, results.SAMPLE_STEPS)]
    if t2:
        runs.insert(0, (model, "t2", options.backend, results.SAMPLE_STEPS))
        how = choose_backend(options.backend, torch.device("cpu")).backend.how(torch.device("cpu"))
        if how.isa is not None:  # else it is the reference that ran
            runs.append((model, "t2", "reference", REFERENCE_STEPS))
    rows = []
    threads = options.thread_counts[0]
    for path, codec, backend, steps in runs:
        console.note(f"bench: terdit sample, {codec}, backend {backend}, {steps} steps")
        words = [
            "sample", "--model", path, "--prompt-class", 0, "--steps", steps, "--backend", backend,
            "--device", "cpu", "--threads", threads, "--force", "-o", folder / "image.npz",
        ]  # fmt: skip
        done = run_terdit(list(map(str, words)), environment=thread_variables(threads))
        rows.append(
            SampleRow(
                codec=codec,
                backend=done.result["backend"],
                activations=done.result["activations"],
                threads=done.result["threads"],
                steps=steps,
                seconds=done.result["seconds"],
                peak_resident=done.peak_bytes or None,
            )
        )
    return rows
