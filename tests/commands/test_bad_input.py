"""Mistakes of users and files: the documented exit code, one sentence, nothing left behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

Terdit = Callable[..., Any]
Evil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["train.stepz=3"], 2, ["train.stepz: unknown key (did you mean 'steps'?)"]),
        (["train.steps=many", "ema.decy=1"], 2, ["2 mistakes", "'many'", "did you mean 'decay'?"]),
        (["train.global_batch_size=9"], 2, ["9 must be a multiple of", "micro_batch_size 8"]),
        (["model.patch_size=5"], 2, ["image_size 28", "patch_size 5"]),
        (["model.size=tinny"], 2, ["'tinny' (did you mean 'tiny'?)", "model.size"]),
        (["model.n_heads=5"], 2, ["n_heads"]),
        (["data.source=embeded"], 2, ["did you mean 'embedded'?"]),
        (["data.source=folder", "data.split=null"], 2, ["data.path is needed"]),
        (["data.source=folder", "data.split=null", "data.path=none"], 3, ["none", "Fix: "]),
        (["data.source=zip", "data.split=null", "data.path=none.zip"], 3, ["none.zip", "Fix: "]),
        (["data.source=zip", "data.split=null", "data.path=bad.zip"], 3, ["bad.zip", "Fix: "]),
        (["data.source=folder", "data.split=null", "data.path=empty"], 3, ["no images found"]),
        (["--resume", "nowhere"], 3, ["nowhere", "--resume auto"]),
        (["--resume", "bad.zip"], 2, ["checkpoint folder: got the file", "init_from=bad.zip"]),
        (["--out", "taken"], 4, ["taken", "Fix: name a folder you can write to"]),
        (["--out", "taken/below"], 4, ["taken/below", "a file where a folder is needed"]),
        (["sample.steps=1", "sample.sampler=ddpm"], 2, ["steps"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_train(
    refused: Callable[..., str], tmp_path: Path, small_recipe: Path, words: list[str], code: int,
    parts: list[str],
) -> None:  # fmt: skip
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not a zip at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("a file")
    message = refused(code, "train", small_recipe, *words)
    for part in parts:
        assert part in message


def test_train_without_a_recipe(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("name: a")
    assert "available recipes: there.yaml" in refused(3, "train", "their.yaml")
    assert "not key=value" in refused(2, "train", "there.yaml", "--", "-steps", "5")


def test_an_empty_word_is_no_folder(refused: Callable[..., str]) -> None:
    # -o "$OUT" without such a variable: Path("") would be the current folder.
    message = refused(2, "sample", "--prompt-class", "sneaker", "-o", "")
    assert "terdit sample --prompt-class sneaker -o ''" in message
    assert "shell variable" in message


def damaged(kind: str, folder: Path, small_run: Path, small_tdt: Path, evil: Evil) -> Path:
    """Write a model file with something wrong into `folder`."""
    path = folder / f"{kind}.tdt"
    data = bytearray(small_tdt.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[-1000] ^= 0x10
        path.write_bytes(data)
    elif kind == "newer":
        old, new = b'"format_version":"1"', b'"format_version":"7"'
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
    elif kind == "foreign":
        save_file({"w": torch.zeros(3)}, path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello, I am a model")
    elif kind == "code":
        path = folder / "code.pt"
        torch.save({"format": "terdit-checkpoint", "model": evil(folder / "ran")}, path)
    elif kind == "legacy-code":
        path = folder / "legacy.pt"
        path.write_bytes(pickle.dumps(evil(folder / "ran")))
    elif kind == "other-config":
        path = folder / "other.pt"
        values = torch.load(small_run / "ckpt.pt", weights_only=True)
        values["info"]["config"]["n_layers"] = 3
        torch.save(values, path)
    elif kind == "half-ckpt":
        path = folder / "half.pt"
        whole = (small_run / "ckpt.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "missing":
        path = folder / "missing.tdt"
    elif kind == "unfinished":
        path = folder / "run"
        path.mkdir()
        (path / "recipe.yaml").write_text("name: run")
    return path


KINDS = (
    "truncated", "flipped", "newer", "foreign", "empty", "text", "code", "legacy-code",
    "other-config", "half-ckpt", "missing", "unfinished",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_cannot_be_used(
    refused: Callable[..., str], tmp_path: Path, small_run: Path, small_tdt: Path, evil: Evil,
    kind: str,
) -> None:  # fmt: skip
    path = damaged(kind, tmp_path, small_run, small_tdt, evil)
    (tmp_path / "old.tdt").write_bytes(b"precious")
    sample = ("sample", "--prompt-class", 1, "--steps", 2, "--model", path, "-o", "x.png")
    for words in (("pack", path, "-o", "old.tdt", "--force"), sample):
        message = refused(3, *words)
        assert path.name in message
        assert "Fix: " in message
    if path.suffix != ".tdt":
        assert path.name in refused(3, "ternarize", path, "-o", "old.tdt", "--force")
    assert (tmp_path / "old.tdt").read_bytes() == b"precious"
    assert not (tmp_path / "ran").exists()


def test_ternarize(
    refused: Callable[..., str], small_run: Path, small_tdt: Path, tmp_path: Path
) -> None:
    assert "use `terdit pack`" in refused(3, "ternarize", small_tdt, "-o", "x.safetensors")
    message = refused(2, "ternarize", small_run, "-o", "x.safetensors", "--granularity", "row")
    assert "leave --granularity out" in message
    assert "no such model" in refused(3, "ternarize", "nowhere", "-o", "x.safetensors")
    (tmp_path / "file").touch()
    assert "file/x.safetensors" in refused(4, "ternarize", small_run, "-o", "file/x.safetensors")


def test_pack(
    refused: Callable[..., str], small_run: Path, parent_run: Path, small_tdt: Path, tmp_path: Path
) -> None:
    message = refused(2, "pack", parent_run, "-o", "x.tdt")
    assert "full precision" in message
    assert f"terdit ternarize {parent_run / 'ckpt.pt'}" in message
    assert "takes overrides: got n_heads=4" in refused(2, "pack", small_run, "n_heads=4")
    assert "got 'n_heads=four'" in refused(2, "pack", small_run, "n_heads=four")
    assert "the output is the input" in refused(2, "pack", small_tdt, "-o", small_tdt)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert "file/x.tdt" in refused(4, "pack", small_run, "-o", "file/x.tdt")
    assert "folder" in refused(4, "pack", small_run, "-o", "folder")


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--prompt-class", "ankel boot"], 2, ["'ankel boot'", "did you mean 'ankle boot'?"]),
        (["--prompt-class", "10"], 2, ["out of range: got 10, expected 0 to 9"]),
        (["--prompt-class", "-1"], 2, ["out of range: got -1"]),
        (["--prompt-class", ""], 2, ["an argument of the command is empty"]),
        (["--prompt-class", " "], 2, ["unknown class"]),
        (["--prompt-class", "1,,2"], 2, ["unknown class"]),
        (["--prompt-class", "1", "--sampler", "dppm"], 2, ["'dppm'", "did you mean 'ddpm'"]),
        (["--prompt-class", "1", "--steps", "0"], 2, ["got 0", "--steps"]),
        (["--prompt-class", "1", "--steps", "1001"], 2, ["got 1001"]),
        (["--prompt-class", "1", "-n", "0"], 2, ["wrong -n: got 0"]),
        (["--prompt-class", "1", "--batch-size", "-3"], 2, ["wrong --batch-size: got -3"]),
        (["--prompt-class", "1", "--cfg-scale", "nan"], 2, ["got nan"]),
        (["--prompt-class", "1", "--cfg-scale", "-1"], 2, ["got -1"]),
        (["--prompt-class", "1", "--seed", "-1"], 2, ["got -1", "--seed"]),
        (["--prompt-class", "1", "--device", "toaster"], 2, ["'toaster'", "--device cpu"]),
        (["--prompt-class", "1", "--device", "cuda:99"], 4, ["got --device cuda:99", "Fix: --de"]),
        (["--prompt-class", "1", "--vae", "some/vae"], 2, ["some/vae", "Fix: leave --vae out"]),
        (["--prompt-class", "1", "--backend", "gpu"], 4, ["'gpu' cannot run", "--backend auto"]),
        (["--prompt-class", "1", "--backend", "qpu"], 2, ["unknown backend"]),
        (["--prompt-class", "1", "-o", "x.jpg"], 2, [".jpg", "-o x.png", "-o x.jpg/"]),
        (["--prompt-class", "1", "-o", "file"], 2, ["the output folder is a file"]),
        (["--prompt-class", "1", "-o", "file/x.png"], 4, ["file/x.png"]),
        (["--prompt-class", "1", "-o", "file/x.npz"], 4, ["file/x.npz"]),
        (["--prompt-class", "1", "-o", "file/x"], 4, ["file/x"]),
        (
            ["--prompt-class", "1", "-o", "old.npz"],
            2,
            ["the output exists: got old.npz", "--force"],
        ),
        (["--prompt-class", "1", "-o", "theirs.png"], 2, ["the output exists: got theirs.png"]),
        (["--prompt-class", "1", "-o", "full"], 2, ["the folder holds images: got a.png"]),
        (["--prompt-class", "all", "-n", "30"], 2, ["got 300", "at most 256", "-o samples/"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_sample(
    refused: Callable[..., str], tmp_path: Path, small_tdt: Path, words: list[str], code: int,
    parts: list[str],
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    (tmp_path / "old.npz").write_bytes(b"precious")
    (tmp_path / "full").mkdir()
    for name in ("theirs.png", "full/a.png"):
        Image.new("L", (2, 2)).save(tmp_path / name)
    first = ("sample", "--model", small_tdt)
    message = refused(code, *first, "--steps", 2, *words)
    for part in parts:
        assert part in message


def test_guidance_of_a_model_without_a_null_class(
    terdit: Terdit, refused: Callable[..., str], small_recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "plain"
    words = ("model.class_dropout_prob=0", "train.steps=1", "--out", folder)
    assert terdit("train", small_recipe, *words).code == 0
    sample = ("sample", "--model", folder, "--prompt-class", 1, "--steps", 2)
    message = refused(2, *sample)
    assert "no null class" in message
    assert "--cfg-scale 1" in message
    output = folder.parent / "x.png"
    done = terdit(*sample, "--cfg-scale", 1, "-o", output, "--json")
    assert json.loads(done.out)["nfe"] == 2


@pytest.mark.slow
def test_a_damaged_tag_of_an_image_is_not_told_without_its_name(
    small_recipe: Path, tmp_path: Path
) -> None:
    """Pillow warns of a JPEG's broken EXIF, without saying of which file."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    tags = b"Exif\0\0MM\0*\0\0\0\x08\0\x01"
    for index in range(8):
        path = tmp_path / "images" / "a" / f"{index}.jpg"
        Image.new("RGB", (28, 28)).save(path, exif=tags)
    data = ["data.source=folder", f"data.path={tmp_path / 'images'}", "data.split=null"]
    words = ["train", small_recipe, *data, "model.num_classes=1", "train.steps=1"]
    done = subprocess.run(
        [sys.executable, "-m", "terdit_cli", *words, "--out", tmp_path / "run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "EXIF" not in done.stderr
