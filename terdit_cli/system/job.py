"""The processes of one job that makes or reads images: alone, or started together by torchrun.

The job ends as the first process that fails does: with its message and its exit code. The others
fail because of it, by what gloo says of a closed connection or by torchrun's SIGTERM, and are
silent. One that was killed says nothing; then one of those who miss it speaks.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from terdit_cli.errors import EnvironmentProblem, Interrupted, TerditError
from terdit_cli.system.signals import StopSignal, ignore_stops

# One may finish its images long before another. A process that dies takes the job down at once:
# that is torchrun's work.
_PATIENCE = datetime.timedelta(days=2)
_CONNECT = datetime.timedelta(minutes=5)
_SIGTERM_CODE = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Processes:
    """This process among those of the job."""

    rank: int
    size: int
    local_rank: int
    store: distributed.Store = field(default_factory=distributed.HashStore)  # of the whole job

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when all have come here."""
        if self.size > 1:
            with _all_alive():
                distributed.barrier()

    def tell(self, value: Any) -> Any:
        """Return the main process's value in all of them; a str, number or None."""
        if self.size == 1:
            return value
        values = [value]
        with _all_alive():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def least(self, number: int) -> int:
        """Return the least of all processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with _all_alive():
            distributed.all_reduce(value, distributed.ReduceOp.MIN)
        return int(value)

    def add(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, without waiting for them, and return it."""
        with _all_alive():
            return self.store.add(name, amount)

    def send(self, values: NDArray[np.uint8]) -> None:
        """Send an array to the main process, which must `receive` it."""
        with _all_alive():
            distributed.send(torch.from_numpy(np.ascontiguousarray(values)), dst=0)

    def receive(self, values: NDArray[np.uint8], rank: int) -> None:
        """Fill a contiguous array with what a process sends next, of the same shape."""
        with _all_alive():
            distributed.recv(torch.from_numpy(values), src=rank)

    def device(self, name: str | None) -> str:
        """Return a device by name, or this process's own GPU, or the CPU."""
        if name == "auto":
            name = None
        if name not in (None, "cuda") or not torch.cuda.is_available():
            return name or "cpu"
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def require_shared(self, folder: Path, option: str = "--work") -> None:
        """Check that all processes see the main one's folder, which `option` names.

        Raises:
            EnvironmentProblem: in those that do not.
        """
        self.wait()
        if not folder.is_dir():
            raise EnvironmentProblem(
                "this process does not see the folder of the others",
                got=f"nothing there on {os.uname().nodename} (rank {self.rank})",
                expected="a folder that all machines share",
                where=folder,
                fix=f"name one with {option}",
            )

    def leave(self, code: int = 0) -> int | None:
        """Say that this process ends, and return another's exit code if that failed before."""
        self.store.set(f"left/{self.rank}", "")
        if not code:
            return None
        first = self.store.compare_set("failed", "", f"{self.rank} {code}").decode().split()
        return None if int(first[0]) == self.rank else int(first[1])

    def enter(self) -> None:
        """Say which process of which machine this is."""
        self.store.set(f"process/{self.rank}", f"{os.getpid()} {os.uname().nodename}")

    def killed(self) -> list[int]:
        """Return the ranks of the processes of this machine that have ended without leaving."""
        ranks = []
        for rank in range(self.size):
            known = self.store.check([f"process/{rank}"])
            if known and not self.store.check([f"left/{rank}"]):
                process, node = self.store.get(f"process/{rank}").decode().split(" ", 1)
                if node == os.uname().nodename and not _is_alive(int(process)):
                    ranks.append(rank)
        return ranks


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _all_alive() -> Iterator[None]:
    """Explain what gloo says when a process of the job has ended."""
    try:
        yield
    except RuntimeError as error:
        raise EnvironmentProblem(
            "another process of this job has ended",
            got=re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0],
            fix="see its own message, then run the same command again",
        ) from error


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the job that torchrun describes in the environment, for as long as the block lasts.

    The processes exchange small objects and images, on the CPU; features go through files.

    Raises:
        EnvironmentProblem: the environment names no whole job, or it does not come together.
        SystemExit: without a message, where another process failed first.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(0, 1, 0)
        return
    try:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        processes = Processes(distributed.get_rank(), size, local_rank, _open_store())
    except (ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            "cannot join the processes of this job",
            got=f"WORLD_SIZE={size}; {error}",
            expected="what torchrun sets",
            fix="start it with torchrun, or unset WORLD_SIZE",
        ) from error
    processes.enter()
    try:
        with _one_message(processes):
            yield processes
    finally:
        distributed.destroy_process_group()


def _open_store() -> distributed.Store:
    """Connect to the store where the processes of the job have met."""
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_CONNECT
    )
    # torchrun may start a job again with the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"terdit/{attempt}", store)


@contextmanager
def _one_message(processes: Processes) -> Iterator[None]:
    """Let only the first process that fails say why; the others exit with its code."""
    try:
        try:
            yield
        except StopSignal as stop:
            raise stop.told() from None
    except TerditError as error:
        # Nothing may interrupt what is left to do: torchrun stops all when the first one ends.
        ignore_stops()
        problem = _cause(processes, error)
        code = _leave(processes, problem.exit_code)
        if code is not None:
            raise SystemExit(code) from error
        raise problem from error.__cause__
    except Exception:
        _leave(processes, 1)  # a bug: its traceback is the message
        raise
    else:
        _leave(processes, 0)


def _cause(processes: Processes, error: TerditError) -> TerditError:
    """Return the error, or, of torchrun's signal after a process has died, that one has died."""
    if not isinstance(error, Interrupted) or error.exit_code != _SIGTERM_CODE:
        return error
    try:
        killed = processes.killed()
    except RuntimeError:
        killed = [0]  # the store was the main process's, and it has ended
    if not killed:
        return error
    return EnvironmentProblem(
        "another process of this job was killed",
        got=f"no last word from rank {', '.join(map(str, killed))}",
        fix="look for its end in the system's log (out of memory?), then run the command again",
    )


def _leave(processes: Processes, code: int) -> int | None:
    try:
        return processes.leave(code)
    except RuntimeError:
        return None  # the main process, whose store it was, has ended
