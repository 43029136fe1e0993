"""Runs of several processes against one alone: the same losses, averages, weights and codes.

Each number of processes is one job of torchrun, which trains every case in turn for 20 steps. The
cases have an odd width, so that rows divide over no number of processes.

Two things would make roundings large. Adam divides gradients by their own size, and those that are
zero but for rounding (a scale before a norm, a bias of keys) would take whole steps: the cases' eps
of 1e-4 keeps these parameters where they are. And new gates are zero, so that their codes hang on
the last bits of the first gradients: the cases begin with weights that are not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from terdit_cli.data.loader import BatchLoader
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model import ternary
from terdit_cli.model.dit import DiT
from terdit_cli.model.ternary import absmean, ternarize
from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.system.job import Job, join_job
from terdit_cli.system.launcher import NEEDED, is_main
from terdit_cli.train import build, ternary_cache
from terdit_cli.train.parallel import distribute, make_mesh
from terdit_cli.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS = 20

RECIPE = """\
name: odd
seed: 5
model:
  {size: nano, n_layers: 3, dim: 30, n_heads: 3, patch_size: 7, multiple_of: 7, num_classes: 10}
ternary: {granularity: tensor}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, flip: true, workers: 1}
train: {steps: 40, global_batch_size: 12, micro_batch_size: 1, precision: fp32}
optim: {lr: 2e-3, weight_decay: 0.01, warmup_steps: 5, schedule: cosine, eps: 1e-4}
ema: {decay: 0.9, warmup: true}
sample: {every: 0, count: 2, steps: 2}
"""

# Recipes, by a name: what changes the mathematics.
KINDS: dict[str, list[str]] = {
    "learned": [],
    "absmean rows": ["ternary.scale=absmean", "ternary.granularity=row"],
    "groups": ["ternary.granularity=group128", "model.multiple_of=140"],
    "int8": ["ternary.activations=int8"],
    "full precision": ["ternary.enabled=false"],
    "bf16": ["train.precision=bf16"],
    "muon": ["optim.kind=muon"],
    "clipped": ["ternary.scale=absmean", "ternary.ste_clip=2"],
}
FEWER = ["train.micro_batch_size=2"]  # and so larger micro-batches, which take less time
# Cases, by number of processes: what must not change it.
CASES: dict[int, list[tuple[str, list[str]]]] = {
    2: [
        ("learned", ["parallel.mode=ddp"]),
        ("learned", ["parallel.mode=fsdp"]),
        (
            "learned",
            ["parallel.mode=fsdp", "train.micro_batch_size=6", "train.activation_checkpointing=2"],
        ),
        (
            "learned",
            [
                "parallel.mode=fsdp",
                "parallel.reshard_after_forward=false",
                "train.activation_checkpointing=true",
                *FEWER,
            ],
        ),
        ("absmean rows", ["parallel.mode=fsdp", *FEWER]),
        ("groups", ["parallel.mode=fsdp", *FEWER]),
        ("int8", ["parallel.mode=fsdp", *FEWER]),
        ("full precision", ["parallel.mode=fsdp", *FEWER]),
        ("bf16", ["parallel.mode=fsdp", *FEWER]),
        ("muon", ["parallel.mode=ddp", *FEWER]),
        ("muon", ["parallel.mode=fsdp", *FEWER]),
        ("bf16", ["parallel.mode=fsdp", "parallel.reduce=bf16", *FEWER]),
        ("bf16", ["parallel.mode=ddp", "parallel.reduce=bf16", *FEWER]),
        ("learned", ["parallel.mode=fsdp", "train.compile=true", *FEWER]),
        (
            "learned",
            [
                "parallel.mode=ddp",
                "train.compile=true",
                "train.activation_checkpointing=true",
                *FEWER,
            ],
        ),
        ("clipped", ["parallel.mode=ddp", *FEWER]),
        ("clipped", ["parallel.mode=fsdp", *FEWER]),
    ],
    3: [
        ("learned", ["parallel.mode=fsdp"]),
        ("absmean rows", ["parallel.mode=fsdp", *FEWER]),
        ("muon", ["parallel.mode=fsdp", *FEWER]),
        ("clipped", ["parallel.mode=fsdp", *FEWER]),
    ],
    4: [("learned", ["parallel.mode=hsdp", "parallel.shard_size=2"])],
}

# Where a rounding that falls the other way moves a value by a 100th, and steps amplify it.
ROUNDED = {"int8", "bf16"}

WORKER = """
import importlib.util, json, sys
from pathlib import Path
import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("test_parallel", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
folder = Path(sys.argv[2])
with tests.join_job(a_gpu_each=True, timeout_seconds=60) as job:
    for number, words in enumerate(json.loads(sys.argv[3])):
        found = tests.train(tests.load_recipe(folder / "odd.yaml", words), job, folder / "run")
        if job.is_main:
            torch.save(found, folder / f"case-{number}.pt")
    job.wait()
"""


def lively_network(recipe: Recipe, make: Callable[[Recipe], DiT] = build.build_network) -> DiT:
    """Make a network without zero weights."""
    network = make(recipe)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def train(recipe: Recipe, job: Job, folder: Path) -> dict[str, Any]:
    """Train for `STEPS` steps and return losses, and whole weights, averages and gammas."""
    source = build.open_data(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_network", lively_network)
        # Graphs are as users have them; C++ of each would take a minute.
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        trainer = Trainer(recipe, source, build.open_space(recipe, job.device), job, folder)
    size, flip = recipe.train.global_batch_size, recipe.data.flip
    losses = []
    loader = BatchLoader(source, recipe.seed, size, flip, job.rank, job.size, workers=1)
    with loader:
        for images, labels in loader.iterate(0):
            result = trainer.train_step(images, labels)
            losses.append([result.loss, result.mse, result.vb, result.grad_norm])
            if trainer.step == STEPS:
                break
    drawn = trainer.preview()
    grid = None if drawn is None else torch.from_numpy(np.array(Image.open(drawn)))
    state = trainer.state()
    whole = {
        part: {name: _whole(value) for name, value in state[part].items()}
        for part in ("model", "ema")
    }
    sharded = [
        value
        for name, value in trainer.network.named_parameters()
        if name.endswith("weight") and hasattr(value, "full_tensor") and value.dim() == 2
    ]
    gammas = [float(gamma) for gamma in ternary_cache.sharded_gammas(sharded)]
    return {"losses": losses, "gammas": gammas, "grid": grid, **whole}


def _whole(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    (path / "odd.yaml").write_text(RECIPE)
    return path


def together(folder: Path, processes: int) -> list[dict[str, Any]]:
    """Return what a job of torchrun makes of its cases."""
    job = folder / str(processes)
    job.mkdir()
    (job / "odd.yaml").write_text(RECIPE)
    (job / "worker.py").write_text(WORKER)
    words = [KINDS[kind] + more for kind, more in CASES[processes]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    line = [*launch, str(processes), job / "worker.py", __file__, job, json.dumps(words)]
    with subprocess.Popen(
        line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, said
    return [
        torch.load(job / f"case-{number}.pt", weights_only=True) for number in range(len(words))
    ]


# One test a job: cases in tests of their own would be run again by each of pytest's processes.
@pytest.mark.slow
@pytest.mark.parametrize("processes", CASES)
def test_many_are_as_one(processes: int, folder: Path) -> None:
    cases = CASES[processes]
    ones = {
        kind: train(load_recipe(folder / "odd.yaml", KINDS[kind]), Job(), folder / "one")
        for kind in {kind for kind, _ in cases}
    }
    for (kind, words), many in zip(cases, together(folder, processes), strict=True):
        with faults_of(f"{processes} processes, {kind}, {' '.join(words)}"):
            compare(kind, ones[kind], many)
            check_gammas(words, many)


@contextlib.contextmanager
def faults_of(case: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        error.add_note(case)
        raise


def check_gammas(words: list[str], many: dict[str, Any]) -> None:
    """Bit for bit: what the processes agreed on, against their gathered weights here."""
    if not {"parallel.mode=fsdp", "parallel.mode=hsdp"} & set(words):
        assert many["gammas"] == []
        return
    weights = [
        value for name, value in many["model"].items()
        if name.endswith("weight") and value.dim() == 2
    ]  # fmt: skip
    assert len(weights) > 20
    assert [float(absmean(weight)) for weight in weights] == many["gammas"]


def compare(kind: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    assert many["grid"].shape == one["grid"].shape
    losses, norms = np.hsplit(np.array(many["losses"]), [3])
    expected_losses, expected_norms = np.hsplit(np.array(one["losses"]), [3])
    if kind in ROUNDED:
        np.testing.assert_allclose(losses[0], expected_losses[0], rtol=1e-3)
        np.testing.assert_allclose(norms[0], expected_norms[0], rtol=0.03)
        np.testing.assert_allclose(losses, expected_losses, rtol=0.03)
        return
    if kind == "muon":
        # Steps are made orthogonal in bfloat16, whose rounding left at most 0.4 % of a matrix. If
        # halves were made orthogonal by themselves, every matrix would differ by at least 1.2 %
        # and the losses by 0.3 % (both tried); all steps together are 2 to 10 % of a matrix.
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
        for name in filter(is_master, one["model"]):
            value = one["model"][name]
            assert (many["model"][name] - value).norm() <= 0.01 * value.norm(), name
        return
    assert (many["grid"].int() - one["grid"].int()).abs().max() <= 1  # a pixel that rounds
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    for part in ("model", "ema"):
        assert many[part].keys() == one[part].keys()
        for name, value in one[part].items():
            # A step moves a parameter by up to 2e-3: 1e-7 is for those that began at 0.
            error = (many[part][name] - value).abs()
            assert (error <= 1e-6 * value.abs() + 1e-7).all(), (name, float(error.max()))
    masters = [name for name in one["model"] if name.startswith("layers.") and is_master(name)]
    assert len(masters) == 24
    for name in masters:
        assert torch.equal(ternarize(many["model"][name]), ternarize(one["model"][name])), name


def is_master(name: str) -> bool:
    return bool(re.search(r"\.w[1-3qkvo]\.weight$|adaLN_modulation\.1\.weight$", name))


def small_trainer(folder: Path, *words: str) -> tuple[Trainer, Tensor, Tensor]:
    recipe = load_recipe(folder / "odd.yaml", words)
    source = build.open_data(recipe)
    space = build.open_space(recipe, torch.device("cpu"))
    trainer = Trainer(recipe, source, space, Job(), folder / "unused")
    loader = BatchLoader(source, recipe.seed, 12, flip=False, rank=0, world_size=1, workers=1)
    with loader:
        images, labels = next(iter(loader.iterate(0)))
    return trainer, images, labels


def test_each_weight_is_ternarized_once_a_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of micro-batches and recomputed blocks; and none is left over."""
    counted = []
    real = ternary.ternarize

    def count(weight: Tensor, gamma: Tensor | None = None) -> Tensor:
        counted.append(weight.data_ptr())
        return real(weight, gamma)

    trainer, images, labels = small_trainer(
        folder, "train.micro_batch_size=4", "train.activation_checkpointing=true"
    )
    layers = [m for m in trainer.network.modules() if isinstance(m, ternary.TernaryLinear)]
    monkeypatch.setattr(ternary, "ternarize", count)
    for _ in range(3):
        counted.clear()
        trainer.train_step(images, labels)
        assert sorted(counted) == sorted(layer.weight.data_ptr() for layer in layers)
        assert all(layer.ternarized is None for layer in layers)


def test_no_code_is_stale(folder: Path) -> None:
    """A second step sees the weights that the first one made, as a fresh trainer does."""
    words = ("optim.lr=0.5", "optim.warmup_steps=0", "train.micro_batch_size=4")
    trainer, images, labels = small_trainer(folder, *words)
    trainer.train_step(images, labels)
    other, _, _ = small_trainer(folder, *words)
    other.restore(trainer.state(), trainer.step)
    assert trainer.train_step(images, labels) == other.train_step(images, labels)


def test_groups_that_do_not_divide(folder: Path) -> None:
    words = ["parallel.mode=hsdp", "parallel.shard_size=4"]
    parallel = load_recipe(folder / "odd.yaml", words).parallel
    with pytest.raises(
        UsageError, match=r"got parallel\.shard_size 4, expected a divisor of the 6 p"
    ):
        make_mesh(Job(size=6, local_size=6), parallel)


def test_nothing_to_offload_from(folder: Path) -> None:
    words = ["parallel.mode=fsdp", "parallel.cpu_offload=true", "ternary.enabled=false"]
    recipe = load_recipe(folder / "odd.yaml", words)
    network = build.build_network(recipe)
    with pytest.raises(UsageError, match="CPU offload needs a GPU"):
        distribute(network, Job(), recipe.train, recipe.parallel)


def set_launcher(patch: pytest.MonkeyPatch, **given: str) -> None:
    """Set torchrun's variables to what is given; the others are not there."""
    for name in (*NEEDED, "LOCAL_WORLD_SIZE"):
        patch.delenv(name, raising=False)
    for name, value in given.items():
        patch.setenv(name, value)


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, WORLD_SIZE="2")
    match = r"without RANK, .*LOCAL_RANK.*torchrun"
    with pytest.raises(EnvironmentProblem, match=match), join_job():
        pass


WHOLE = dict(zip(NEEDED, ("1", "2", "1", "127.0.0.1", "1"), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two; invalid literal"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 with RANK=1"),
        ({"RANK": "2"}, "WORLD_SIZE=2 with RANK=2"),
        ({"RANK": ""}, "WORLD_SIZE=2 without RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"MASTER_PORT": "x"}, "invalid literal"),
    ],
)
def test_a_wrong_environment(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], said: str
) -> None:
    set_launcher(monkeypatch, **WHOLE | changed)
    with pytest.raises(EnvironmentProblem, match=f"cannot join .*got .*{said}"), join_job():
        pass


@pytest.mark.parametrize(
    "given", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "1"}, {"RANK": "1"}, {"RANK": ""}]
)
def test_a_job_of_one(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    set_launcher(monkeypatch, **given)
    with join_job() as job:
        assert (job.rank, job.size, job.is_main) == (0, 1, True)
        assert (job.largest(3.0), job.smallest(3), job.broadcast("x")) == (3.0, 3, "x")
    assert is_main()


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, **WHOLE)
    assert not is_main()
    match = r"could not connect.*2 processes within 1 s"
    with pytest.raises(EnvironmentProblem, match=match), join_job(timeout_seconds=1):
        pass
