"""eval-fid: what it says of sets whose distance is known, in every form that a set can have."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from terdit_cli.commands import eval_fid
from terdit_cli.evaluate import features as extractors
from terdit_cli.evaluate import scores as eval_scores
from terdit_cli.evaluate.feature_network import Network, Outputs
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.generate.options import ModelOptions
from terdit_cli.system.torchvision_shim import import_vision

Evaluate = Callable[..., EvalResult]
Images = Callable[..., np.ndarray]
Terdit = Callable[..., Any]

OF_SAMPLES = ("precision", "recall", "KID", "KID standard error")
ITSELF = "made from the very images that are scored"


def write_form(form: str, folder: Path, evaluate: Evaluate, arrays: np.ndarray) -> Path:
    """Write the images of a folder in another form and return its path."""
    if form == "folder":
        return folder
    path = folder.parent / f"set-{form}.{'tar' if form == 'tar' else form.split('-')[0]}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"class/{file.name}")
    elif form == "tar":
        with tarfile.open(path, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.add(file, f"class/{file.name}")
    elif form == "npz":
        np.savez(path, arr_0=arrays)
    else:  # statistics, by the command itself
        with_features = form == "npz-features"
        path = folder.parent / f"{form}.npz"
        if form == "npz-adm":
            evaluate(images=str(folder), reference=str(folder), make_reference=path)
            with np.load(path) as values:
                np.savez(path, mu=values["mu"], sigma=values["sigma"], arr_0=arrays[:10])
        else:
            evaluate(
                images=str(folder), reference=str(folder), make_reference=path,
                reference_features=with_features,
            )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "form", ["folder", "zip", "tar", "npz", "npz-statistics", "npz-features", "npz-adm"]
)
def test_a_set_against_itself_is_zero(
    folder: Path, images: Images, evaluate: Evaluate, form: str
) -> None:
    path = write_form(form, folder, evaluate, images(40))
    result = evaluate(images=str(folder), reference=str(path))
    # Squares of differences of float64 that are about 1e4 and equal but for their last bits.
    assert result.distance == pytest.approx(0, abs=1e-6)
    assert result.distance_name == "fd-grid"
    # A file like ADM's has the moments of all its images, and does not say of how many.
    assert (result.n, result.n_reference) == (40, None if form == "npz-adm" else 40)
    assert "IS" not in result.metrics
    assert "sFID" not in result.metrics
    for name in OF_SAMPLES[:3]:
        assert (name in result.metrics) == (form != "npz-statistics")
    if form not in ("npz-statistics", "npz-adm"):
        assert result.metrics["precision"] == result.metrics["recall"] == 1
    told = any(ITSELF in text for text in result.warnings)
    assert told == (form in ("folder", "npz-statistics", "npz-features"))
    doubted = any("does not say which features" in text for text in result.warnings)
    assert doubted == (form == "npz-adm")


def test_a_shift_of_all_pixels_is_the_distance(
    folder: Path, tmp_path: Path, images: Images, evaluate: Evaluate
) -> None:
    """All 12 means move by 10 and the covariance stays: the distance is 12 * 10^2."""
    np.savez(tmp_path / "shifted.npz", arr_0=images(40, shift=10))
    result = evaluate(images=str(tmp_path / "shifted.npz"), reference=str(folder))
    assert result.distance == pytest.approx(1200, rel=1e-4)
    assert result.warnings == []


def test_a_part_of_both_sides(
    folder: Path, tmp_path: Path, images: Images, evaluate: Evaluate
) -> None:
    result = evaluate(images=str(folder), reference=str(folder), n=10)
    assert (result.n, result.n_reference) == (10, 10)
    assert any("biased upwards" in text for text in result.warnings)
    np.savez(tmp_path / "few.npz", arr_0=images(12))
    of_few = evaluate(images=str(folder), reference=str(tmp_path / "few.npz"))
    assert any("12 of the reference for 12 features: the dist" in text for text in of_few.warnings)
    all_of_it = evaluate(images=str(folder), reference="embedded:heldout", n=40)
    assert all_of_it.n_reference == 40


def test_samples_for_precision_and_recall(folder: Path, evaluate: Evaluate) -> None:
    sides = {"images": str(folder), "reference": "embedded:heldout", "n": 40}
    whole, part, none = (evaluate(**sides, pr_samples=number) for number in ("all", "20", "0"))
    assert whole.metrics["recall"] == evaluate(**sides).metrics["recall"]
    assert part.metrics["precision"] != whole.metrics["precision"]
    assert not {"precision", "recall"} & set(none.metrics)
    assert none.metrics["KID"] == whole.metrics["KID"]


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
    options = eval_fid.EvalOptions(images=str(path), n=10, features=features, make_reference=stats)
    assert eval_fid.run(options, loading=ModelOptions(device="cpu")) is None
    with np.load(stats) as values:
        assert np.allclose(values["mu"], 90)
        assert values["n"] == 10


def test_how_the_model_ran_is_in_the_json(
    terdit: Terdit, small_tdt: Path, features: str, folder: Path, tmp_path: Path
) -> None:
    words = ("--reference", "embedded:heldout", "--features", features, "-n", 2, "--steps", 2)
    words += ("--backend", "reference", "--activations", "int8", "--device", "cpu", "--json")
    done = terdit("eval-fid", "--model", small_tdt, *words)
    assert done.code == 0, done.err
    provenance = json.loads(done.out)["provenance"]
    expected = {
        "backend": "reference", "isa": None, "threads": torch.get_num_threads(),
        "activations": "int8", "sampler": "ddpm", "steps": 2, "nfe": 4, "cfg_scale": 4.0,
        "cfg_channels": "3", "seed": 0, "labels": "balanced", "image_size": 28, "step": 30,
        "model": str(small_tdt), "reference": "embedded:heldout", "torch": torch.__version__,
    }  # fmt: skip
    assert {name: provenance[name] for name in expected} == expected
    assert provenance["config"]["n_layers"] == 2
    assert provenance["command"].startswith("terdit eval-fid --model")
    for name in ("model_sha256", "recipe_sha256", "reference_sha256"):
        assert len(provenance[name]) == 64
    assert "activations int8 (as asked)" in done.err


def test_the_last_weights_of_a_run_are_another_run(
    terdit: Terdit, small_run: Path, features: str, tmp_path: Path
) -> None:
    words = ("--reference", "embedded:heldout", "--features", features, "-n", 2, "--steps", 2)
    words += ("--device", "cpu", "--json", "--work", tmp_path / "work", "--model", small_run)
    done = terdit("eval-fid", *words, "--raw")
    assert done.code == 0, done.err
    assert json.loads(done.out)["provenance"]["weights"] == "raw"
    done = terdit("eval-fid", *words)
    assert done.code == 2
    assert "weights" in done.err


def test_json_without_a_comparison_is_one_object(
    terdit: Terdit, folder: Path, features: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.npz"
    words = ("eval-fid", "--images", folder, "--features", features, "--make-reference", path)
    done = terdit(*words, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"reference": str(path), "images": None, "grid": None}
    assert f"{path}: reference written" in terdit(*words).out


def small_inception() -> Network:
    """All three kinds of features of a mean colour, under the name of a pipeline of FID's."""

    def prepare(image: np.ndarray) -> torch.Tensor:
        return torch.tensor(image).float().mean((0, 1))[:, None, None] / 255

    def forward(batch: torch.Tensor) -> Outputs:
        pool = batch.flatten(1)
        return Outputs(pool, pool[:, :2] * 3, torch.cat([pool, -pool], 1) * 9)

    return Network("adm@0 mean", "FID", 3, 2, 6, True, prepare, forward)


def test_every_metric_of_a_pipeline_that_defines_all(
    folder: Path,
    tmp_path: Path,
    images: Images,
    evaluate: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extractors, "adm", lambda *_: small_inception())
    monkeypatch.setattr(eval_scores, "KID_SUBSET", 10)  # of all, they would have no error
    np.savez(tmp_path / "other.npz", arr_0=images(30, 1, 5))
    path, others = tmp_path / "ours.npz", str(tmp_path / "other.npz")
    result = evaluate(
        features="adm", images=others, reference=str(folder), make_reference=path,
        confidence=2,
    )  # fmt: skip
    assert set(result.metrics) == {"FID", "sFID", "IS", *OF_SAMPLES, "FID infinity"}
    real, fake = (
        values.astype(np.float64).mean((1, 2)) / 255 for values in (images(40), images(30, 1, 5))
    )
    shift = real.mean(0) - fake.mean(0)
    assert result.distance >= shift @ shift
    assert result.metrics["IS"] > 1
    # The spatial features are three times two of the others: their distance is nine times that.
    two = by_definition(real[:, :2], fake[:, :2])
    assert result.metrics["sFID"] == pytest.approx(9 * two, rel=1e-4)
    assert result.metrics["FID"] == pytest.approx(by_definition(real, fake), rel=1e-4)
    # Ours holds the spatial moments; without features there is no KID, precision or recall.
    ours = evaluate(features="adm", images=others, reference=str(path))
    assert set(ours.metrics) == {"FID", "sFID", "IS"}
    assert ours.metrics["sFID"] == pytest.approx(0, abs=1e-9)


def by_definition(real: np.ndarray, fake: np.ndarray) -> float:
    """The Frechet distance by its definition, with eigenvalues of the product."""
    covariances = np.cov(real.T), np.cov(fake.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0))
    shift = real.mean(0) - fake.mean(0)
    return float(shift @ shift + sum(map(np.trace, covariances)) - 2 * roots.sum())


@pytest.mark.slow
def test_adm_from_end_to_end(terdit: Terdit, folder: Path, tmp_path: Path, images: Images) -> None:
    """torch-fidelity's architecture from a file of random weights, against a file like ADM's."""
    library = import_vision("torch_fidelity.feature_extractor_inceptionv3")

    class Empty(library.FeatureExtractorInceptionV3):  # type: ignore[name-defined, misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep the random weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    weights, stats = tmp_path / "weights.pth", tmp_path / "VIRTUAL.npz"
    torch.save(Empty("empty", ["2048"], nothing).state_dict(), weights)
    random = np.random.default_rng(0)
    moments = {}
    for suffix, dim in (("", 2048), ("_s", 2023)):
        moments |= {f"mu{suffix}": random.random(dim), f"sigma{suffix}": np.eye(dim)}
    np.savez(stats, arr_0=images(4, 1), **moments)
    words = ("eval-fid", "--images", folder, "--reference", stats, "-n", 4, "--device", "cpu")
    done = terdit(*words, "--weights", weights, "--json", "--max-fid", 1e9)
    weights.unlink()  # 96 MB, and pytest keeps the folders of three runs
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert set(result["metrics"]) == {"FID", "sFID", "IS", *OF_SAMPLES} - {"KID standard error"}
    assert result["pipeline"].startswith("adm@")
    assert result["gates"][0]["metric"] == "FID"
    assert (result["n"], result["n_reference"]) == (4, None)
    assert any("is not the usual weight file" in text for text in result["warnings"])
