"""The processes of one job that makes or reads images: alone, or started together by torchrun."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from terdit_cli.errors import EnvironmentProblem

# One may finish its images long before another. A process that dies takes the job down at once:
# that is torchrun's work.
_PATIENCE = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those of the job."""

    rank: int
    size: int
    local_rank: int

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

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank, in the main one; [] in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        with _all_alive():
            distributed.gather_object(value, values, dst=0)
        return values or []

    def device(self, name: str | None) -> str:
        """Return a device by name, or this process's own GPU, or the CPU."""
        if name not in (None, "cuda") or not torch.cuda.is_available():
            return name or "cpu"
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def require_shared(self, folder: Path) -> None:
        """Check that all processes see the main one's folder.

        Raises:
            EnvironmentProblem: in those that do not.
        """
        self.wait()
        if not folder.is_dir():
            raise EnvironmentProblem(
                "this process does not see the work folder of the others",
                got=f"nothing there on {os.uname().nodename} (rank {self.rank})",
                expected="a folder that all machines share",
                where=folder,
                fix="name one with --work",
            )


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

    The processes exchange only small objects, on the CPU; features go through files.

    Raises:
        EnvironmentProblem: the environment names no whole job, or it does not come together.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(0, 1, 0)
        return
    try:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            "cannot join the processes of this job",
            got=f"WORLD_SIZE={size}; {error}",
            expected="what torchrun sets",
            fix="start it with torchrun, or unset WORLD_SIZE",
        ) from error
    try:
        yield Processes(distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()
