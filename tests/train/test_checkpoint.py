"""Saving: whole or not at all, the newest few are kept, a disk that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.train.checkpoint import (
    Saved,
    check_checkpoint,
    latest_checkpoint,
    load_state,
    save_checkpoint,
)

Train = Callable[..., Any]
ROOT = Path(__file__).parents[2]
STATE = {"model": {"w": torch.arange(5.0)}, "ema": {"w": torch.ones(3)}, "optimizer": {"lr": 0.1}}


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_round_trip(tmp_path: Path, recipe: Recipe) -> None:
    saved = save_checkpoint(tmp_path, 7, STATE, recipe, 2)
    assert saved == Saved(tmp_path / "checkpoints" / "step-00000007", 7)
    assert latest_checkpoint(tmp_path) == saved == check_checkpoint(saved.path)
    state = load_state(saved)
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert state["optimizer"] == {"lr": 0.1}
    assert load_recipe(saved.path / "recipe.yaml") == recipe


def test_the_newest_few_are_kept_and_later_leftovers_go(tmp_path: Path, recipe: Recipe) -> None:
    for step in (1, 2, 10, 9_999_999, 123_456_789):
        save_checkpoint(tmp_path, step, STATE, recipe, 3)
    assert names(tmp_path) == ["step-00000010", "step-09999999", "step-123456789"]
    assert latest_checkpoint(tmp_path) == check_checkpoint(
        tmp_path / "checkpoints" / "step-123456789"
    )
    save_checkpoint(tmp_path, 11, STATE, recipe, 1)  # a continuation from step 10
    assert names(tmp_path) == ["step-00000011"]


def test_a_new_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_state_without_a_part(tmp_path: Path, recipe: Recipe) -> None:
    saved = save_checkpoint(tmp_path, 1, {"model": {}, "optimizer": {}}, recipe, 1)
    with pytest.raises(InputFileError, match="no ema") as caught:
        load_state(saved)
    assert str(saved.path) in str(caught.value)


def test_a_failing_sync_leaves_the_checkpoint_before(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, STATE, recipe, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
        save_checkpoint(tmp_path, 2, STATE, recipe, 1)
    assert "step-00000002" in str(caught.value)
    assert "Fix: free disk space" in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == Saved(tmp_path / "checkpoints" / "step-00000001", 1)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["terdit", "train", *sys.argv[2:]]
from terdit_cli.app import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits differ elsewhere")
@pytest.mark.parametrize("part", ["state", "ckpt"])
def test_a_disk_that_fills_up_during_the_save(
    tmp_path: Path, recipe_path: Path, whole_run: Path, train: Train, part: str
) -> None:
    """The limit is hit in the midst of torch's own writing, where errors change their type."""
    folder = tmp_path / "run"
    train(folder, "train.steps=10", "train.global_batch_size=8")
    (folder / "ckpt.pt").unlink()
    whole = (whole_run / "checkpoints" / "step-00000040" / "state.pt").stat().st_size
    limit = whole // 2 if part == "state" else (whole_run / "ckpt.pt").stat().st_size - 1000
    steps = 12 if part == "state" else 10
    words = [recipe_path, f"train.steps={steps}", "--resume", "auto", "--out", folder]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: cannot write: got File too large")
    assert ("step-00000012" if part == "state" else "ckpt.pt") in error
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
