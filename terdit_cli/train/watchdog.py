"""Processes that hang or fall behind.

A collective waits for its last process. When no step has ended for `hang_seconds` on a process, its
watchdog thread writes the position of its main thread into the job's store, reads those of the
others, names the process that is elsewhere or silent, and ends its own: a hang becomes an exit.

All processes take the same time for a step, since each waits for the slowest. So two things are
compared that need no other process: seconds spent waiting for data, and the time of a fixed matrix
product.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system.job import Job, open_store

REPORT_SECONDS = 5.0  # in which the processes report their positions
SLOW_RATIO = 2.0  # of a process's matrix product time to the median
SLOW_SHARE = 0.2  # of a step, by which the wait for data exceeds the median
PRODUCT = {"cpu": 192, "cuda": 2048}  # side of the matrices that are timed
PRODUCT_REPEATS = 5


class Watchdog:
    """Ends this process when no step has ended for some time; a context manager."""

    def __init__(self, job: Job, seconds: float, fix: str) -> None:
        self._job = job
        self._seconds = seconds
        self._fix = fix
        self._beats = 0
        self._pauses = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="terdit-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._job.size > 1:
            self._store = open_store()  # its own connection: the main thread may wait in another
            self._store.set_timeout(timedelta(seconds=REPORT_SECONDS))
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()

    def beat(self) -> None:
        """Record that a step has ended."""
        self._beats += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside the block, however long it takes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._beats += 1

    def _watch(self) -> None:
        # Ticks are counted, not seconds: a suspended process is not a hanging one when it wakes.
        tick = min(1.0, self._seconds / 20)
        seen, idle = -1, 0.0
        while not self._stop.wait(tick):
            if self._beats != seen or self._pauses:
                seen, idle = self._beats, 0.0
            elif (idle := idle + tick) >= self._seconds:
                self._end_process()

    def _end_process(self) -> None:
        job, places = self._job, {self._job.rank: where_is_main()}
        lost = ""
        try:
            self._store.set(f"hang/{job.rank}", json.dumps(places[job.rank]))
            time.sleep(REPORT_SECONDS)
            for rank in range(job.size):
                if self._store.check([f"hang/{rank}"]):
                    places[rank] = json.loads(self._store.get(f"hang/{rank}"))
        except RuntimeError as error:
            lost = f"; the job's store does not answer: {str(error).splitlines()[0][:100]}"
        if job.rank == min(places):
            problem = EnvironmentProblem(
                "training hangs",
                got=f"no step for {self._seconds:g} s; {describe(places, job.size)}{lost}",
                fix=f"look at that process and its machine, then {self._fix}",
            )
            # Not through the console: the main thread may hold its lock.
            os.write(2, f"error: {problem}\n".encode())
        os._exit(EnvironmentProblem.exit_code)


def where_is_main() -> str:
    """Return the place in this package that the main thread is at, and the function it waits in."""
    package = str(Path(__file__).parents[1])
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame.f_code.co_name if frame else "nothing"
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return innermost
    file = Path(frame.f_code.co_filename).name
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno}), in {innermost}"


def describe(places: dict[int, str], size: int) -> str:
    """Describe which of `size` processes are silent or elsewhere, and where all are."""
    silent = [rank for rank in range(size) if rank not in places]
    groups: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        groups.setdefault(place, []).append(rank)
    parts = [f"no report from {_ranks(silent)}"] if silent else []
    parts += [
        f"{_ranks(group)} at {place}"
        for place, group in sorted(groups.items(), key=lambda item: len(item[1]))
    ]
    return "; ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class Stragglers:
    """Warns of processes that are slower than the others, once until they are not."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._suspects: set[str] = set()
        self._named: set[str] = set()

    def compare(self, data_seconds: float, step_seconds: float) -> None:
        """Compare the mean step time of this process with the others'; all must call.

        Args:
            data_seconds: of a step, waiting for data.
            step_seconds: of a step.
        """
        job = self._job
        if job.size == 1:
            return
        table = torch.zeros(2, job.size, device=job.device)
        table[:, job.rank] = torch.tensor([data_seconds, time_product(job.device)])
        data, product = (job.mean(table) * job.size).tolist()
        slow = slow_processes(data, product, step_seconds)
        # Twice in a row: once may be chance.
        for text in sorted(slow[rank] for rank in slow.keys() & self._suspects - self._named):
            console.warn(text)
        self._named = slow.keys() & (self._suspects | self._named)
        self._suspects = set(slow)


def slow_processes(
    data: Sequence[float], product: Sequence[float], step_seconds: float
) -> dict[str, str]:
    """Return a sentence for each slow rank and reason, from the seconds of all ranks."""
    usual_data, usual_product = statistics.median_low(data), statistics.median_low(product)
    slow = {}
    for rank, (waited, computed) in enumerate(zip(data, product, strict=True)):
        if waited - usual_data > SLOW_SHARE * step_seconds:
            slow[f"data {rank}"] = (
                f"rank {rank} waits {waited:.3g} s a step for data, "
                f"the median process {usual_data:.3g} s"
            )
        if computed > SLOW_RATIO * usual_product:
            slow[f"product {rank}"] = (
                f"rank {rank} is slow: a matrix product takes it "
                f"{computed / usual_product:.1f} times as long as the median process"
            )
    return slow


def time_product(device: torch.device) -> float:
    """Return the best time in seconds of a fixed matrix product on this process."""
    side = PRODUCT[device.type]
    matrix = torch.ones(side, side, device=device)
    best = float("inf")
    for _ in range(PRODUCT_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
