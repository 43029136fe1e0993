"""The process group of a job: one process, or several that torchrun has started.

    torchrun --nproc-per-node 8 -m terdit_cli train RECIPE   (or one that sets its variables)

Training, sampling and scoring all join it. The job ends with the message and the exit code of the
first process that fails. The others fail as a consequence, by torch's error about a closed
connection or by torchrun's SIGTERM, and print nothing. A process that was killed prints nothing
itself; then one of those that wait for it reports it.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from terdit_cli.errors import EnvironmentProblem, Interrupted, TerditError
from terdit_cli.system.launcher import Launched, read_launcher
from terdit_cli.system.signals import StopSignal, ignore_stops

# One may finish its images long before another. If a process dies, torchrun ends the job at once.
_TWO_DAYS = 2 * 24 * 3600.0
_CONNECT_SECONDS = 300.0  # that the store may take to answer hundreds of processes at once
_SIGTERM_CODE = 128 + signal.SIGTERM
_COLLECTIVE_FAILED = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out|process group", re.I
)


@dataclass(frozen=True)
class Job(Launched):
    """This process among those of the job; by default the only one, on the CPU."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # its own
    store: distributed.Store = field(default_factory=distributed.HashStore)  # of the whole job

    @property
    def is_main(self) -> bool:
        """Return whether this is the main process, which writes what exists only once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.size > 1:
            distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value in all of them; a str, number or None."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def largest(self, number: float) -> float:
        """Return the largest of all processes' numbers; all must call."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64)  # on the CPU: works without a working GPU
        distributed.all_reduce(value, distributed.ReduceOp.MAX)
        return float(value)

    def smallest(self, number: int) -> int:
        """Return the smallest of all processes' numbers; all must call."""
        return int(-self.largest(-number))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over the processes, in place; all must call."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, without waiting for them, and return it."""
        return self.store.add(name, amount)

    def send(self, values: NDArray[np.uint8]) -> None:
        """Send an array to the main process, which must `receive` it."""
        distributed.send(torch.from_numpy(np.ascontiguousarray(values)), dst=0)

    def receive(self, values: NDArray[np.uint8], rank: int) -> None:
        """Fill a contiguous array with what a process sends next, of the same shape."""
        distributed.recv(torch.from_numpy(values), src=rank)

    def device_named(self, name: str | None) -> str:
        """Return a device by name; None, "auto" and "cuda" are this process's own."""
        if name not in (None, "auto", "cuda") or (name == "cuda" and self.device.type == "cpu"):
            return name or "cpu"  # a missing GPU is refused when it is used
        return str(self.device)

    def require_shared(self, folder: Path, option: str = "--work") -> None:
        """Check that all processes see the main one's folder, which `option` names.

        Raises:
            EnvironmentProblem: in those that do not.
        """
        self.wait()
        if not folder.is_dir():
            raise EnvironmentProblem(
                "this process does not see the other processes' folder",
                got=f"nothing there on {os.uname().nodename} (rank {self.rank})",
                expected="a folder that all machines share",
                where=folder,
                fix=f"give one with {option}",
            )

    def killed(self) -> list[int]:
        """Return the ranks of this machine's processes that have ended without `_leave`."""
        ranks = []
        for rank in range(self.size):
            known = self.store.check([f"process/{rank}"])
            if known and not self.store.check([f"left/{rank}"]):
                process, node = self.store.get(f"process/{rank}").decode().split(" ", 1)
                if node == os.uname().nodename and not _is_alive(int(process)):
                    ranks.append(rank)
        return ranks

    def _enter(self) -> None:
        """Record the process id and the machine of this rank."""
        self.store.set(f"process/{self.rank}", f"{os.getpid()} {os.uname().nodename}")

    def _leave(self, code: int) -> int | None:
        """Record that this process ends; return the exit code of one that failed before."""
        try:
            self.store.set(f"left/{self.rank}", "")
            if not code:
                return None
            first = self.store.compare_set("failed", "", f"{self.rank} {code}").decode().split()
        except RuntimeError:
            return None  # the main process, which holds the store, has ended
        return None if int(first[0]) == self.rank else int(first[1])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def join_job(
    *,
    a_gpu_each: bool = False,
    timeout_seconds: float = _TWO_DAYS,
    retry: str = "run the same command again",
) -> Iterator[Job]:
    """Join the job that torchrun describes in the environment, for as long as the block lasts.

    Args:
        a_gpu_each: GPUs, where there are any, take part in the collectives, and no two processes
            share one. Otherwise the processes exchange small objects and images on the CPU.
        timeout_seconds: for the processes to meet, and of each collective.
        retry: the fix to suggest after another process has ended.

    Raises:
        EnvironmentProblem: the environment describes no complete job, it cannot connect, or
            another process has ended.
        SystemExit: without a message, where another process failed first.
    """
    place = read_launcher()
    device = own_device(place, a_gpu_each)
    if place.size == 1:
        yield Job(device=device)
        return
    gpus = a_gpu_each and device.type == "cuda"
    if gpus:
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=datetime.timedelta(seconds=timeout_seconds),
            device_id=device if gpus else None,
        )
        store = open_store()
    except (RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            "the processes of this job could not connect",
            got=str(error).split("\n")[0][:200],
            expected=f"{place.size} processes within {timeout_seconds:.0f} s",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            fix="check that torchrun was started on every machine with the same address",
        ) from error
    job = Job(**asdict(place), device=device, store=store)
    job._enter()
    failed = True
    try:
        with _one_message(job), others_alive(job, retry):
            yield job
        failed = False
    finally:
        # After a failed training, a collective of another thread may wait for an ended process.
        if not (failed and a_gpu_each):
            distributed.destroy_process_group()


def own_device(place: Launched, a_gpu_each: bool = False) -> torch.device:
    """Return the device of a process: a GPU by its number on this machine, or the CPU.

    Raises:
        EnvironmentProblem: `a_gpu_each`, and there are fewer.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if a_gpu_each and place.local_rank >= count:
        raise EnvironmentProblem(
            "this machine has more processes than GPUs",
            got=f"local rank {place.local_rank}",
            expected=f"a rank below {count}",
            fix=f"start torchrun with --nproc-per-node {count}",
        )
    return torch.device("cuda", place.local_rank % count)


def open_store() -> distributed.Store:
    """Connect to the store that the processes of the job share."""
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=_CONNECT_SECONDS),
    )
    # torchrun may start a job again with the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"terdit/{attempt}", store)


@contextmanager
def others_alive(job: Job, retry: str) -> Iterator[None]:
    """Explain torch's error about a connection whose other end is gone.

    Raises:
        EnvironmentProblem: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, distributed.DistError) or _COLLECTIVE_FAILED.search(text)
        if job.size == 1 or not lost:
            raise
        raise EnvironmentProblem(
            "another process of this job has ended",
            got=re.sub(r"^\[\S*\] ", "", text.split("\n")[0]).partition(". ")[0][:200],
            fix=f"see its message, then {retry}",
        ) from error


@contextmanager
def _one_message(job: Job) -> Iterator[None]:
    """Let only the first process that fails print its error; the others exit with its code."""
    try:
        try:
            yield
        except StopSignal as stop:
            raise stop.told() from None
    except TerditError as error:
        # Nothing may interrupt the clean-up: torchrun stops all when the first one ends.
        ignore_stops()
        problem = _cause(job, error)
        code = job._leave(problem.exit_code)
        if code is not None:
            raise SystemExit(code) from error
        raise problem from error.__cause__
    except Exception:
        job._leave(1)  # a bug: its traceback is the message
        raise
    else:
        job._leave(0)


def _cause(job: Job, error: TerditError) -> TerditError:
    """Return the error; for torchrun's signal after a process has died, the error that says so."""
    if not isinstance(error, Interrupted) or error.exit_code != _SIGTERM_CODE:
        return error
    try:
        killed = job.killed()
    except RuntimeError:
        killed = [0]  # the store was the main process's, and it has ended
    if not killed:
        return error
    return EnvironmentProblem(
        "another process of this job was killed",
        got=f"no message from rank {', '.join(map(str, killed))}",
        fix="look in the system log for the reason (out of memory?), then rerun the command",
    )
