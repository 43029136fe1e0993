"""torchrun, whose processes are forked: torch, most of a short job's time, is imported once.

    python tests/torchrun.py PROCESSES SCRIPT.py WORDS...
    python tests/torchrun.py PROCESSES -m MODULE WORDS...

The agent that starts, watches and stops the processes is torchrun's own.
"""

from __future__ import annotations

import runpy
import sys
import uuid
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import terdit_cli.commands.sample
import terdit_cli.commands.train  # noqa: F401 - what the processes will import


def work(words: list[str]) -> None:
    """Run the words' script or module, as python would."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def main(processes: str, *words: str) -> None:
    """Start the job and wait for it."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), run_id=str(uuid.uuid4()),
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(config, work)(list(words))


if __name__ == "__main__":
    main(*sys.argv[1:])
