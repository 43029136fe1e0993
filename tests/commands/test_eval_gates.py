"""The gates of eval-fid as a CI job uses them: exit codes, and files that are always written."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from terdit_cli.model.dit import DiTConfig
from terdit_cli.pack.tdt import TdtFile, write_tdt

Terdit = Callable[..., Any]
Images = Callable[..., np.ndarray]

ZEROED = 0.2  # of the trits


class Damaged(TdtFile):
    """The model of a .tdt with some of its trits set to zero."""

    def trits(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(name))
        trits = super().trits(name)
        return trits * (torch.rand(trits.shape, generator=generator) >= ZEROED)


@pytest.fixture(scope="module")
def good(
    terdit: Terdit, make_ckpt: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model whose images hang on its trits.

    Those of the trained `small_tdt` hardly do after its 30 steps: they are mostly noise. Here all
    weights are random and large, and the set that it is measured by is drawn by the model itself
    from other noises; so its distance is small, and that of another network is not.
    """
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=3, n_heads=2, multiple_of=16,
        num_classes=10, qk_norm=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("good")
    done = terdit("pack", make_ckpt(folder / "ckpt.pt", config), "-o", folder / "good.tdt")
    assert done.code == 0, done.err
    return folder / "good.tdt"


@pytest.fixture(scope="module")
def damaged(good: Path) -> Path:
    path = good.with_name("damaged.tdt")
    with Damaged(good) as model:
        write_tdt(model, path, "t2", "fp32")
    return path


@pytest.fixture(scope="module")
def words(terdit: Terdit, good: Path, features: str) -> tuple[object, ...]:
    """The settings of all runs here, and a reference that the good model drew."""
    reference = good.with_name("reference.npz")
    how = ("--features", features, "-n", 200, "--steps", 4, "--cfg-scale", 1, "--device", "cpu")
    how += ("--batch-size", 50)
    drawn = ("--model", good, "--seed", 7, "--make-reference", reference)
    done = terdit("eval-fid", *how, *drawn)
    assert done.code == 0, done.err
    return ("eval-fid", *how, "--reference", reference)


@pytest.fixture(scope="module")
def earlier(terdit: Terdit, good: Path, words: tuple[object, ...]) -> Path:
    """REF.json: what --json printed for the good model."""
    done = terdit(*words, "--model", good, "--json")
    assert done.code == 0, done.err
    path = good.with_name("ref.json")
    path.write_text(done.out)
    return path


def files(folder: Path) -> tuple[object, ...]:
    return (
        "--report", folder / "junit.xml", "--report", folder / "pr.md",
        "--report", folder / "page.html",
    )  # fmt: skip


def test_a_good_model_passes(
    terdit: Terdit, good: Path, words: tuple[object, ...], earlier: Path, tmp_path: Path
) -> None:
    distance = json.loads(earlier.read_text())["metrics"]["fd-grid"]
    gates = ("--max-regression", earlier, "--tolerance", 0, "--max-fid", 1.01 * distance)
    done = terdit(*words, "--model", good, *gates, *files(tmp_path), "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["passed"]
    assert [gate["name"] for gate in result["gates"]] == ["--max-fid", "--max-regression"]
    assert result["metrics"]["fd-grid"] == distance, "the same run again, to the last bit"
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert not list(suite.iter("failure"))
    other = terdit(*words, "--model", good, "--seed", 1, "--max-regression", earlier)
    assert "warning: the seed is 1" in other.err


def test_a_damaged_model_fails(
    terdit: Terdit, damaged: Path, words: tuple[object, ...], earlier: Path, tmp_path: Path
) -> None:
    distance = json.loads(earlier.read_text())["metrics"]["fd-grid"]
    gates = ("--max-regression", earlier, "--tolerance", 0.5, "--max-fid", 2 * distance)
    done = terdit(*words, "--model", damaged, *gates, *files(tmp_path), "--json")
    assert done.code == 5
    assert "Traceback" not in done.err
    assert "error: 2 of 2 quality gates failed: got fd-grid" in done.err
    assert str(damaged) in done.err
    result = json.loads(done.out)
    assert not result["passed"]
    assert result["metrics"]["fd-grid"] > 4 * distance
    assert (
        result["provenance"]["model_sha256"]
        != json.loads(earlier.read_text())["provenance"]["model_sha256"]
    )
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert len(list(suite.iter("failure"))) == 2
    for name in ("pr.md", "page.html"):
        text = (tmp_path / name).read_text()
        assert "fd-grid" in text
        assert "--max-regression" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", 5], "steps 5 not 4"),
        (["-n", 100], "n 100 not 200"),
        (["--sampler", "ddim"], "sampler ddim not ddpm"),
        (["--cfg-scale", 2], "cfg_scale 2.0 not 1.0"),
        (["--cfg-channels", "all"], "cfg_channels all not 3"),
        (["--labels", "uniform"], "labels uniform not balanced"),
        (["--reference", "embedded:heldout"], "reference_sha256"),
        (["--features", "other"], "pipeline torchscript other.pt@"),
        (["--model", "small"], "config.input_size 28 not 8"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_unlike_runs_are_not_compared(
    refused: Callable[..., str], good: Path, small_tdt: Path, words: tuple[object, ...],
    earlier: Path, tmp_path_factory: pytest.TempPathFactory, more: list[object], said: str,
) -> None:  # fmt: skip
    if more[1] == "small":
        more = ["--model", small_tdt]
    if more[1] == "other":
        path = tmp_path_factory.mktemp("net") / "other.pt"
        torch.jit.script(torch.nn.Flatten()).save(str(path))
        more = ["--features", f"torchscript:{path}", "--reference", "embedded:heldout"]
    junit = ("--report", "junit.xml")
    message = refused(2, *words, "--model", good, "--max-regression", earlier, *junit, *more)
    assert "cannot compare unlike runs" in message
    assert said in message
    assert str(earlier) in message


def test_a_result_of_another_program_is_no_reference(
    refused: Callable[..., str], good: Path, words: tuple[object, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("json") / "other.json"
    path.write_text('{"fid": 3}')
    message = refused(3, *words, "--model", good, "--max-regression", path)
    assert "other.json" in message
    assert "--json > REF.json" in message


def test_gates_of_a_set(
    terdit: Terdit, folder: Path, tmp_path: Path, images: Images, features: str
) -> None:
    """A shift of 10 in 12 features is 1200; it is called by its name, which is not FID."""
    np.savez(tmp_path / "s.npz", arr_0=images(40, shift=10))
    words = ("--images", tmp_path / "s.npz", "--reference", folder, "--features", features)
    done = terdit("eval-fid", *words, "--max-fid", 1300, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["provenance"]["images"].endswith("s.npz")
    done = terdit("eval-fid", *words, "--max-fid", 1100)
    assert done.code == 5
    assert "FAILED --max-fid: fd-grid 1,200." in done.out
    assert "FID " not in done.out
    assert "error: the quality gate failed: got fd-grid 1200" in done.err
    assert "expected <= 1100 (--max-fid)" in done.err
