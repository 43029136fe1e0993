"""`terdit info`: every kind of file says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from terdit_cli.errors import InputFileError
from terdit_cli.system.atomic import file_sha256

Terdit = Callable[..., Any]


def told(terdit: Terdit, what: object) -> dict[str, Any]:
    done = terdit("info", what, "--json")
    assert done.code == 0, done.err
    text = terdit("info", what)
    assert text.code == 0
    values: dict[str, Any] = json.loads(done.out)
    assert f"kind{' ' * (text.out.index(values['kind']) - 4)}{values['kind']}" in text.out
    return values


def test_models(terdit: Terdit, small_run: Path, small_tdt: Path, tmp_path: Path) -> None:
    packed = told(terdit, small_tdt)
    assert packed["kind"] == "packed model"
    assert packed["sha256"] == file_sha256(small_tdt)
    assert packed["bytes"] == small_tdt.stat().st_size
    assert packed["image_size"] == 28
    assert len(packed["classes"]) == packed["network"]["num_classes"] == 10
    assert set(packed["codec"]) == {"t2"}
    for what in (small_run, small_run / "ckpt.pt"):
        run = told(terdit, what)
        assert (run["kind"], run["step"]) == ("training checkpoint", 30)
        assert run["parameters"] == 56_658
    fixed = tmp_path / "a.safetensors"
    assert terdit("ternarize", small_run, "-o", fixed).code == 0
    assert told(terdit, fixed)["codec"] == {"int8": packed["codec"]["t2"]}
    named = told(terdit, "fashion-mnist")
    assert named["licence"].startswith("MIT")


def test_other_files(terdit: Terdit, small_tdt: Path, tmp_path: Path) -> None:
    assert told(terdit, "quickstart")["train"]["steps"] == 1800
    rng = np.random.default_rng(0)
    features = rng.normal(size=(64, 5))
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features.T))
    assert told(terdit, tmp_path / "stats.npz")["features"] == 5
    np.savez(tmp_path / "images.npz", np.zeros((3, 4, 6, 3), np.uint8), np.array([0, 0, 7]))
    images = told(terdit, tmp_path / "images.npz")
    assert (images["kind"], images["images"], images["classes"]) == ("images", 3, ["0", "7"])
    assert images["first"].endswith("6 x 4, RGB")
    grid = tmp_path / "grid.png"
    words = ("--model", small_tdt, "--prompt-class", 1, "--steps", 2, "--seed", 5)
    assert terdit("sample", *words, "-o", grid).code == 0
    seen = told(terdit, grid)
    assert (seen["kind"], seen["seed"]) == ("images of terdit sample", "5")
    assert seen["model_sha256"] == file_sha256(small_tdt)


def test_what_it_cannot_read(terdit: Terdit, tmp_path: Path) -> None:
    from terdit_cli.commands import info

    with pytest.raises(InputFileError, match="images not found"):
        info.run(str(tmp_path / "nothing"))
    Image.new("RGB", (2, 2)).save(tmp_path / "theirs.png")
    with pytest.raises(InputFileError, match="an image of another program"):
        info.run(str(tmp_path / "theirs.png"))
    (tmp_path / "x.tdt").write_bytes(b"junk")
    assert terdit("info", tmp_path / "x.tdt").code == 3
    (tmp_path / "x.bin").write_bytes(b"junk")
    assert terdit("info", tmp_path / "x.bin").code == 3
