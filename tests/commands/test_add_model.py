"""A trained run becomes a packaged model, with a card of what was measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from terdit_cli.commands import models as command
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import InputFileError, TerditError
from terdit_cli.evaluate.result import load_result
from terdit_cli.generate.generator import sampler_for
from terdit_cli.generate.options import SamplingOptions
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Advice, read_card
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.lab import add_model
from terdit_cli.lab.add_model import Words
from terdit_cli.model.ckpt import load_ckpt
from tests.ckpt_file import save_ckpt

WORDS = Words("1,000 images", "MIT", "draws noise")


@pytest.fixture
def measured(small_run: Path, features: str, terdit: Callable[..., Any], shelf: Path) -> Path:
    """What eval-fid says of the small run, packed as models are packaged."""
    assert terdit("pack", small_run, "-o", "m.tdt", "--codec", "t5", "--rest", "bf16").code == 0
    words = ("--model", "m.tdt", "--reference", "embedded:heldout", "-n", 8, "--features", features)
    sampler = (
        "--sampler",
        "ddim",
        "--steps",
        4,
        "--cfg-scale",
        2,
        "--eps-scale",
        0.98,
        "--seed",
        3,
    )
    done = terdit("eval-fid", *words, *sampler, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    Path("result.json").write_text(done.out)
    return Path("result.json")


@pytest.mark.slow
def test_a_run_becomes_a_packaged_model(measured: Path, small_run: Path, shelf: Path) -> None:
    path = add_model.run(small_run, "new", measured, WORDS)
    assert path == shelf / "new.tdt"
    assert path.read_bytes() == Path("m.tdt").read_bytes()
    [model] = command.run()
    card, result = model.card, load_result(measured)
    assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (card.recipe, card.steps, card.seed) == ("small", 30, 0)
    assert card.scores == result.metrics
    assert card.score[0] == result.distance_name
    assert card.sampler == Advice(name="ddim", steps=4, cfg_scale=2, eps_scale=0.98)
    assert (card.data, card.licence, card.limits) == ("1,000 images", "MIT", "draws noise")
    assert "8 images against 8, seed 3, activations " in card.measured
    assert "terdit eval-fid --model m.tdt" in card.measured
    assert card.text.startswith("# new\n\n## Recipe\n\n```yaml\nname: small\n")
    assert sampler_for(ModelFile.open(path), SamplingOptions()) == SamplerConfig(
        "ddim", 4, 2.0, eps_scale=0.98
    )
    # Again: the words of people stay, or are replaced.
    add_model.run(small_run, "new", measured, Words(text="# Better\n\nMuch."))
    add_model.run(small_run, "new", measured, Words(limits="few"))
    again = read_card("new")
    assert (again.data, again.limits) == ("1,000 images", "few")
    assert again.text.startswith("# Better\n\nMuch.\n\n## Recipe\n\n```yaml\nname: small\n")
    assert again.text.count("## Recipe") == 1


def test_a_card_names_the_run_that_a_model_began_with(
    measured: Path, small_run: Path, shelf: Path, terdit: Callable[..., Any]
) -> None:
    """Its steps are part of what the model cost."""
    found = load_ckpt(small_run / "ckpt.pt")
    recipe = yaml.safe_load(found.recipe)
    recipe["train"]["init_from"] = recipe["distill"]["teacher"] = str(small_run)
    second = shelf.parent / "second.pt"
    save_ckpt(second, found.info, yaml.safe_dump(recipe), found.model, found.ema)
    add_model.run(second, "new", measured, WORDS)
    said = "the averaged weights of small, 30 steps, and learned from it"
    assert read_card("new").began_with == said
    assert said in terdit("models", "new").out
    assert add_model.run(small_run, "new", measured, WORDS)
    assert read_card("new").began_with is None


def test_a_damaged_card_is_made_anew(measured: Path, small_run: Path, shelf: Path) -> None:
    (shelf / "new.md").write_text("damaged")
    with pytest.raises(InputFileError, match="the card of a packaged model is invalid"):
        add_model.run(small_run, "new", measured, WORDS)
    add_model.run(small_run, "new", measured, dataclasses.replace(WORDS, text="# New"))
    assert read_card("new").text.startswith("# New")


def test_runs_that_are_not_packaged(
    measured: Path, small_run: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> str:
        with pytest.raises(TerditError) as caught:
            add_model.run(*arguments)
        assert list(shelf.iterdir()) == []
        assert "Fix: " in str(caught.value)
        return str(caught.value)

    message = refused(small_run, "new", measured, WORDS, "t2", "fp32")
    assert "these are not the scores of this model" in message
    assert f"terdit pack {small_run} -o new.tdt --codec t2 --rest fp32" in message
    assert "terdit eval-fid --model new.tdt ... --json > result.json" in message
    message = refused(small_run, "new", measured, Words("data"))
    assert "a new card needs words: expected --licence, --limits" in message
    assert "ckpt.pt or its run folder" in refused(Path("m.tdt"), "new", measured, WORDS)
    assert "cannot read the result" in refused(small_run, "new", Path("m.tdt"), WORDS)
    values = json.loads(measured.read_text())
    values["provenance"]["steps"] = "many"
    Path("wrong.json").write_text(json.dumps(values))
    assert "sampler.steps: " in refused(small_run, "new", Path("wrong.json"), WORDS)
    monkeypatch.setattr(catalogue, "SIZE_LIMIT", 1000)
    message = refused(small_run, "new", measured, WORDS)
    assert "the packaged models would be too large together" in message
    assert "expected at most 1,000" in message


@pytest.mark.slow
def test_the_command_of_developers(measured: Path, small_run: Path, shelf: Path) -> None:
    (shelf.parent / "text.md").write_text("# Clothes\n")
    words = [
        "--data",
        "d",
        "--licence",
        "l",
        "--limits",
        "l",
        "--text",
        str(shelf.parent / "text.md"),
    ]
    command_line = [sys.executable, "-m", "terdit_cli.lab.add_model", str(small_run), "new"]
    for model, code in (("new", 0), ("../new", 3)):
        command_line[-1] = model
        done = subprocess.run(
            [*command_line, "--eval", str(measured.absolute()), *words],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert "name: String should match" in done.stderr
    assert read_card("new").text.startswith("# Clothes\n\n## Recipe")
    assert sorted(path.name for path in shelf.iterdir()) == ["new.md", "new.tdt"]
