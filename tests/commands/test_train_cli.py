"""`terdit train` without training: --dry-run; `plot`, `export`; and what they refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
PLANNED = [path for path in SHIPPED if "# Plan: terdit train " in path.read_text(encoding="utf-8")]
UNITS = {"MB": 1e6, "GB": 1e9}
Terdit = Callable[..., Any]


@pytest.mark.slow
def test_the_plan_as_a_table(terdit: Terdit, small_recipe: Path) -> None:
    words = ("train.precision=bf16", "--gpus", "2", "--gpu-memory", "h100", "--mfu", "0.5")
    done = terdit("train", small_recipe, "train.global_batch_size=16", *words, "--dry-run")
    assert done.code == 0, done.err
    for line in (
        r"small: plan for 2 processes, ddp",
        r"parameters +56,658",
        r"ternary +[\d,]+ \(\d\d\.\d{3} %\)",
        r"weights, fp32 +226\.6 kB",
        r"optimizer, Adam state, fp32 +453\.3 kB",
        r"EMA, fp32 +226\.6 kB",
        r"activations, 8 images, bf16 +\d+\.\d .B",
        r"with activation checkpointing \(not enabled\) +\d+\.\d .B",
        r"total memory per process +\d+\.\d .B",
        r"largest micro-batch that fits 80\.0 GB +8 images",
        r"operations per step +0\.\d\d TFLOP",
        r"2 x 989 TFLOP/s at 50% MFU +0\.0 days",
    ):
        assert re.search(line, done.out), line


@pytest.mark.slow
def test_a_gpu_that_is_too_small(terdit: Terdit, small_recipe: Path) -> None:
    words = ("train.global_batch_size=1", "train.micro_batch_size=1", "--gpu-memory", "1MB")
    done = terdit("train", small_recipe, "--dry-run", *words)
    assert "none: use more GPUs or activation checkpointing" in done.out
    plan = json.loads(terdit("train", small_recipe, "--dry-run", "--json", *words).out)
    assert (plan["gpus"], plan["parameters"]) == (1, 56_658)
    assert (plan["largest_micro_batch"], plan["gpu_bytes"], plan["days"]) == (0, 10**6, None)


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_recipes_say_what_the_planner_says(terdit: Terdit, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    command, said = re.search(r"# Plan: terdit (train .*)\n# +(.*)\n", text).groups()  # type: ignore[union-attr]
    _, recipe, *options = command.split()
    assert ROOT / recipe == path
    done = terdit("train", path, *options, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    number, unit = re.search(r"([\d.]+) ([MG]B)(?: of each| of memory)", said).groups()  # type: ignore[union-attr]
    assert plan["total_bytes"] == pytest.approx(float(number) * UNITS[unit], rel=0.01, abs=5e7)
    if plan["gpu_bytes"] is not None:
        gpus, images, days = (
            float(re.search(rf"([\d.]+) {word}", said)[1])  # type: ignore[index]
            for word in ("GPUs of 80 GB", "images at once", "days at 40 % MFU")
        )
        assert (plan["gpus"], plan["gpu_bytes"]) == (gpus, 80e9)
        assert images <= plan["largest_micro_batch"]
        assert plan["grad_accum_steps"] == plan["images"] / plan["steps"] / gpus / images
        assert plan["days"] == pytest.approx(days, abs=0.05)


def test_the_large_recipes_have_plans() -> None:
    names = {path.stem for path in PLANNED}
    assert {"600m", "4.2b", "4.2b-512", "quickstart", "cifar10", "fashion-mnist"} <= names


@pytest.mark.slow
def test_plot(terdit: Terdit, small_run: Path, parent_run: Path, tmp_path: Path,
              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = terdit("plot", small_run, parent_run)
    assert (done.code, done.out) == (0, "curves.png: curves of 2 runs\n")
    with Image.open("curves.png") as picture:
        assert picture.format == "PNG"
    done = terdit("plot", small_run, "-o", tmp_path / "one.html", "--json")
    assert json.loads(done.out) == {"runs": [str(small_run)], "out": str(tmp_path / "one.html")}
    assert "<svg" in (tmp_path / "one.html").read_text(encoding="utf-8")
    assert terdit("plot", small_run).out == "curves.png: curves of 1 run\n"


def test_export(terdit: Terdit, small_run: Path, tmp_path: Path) -> None:
    checkpoint = small_run / "checkpoints" / "step-00000030"
    for source in (small_run, checkpoint):
        out = tmp_path / source.name / "model.pt"
        done = terdit("export", source, "-o", out)
        assert (done.code, done.out) == (0, f"{out}: step 30, from {checkpoint}\n"), done.err
        values = torch.load(out, weights_only=True)
        expected = torch.load(small_run / "ckpt.pt", weights_only=True)
        assert values.keys() == expected.keys()
    done = terdit("export", checkpoint, "--json", "--out", tmp_path / "other.pt")
    assert json.loads(done.out) == {
        "checkpoint": str(checkpoint), "out": str(tmp_path / "other.pt"), "step": 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["--plot"], "terdit train has no --plot", "use terdit plot RUN"),
        (["--export"], "terdit train has no --export", "use terdit export RUN"),
        (["--gpus", "8"], "--gpus would have no effect here", "leave --gpus out"),
        (["--gpu-memory", "h100"], "it is for a --dry-run", "leave --gpu-memory out"),
        (["--mfu", "0.4"], "it is for a --dry-run", "leave --mfu out"),
        (["--dry-run", "--resume", "auto"], "it is for training", "leave --resume out"),
        (["--dry-run", "-o", "runs/a"], "it is for training", "leave --out out"),
        (["--dry-run", "--gpu-memory", "big"], "got 'big', expected a size such as 80GB", ""),
        (["--dry-run", "--gpu-memory", "h10"], "did you mean 'h100'?", ""),
        (["--dry-run", "--gpu-memory", "h100", "--mfu", "40"], "got --mfu 40.0", "for 0.4"),
        (["--dry-run", "--mfu", "0.4"], "peak is unknown", "--gpu-memory h100"),
        (["--dry-run", "--gpus", "3"], "cannot be divided among", "train.global_batch_size=24"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    refused: Callable[..., str], small_recipe: Path, words: list[str], message: str, fix: str
) -> None:
    text = refused(2, "train", small_recipe, *words)
    assert message in text
    assert f"{fix}." in text


def test_bad_sources(refused: Callable[..., str], terdit: Terdit, small_recipe: Path) -> None:
    assert "no such run" in refused(3, "export", "nothing")
    assert "nothing to plot" in refused(3, "plot", "nothing")
    assert "got early.bin, expected a name that ends in .pt" in refused(
        2, "export", small_recipe, "-o", "early.bin"
    )
    text = refused(2, "plot", "nothing", "-o", "curves.jpg")
    assert "got curves.jpg, expected .png, .svg or .html" in text
    done = terdit("train", small_recipe, "--dry-run", "--gpus", "0")
    assert (done.code, done.out) == (2, "")
    assert "'--gpus'" in done.err


def test_mistakes_are_told_without_torch(small_recipe: Path) -> None:
    code = f"""
import sys
sys.argv = ["terdit", "train", {str(small_recipe)!r}, "--gpus", "2"]
from terdit_cli.cli.app import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (2, "False\n")
