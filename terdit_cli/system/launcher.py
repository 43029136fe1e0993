"""What torchrun, or another launcher, says about the job in the environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from terdit_cli.errors import EnvironmentProblem

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """This process's place among those of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1


def read_launcher() -> Launched:
    """Return this process's place; without WORLD_SIZE, or with 1, the job is one process.

    Raises:
        EnvironmentProblem: variables are missing or are not valid numbers.
    """
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return Launched()
    got = f"WORLD_SIZE={os.environ['WORLD_SIZE']}"
    missing = [name for name in NEEDED if not os.environ.get(name, "").strip()]
    if missing:
        raise _not_whole(f"{got} without {', '.join(missing)}")
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in NEEDED[:3])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
        int(os.environ["MASTER_PORT"])
    except ValueError as error:
        raise _not_whole(f"{got}; {error}") from error
    if not (0 <= rank < size and local_rank >= 0 and local_size >= 1):
        raise _not_whole(f"{got} with RANK={rank}, LOCAL_RANK={local_rank}")
    return Launched(rank, size, local_rank, local_size)


def is_main() -> bool:
    """Return whether this process prints messages: the first of the job, or the only one."""
    try:
        return read_launcher().rank == 0
    except EnvironmentProblem:
        return True  # verbs that join a job will refuse to start; all others run alone


def _not_whole(got: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "cannot join the processes of this job",
        got=got,
        expected="the variables that torchrun sets",
        fix="start it with torchrun, or unset WORLD_SIZE",
    )
