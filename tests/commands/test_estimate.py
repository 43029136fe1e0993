"""Hours of sampling are announced before they begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from terdit_cli.generate import estimate
from terdit_cli.generate.estimate import LONG, long_sampling
from terdit_cli.model.dit import build_config
from terdit_cli.model.layout import forward_flops, training_flops

CPU = torch.device("cpu")
Terdit = Callable[..., Any]


def test_the_operations_of_a_forward() -> None:
    """Of the 4.2b model at 256 pixels: 2 for each of its per-token weights and token, mostly."""
    config = build_config("4.2b", num_classes=1000)
    assert training_flops(config) == 3 * forward_flops(config)
    wide = replace(config, input_size=4 * config.input_size)
    assert forward_flops(wide) > 16 * forward_flops(config)  # attention grows faster than tokens


@pytest.mark.parametrize(("rate", "hours"), [(1e12, None), (1e11, None), (1e10, 2.5)])
def test_long_and_short_work(
    monkeypatch: pytest.MonkeyPatch, rate: float, hours: float | None
) -> None:
    monkeypatch.setattr(estimate, "_rate", lambda device: rate)
    config = build_config("base", num_classes=10)
    forwards = int(9e13 / forward_flops(config))
    found = long_sampling(config, forwards, CPU)
    assert found == (None if hours is None else pytest.approx(3600 * hours, rel=1e-3))
    assert found is None or found > LONG


def test_little_work_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> float:
        raise AssertionError

    monkeypatch.setattr(estimate, "_rate", fail)
    assert long_sampling(build_config("nano", num_classes=10), 10_000, CPU) is None


def test_the_rate_is_that_of_this_machine() -> None:
    assert 1e8 < estimate._rate(CPU) < 1e14


def test_the_command_says_so_and_goes_on(
    terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sample", "--model", "fashion-mnist", "--prompt-class", "1", "--steps", "2")
    done = terdit(*words, "-o", tmp_path / "quick.png")
    assert (done.code, "warning" in done.err) == (0, False)
    monkeypatch.setattr(estimate, "_SLOWEST", 1.0)
    monkeypatch.setattr(estimate, "_rate", lambda device: 1e4)
    done = terdit(*words, "-o", tmp_path / "slow.png")
    assert done.code == 0
    (line,) = (line for line in done.err.splitlines() if line.startswith("warning: "))
    assert line.startswith("warning: this will take about ")
    assert "h " in line
    assert (tmp_path / "slow.png").exists()
