"""The command line called in this process, tiny trained runs and images to call it on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from terdit_cli.cli import app
from terdit_cli.cli.flags import names_of
from terdit_cli.commands import eval_fid
from terdit_cli.evaluate.request import EvalOptions
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.generate.options import ModelOptions, SamplingOptions

RECIPE = """\
name: small
model:
  {size: nano, n_layers: 2, dim: 32, n_heads: 2, patch_size: 7, multiple_of: 16, num_classes: 10}
ternary: {granularity: tensor}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, workers: 1}
train: {steps: 30, global_batch_size: 8, micro_batch_size: 8, precision: fp32}
optim: {lr: 3e-3}
ema: {decay: 0.9}
sample: {every: 0}
logging: {every: 10}
"""


class Done(NamedTuple):
    """How a call of the command line ended."""

    code: int
    out: str
    err: str


Terdit = Callable[..., Done]
Images = NDArray[np.uint8]


def _terdit(*words: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        patch.object(sys, "argv", ["terdit", *map(str, words)]),
        patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def terdit() -> Terdit:
    """Return terdit(*words) -> (code, out, err): the command line in this process."""
    return _terdit


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_recipe: Path) -> Path:
    """The run folder of a ternary model."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = _terdit("train", small_recipe, "--out", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def parent_run(tmp_path_factory: pytest.TempPathFactory, small_recipe: Path) -> Path:
    """The run folder of a full-precision model."""
    folder = tmp_path_factory.mktemp("runs") / "parent"
    words = ("ternary.enabled=false", "train.steps=5")
    done = _terdit("train", small_recipe, *words, "--out", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def small_tdt(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    path = tmp_path_factory.mktemp("packed") / "small.tdt"
    done = _terdit("pack", small_run, "-o", path)
    assert done.code == 0, done.err
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return refused(code, *words) -> message, run in `tmp_path`, which must not change."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, *words: object) -> str:
        before = listing(tmp_path)
        done = terdit(*words)
        assert done.code == code, done.err
        assert done.out == ""
        assert "Traceback" not in done.err
        assert listing(tmp_path) == before
        message = done.err[done.err.index("error:") :]
        assert message.count("error:") == 1
        return str(message)

    return run


class _Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="session")
def evil() -> Callable[[Path], object]:
    """Return evil(marker): an object that makes the file `marker` when it is unpickled."""
    return _Evil


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A quick extractor: mean colours of a 2 x 2 grid, 12 features."""
    path = tmp_path_factory.mktemp("net") / "grid.pt"
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(path))
    return f"torchscript:{path}"


def _images(count: int, seed: int = 0, shift: int = 0) -> Images:
    random = np.random.default_rng(seed)
    return random.integers(0, 200, (count, 8, 8, 3)).astype(np.uint8) + np.uint8(shift)


@pytest.fixture(scope="session")
def images() -> Callable[..., Images]:
    """Return images(count, seed=0, shift=0): random ones of 8 x 8 pixels."""
    return _images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The 40 images of seed 0 in a folder."""
    path = tmp_path / "images"
    path.mkdir()
    for index, image in enumerate(_images(40)):
        Image.fromarray(image).save(path / f"{index:03d}.png")
    return path


@pytest.fixture(scope="session")
def evaluate(features: str) -> Callable[..., EvalResult]:
    """Return evaluate(**options of EvalOptions) with the quick extractor, on the CPU."""

    def run(**options: object) -> EvalResult:
        given: dict[str, Any] = {"features": features, "device": "cpu", **options}
        kinds = [
            kind(**{name: given.pop(name) for name in names_of(kind) if name in given})
            for kind in (EvalOptions, SamplingOptions, ModelOptions)
        ]
        assert not given
        result = eval_fid.run(*kinds)
        assert result is not None
        return result

    return run


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packaged models, empty, and an empty one to work in."""
    folder, here = tmp_path / "packaged", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("TERDIT_MODELS", str(folder))
    monkeypatch.delenv("TERDIT_MODEL", raising=False)
    return folder
