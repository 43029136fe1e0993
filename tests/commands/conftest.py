"""The command line called in this process, and tiny trained runs to call it on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from terdit_cli import app

RECIPE = """\
name: small
model:
  {size: nano, n_layers: 2, dim: 32, n_heads: 2, patch_size: 7, multiple_of: 16, num_classes: 10}
ternary: {alpha_init: absmean}
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
