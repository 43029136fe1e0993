"""eval-fid on small folders, zips, arrays and a gate."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from terdit_cli import app
from terdit_cli.commands import eval_fid
from terdit_cli.errors import InputFileError, UsageError


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A quick extractor: mean colours of a 2 x 2 grid, 12 features."""
    path = tmp_path_factory.mktemp("net") / "grid.pt"
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(path))
    return f"torchscript:{path}"


def images(count: int, seed: int, shift: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 200, (count, 8, 8, 3)).astype(np.uint8) + np.uint8(shift)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for index, image in enumerate(images(40, 0)):
        Image.fromarray(image).save(path / f"{index:03d}.png")
    return path


def run_app(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["terdit", "eval-fid", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0)


def test_a_set_against_itself_is_zero_in_every_form(
    folder: Path, tmp_path: Path, features: str
) -> None:
    packed, arrays, stats = tmp_path / "i.zip", tmp_path / "i.npz", tmp_path / "ref.npz"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"class/{path.name}")
    np.savez(arrays, arr_0=images(40, 0))
    assert eval_fid.run(images=str(folder), features=features, save_reference_to=stats) is None
    for reference in (folder, packed, arrays, stats):
        result = eval_fid.run(str(reference), images=str(folder), features=features)
        assert result is not None
        assert result.distance == pytest.approx(0, abs=1e-6)
        assert (result.n, result.n_reference) == (40, 40)
        assert result.distance_name == "fd-grid"
        assert (result.kid is None) == (reference == stats)


def test_a_shift_of_all_pixels_is_the_distance(folder: Path, tmp_path: Path, features: str) -> None:
    """All 12 means move by 10 and the covariance stays: the distance is 12 * 10^2."""
    np.savez(tmp_path / "shifted.npz", arr_0=images(40, 0, shift=10))
    result = eval_fid.run(str(folder), images=str(tmp_path / "shifted.npz"), features=features)
    assert result is not None
    assert result.distance == pytest.approx(1200, rel=1e-4)


def test_images_of_different_sizes(folder: Path, features: str) -> None:
    Image.new("RGB", (5, 9)).save(folder / "odd.png")
    result = eval_fid.run(str(folder), images=str(folder), features=features)
    assert result is not None
    assert result.n == 41


def test_gate_and_json(
    folder: Path,
    tmp_path: Path,
    features: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.savez(tmp_path / "s.npz", arr_0=images(40, 0, shift=10))
    words = [
        "--images",
        str(tmp_path / "s.npz"),
        "--reference",
        str(folder),
        "--features",
        features,
    ]
    assert run_app(monkeypatch, *words, "--max-fid", "1300", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["passed"]
    assert values["provenance"]["images"].endswith("s.npz")
    assert run_app(monkeypatch, *words, "--max-fid", "1100") == 5
    captured = capsys.readouterr()
    assert "fd-grid 1200." in captured.out
    assert "FID" not in captured.out
    assert "above the gate: got 1200." in captured.err
    assert "Traceback" not in captured.err


def test_how_the_model_ran_is_in_the_json(
    terdit: Callable[..., Any], small_tdt: Path, features: str
) -> None:
    words = ("--reference", "embedded:heldout", "--features", features, "-n", 2, "--steps", 2)
    words += ("--backend", "reference", "--activations", "int8", "--device", "cpu", "--json")
    done = terdit("eval-fid", "--model", small_tdt, *words)
    assert done.code == 0, done.err
    provenance = json.loads(done.out)["provenance"]
    assert provenance["backend"] == "reference"
    assert provenance["isa"] is None
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["activations"] == "int8"
    assert "activations int8 (as asked)" in done.err


def test_other_features_than_the_reference_s(folder: Path, tmp_path: Path, features: str) -> None:
    stats, other = tmp_path / "ref.npz", tmp_path / "other.pt"
    eval_fid.run(images=str(folder), features=features, save_reference_to=stats)
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).save(str(other))
    with pytest.raises(UsageError, match="made with other features"):
        eval_fid.run(str(stats), images=str(folder), features=f"torchscript:{other}")


def test_refusals(folder: Path, tmp_path: Path, features: str) -> None:
    with pytest.raises(UsageError, match="neither --model nor --images"):
        eval_fid.run(str(folder), features=features)
    with pytest.raises(UsageError, match="both"):
        eval_fid.run(str(folder), model=folder, images=str(folder), features=features)
    with pytest.raises(UsageError, match="give --reference"):
        eval_fid.run(images=str(folder), features=features)
    with pytest.raises(UsageError, match="wrong -n: got 1"):
        eval_fid.run(str(folder), images=str(folder), n=1, features=features)
    with pytest.raises(InputFileError, match="too few images: got 40, expected -n 50"):
        eval_fid.run(str(folder), images=str(folder), n=50, features=features)
    (folder / "013.png").write_bytes(b"not a png")
    with pytest.raises(InputFileError, match=r"013\.png"):
        eval_fid.run(str(folder), images=str(folder), features=features)
    with pytest.raises(InputFileError, match="nowhere"):
        eval_fid.run(str(tmp_path / "nowhere"), images="embedded:heldout", n=2, features=features)


def test_warns_of_bias_when_there_are_fewer_images_than_features(
    folder: Path, features: str
) -> None:
    result = eval_fid.run(str(folder), images=str(folder), n=10, features=features)
    assert result is not None
    assert (result.n, result.n_reference) == (10, 10)
    assert any("biased upwards" in text for text in result.warnings)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_a_part_of_a_sorted_set_holds_all_classes(tmp_path: Path, kind: str, features: str) -> None:
    """Ten classes of ten grey images, sorted: 10 of them must not be one class."""
    greys = np.repeat(np.arange(10, dtype=np.uint8) * 20, 10)
    arrays = np.broadcast_to(greys[:, None, None, None], (100, 8, 8, 3))
    path = tmp_path / f"set.{kind}"
    if kind == "npz":
        np.savez(path, arr_0=arrays)
    else:
        source = tmp_path / "set.folder"
        source.mkdir()
        for index, image in enumerate(arrays):
            Image.fromarray(image).save(source / f"{index:03d}.png")
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for file in sorted(source.iterdir()):
                    archive.write(file, f"class/{file.name}")
    stats = tmp_path / "stats.npz"
    eval_fid.run(images=str(path), n=10, features=features, save_reference_to=stats)
    with np.load(stats) as values:
        assert np.allclose(values["mu"], 90)
        assert values["n"] == 10


def test_the_reference_is_checked_before_any_image_is_scored(tmp_path: Path, features: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"not a png")
    (tmp_path / "bad" / "1.png").write_bytes(b"not a png")
    with pytest.raises(InputFileError, match="nowhere"):
        eval_fid.run(str(tmp_path / "nowhere"), images=str(tmp_path / "bad"), features=features)


def test_more_refusals(tmp_path: Path, features: str) -> None:
    with pytest.raises(InputFileError, match=r"too few images: got \d+, expected -n 99999"):
        eval_fid.run("embedded", images="embedded", n=99999, features=features)
    with pytest.raises(UsageError, match=r"wrong --seed: got -1.*--seed 0"):
        eval_fid.run("embedded", images="embedded", n=2, features=features, seed=-1)
    with pytest.raises(UsageError, match=r"got ref, expected a name that ends in \.npz.*ref\.npz"):
        eval_fid.run(images="embedded", n=2, features=features, save_reference_to=tmp_path / "ref")
    large = eval_fid.run("embedded", images="embedded", n=4, features=features, seed=2**40)
    assert large is not None
    assert large.kid is not None
