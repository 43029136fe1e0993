"""A run that is stopped at any moment and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.system.job import Job
from terdit_cli.train.run_lock import locked_run

ROOT = Path(__file__).parents[2]
Train = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MEASURED = {"images_per_second", "data_wait", "memory_bytes"}


def without_measured(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in entries]


def options_of(recipe: str) -> list[str]:
    """Return what a shipped recipe says of the optimizer and of the ternary layers."""
    values = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    words = [
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section in ("optim", "ternary")
        for key, value in values.get(section, {}).items()
    ]
    return [*words, "optim.warmup_steps=5"]


@pytest.mark.slow
@pytest.mark.parametrize("shipped", [None, "quickstart", "fashion-mnist", "600m"])
def test_twenty_and_twenty_steps_are_forty(
    shipped: str | None, tmp_path: Path, train: Train, whole_run: Path,
    assert_same_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from terdit_cli.train.trainer import Trainer

    class Stop(Exception):
        pass

    words = options_of(shipped) if shipped else []
    step = Trainer.train_step

    def stop_at_27(self: Trainer, *batch: Any) -> Any:
        if self.step == 27:
            self.checkpoints.wait()  # the one of step 20 is written by now
            raise Stop
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at_27)
        with pytest.raises(Stop):
            train(tmp_path / "run", *words)
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [5, 10, 15, 20, 25]
    torch.manual_seed(123)  # whatever this process drew before does not matter
    train(tmp_path / "run", *words, resume="auto")
    assert "resuming small after step 20" in capsys.readouterr().err
    if words:
        whole_run = tmp_path / "whole"
        train(whole_run, *words)
    assert_same_run(tmp_path / "run", whole_run)
    # The lost continuation's lines 25 are not there twice, and the numbers are the same.
    assert without_measured(logged(tmp_path / "run")) == without_measured(logged(whole_run))


def test_a_finished_run_resumed_stays_the_same(
    tmp_path: Path, train: Train, whole_run: Path, assert_same_run: Callable[..., None]
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    manifest = tmp_path / "run" / "checkpoints" / "step-00000040" / "manifest.json"
    before = manifest.stat().st_ino
    train(tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", whole_run)
    assert manifest.stat().st_ino == before  # it was never away


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_says_how_to_continue(
    tmp_path: Path, start: Start, wait_for: Callable[..., None], train: Train, whole_run: Path,
    assert_same_run: Callable[..., None], number: signal.Signals, code: int,
) -> None:  # fmt: skip
    folder = tmp_path / "run folder"
    process = start(folder, "logging.every=1", "checkpoint.every=1000")
    metrics = folder / "metrics.jsonl"
    at = random.randrange(1, 10)
    wait_for(process, lambda: metrics.exists() and len(logged_lines(metrics)) >= at)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    assert f"stopped by {number.name} after step" in err
    assert f"--resume auto --out '{folder}'" in err
    assert "Traceback" not in err
    saved = sorted((folder / "checkpoints").iterdir())
    assert len(saved) == 1
    assert f"after step {int(saved[0].name[5:])}," in err
    train(folder, resume="auto")
    assert_same_run(folder, whole_run)


def logged_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.slow
def test_five_kills_at_random_moments(
    tmp_path: Path, start: Start, wait_for: Callable[..., None], train: Train, whole_run: Path,
    assert_same_run: Callable[..., None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    words = ("--resume", "auto", "logging.every=1", "checkpoint.every=2")
    checkpoints = folder / "checkpoints"
    killed_at = []
    for attempt in range(5):
        process = start(folder, *words)
        before = newest(checkpoints)
        # From the second on: at a random moment after its first step or save.
        wait_for(process, lambda known=before: newest(checkpoints) > known)
        time.sleep(random.uniform(0, 0.06))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"attempt {attempt} had already ended"
        killed_at.append(newest(checkpoints))
    assert killed_at == sorted(killed_at)
    train(folder, "checkpoint.every=10", resume="auto")
    assert_same_run(folder, whole_run)
    assert [e["step"] for e in logged(folder)] == [*range(1, killed_at[-1] + 1), *range(
        -(-(killed_at[-1] + 1) // 5) * 5, 41, 5
    )]  # fmt: skip
    assert not list((folder / "checkpoints").glob(".*")) or "incomplete" in capsys.readouterr().err


def newest(checkpoints: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 for none."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


@pytest.mark.slow
def test_incomplete_and_damaged_checkpoints_are_named_and_skipped(
    tmp_path: Path, train: Train, whole_run: Path, assert_same_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    saved = folder / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000030", "step-00000040"]
    shard = saved / "step-00000040" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(saved / "step-00000030", saved / ".step-00000035.tmp")
    shutil.copytree(saved / "step-00000030", saved / "step-00000036")
    (saved / "step-00000036" / "manifest.json").unlink()
    shutil.copytree(saved / "step-00000030", saved / "step-old")
    train(folder, resume="auto")
    err = capsys.readouterr().err
    assert f"incomplete checkpoint: {saved / '.step-00000035.tmp'}" in err
    assert f"incomplete checkpoint: {saved / 'step-00000036'}" in err
    assert "__0_0.distcp is not what the manifest says" in err
    assert str(saved / "step-00000040") in err
    assert "resuming small after step 30" in err
    assert_same_run(folder, whole_run)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, train: Train) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # the second time the first one has let go
        with locked_run(folder, Job()):
            for resume in (None, "auto"):
                with pytest.raises(UsageError, match="another process trains in this run folder"):
                    train(folder, resume=resume)
        assert not folder.exists()  # nothing was made in it
    train(folder, "train.steps=2")


def test_a_run_folder_is_no_checkpoint(tmp_path: Path, train: Train, whole_run: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"not a run folder.*Fix: --resume auto --out {whole_run}"
    ):
        train(tmp_path / "run", resume=str(whole_run))


def test_nothing_to_continue_from_is_no_new_run(
    tmp_path: Path, train: Train, whole_run: Path
) -> None:
    """What is there, a finished model or checkpoints that may be mended, would be lost."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    shards = list((folder / "checkpoints").glob("*/__0_0.distcp"))
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "ckpt.pt").unlink()
    with pytest.raises(InputFileError, match=r"got only damaged ones \(.*run\)\. Fix: restore one"):
        train(folder, resume="auto")
    assert all(shard.exists() for shard in shards)
    shutil.rmtree(folder / "checkpoints")
    shutil.copy(whole_run / "ckpt.pt", folder)
    with pytest.raises(InputFileError, match="got a finished run without checkpoints"):
        train(folder, resume="auto")
    assert (folder / "ckpt.pt").read_bytes() == (whole_run / "ckpt.pt").read_bytes()


@pytest.mark.parametrize("damage", ["manifest.json", "__0_0.distcp", ".metadata", "recipe.yaml"])
def test_a_damaged_checkpoint_named_by_the_user_is_refused(
    tmp_path: Path, train: Train, whole_run: Path, damage: str
) -> None:
    folder = tmp_path / "step-00000040"
    shutil.copytree(whole_run / "checkpoints" / "step-00000040", folder)
    data = bytearray((folder / damage).read_bytes())
    data[len(data) // 2] ^= 1 if damage != "manifest.json" else 0x80
    (folder / damage).write_bytes(data)
    with pytest.raises(InputFileError, match="not a complete checkpoint") as caught:
        train(tmp_path / "run", resume=str(folder))
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_manifest_of_nonsense_is_refused(tmp_path: Path, train: Train) -> None:
    for text in (
        "[]", "null", '{"step": "x", "files": {}}', '{"step": 1, "files": 3}', "{" * 99,
        '{"step": 1, "saved_at": 0, "info": {}, "files": {}}', "[" * 100_000,
    ):  # fmt: skip
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputFileError, match="not a complete checkpoint"):
            train(tmp_path / "run", resume=str(tmp_path))


def test_resume_from_a_named_checkpoint_into_a_new_folder(
    tmp_path: Path, train: Train, whole_run: Path, assert_same_run: Callable[..., None]
) -> None:
    checkpoint = whole_run / "checkpoints" / "step-00000030"
    train(tmp_path / "run", resume=str(checkpoint))
    assert_same_run(tmp_path / "run", whole_run)


def test_an_old_checkpoint_does_not_continue_below_newer_ones(
    train: Train, whole_run: Path
) -> None:
    with pytest.raises(UsageError, match="later checkpoint") as caught:
        train(whole_run, resume=str(whole_run / "checkpoints" / "step-00000030"))
    assert "step-00000040" in str(caught.value)
    assert "--out" in str(caught.value)


def test_a_checkpoint_does_not_continue_in_the_folder_of_another_run(
    tmp_path: Path, train: Train, whole_run: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "other")
    checkpoint = tmp_path / "other" / "checkpoints" / "step-00000040"
    with pytest.raises(UsageError, match="another run") as caught:
        train(whole_run, resume=str(checkpoint))
    assert f"got {whole_run / 'checkpoints' / 'step-00000040'}" in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert "a new folder with --out" in str(caught.value)


def test_a_used_folder_needs_resume(train: Train, whole_run: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already holds a run") as caught:
        train(whole_run)
    assert str(whole_run) in str(caught.value)
    assert "--resume auto" in str(caught.value)
    assert (whole_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "word",
    ["model.n_layers=3", "ternary.scale=absmean", "ternary.activations=int8", "optim.kind=muon"],
)
def test_another_network_is_refused(train: Train, whole_run: Path, word: str) -> None:
    with pytest.raises(UsageError, match="another network") as caught:
        train(whole_run, word, resume="auto")
    assert word.split("=")[0] in str(caught.value)


def test_a_checkpoint_beyond_the_last_step_is_refused(train: Train, whole_run: Path) -> None:
    with pytest.raises(UsageError, match="got step 40") as caught:
        train(whole_run, "train.steps=39", resume="auto")
    assert "train.steps = 39" in str(caught.value)


def test_other_changes_are_named(
    tmp_path: Path, train: Train, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    result = train(tmp_path / "run", "train.steps=42", "seed=4", "data.flip=no", resume="auto")
    assert result.steps == 42
    assert "changed settings: seed, data.flip, train.steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_changed_options_of_the_optimizer_count(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Although the saved state has options too."""
    from terdit_cli.train.trainer import Trainer

    groups: list[list[dict[str, Any]]] = []
    step = Trainer.train_step

    def noting(self: Trainer, *batch: Any) -> Any:
        result = step(self, *batch)
        groups.append([dict(group) for group in self.optimizer.param_groups])
        return result

    monkeypatch.setattr(Trainer, "train_step", noting)
    words = (
        f"optim.kind={kind}",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
    )
    train(tmp_path / "run", *words, "train.steps=1")
    words += ("optim.weight_decay=0.25", "optim.betas=[0.8, 0.9]", "optim.alpha_lr_ratio=0.5")
    train(tmp_path / "run", *words, "train.steps=2", resume="auto")
    before, after = groups
    decays = [[group["weight_decay"] for group in groups] for groups in (before, after)]
    assert decays[1] == [0.25 if decay else 0.0 for decay in decays[0]]
    assert decays[1] != decays[0]
    assert {group["lr"] for group in before} == {1e-3}
    assert {group["betas"] for group in after if "betas" in group} == {(0.8, 0.9)}
    assert [group["lr"] for group in after] == [1e-3] * (len(after) - 1) + [5e-4]


def test_full_precision_does_not_care_how_ternary_would_be(tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    train(run, "ternary.enabled=false", "train.steps=1")
    words = ("ternary.enabled=false", "ternary.granularity=row", "train.steps=2")
    assert train(run, *words, resume="auto").steps == 2
    with pytest.raises(UsageError, match=r"different ternary\.adaln_norm"):
        train(run, *words, "ternary.adaln_norm=true", resume="auto")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_under_a_schedule_that_ends(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    words = (f"optim.schedule={schedule}", "checkpoint.every=2")
    train(tmp_path / "run", *words, "train.steps=2")
    capsys.readouterr()
    train(tmp_path / "run", *words, "train.steps=4", resume="auto")
    told = capsys.readouterr().err
    stretched = "the schedule is stretched from 2 to 4 steps" in told
    assert stretched == (schedule == "cosine")
