"""`terdit_cli.load_pipeline`: images from Python, the same as those of `terdit sample`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import terdit_cli
from terdit_cli.commands import sample
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.generate.options import ModelOptions, SamplingOptions


def test_the_images_are_those_of_the_command(small_tdt: Path, tmp_path: Path) -> None:
    options = SamplingOptions(steps=3, sampler="ddim", cfg_scale=1.5, seed=5, batch_size=4)
    sample.run(
        "Bag, 7", small_tdt, n=2, output=tmp_path / "a.npz", sampling=options,
        loading=ModelOptions(device="cpu"),
    )  # fmt: skip
    with np.load(tmp_path / "a.npz") as arrays:
        expected, labels = arrays["arr_0"], arrays["labels"]
    pipe = terdit_cli.load_pipeline(small_tdt, "cpu")
    images = pipe.generate(
        ["Bag", 7], n=2, steps=3, sampler="ddim", cfg_scale=1.5, seed=5, batch_size=4
    )
    assert [image.mode for image in images] == ["RGB"] * 4
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)
    assert labels.tolist() == [pipe.classes.index("Bag")] * 2 + [7, 7]
    # One class alone, by its name or its number.
    for alone in (7, "7", "Sneaker"):
        again = pipe.generate(alone, n=2, steps=3, sampler="ddim", cfg_scale=1.5, seed=5)
        assert [image.tobytes() for image in again] == [image.tobytes() for image in images[2:]]


def test_what_a_pipeline_says_of_itself(small_tdt: Path) -> None:
    pipe = terdit_cli.load_pipeline(small_tdt)
    assert len(pipe.classes) == pipe.info.config.num_classes == 10
    assert pipe.network.config == pipe.info.config
    assert {"load_pipeline", "load_model"} <= set(dir(terdit_cli))


def test_bad_arguments(small_tdt: Path, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such model: got 'fashon-mnist'"):
        terdit_cli.load_pipeline("fashon-mnist")
    pipe = terdit_cli.load_pipeline(small_tdt)
    with pytest.raises(UsageError, match="Sneeker"):
        pipe.generate("Sneeker")
    with pytest.raises(UsageError, match="wrong n: got 0"):
        pipe.generate(0, n=0)
