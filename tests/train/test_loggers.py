"""metrics.jsonl survives kills and resumes; the other logs get the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.train.loggers import MetricsLog, read_metrics


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
