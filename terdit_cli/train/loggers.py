"""The logs of a run: metrics.jsonl always; TensorBoard and Weights & Biases by extras.

metrics.jsonl has one line per logged step, and all curves are made from it. The others get the same
numbers under the same names, nested ones as "flipped/wq".
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.recipe import Recipe, WandbSection
from terdit_cli.system.atomic import atomic_path, write_problem

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id.txt"


class Log(Protocol):
    """A destination of log entries."""

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry: "step", numbers, None and dictionaries of them."""

    def close(self) -> None:
        """Write what is still buffered."""


def open_logs(run_folder: Path, recipe: Recipe, start_step: int) -> list[Log]:
    """Open metrics.jsonl, which comes first, and the recipe's other logs.

    Raises:
        EnvironmentProblem: a missing package, a folder that cannot be written, no account.
    """
    logs: list[Log] = [MetricsLog(run_folder, start_step)]
    if recipe.logging.tensorboard:
        logs.append(TensorBoardLog(run_folder, start_step))
    if recipe.logging.wandb is not None:
        logs.append(WandbLog(run_folder, recipe, recipe.logging.wandb, start_step))
    return logs


def scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of an entry except its step, nested ones as "outer/inner"."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif key != "step" and value is not None and math.isfinite(value):
            yield prefix + key, float(value)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the logged lines of a run; a half-written last line is skipped."""
    path = run_folder / FILE
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        entries.append(entry)
    return entries


def logged_seconds(entries: list[dict[str, Any]], global_batch_size: int) -> float:
    """Return how long the logged steps took, over all resumes, without samples and checkpoints."""
    steps = [0, *(entry["step"] for entry in entries)]
    counts = [after - before for before, after in itertools.pairwise(steps)]
    rates = [entry["images_per_second"] for entry in entries]
    return sum(n * global_batch_size / rate for n, rate in zip(counts, rates, strict=True) if rate)


class MetricsLog:
    """Appends to metrics.jsonl; opened at a step, it drops the lines of later steps."""

    def __init__(self, run_folder: Path, start_step: int) -> None:
        self._folder = run_folder
        kept = [entry for entry in read_metrics(run_folder) if entry["step"] <= start_step]
        with atomic_path(run_folder / FILE) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line; numbers that are not finite become null.

        Raises:
            EnvironmentProblem: disk full or not writable.
        """
        path = self._folder / FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_without_infinities(entry)) + "\n")
        except OSError as error:
            raise write_problem(path, error) from error

    def close(self) -> None:
        """Do nothing: every line is written when it is appended."""


class TensorBoardLog:
    """Scalars in RUN/tensorboard; steps after the one resumed from are hidden."""

    def __init__(self, run_folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("TensorBoard", "logging.tensorboard=false", error) from error
        folder = run_folder / TENSORBOARD
        try:
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        except OSError as error:
            raise write_problem(folder, error) from error

    def append(self, entry: dict[str, Any]) -> None:
        for name, value in scalars(entry):
            self._writer.add_scalar(name, value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases; its id is kept in the run folder, for a resume."""

    def __init__(
        self, run_folder: Path, recipe: Recipe, section: WandbSection, start_step: int
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("Weights & Biases", "logging.wandb=null", error) from error
        path = run_folder / WANDB_ID
        if start_step == 0 or not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text(secrets.token_hex(8), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                mode=section.mode,
                name=recipe.name,
                id=path.read_text(encoding="utf-8"),
                resume="allow" if section.mode == "online" else None,  # `wandb sync` joins them
                dir=str(run_folder),
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(quiet=True),
            )
        except (wandb.errors.Error, OSError) as error:
            raise EnvironmentProblem(
                "Weights & Biases cannot be reached",
                got=str(error).split("\n")[0][:200],
                where=f"logging.wandb.mode={section.mode}",
                fix="run `wandb login`, or set logging.wandb.mode=offline",
            ) from error

        # Its own step counter only grows: after resuming from an earlier step it would refuse ours.
        self._run.define_metric("*", step_metric="step")

    def append(self, entry: dict[str, Any]) -> None:
        self._run.log({"step": entry["step"], **dict(scalars(entry))})

    def close(self) -> None:
        self._run.finish()


def _missing(what: str, off: str, error: ImportError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{what} is not installed", got=error, fix=f"pip install 'terdit[logging]', or set {off}"
    )


def _without_infinities(value: Any) -> Any:
    """Return an entry in which numbers that are not valid JSON are None."""
    if isinstance(value, dict):
        return {key: _without_infinities(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
