"""The demo from end to end, on a network small enough to take seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from terdit_cli.lab import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_runs_again_over_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SCORED", 4)
    monkeypatch.setattr(demo, "SAMPLING", replace(demo.SAMPLING, steps=2))
    overrides = [
        "model.size=nano", "model.n_layers=1", "train.steps=2", "train.global_batch_size=4",
        "train.micro_batch_size=4", "logging.every=1", "sample.count=2", "sample.steps=2",
    ]  # fmt: skip
    folder = tmp_path / "demo"
    for _ in range(2):
        demo.run(ROOT / "recipes" / "quickstart.yaml", folder, overrides)
        table = capsys.readouterr().out
        for part in (
            "parameters", "% zeros", "bits per ternary weight", "loss, first -> last",
            "fd-efficientnet-lite0, 4 images: uniform noise", "held-out real images",
        ):  # fmt: skip
            assert part in table, part
        for name in ("grid.png", "model.tdt", "small.tdt", "run/loss.png", "run/ckpt.pt"):
            assert (folder / name).stat().st_size > 0
