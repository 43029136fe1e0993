"""One process of a benchmark: it does what it is told in JSON lines, and answers in JSON lines.

    stdin   {"task": name, ...}
    stdout  {...} | {"why_not": text} (a rival cannot run) | {"error": text, "exit_code": number}

`Worker` is the end in the new process, `Process` the parent's.

Each network has a process of its own, so that its memory is its own; the parent makes them take
turns. The ways of multiplying one matrix share a process and take turns in here. Everything is
built before anything is timed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from terdit_cli.errors import TerditError
from terdit_cli.lab.bench import rivals
from terdit_cli.lab.bench.results import OURS
from terdit_cli.lab.children import resident_bytes
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.model.ternary import Granularity, alpha_shape
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.pack.trits import t2_encode
from terdit_cli.runtime import cpu
from terdit_cli.runtime.backends import choose_backend
from terdit_cli.runtime.packed import packed_network
from terdit_cli.runtime.reference import Precision

Answer = dict[str, Any]
ARITHMETICS: tuple[rivals.Peak, ...] = ("int8", "bf16", "fp32")

# Idle workers of one library's thread pool spin for some milliseconds: a contender must not be
# timed while another's threads still do.
SETTLE_SECONDS = 0.02
SAMPLE_SECONDS = 0.02  # a sample repeats calls that are shorter than this
PEAK_SECONDS = 0.03
ERROR_ROWS = 8
DIFFUSION_STEPS = 1000


class Worker:
    """What this process holds between two tasks."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.network: rivals.Network | None = None
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.runs = 0

    def answer(self, task: str, **job: Any) -> Answer:
        """Do one task; the tasks are the methods below."""
        tasks: dict[str, Callable[..., Answer]] = {
            "peak": self.peak,
            "gemm": self.gemm,
            "load": self.load,
            "run": self.run,
            "finish": self.finish,
            "score": self.score,
        }
        return tasks[task](**job)

    def peak(self, what: rivals.Peak) -> Answer:
        """Measure a peak for a moment -> {"peak": operations per second, or None, "isa": name}."""
        return {"peak": measure_peak(what, self.threads), "isa": native_isa()}

    def gemm(
        self,
        shape: tuple[int, int, int],
        ways: list[tuple[str, Precision, Granularity]],
        backend: str,
        repeats: int,
        seed: int,
        ggml: str,
    ) -> Answer:
        """Time all ways to multiply [M, K] by [K, N], taking turns.

        Args:
            ways: (who, activations, granularity).

        Returns {"rows": fields of `GemmRow`, "samples" in place of its figure, "peaks": {what:
        median of operations per second}, "isa": name}.
        """
        m, k, n = shape
        generator = torch.Generator().manual_seed(seed)
        trits = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
        x = torch.randn(m, k, generator=generator)
        alpha = torch.tensor([(2 * k / 3) ** -0.5])
        rows: list[Answer] = []
        running: list[tuple[Answer, Callable[[], Tensor]]] = []
        for who, activations, granularity in ways:
            row: Answer = {"who": who, "activations": activations, "granularity": granularity}
            row |= {"samples": [], "why_not": None, "error": None}
            rows.append(row)
            try:
                if who == OURS:
                    call = our_gemm(backend, trits, alpha, x, activations, granularity)
                elif who == rivals.GGML:
                    call = rivals.GgmlGemm(Path(ggml), trits, alpha, x, self.threads)
                else:
                    call = rivals.RIVALS[who].gemm(trits, alpha, x)
                call()
                running.append((row, call))
            # Anything may be missing on this machine or in this torch, down to its compiler.
            except Exception as error:
                if who == OURS:
                    raise
                row["why_not"] = _reason(error)
        some = torch.linspace(0, m - 1, min(m, ERROR_ROWS)).long()
        expected = x[some].double() @ (trits.double() * alpha.double()).T
        for row, call in running:
            row["error"] = float((call()[some].double() - expected).norm() / expected.norm())
        peaks: dict[str, list[float]] = {}
        for _ in range(repeats):
            for what in ARITHMETICS:
                if (value := measure_peak(what, self.threads)) is not None:
                    peaks.setdefault(what, []).append(value)
            for row, call in running:
                time.sleep(SETTLE_SECONDS)
                row["samples"].append(_time(call))
        for _, call in running:
            if isinstance(call, rivals.GgmlGemm):
                call.close()
        isa = native_isa()
        # Plain C has no instruction whose rate would bound it: the compiler chooses.
        known = peaks if isa != "generic" else {}
        return {
            "rows": rows,
            "peaks": {what: statistics.median(each) for what, each in known.items()},
            "isa": isa,
        }

    def load(
        self,
        who: str,
        model: str,
        input_size: int,
        batch: int,
        backend: str,
        activations: Precision,
        seed: int,
    ) -> Answer:
        """Build a network from a .tdt and run it once -> {"backend": name, "isa": name}."""
        file = TdtFile(Path(model))
        with file, torch.inference_mode():
            file.info = with_input_size(file.info, input_size)
            self.inputs = _inputs(file.info, batch, seed)
            if who == OURS:
                self.network, used = our_network(file, backend, activations)
                release_freed()
                self.network(*self.inputs)
                return {"backend": used, "isa": native_isa() if used == "cpu" else ""}
            try:
                self.network = rivals.RIVALS[who].network(file)
                release_freed()
                self.network(*self.inputs)
            except Exception as error:  # as in `gemm`
                return {"why_not": _reason(error)}
        return {"backend": "torch", "isa": ""}

    def run(self) -> Answer:
        """Time one forward, at another timestep than the last -> {"seconds": s}."""
        assert self.network is not None
        assert self.inputs is not None
        x, t, y = self.inputs
        self.runs += 1
        with torch.inference_mode():
            t = (t + 7 * self.runs) % DIFFUSION_STEPS
            started = time.perf_counter()
            self.network(x, t, y)
            return {"seconds": time.perf_counter() - started}

    def finish(self, output: str) -> Answer:
        """Write the network's output to an .npy -> {"resident": bytes, "peak_resident": bytes}."""
        assert self.network is not None
        assert self.inputs is not None
        memory = resident_bytes("self")
        with torch.inference_mode():
            np.save(output, self.network(*self.inputs).numpy())
        return {"resident": memory[0], "peak_resident": memory[1]}

    def score(self, **job: Any) -> Answer:
        """Time a metric -> see `metrics_bench.score`."""
        from terdit_cli.lab.bench.metrics_bench import score  # which imports this file

        return score(**job)


CPU = torch.device("cpu")


def our_gemm(
    backend: str,
    trits: Tensor,
    alpha: Tensor,
    x: Tensor,
    activations: Precision,
    granularity: Granularity,
) -> Callable[[], Tensor]:
    """Return a call that computes y float32 [M, N] from x float32 [M, K] and packed trits."""
    n, k = trits.shape
    packed = t2_encode(trits)
    alphas = alpha.expand(alpha_shape(n, k, granularity)).contiguous()
    run = choose_backend(backend, CPU).backend.matmul
    return lambda: run(x, packed, alphas, None, (n, k), activations)


def our_network(file: TdtFile, backend: str, precision: Precision) -> tuple[rivals.Network, str]:
    """Return the packed network of a .tdt and the name of the backend that runs it."""
    chosen = choose_backend(backend, CPU).backend
    return packed_network(file, chosen, CPU, precision), chosen.NAME


def measure_peak(what: rivals.Peak, threads: int) -> float | None:
    """Return operations per second, measured for a moment; None without the native library."""
    return None if cpu.available(CPU) else cpu.peak(what, PEAK_SECONDS, threads)


def native_isa() -> str:
    """Return the instruction set in use, "" without the native library."""
    return "" if cpu.available(CPU) else cpu.isa()


def with_input_size(info: ModelInfo, input_size: int) -> ModelInfo:
    """Return the description of the same weights at another resolution."""
    return dataclasses.replace(info, config=dataclasses.replace(info.config, input_size=input_size))


def release_freed() -> None:
    """Give what building a network has freed back to the system: it is not the network's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _inputs(info: ModelInfo, batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, t and y as guidance makes them: half of the rows are of the null class."""
    config = info.config
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    y = torch.arange(batch) % config.num_classes
    if config.null_class is not None:
        y[(batch + 1) // 2 :] = config.null_class
    return torch.randn(shape, generator=generator), torch.full((batch,), 500), y


def _time(call: Callable[[], Tensor]) -> float:
    """Return the seconds of one call, after one that is not timed; short ones many at a time."""
    started = time.perf_counter()
    call()
    count = max(1, min(1000, round(SAMPLE_SECONDS / (time.perf_counter() - started))))
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _reason(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:120]}"


def thread_variables(threads: int) -> dict[str, str]:
    """Return what makes a process and all its libraries use so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TERDIT_THREADS")
    return dict.fromkeys(names, str(threads))


class Process:
    """The parent's end: a worker process with its own number of threads.

    Args:
        threads: for torch, its libraries and terdit.
        environment: more variables, known before anything is loaded.
    """

    def __init__(self, threads: int, environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed at exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "terdit_cli.lab.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | thread_variables(threads) | (environment or {}),
        )

    def ask(self, task: str, **job: Any) -> Answer:
        """Send a task and wait for its answer; {"why_not": text} if the process has ended.

        Raises:
            TerditError: what the worker raised, with its exit code.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"task": task, **job}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"why_not": self._last_words()}
        answer: Answer = json.loads(line)
        if "error" in answer:
            error = TerditError(answer["error"])
            error.exit_code = answer["exit_code"]
            raise error
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        if code < 0:
            killed = f"its process was ended by {signal.Signals(-code).name}"
            return killed + (" (out of memory?)" if -code == signal.SIGKILL else "")
        return f"its process ended with {code}: {said[-1][:120] if said else 'no message'}"

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def serve(lines: TextIO, out: TextIO, worker: Worker) -> None:
    """Answer every line of `lines` until they end."""
    for line in lines:
        job = json.loads(line)
        try:
            answer = worker.answer(**job)
        except TerditError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def main() -> None:
    """Serve the parent; whatever libraries print to stdout goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        serve(sys.stdin, out, Worker(int(os.environ["OMP_NUM_THREADS"])))


if __name__ == "__main__":
    main()
