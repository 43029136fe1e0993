"""A recipe whose steps take milliseconds, and ways to run it here or in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from terdit_cli.commands import train as command
from terdit_cli.train.checkpoint import read_manifest
from terdit_cli.train.sharded_tensors import ShardReader

ROOT = Path(__file__).parents[2]

# Everything that could break a resume: label dropout, flips, accumulation, EMA warm-up, schedule.
RECIPE = """\
name: small
seed: 3
model:
  {size: nano, n_layers: 2, dim: 32, n_heads: 2, patch_size: 7, multiple_of: 16, num_classes: 10}
ternary: {granularity: tensor}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, flip: true, workers: 1}
train: {steps: 40, global_batch_size: 8, micro_batch_size: 4, precision: fp32}
optim: {lr: 2e-3, weight_decay: 0.01, warmup_steps: 5, schedule: cosine}
ema: {decay: 0.99, warmup: true}
sample: {every: 0}
logging: {every: 5}
checkpoint: {every: 10}
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on tensors this small more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def train(recipe_path: Path) -> Callable[..., command.TrainResult]:
    """Return train(out, *overrides, resume=None): runs the recipe in this process."""

    def run(out: Path, *overrides: str, resume: str | None = None) -> command.TrainResult:
        return command.run(recipe_path, overrides, resume, out)

    return run


@pytest.fixture(scope="session")
def start(recipe_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return start(out, *words): `terdit train` in a process of its own."""

    def begin(out: Path, *words: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "terdit_cli", "train", recipe_path, *words, "--out", out]
        return subprocess.Popen(
            line,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # sums depend on the number of threads
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Return wait_for(process, condition): until it holds or the process has ended."""

    def wait(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 120
        while process.poll() is None and not condition():
            assert time.monotonic() < end, "nothing happened in two minutes"
            time.sleep(0.002)

    return wait


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{path}: other keys"]
        return [line for key in a for line in _differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, Sequence) and not isinstance(a, str):
        if len(a) != len(b):
            return [f"{path}: other length"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in _differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """Return tensors_of(checkpoint folder): all it holds, by dotted names."""

    def read(folder: Path) -> dict[str, Tensor]:
        reader = ShardReader(folder, read_manifest(folder).files)
        stored = reader.tensors().items()
        tensors = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in stored}
        reader.read(tensors, one_process=True)
        return tensors

    return read


@pytest.fixture(scope="session")
def assert_same_run(
    tensors_of: Callable[[Path], dict[str, Tensor]],
) -> Callable[[Path, Path], None]:
    """Return assert_same_run(a, b): ckpt.pt and the last states are equal bit for bit."""

    def check(a: Path, b: Path) -> None:
        x, y = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (a, b))
        assert _differences(x, y, "ckpt.pt") == []
        x, y = (tensors_of(folder / "checkpoints" / "step-00000040") for folder in (a, b))
        assert _differences(x, y, "step-00000040") == []

    return check


@pytest.fixture(scope="session")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory, train: Callable[..., command.TrainResult]
) -> Path:
    """The run folder of 40 steps without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder
