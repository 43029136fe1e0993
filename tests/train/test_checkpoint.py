"""Saving: whole or not at all, which checkpoints are kept, a disk that refuses, hostile folders."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.recipe import load_recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build, checkpoint
from terdit_cli.train import sharded_tensors as shards
from terdit_cli.train.checkpoint import (
    CheckpointWriter,
    Saved,
    check_checkpoint,
    complete_checkpoints,
    latest_checkpoint,
    load_state,
    read_manifest,
)

Train = Callable[..., Any]
ROOT = Path(__file__).parents[2]
ALONE = Job()


def make_state() -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(5.0)},
        "ema": {"w": torch.ones(3)},
        "optimizer": {"state": {"w": {"exp_avg": torch.zeros(5)}}, "param_groups": []},
    }


@pytest.fixture
def writer(recipe_path: Path) -> Callable[..., CheckpointWriter]:
    """Return writer(folder, *overrides): of a process on its own."""

    def make(folder: Path, *overrides: str) -> CheckpointWriter:
        recipe = load_recipe(recipe_path, overrides)
        info = build.model_info(recipe, [str(i) for i in range(10)], 0)
        return CheckpointWriter(folder, recipe, info, ALONE)

    return make


@pytest.fixture
def save(writer: Callable[..., CheckpointWriter]) -> Callable[..., Saved]:
    """Return save(folder, step, *overrides): a complete checkpoint, checked."""

    def run(folder: Path, step: int, *overrides: str) -> Saved:
        saver = writer(folder, *overrides)
        path = saver.save(step, make_state())
        saver.wait()
        return check_checkpoint(path, ALONE)

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_round_trip(tmp_path: Path, recipe_path: Path, save: Callable[..., Saved]) -> None:
    saved = save(tmp_path, 7)
    assert saved.path == tmp_path / "checkpoints" / "step-00000007"
    assert saved.step == saved.info["step"] == 7
    assert names(tmp_path) == ["step-00000007"]
    files = {".metadata", "__0_0.distcp", "recipe.yaml"}
    assert set(saved.files) == files
    assert {path.name for path in saved.path.iterdir()} == files | {"manifest.json"}
    assert latest_checkpoint(tmp_path, ALONE) == saved
    assert load_recipe(saved.path / "recipe.yaml") == load_recipe(recipe_path)
    state = {"model": {"w": torch.empty(5)}, "optimizer": {"state": {"w": {}}}}
    assert load_state(saved, state) is state
    assert torch.equal(state["model"]["w"], torch.arange(5.0))


def test_what_is_saved_is_the_state_when_save_was_called(
    tmp_path: Path, writer: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = threading.Event()
    write = shards.ShardWriter.write_data

    def late(self: shards.ShardWriter, *args: Any) -> Any:
        assert changed.wait(60)
        return write(self, *args)

    monkeypatch.setattr(shards.ShardWriter, "write_data", late)
    saver, state = writer(tmp_path), make_state()
    path = saver.save(1, state)
    state["model"]["w"].fill_(-1)
    assert not path.exists()
    changed.set()
    saver.wait()
    loaded = load_state(read_manifest(path), make_state())
    assert torch.equal(loaded["model"]["w"], torch.arange(5.0))


def test_the_newest_few_are_kept_and_later_leftovers_go(
    tmp_path: Path, save: Callable[..., Saved]
) -> None:
    for step in (1, 2, 10, 9_999_999, 123_456_789):
        saved = save(tmp_path, step, "checkpoint.keep_last=3")
    assert names(tmp_path) == ["step-00000010", "step-09999999", "step-123456789"]
    assert latest_checkpoint(tmp_path, ALONE) == saved
    save(tmp_path, 11, "checkpoint.keep_last=1")  # a continuation from step 10
    assert names(tmp_path) == ["step-00000011"]


def test_one_of_every_few_hours_is_kept(
    tmp_path: Path, save: Callable[..., Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = 3600.0
    clock = [1000 * hours]
    monkeypatch.setattr(checkpoint.time, "time", lambda: clock[0])
    words = ("checkpoint.keep_last=2", "checkpoint.keep_every_hours=3")
    for step in range(1, 12):
        save(tmp_path, step, *words)
        clock[0] += hours
    # The first, then each three hours younger, and the newest two.
    assert list(complete_checkpoints(tmp_path)) == [11, 10, 7, 4, 1]


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, ALONE) is None
    assert latest_checkpoint(tmp_path / "nothing", ALONE) is None


@pytest.mark.parametrize(
    ("name", "wanted", "got"),
    [("w2", torch.empty(5), "got nothing"), ("w", torch.empty(6), r"got shape \[5\]")],
)
def test_a_state_that_the_checkpoint_does_not_hold(
    tmp_path: Path, save: Callable[..., Saved], name: str, wanted: torch.Tensor, got: str
) -> None:
    saved = save(tmp_path, 1)
    with pytest.raises(InputFileError, match=f"lacks a tensor: {got}") as caught:
        load_state(saved, {"model": {name: wanted}})
    assert f"model.{name} of shape {list(wanted.shape)}" in str(caught.value)
    assert str(saved.path) in str(caught.value)
    assert "Fix: use the recipe it was trained with" in str(caught.value)


# A disk that refuses


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_failing_sync_leaves_the_checkpoint_before(
    tmp_path: Path, writer: Callable[..., CheckpointWriter], save: Callable[..., Saved],
    monkeypatch: pytest.MonkeyPatch, after: int,
) -> None:  # fmt: skip
    """The shard's, the metadata's, the recipe's or the manifest's."""
    before = save(tmp_path, 1, "checkpoint.keep_last=1")
    sync, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    saver = writer(tmp_path, "checkpoint.keep_last=1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        path = saver.save(2, make_state())  # does not fail: the disk is asked later
        with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
            saver.wait()
    assert str(path) in str(caught.value)
    assert "Fix: free disk space" in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert latest_checkpoint(tmp_path, ALONE) == before
    saver.wait()  # told once
    saver.save(2, make_state())
    saver.wait()
    assert names(tmp_path) == ["step-00000002"]


def test_a_failed_save_is_told_at_the_next(
    tmp_path: Path, writer: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "fingerprint", None)
        patch.setattr(checkpoint, "fingerprint", None)  # a bug
        saver.save(1, make_state())
        with pytest.raises(EnvironmentProblem, match="'NoneType' object is not callable"):
            saver.save(2, make_state())
    assert not saver.failed
    assert names(tmp_path) == []


def test_shards_that_never_arrive(
    tmp_path: Path, writer: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run folder of another machine is another folder: its shards are not here."""
    finish = shards.ShardWriter.finish

    def elsewhere(self: shards.ShardWriter, **values: Any) -> None:
        (Path(self.path) / "__0_0.distcp").unlink()
        finish(self, **values)

    monkeypatch.setattr(shards.ShardWriter, "finish", elsewhere)
    saver = writer(tmp_path)
    saver.save(1, make_state())
    with pytest.raises(
        EnvironmentProblem, match=r"in different places: got no __0_0\.distcp"
    ) as caught:
        saver.wait()
    assert "expected a run folder that all machines share" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "Fix: give a folder on shared storage with --out" in str(caught.value)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["terdit", "train", *sys.argv[2:]]
from terdit_cli.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file size limits differ elsewhere")
@pytest.mark.parametrize("part", ["shards", "ckpt"])
def test_a_disk_that_fills_up_during_the_save(
    tmp_path: Path, recipe_path: Path, whole_run: Path, train: Train, part: str
) -> None:
    """The limit is hit in the midst of torch's own writing, where errors change their type."""
    folder = tmp_path / "run"
    train(folder, "train.steps=10")
    (folder / "ckpt.pt").unlink()
    shard = whole_run / "checkpoints" / "step-00000040" / "__0_0.distcp"
    ckpt = whole_run / "ckpt.pt"
    limit = (shard.stat().st_size if part == "shards" else ckpt.stat().st_size) // 2
    words = [recipe_path, f"train.steps={12 if part == 'shards' else 10}"]
    words += ["--resume", "auto", "--out", folder]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write: got File too large")
    assert ("step-00000012" if part == "shards" else "ckpt.pt") in error
    assert "Fix: free disk space" in error
    assert names(folder) == ["step-00000010"]
    assert not (folder / "ckpt.pt").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert train(folder, "train.steps=12", resume="auto").steps == 12


@pytest.mark.parametrize("where", ["file", "file/below", "file/a/b"])
def test_a_file_where_the_run_folder_should_be(tmp_path: Path, train: Train, where: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(EnvironmentProblem, match="a file where a folder is needed") as caught:
        train(tmp_path / where)
    assert str(tmp_path / where) in str(caught.value)
    assert "Fix: name a folder you can write to" in str(caught.value)
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Folders that others have made or changed


@pytest.mark.parametrize(
    "name",
    ["../recipe.yaml", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 200, "a\nb"],
)
def test_a_hostile_file_name_in_the_manifest(
    tmp_path: Path, save: Callable[..., Saved], name: str
) -> None:
    saved = save(tmp_path, 1)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputFileError, match="not a complete checkpoint: got ValueError: a file"):
        check_checkpoint(saved.path, ALONE)
    assert latest_checkpoint(tmp_path, ALONE) is None


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_no_shard(tmp_path: Path, save: Callable[..., Saved], kind: str) -> None:
    saved = save(tmp_path, 1)
    shard = saved.path / "__0_0.distcp"
    shard.unlink()
    shard.mkdir() if kind == "folder" else os.mkfifo(shard)
    with pytest.raises(InputFileError, match=r"__0_0\.distcp is not what the manifest says"):
        check_checkpoint(saved.path, ALONE)


def test_folders_of_other_names_are_not_checkpoints(
    tmp_path: Path, save: Callable[..., Saved]
) -> None:
    saved = save(tmp_path, 3)
    for name in ("step-4", "step-old", "step-000000005", "step-00000006x"):
        saved.path.with_name(name).mkdir()
        (saved.path.with_name(name) / "manifest.json").write_text("{}")
    assert complete_checkpoints(tmp_path) == {3: saved.path}
    assert latest_checkpoint(tmp_path, ALONE) == saved
