"""metrics.jsonl survives kills and resumes; the other logs get the same numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.recipe import Recipe
from terdit_cli.train.loggers import (
    MetricsLog,
    TensorBoardLog,
    logged_seconds,
    open_logs,
    read_metrics,
    scalars,
)

ROOT = Path(__file__).parents[2]


def entry(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "mse": 0.5, "vb": 0.1, "lr": 1e-4}


def test_a_resume_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (5, 10, 15):
        log.append(entry(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 10, 15]
    MetricsLog(tmp_path, 10).append(entry(12))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 12]


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).append(entry(1))
    MetricsLog(tmp_path, 0)
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nothing") == []


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.append(entry(1, math.nan))
    log.append(entry(2, math.inf))
    assert [line["loss"] for line in read_metrics(tmp_path)] == [None, None]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(EnvironmentProblem, match="cannot write") as caught:
        log.append(entry(1))
    assert "metrics.jsonl" in str(caught.value)


ENTRY = {
    "step": 5,
    "loss": 0.5,
    "grad_norm": None,
    "lr": math.inf,
    "loss_by_quarter": {"1": 0.25, "4": None},
    "flipped": {"all": 0.125, "wq": 0.0625},
}


def test_nested_numbers_have_paths_and_others_are_left_out() -> None:
    assert dict(scalars(ENTRY)) == {
        "loss": 0.5, "loss_by_quarter/1": 0.25, "flipped/all": 0.125, "flipped/wq": 0.0625,
    }  # fmt: skip


def recipe(**logging: Any) -> Recipe:
    return Recipe.model_validate({"name": "try", "logging": logging})


def test_metrics_only_unless_more_is_wanted(tmp_path: Path) -> None:
    assert [type(log) for log in open_logs(tmp_path, recipe(), 0)] == [MetricsLog]


def test_tensorboard_shows_the_run_without_the_lost_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps, loss in ((0, (5, 10, 15), 1.0), (10, (15, 20), 0.5)):
        logs = open_logs(tmp_path, recipe(tensorboard=True), start)
        assert [type(log) for log in logs] == [MetricsLog, TensorBoardLog]
        for step in steps:
            for log in logs:
                log.append(ENTRY | {"step": step, "loss": loss})
        for log in logs:
            log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = ["loss", "loss_by_quarter/1", "flipped/all", "flipped/wq"]
    assert sorted(events.Tags()["scalars"]) == sorted(names)
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(5, 1.0), (10, 1.0), (15, 0.5), (20, 0.5)]
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 10, 15, 20]


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = """
import json, sys, time
from pathlib import Path
from terdit_cli.recipe import Recipe
from terdit_cli.train.loggers import open_logs
folder, entry = Path(sys.argv[1]), json.loads(sys.argv[2])
wandb = {"project": "tests", "mode": "offline"}
recipe = Recipe.model_validate({"name": "try", "logging": {"wandb": wandb}})
for start in (0, 5):
    time.sleep(start / 4)  # the name of a run has its second
    logs = open_logs(folder, recipe, start)
    for step in range(start + 1, start + 9):  # the second begins before the first has ended
        logs[-1].append(entry | {"step": step, "loss": start + 0.375})
    for log in logs:
        log.close()
"""
    entry = {key: value for key, value in ENTRY.items() if key != "lr"}
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(entry)], timeout=120,
        env=os.environ | home | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # which is for results
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    written = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert {path.stem for path in files} == {f"run-{written}"}
    first, second = (path.read_bytes() for path in files)
    for text in (b"flipped/wq", b"0.0625", b"loss_by_quarter/1"):
        assert text in first
    assert b"0.375" in first
    assert second.count(b"5.375") >= 8  # none refused for its step


@pytest.mark.parametrize(
    ("module", "logging", "words"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True},
         ("TensorBoard", "logging.tensorboard=false")),
        ("wandb", {"wandb": {"project": "a"}}, ("Weights & Biases", "logging.wandb=null")),
    ],
)  # fmt: skip
def test_a_missing_package_is_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    logging: dict[str, Any],
    words: tuple[str, str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem) as caught:
        open_logs(tmp_path, recipe(**logging), 0)
    assert caught.value.exit_code == 4
    for word in (*words, "pip install 'terdit[logging]'", "is not installed"):
        assert word in str(caught.value)


def test_logged_seconds_are_of_all_sittings() -> None:
    rates = [(10, 64.0), (20, 128.0), (25, 32.0)]
    entries = [{"step": step, "images_per_second": rate} for step, rate in rates]
    assert logged_seconds(entries, 64) == 10 + 5 + 10
    assert logged_seconds([], 64) == 0
