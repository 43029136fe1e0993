"""eval-fid on wrong images, statistics, weights and options: the exit code and one sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from terdit_cli.errors import InputFileError
from terdit_cli.evaluate import inception
from terdit_cli.evaluate.result import EvalResult

Evaluate = Callable[..., EvalResult]
Refused = Callable[..., str]
Terdit = Callable[..., Any]
Images = Callable[..., np.ndarray]

PIXELS = np.random.default_rng(1).integers(0, 256, (8, 8, 4)).astype(np.uint8)


@pytest.fixture
def words(folder: Path, features: str) -> tuple[object, ...]:
    """A set against itself."""
    return ("eval-fid", "--images", folder, "--reference", folder, "--features", features)


@pytest.mark.parametrize(
    ("mode", "suffix", "said"),
    [
        ("L", ".png", "1 of 41 images are grey: three equal channels"),
        ("1", ".png", "1 of 41 images are black and white"),
        ("LA", ".png", "1 of 41 images are grey with an alpha channel, which was dropped"),
        ("RGBA", ".png", "1 of 41 images are transparent in places"),
        ("P", ".png", "1 of 41 images are of a palette"),
        ("CMYK", ".jpg", "1 of 41 images are CMYK"),
    ],
)
def test_what_is_not_rgb_is_converted_and_told(
    folder: Path, evaluate: Evaluate, mode: str, suffix: str, said: str
) -> None:
    bands = {"RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 0)
    image = Image.fromarray(PIXELS[:, :, :bands], mode) if bands else (
        Image.fromarray(PIXELS[:, :, :3]).convert(mode)
    )  # fmt: skip
    image.save(folder / f"odd{suffix}")
    result = evaluate(images=str(folder), reference="embedded:heldout")
    assert result.n == 41
    assert any(text.startswith(said) for text in result.warnings)
    other = evaluate(images="embedded:heldout", reference=str(folder), n=41)
    assert any(text.startswith(f"reference: {said}") for text in other.warnings)


def test_sixteen_bits_are_refused(folder: Path, refused: Refused, words: tuple[object]) -> None:
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(folder / "deep.png")
    message = refused(3, *words)
    assert "deep.png" in message
    assert "more than 8 bits a channel" in message


def test_different_sizes_are_told(folder: Path, evaluate: Evaluate) -> None:
    Image.new("RGB", (5, 9)).save(folder / "odd.png")
    result = evaluate(images=str(folder), reference="embedded:heldout")
    assert any("2 sizes, 8 x 8 to 5 x 9 pixels" in text for text in result.warnings)


@pytest.mark.parametrize("content", [b"", b"not a png", "cut"])
def test_corrupt_images(
    folder: Path, evaluate: Evaluate, refused: Refused, words: tuple[object, ...],
    content: bytes | str,
) -> None:  # fmt: skip
    bad = folder / "013.png"
    bad.write_bytes(bad.read_bytes()[:60] if isinstance(content, str) else content)
    message = refused(3, *words)
    assert "013.png" in message
    assert str(folder) in message
    assert "on-bad-image" in message
    result = evaluate(images=str(folder), reference=str(folder), on_bad_image="skip")
    assert (result.n, result.n_reference) == (39, 39)
    said = [text for text in result.warnings if "unreadable" in text]
    assert "1 unreadable images were skipped, the first: unreadable image" in said[0]
    assert "013.png" in said[0]
    assert said[1] == "reference: 1 unreadable images were skipped"
    message = refused(3, *words, "--on-bad-image", "skip", "-n", 40)
    assert "got 39 (1 unreadable), expected -n 40" in message
    assert "Fix: -n 39" in message


def test_arrays_that_are_code(
    folder: Path, tmp_path: Path, refused: Refused, features: str, evil: Callable[[Path], object]
) -> None:
    """As images, as labels, as moments, as weights: nothing is unpickled."""
    marker = tmp_path / "ran"
    code = np.empty(1, dtype=object)
    code[0] = evil(marker)
    np.savez(tmp_path / "images.npz", arr_0=code)
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=code)
    np.savez(tmp_path / "mu.npz", mu=code, sigma=np.eye(12))
    np.savez(tmp_path / "n.npz", mu=np.zeros(12), sigma=np.eye(12), n=code)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(evil(marker)))
    torch.save({"a": evil(marker)}, tmp_path / "zip.pth")
    for name in ("images.npz", "labels.npz", "mu.npz", "n.npz"):
        path = tmp_path / name
        words = ("--images", folder, "--features", features)
        assert name in refused(3, "eval-fid", *words, "--reference", path)
        if name in ("images.npz", "labels.npz"):
            words = ("--reference", folder, "--features", features)
            assert name in refused(3, "eval-fid", *words, "--images", path)
    for name in ("weights.pth", "zip.pth"):
        words = ("--images", folder, "--reference", folder, "--weights", tmp_path / name)
        for pipeline in ("adm", "clean"):
            assert name in refused(3, "eval-fid", *words, "--features", pipeline)
    assert not marker.exists()


def test_statistics_of_other_features(
    folder: Path, tmp_path: Path, evaluate: Evaluate, refused: Refused, features: str
) -> None:
    ours, other = tmp_path / "ours.npz", tmp_path / "other.pt"
    evaluate(images=str(folder), reference=str(folder), make_reference=ours)
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).save(str(other))
    np.savez(tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(
        tmp_path / "adm.npz", mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    words = ("eval-fid", "--images", folder, "--features")
    message = refused(2, *words, f"torchscript:{other}", "--reference", ours)
    for part in ("made with other features: got torchscript grid.pt@", "expected", "other.pt@"):
        assert part in message
    assert "adm, by its spatial statistics" in refused(
        2, *words, features, "--reference", "adm.npz"
    )
    message = refused(2, *words, features, "--reference", "three.npz")
    assert "another number of features: got 3, expected 12" in message


def test_no_weights_and_no_network(
    folder: Path, terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path / "cache"))
    for name in ("ADM", "CLEAN"):
        pinned = getattr(inception, name)
        nowhere = replace(pinned, url="http://127.0.0.1:1/weights")
        monkeypatch.setattr(inception, name, nowhere)
        words = ("--images", folder, "--reference", folder, "--features", name.lower())
        done = terdit("eval-fid", *words)
        assert done.code == 4
        assert done.out == ""
        for part in (pinned.sha256, "--weights", nowhere.url, str(tmp_path / "cache")):
            assert part in done.err


class NotFinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] / 0.0


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 7)


@pytest.mark.parametrize("module", [NotFinite, Fails, nn.Identity])
def test_extractors_that_give_no_features(
    folder: Path, tmp_path: Path, evaluate: Evaluate, terdit: Terdit, module: type[nn.Module]
) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(module()).save(str(path))
    words = ("--images", folder, "--reference", folder, "--features", f"torchscript:{path}")
    done = terdit("eval-fid", *words)
    assert done.code == 3
    assert "error: the extractor does not give one feature vector an image" in done.err
    assert "net.pt" in done.err
    with pytest.raises(InputFileError, match="feature vector"):
        evaluate(images=str(folder), reference=str(folder), features=f"torchscript:{path}")


@pytest.mark.parametrize(
    ("more", "code", "parts"),
    [
        (["--images", "empty"], 3, ["no images found", "empty"]),
        (["--reference", "empty"], 3, ["no images found", "empty"]),
        (["--images", "nowhere"], 3, ["images not found (nowhere)", "check the path"]),
        (["--reference", "nowhere"], 3, ["nowhere"]),
        (["--images", "a.txt"], 3, ["a.txt", "a folder, .zip, .tar, .npz or .parquet"]),
        (["--images", "embedded:test"], 2, ["got 'test', expected one of train, heldout"]),
        (["-n", 50], 3, ["too few images: got 40, expected -n 50", "Fix: -n 40"]),
        (["-n", 1], 2, ["wrong -n: got 1, expected at least 2. Fix: -n 2"]),
        (["--seed", -1], 2, ["wrong --seed: got -1", "Fix: --seed 0"]),
        (
            ["--batch-size", 8],
            2,
            ["--batch-size would have no effect", "images generated with --model"],
        ),
        (["--steps", 20], 2, ["--steps would have no effect here"]),
        (["--raw"], 2, ["--ema would have no effect here"]),
        (["--tolerance", 0.1], 2, ["--tolerance would have no effect here: it is for --max-reg"]),
        (["--confidence", 1], 2, ["wrong --confidence: got 1", "--confidence 100"]),
        (["--confidence", -1], 2, ["wrong --confidence: got -1"]),
        (["--pr-samples", "many"], 2, ["wrong --pr-samples: got 'many'", "all"]),
        (["--pr-samples", 3], 2, ["wrong --pr-samples: got 3, expected 0 for none, or more than"]),
        (["--max-regression", "x.json", "--tolerance", -0.1], 2, ["wrong --tolerance: got -0.1"]),
        (["--max-fid", "nan"], 2, ["wrong --max-fid: got nan"]),
        (["--min-is", 3], 2, ["no Inception Score for --min-is", "torchscript grid.pt"]),
        (["--max-regression", "nowhere.json"], 3, ["nowhere.json", "--json > REF.json"]),
        (["--features", "clena"], 2, ["did you mean 'clean'?", "efficientnet-lite0"]),
        (["--features", "torchscript:x.pt"], 3, ["no such feature extractor (x.pt)"]),
        (["--features", "torchscript:a.txt"], 3, ["not a TorchScript file", "a.txt"]),
        (["--weights", "x.pt"], 2, ["--weights has no use here: got x.pt"]),
        (["--device", "toaster"], 2, ["'toaster'", "--device cpu"]),
        (["--threads", 0], 2, ["wrong number of threads: got 0"]),
        (["--per-class", "0"], 2, ["got images without classes", "images)", "--per-class out"]),
        (["--images", "embedded", "--per-class", "0"], 2, ["got a reference without classes"]),
        (["--model", "x.tdt"], 2, ["got both --model and --images"]),
        (["--reference-features"], 2, ["--reference-features is for --make-reference"]),
        (["--make-reference", "ref"], 2, ["got ref, expected a name that ends in .npz", "ref.npz"]),
        (["--report", "g.jpg"], 2, ["wrong name for --report: got g.jpg", "--report g.html"]),
        (["--report", "page"], 2, ["wrong name for --report: got page", "--report page.html"]),
        (["--report", "dir.html"], 4, ["cannot write", "(dir.html)"]),
        (["--work", "a.txt"], 4, ["a file where a folder is needed", "a.txt"]),
        (["--save-images", "a.txt"], 4, ["a file where a folder is needed", "a.txt"]),
        (["--report", "a.txt/x/y.xml"], 4, ["a file where a folder is needed", "y.xml"]),
        (["--report", "a.txt/y.md"], 4, ["a file where a folder is needed", "y.md"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_options(
    refused: Refused, tmp_path: Path, words: tuple[object, ...], more: list[object], code: int,
    parts: list[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.html").mkdir()
    (tmp_path / "a.txt").write_text("a file")
    message = refused(code, *words, *more)
    for part in parts:
        assert part in message
    assert "Fix: " in message or code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "parts"),
    [
        (["--per-class", "ankel boot"], 2, ["'ankel boot'", "did you mean 'ankle boot'?"]),
        (["--per-class", "10"], 2, ["got 10, expected 0 to 9"]),
        (["--per-class", "Bag", "-n", 12], 2, ["got 1 of 'Bag' in the images", "at least 2"]),
        (["--sampler", "dppm"], 2, ["'dppm'", "ddpm"]),
        (["--steps", 1], 2, ["got 1"]),
        (["--cfg-scale", "nan"], 2, ["got nan"]),
        (["--backend", "qpu"], 2, ["unknown backend"]),
        (["--vae", "some/vae"], 2, ["some/vae", "without a VAE"]),
        (["--batch-size", 0], 2, ["wrong --batch-size: got 0"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_options_of_a_model(
    refused: Refused, small_tdt: Path, features: str, more: list[object], code: int,
    parts: list[str],
) -> None:  # fmt: skip
    words = ("--reference", "embedded:heldout", "--features", features, "-n", 40, "--steps", 2)
    message = refused(code, "eval-fid", "--model", small_tdt, *words, *more)
    for part in parts:
        assert part in message


def test_nothing_to_do(refused: Refused, folder: Path, features: str, tmp_path: Path) -> None:
    words = ("eval-fid", "--features", features)
    assert "neither --model nor --images" in refused(2, *words, "--reference", folder)
    assert "give --reference" in refused(2, *words, "--images", folder)
    alone = (*words, "--images", folder, "--make-reference", "r.npz")
    for option, value in (("--max-fid", 3), ("--report", "x.html"), ("--per-class", "all")):
        assert f"{option} needs a reference" in refused(2, *alone, option, value)
    for option in (["--confidence", 50], ["--pr-samples", "all"]):
        assert f"{option[0]} would have no effect here" in refused(2, *alone, *option)
    assert "no such model" in refused(3, *words, "--model", "x.tdt", "--reference", folder)


def test_the_reference_is_checked_before_any_image_is_scored(
    folder: Path, tmp_path: Path, refused: Refused, features: str
) -> None:
    (folder / "000.png").write_bytes(b"not a png")
    words = ("eval-fid", "--images", folder, "--features", features)
    assert "nowhere" in refused(3, *words, "--reference", tmp_path / "nowhere")


def test_a_seed_of_any_size(terdit: Terdit, words: tuple[object, ...]) -> None:
    done = terdit(*words, "--seed", 2**40, "--confidence", 2, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["provenance"]["seed"] == 2**40
