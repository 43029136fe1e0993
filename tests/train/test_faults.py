"""Jobs of several processes in which things go wrong: nothing is lost but steps since the save."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from terdit_cli.commands import export
from terdit_cli.data.loader import BatchLoader
from terdit_cli.diffusion.process import Schedule
from terdit_cli.errors import EnvironmentProblem, GateFailed
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.ternary import GAMMA_EPS, absmean, ternarize
from terdit_cli.recipe import load_recipe
from terdit_cli.system.job import Job, others_alive
from terdit_cli.train import build
from terdit_cli.train.checkpoint import complete_checkpoints, folder_of
from terdit_cli.train.sharded_tensors import flatten
from terdit_cli.train.trainer import Trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")

Train = Callable[..., Any]
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 14, 3
RTOL, ATOL = 1e-6, 1e-7  # of masters, whose sums are rounded otherwise

# The batch divides over 1, 2 and 3 processes. Some gradients are zero but for rounding (those of
# keys' biases and of scales before a norm): Adam's eps keeps it from dividing them by themselves.
WORDS = (
    f"train.steps={STEPS}", "train.global_batch_size=12", "train.micro_batch_size=2",
    "logging.every=1", f"checkpoint.every={EVERY}", "checkpoint.keep_last=3",
    "parallel.mode=fsdp", "parallel.hang_seconds=60", "optim.eps=1e-4",
)  # fmt: skip

# `terdit` with a fault: FAULTS is a list of [rank, step, kind]. Every process writes down the
# samples of its steps, and its exit code.
WORKER = """
import json, os, pathlib, resource, signal, sys, time
from terdit_cli.cli import app
from terdit_cli.diffusion import process
from terdit_cli.train import loop, trainer, watchdog

rank, folder = int(os.environ["RANK"]), pathlib.Path(os.environ["NOTES"])
faults = {(step, kind) for who, step, kind in json.loads(os.environ["FAULTS"]) if who == rank}
watchdog.REPORT_SECONDS = 1.0
(folder / f"pid-{rank}").write_text(str(os.getpid()))
now = [0]
plain_step, plain_losses = trainer.Trainer.train_step, process.Schedule.training_losses


def step(self, images, labels, notices=()):
    now[0] = self.step
    rows = [[int(label), int(image.sum())] for label, image in zip(labels, images, strict=True)]
    with (folder / f"seen-{rank}").open("a") as file:
        print(json.dumps([self.step, rows]), file=file)
    if (self.step, "limit") in faults:
        while not (self.run_folder / "checkpoints/step-00000003/manifest.json").exists():
            time.sleep(0.01)  # for the checkpoint that is to stay
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    for number in ("SIGKILL", "SIGTERM", "SIGSTOP"):
        if (self.step, number) in faults:
            (folder / "fault").touch()
            os.kill(os.getpid(), getattr(signal, number))
    return plain_step(self, images, labels, notices)


def losses(self, *arguments):
    values = plain_losses(self, *arguments)
    spoilt = float("nan") if (now[0], "nan") in faults else 1.0
    return {key: value * spoilt for key, value in values.items()}


class SlowDisk(loop.BatchLoader):
    def iterate(self, start_step=0, end_step=None):
        for number, batch in enumerate(super().iterate(start_step, end_step), start_step):
            if (number, "data") in faults:
                (folder / "fault").touch()
                time.sleep(600)
            yield batch


def leave(code, plain=os._exit):
    (folder / f"exit-{rank}").write_text(str(code))
    plain(code)


os._exit = leave
trainer.Trainer.train_step, process.Schedule.training_losses = step, losses
loop.BatchLoader = SlowDisk


def leave(code, plain=os._exit):
    (folder / f"exit-{rank}").write_text(str(code))
    plain(code)


os._exit = leave
try:
    app.main()
    code = 0
except SystemExit as stop:
    code = stop.code or 0
(folder / f"exit-{rank}").write_text(str(code))
sys.exit(code)
"""


class Torchrun:
    """A running torchrun."""

    def __init__(self, process: subprocess.Popen[str], notes: Path) -> None:
        self.process = process
        self.notes = notes

    def wait_for(self, name: str) -> float:
        """Wait for a note; return the time it was written."""
        end = time.monotonic() + 100
        while not (self.notes / name).exists() and self.process.poll() is None:
            assert time.monotonic() < end, f"no {name}"
            time.sleep(0.01)
        return (self.notes / name).stat().st_mtime

    def end(self) -> str:
        """Wait for the end and return what was written to stderr."""
        _, self.err = self.process.communicate(timeout=100)
        return self.err

    def exits(self, size: int) -> list[int | None]:
        """Return the exit codes of the processes; None for those that were killed."""
        files = [self.notes / f"exit-{rank}" for rank in range(size)]
        return [int(file.read_text()) if file.exists() else None for file in files]

    def seen(self, size: int) -> dict[int, list[list[int]]]:
        """Return the samples of each step, [label, sum of the image], of all processes."""
        steps: dict[int, list[list[int]]] = {}
        for rank in range(size):
            for line in (self.notes / f"seen-{rank}").read_text().splitlines():
                step, rows = json.loads(line)
                steps.setdefault(step, []).extend(rows)
        return {step: sorted(rows) for step, rows in steps.items()}


@pytest.fixture(scope="module")
def job(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return job(size, out, *words, faults=[]): a context in which torchrun runs."""

    @contextmanager
    def run(
        size: int, out: Path, *words: str, faults: tuple[tuple[int, int, str], ...] = ()
    ) -> Iterator[Torchrun]:
        notes = tmp_path_factory.mktemp("notes")
        worker = notes / "worker.py"
        worker.write_text(WORKER)
        line = [sys.executable, ROOT / "tests/torchrun.py", str(size), worker, "train", recipe_path]
        environment = {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NOTES": str(notes),
            "FAULTS": json.dumps(faults),
        }  # fmt: skip
        process = subprocess.Popen(
            [*line, *WORDS, *words, "--out", out],
            cwd=ROOT, env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            yield Torchrun(process, notes)
        finally:
            if process.poll() is None:  # a test has failed
                for note in notes.glob("pid-*"):
                    with suppress(ProcessLookupError):
                        os.kill(int(note.read_text()), signal.SIGKILL)
                process.kill()
                process.communicate()

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """The run folder of one process that nothing stops."""
    folder = tmp_path_factory.mktemp("faultless") / "run"
    train(folder, *WORDS)
    return folder


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def codes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [key.removesuffix(".alphas") for key in weights if key.endswith(".alphas")]
    assert names
    return {name: ternarize(weights[f"{name}.weight"]) for name in names}


def assert_equal_run(folder: Path, whole: Path) -> None:
    """Assert that a run has gone, step by step, as one that nothing stopped.

    Its number of processes may be another, and with it the rounding of sums: a code may differ
    only where the masters' own tolerance reaches over the threshold of half a gamma.
    """
    a, b = load_ckpt(folder / "ckpt.pt"), load_ckpt(whole / "ckpt.pt")
    assert a.info.step == b.info.step == STEPS
    for part, other in ((a.model, b.model), (a.ema, b.ema)):
        torch.testing.assert_close(part, other, rtol=RTOL, atol=ATOL)
        for name, trits in codes(part).items():
            master = other[f"{name}.weight"]
            differ = trits != ternarize(master)
            gamma = absmean(master)
            # The tolerance of a master, and half of gamma's: a mean of such masters.
            reach = RTOL * master.abs() + ATOL + (RTOL * gamma + ATOL) / 2
            from_threshold = (master.abs() - (gamma + GAMMA_EPS) / 2).abs()
            assert (from_threshold[differ] <= reach[differ]).all(), name
            assert differ.float().mean() < 1e-3, name
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-6)


def expected_samples(recipe_path: Path, step: int) -> list[list[int]]:
    """Return what the processes of any job see in a step, together."""
    recipe = load_recipe(recipe_path, WORDS)
    with BatchLoader(build.open_data(recipe), recipe.seed, 12, recipe.data.flip) as loader:
        images, labels = loader.batch(step)
    return sorted([int(y), int(image.sum())] for y, image in zip(labels, images, strict=True))


# A process is killed


@pytest.fixture(scope="module")
def killed(job: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of two processes, one of which was killed at a step; the folder and the step."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    step = random.randrange(3 * EVERY + 1, STEPS)
    with job(2, folder, faults=((1, step, "SIGKILL"),)) as torchrun:
        err = torchrun.end()
        assert torchrun.process.returncode == 1, err
        assert torchrun.exits(2) == [4, None], err
    assert "error: another process of this job has ended: got " in err
    assert "Fix: see its message, then continue with: terdit train" in err
    assert f"--resume auto --out {folder}" in err
    # The save before the kill may not have been done.
    assert list(complete_checkpoints(folder)) in ([6, 3], [9, 6, 3], [12, 9, 6])
    return folder, step


@pytest.mark.slow
def test_resumed_by_one_process(
    tmp_path: Path, killed: tuple[Path, int], train: Train, whole: Path
) -> None:
    shutil.copytree(killed[0], tmp_path / "run")
    train(tmp_path / "run", *WORDS, resume="auto")
    assert_equal_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_resumed_by_two_processes_past_a_corrupted_shard(
    tmp_path: Path, killed: tuple[Path, int], job: Callable[..., Any], whole: Path,
    recipe_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(killed[0], folder)
    newest, resumed = list(complete_checkpoints(folder))[:2]
    shard = folder_of(folder, newest) / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with job(2, folder, "--resume", "auto") as torchrun:
        err = torchrun.end()
        assert torchrun.process.returncode == 0, err
    assert "skipping a damaged checkpoint: not a complete checkpoint: got __1_0.distcp" in err
    assert "is not what the manifest says, expected" in err
    assert f"resuming small after step {resumed}" in err
    assert_equal_run(folder, whole)
    assert torchrun.seen(2) == {s: expected_samples(recipe_path, s) for s in range(resumed, STEPS)}


@pytest.mark.slow
def test_resumed_by_three_processes(
    tmp_path: Path, killed: tuple[Path, int], job: Callable[..., Any], whole: Path,
    recipe_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(killed[0], folder)
    resumed = next(iter(complete_checkpoints(folder)))
    with job(3, folder, "--resume", "auto", "parallel.mode=ddp") as torchrun:
        err = torchrun.end()
        assert torchrun.process.returncode == 0, err
    assert "continuing with changed settings: parallel.mode" in err
    assert_equal_run(folder, whole)
    assert torchrun.seen(3) == {s: expected_samples(recipe_path, s) for s in range(resumed, STEPS)}


@pytest.mark.slow
def test_the_shards_of_two_processes_as_one_file(
    tmp_path: Path, killed: tuple[Path, int], tensors_of: Callable[[Path], dict[str, Tensor]]
) -> None:
    result = export.run(killed[0], tmp_path / "out.pt")
    assert result.step == max(complete_checkpoints(killed[0]))
    assert {"__0_0.distcp", "__1_0.distcp"} < {path.name for path in result.checkpoint.iterdir()}
    exported, stored = load_ckpt(result.out), tensors_of(result.checkpoint)
    for part, weights in (("model", exported.model), ("ema", exported.ema)):
        assert {f"{part}.{name}" for name in weights} == {k for k in stored if k.startswith(part)}
        for name, weight in weights.items():
            assert torch.equal(weight, stored[f"{part}.{name}"]), name


def test_other_errors_are_told_as_they_are() -> None:
    for job, text in ((Job(size=2), "a matrix of another shape"), (Job(), "gloo")):
        with pytest.raises(RuntimeError, match=text) as caught, others_alive(job, "try again"):
            raise RuntimeError(text)
        assert not isinstance(caught.value, EnvironmentProblem)
    match = r"has ended: got broken pipe\. .*then try again"
    with pytest.raises(EnvironmentProblem, match=match), others_alive(Job(size=2), "try again"):
        raise RuntimeError("broken pipe")


# Gradients are not finite


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return spoil(*steps): gives these steps finite losses with gradients that are not numbers."""

    def begin(*steps: int) -> None:
        real = Schedule.training_losses
        calls = itertools.count()

        def spoilt(self: Schedule, *arguments: Any) -> dict[str, Tensor]:
            losses = real(self, *arguments)
            if next(calls) // 6 + 1 in steps:  # micro-batches a step
                losses["loss"] = losses["loss"] + (0 * losses["loss"]).sqrt()
            return losses

        monkeypatch.setattr(Schedule, "training_losses", spoilt)

    return begin


@pytest.mark.slow
def test_steps_without_finite_gradients_are_skipped_and_counted(
    tmp_path: Path, train: Train, spoil: Callable[..., None],
    tensors_of: Callable[[Path], dict[str, Tensor]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    states: list[dict[str, Tensor]] = []  # after each step
    real = Trainer.train_step

    def observed(self: Trainer, *arguments: Any) -> Any:
        result = real(self, *arguments)
        flat = flatten(self.state())
        states.append({k: v.clone() for k, v in flat.items() if isinstance(v, Tensor)})
        return result

    monkeypatch.setattr(Trainer, "train_step", observed)
    spoil(5, 6, 8)
    words = ("train.steps=9", "train.max_skipped=2", "checkpoint.every=1", "checkpoint.keep_last=9")
    train(folder, *WORDS, *words)
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split(":")[1] for line in told] == [f" step {step} skipped" for step in (5, 6, 8)]
    assert all("gradient norm nan" in line and "loss nan" not in line for line in told)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(line)["skipped_steps"] for line in lines]
    assert skipped == [0, 0, 0, 0, 1, 2, 2, 3, 3]
    assert list(complete_checkpoints(folder)) == [9, 7, 4, 3, 2, 1]  # nothing new to save
    saved = tensors_of(folder_of(folder, 4))
    for step in (5, 6):  # nothing has changed
        for key, value in states[step - 1].items():
            assert torch.equal(saved[key], value), (step, key)
    assert not torch.equal(states[6]["model.x_embedder.weight"], saved["model.x_embedder.weight"])


@pytest.mark.parametrize("every", [3, 4])
def test_too_many_in_a_row_stop_the_run(
    tmp_path: Path, train: Train, spoil: Callable[..., None], every: int,
    tensors_of: Callable[[Path], dict[str, Tensor]],
) -> None:  # fmt: skip
    """Their state takes the place of no earlier one, from where a lower rate may help."""
    folder = tmp_path / "run"
    spoil(2, *range(5, 99))
    words = (*WORDS, "train.max_skipped=2", f"checkpoint.every={every}", "checkpoint.keep_last=1")
    with pytest.raises(GateFailed, match="training diverged at step 5: got loss") as caught:
        train(folder, *words)
    assert caught.value.exit_code == 5
    assert "gradient norm nan in step 7, expected finite numbers after at most 2" in str(
        caught.value
    )
    assert list(complete_checkpoints(folder)) == [every]
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder_of(folder, every)).values())
    assert "Fix: try a lower learning rate: terdit train" in str(caught.value)
    [fix] = re.findall(r"Fix: try a lower learning rate: (.*)\.", str(caught.value))
    resumed = [] if every == 4 else ["--resume", str(folder_of(folder, 3))]  # 4 is where it began
    assert shlex.split(fix) == [
        "terdit", "train", str(folder / "recipe.yaml"), *resumed,
        "--out", f"{folder}-lower", "optim.lr=0.001",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_advice_after_a_divergence_works(tmp_path: Path, train: Train) -> None:
    words = (*WORDS, "train.max_skipped=1", "optim.grad_clip=null", "checkpoint.every=1")
    folder = tmp_path / "run"
    train(folder, *words, "train.steps=3")
    with pytest.raises(GateFailed, match="diverged at step") as caught:
        train(folder, *words, "optim.lr=1e30", resume="auto")
    assert f"--resume {folder_of(folder, 3)} --out {folder}-lower" in str(caught.value)
    lower = Path(f"{folder}-lower")
    assert train(lower, *words, "optim.lr=1e-3", resume=str(folder_of(folder, 3))).steps == STEPS


@pytest.mark.parametrize("spoilt", [(8,), (7, 8)])
def test_a_run_must_not_end_in_skipped_steps(
    tmp_path: Path, train: Train, spoil: Callable[..., None], spoilt: tuple[int, ...]
) -> None:
    """Nobody would know whether the weights give anything."""
    spoil(*spoilt)
    with pytest.raises(GateFailed, match=f"diverged at step {spoilt[0]}: .*in the last step"):
        train(tmp_path / "run", *WORDS, "train.steps=8")
    assert not (tmp_path / "run" / "ckpt.pt").exists()


# A process is told to stop


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, job: Callable[..., Any], train: Train
) -> None:
    """While a save is on its way, and after a step that one process has to skip."""
    faults = ((1, 2, "nan"), (1, 5, "SIGTERM"))
    with job(2, tmp_path / "run", "checkpoint.every=1", faults=faults) as torchrun:
        err = torchrun.end()
        assert torchrun.exits(2) == [143, 143], err
    assert err.count("SIGTERM: saving after this step") >= 1
    assert "warning: step 3 skipped: loss" in err
    assert err.count("error: stopped by SIGTERM after step 7, saved.") == 1
    assert "/terdit_cli/" not in " ".join(re.findall(r'File "[^"]+"', err))  # no traceback of ours
    assert next(iter(complete_checkpoints(tmp_path / "run"))) == 7
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 1]
    assert train(tmp_path / "run", *WORDS, "train.steps=8", resume="auto").steps == 8


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all(tmp_path: Path, job: Callable[..., Any]) -> None:
    with job(2, tmp_path / "run", "train.steps=100000") as torchrun:
        torchrun.wait_for("seen-1")
        torchrun.process.send_signal(signal.SIGTERM)
        err = torchrun.end()
        assert torchrun.exits(2) == [143, 143], err
    newest = next(iter(complete_checkpoints(tmp_path / "run")))
    assert err.count(f"error: stopped by SIGTERM after step {newest}, saved.") == 1


# A disk is full


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process(tmp_path: Path, job: Callable[..., Any]) -> None:
    with job(2, tmp_path / "run", faults=((1, 4, "limit"),)) as torchrun:
        err = torchrun.end()
        assert torchrun.exits(2) == [4, 4], err
    folder = tmp_path / "run" / "checkpoints"
    problem = f"error: cannot write: got File too large ({folder / 'step-00000006'}). Fix: free"
    assert err.count(problem) == 1, err
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


# A process hangs


@pytest.mark.slow
def test_processes_that_hang_are_named(tmp_path: Path, job: Callable[..., Any]) -> None:
    """One is suspended, one waits for its data."""
    faults = ((1, 5, "SIGSTOP"), (2, 5, "data"))
    with job(3, tmp_path / "run", "parallel.hang_seconds=3", faults=faults) as torchrun:
        torchrun.wait_for("exit-0")
        os.kill(int((torchrun.notes / "pid-1").read_text()), signal.SIGKILL)  # as torchrun, later
        err = torchrun.end()
    assert torchrun.exits(3) == [4, None, 4]
    assert "error: training hangs: got no step for 3 s; no report from rank 1; " in err
    assert "rank 2 at timed (run_metrics.py:" in err
    assert re.search(r"rank 0 at \w+ \(\w+.py:\d+\), in \w+", err), err
    assert "Fix: look at that process and its machine, then continue with: terdit train" in err
