"""train -> ternarize -> pack -> sample through the command line, on a tiny trained run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import terdit_cli
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.generate.find_model import find_model
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.ternary import TernaryLinear, ternarize
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.runtime import cpu
from terdit_cli.runtime.load import LoadedModel

Terdit = Callable[..., Any]
FASHION = "T-shirt/top"


@pytest.fixture
def runtime_left_alone() -> Iterator[None]:
    """Undo what --threads sets for the whole process."""
    before = torch.get_num_threads()
    yield
    cpu.set_threads(None)
    torch.set_num_threads(before)


def one_object(text: str) -> dict[str, Any]:
    """Return the only JSON object of `text`; anything beside it is an error."""
    values = json.loads(text)
    assert isinstance(values, dict)
    return values


@pytest.mark.slow
def test_train_says_where_the_product_is(
    terdit: Terdit, small_recipe: Path, tmp_path: Path
) -> None:
    words = ("train", small_recipe, "train.steps=4", "logging.every=2", "--out")
    done = terdit(*words, tmp_path / "a")
    assert done.code == 0
    assert done.out.startswith("trained 4 steps, loss 1.")
    assert done.out.rstrip().endswith(str(tmp_path / "a" / "ckpt.pt"))
    done = terdit(*words, tmp_path / "b", "--json")
    values = one_object(done.out)
    assert values["steps"] == 4
    assert Path(values["checkpoint"]).is_file()
    assert "training small: 4/4" in done.err


def test_the_default_run_folder(
    terdit: Terdit, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert terdit("train", small_recipe, "train.steps=1", "name=other").code == 0
    assert Path("runs/other/ckpt.pt").is_file()


@pytest.mark.slow
def test_dry_run_trains_nothing(terdit: Terdit, small_recipe: Path, tmp_path: Path) -> None:
    words = ("train", small_recipe, "data.source=folder", "data.path=nowhere", "--dry-run")
    done = terdit(*words)
    assert done.code == 0
    assert done.err == "nowhere is not here: the plan is of the recipe alone\n"
    assert "plan for one process" in done.out
    assert "56,658" in done.out
    values = one_object(terdit(*words, "--json").out)
    assert values["parameters"] == 56_658
    assert values["images"] == 30 * 8


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_ternarize_prints_every_layer(
    terdit: Terdit, small_run: Path, tmp_path: Path, weights: str
) -> None:
    output = tmp_path / "out.safetensors"
    done = terdit("ternarize", small_run, "-o", output, f"--{weights}")
    assert done.code == 0
    assert done.err == ""
    assert f"({weights} weights)" in done.out
    lines = done.out.splitlines()
    state = load_ckpt(small_run / "ckpt.pt").state_dict(weights)  # type: ignore[arg-type]
    masters = [key for key in state if key.removesuffix(".weight") + ".alphas" in state]
    assert len(masters) == 16
    with safe_open(output, "pt") as file:
        for key in masters:
            name = key.removesuffix(".weight")
            [line] = [line for line in lines if line.split()[:1] == [name]]  # never folded
            trits = file.get_tensor(key)
            assert trits.dtype == torch.int8
            assert torch.equal(trits.float(), ternarize(state[key]))
            assert torch.equal(file.get_tensor(f"{name}.alphas"), state[f"{name}.alphas"])
            shape, minus, zero, plus = line.split()[1:5]
            assert shape == "x".join(map(str, trits.shape))
            for value, share in ((-1, minus), (0, zero), (1, plus)):
                found = 100 * (trits == value).double().mean()
                assert float(share) == pytest.approx(float(found), abs=0.051)


def test_ternarize_as_json(terdit: Terdit, small_run: Path, tmp_path: Path) -> None:
    done = terdit("ternarize", small_run / "ckpt.pt", "-o", tmp_path / "a.safetensors", "--json")
    values = one_object(done.out)
    assert done.err == ""
    assert values["fitted"] is False
    assert len(values["layers"]) == 16
    for layer in values["layers"]:
        assert layer["minus"] + layer["zero"] + layer["plus"] == pytest.approx(1)
        assert 0 <= layer["relative_error"] < 1.5
        assert abs(layer["cosine"]) <= 1 + 1e-6


def test_a_full_precision_run_is_fitted_with_a_plain_warning(
    terdit: Terdit, parent_run: Path, tmp_path: Path
) -> None:
    errors = []
    for granularity in ("tensor", "row", "group128"):
        output = tmp_path / f"{granularity}.safetensors"
        words = ("ternarize", parent_run, "-o", output, "--force", "--granularity", granularity)
        done = terdit(*words)
        assert done.code == 0
        assert "warning:" in done.err
        assert "post-training quantisation has a mean relative error of 0." in done.err
        assert "train with ternary.enabled=true" in done.err
        errors.append(one_object(terdit(*words, "--json").out)["relative_error"])
        assert terdit("pack", output, "-o", tmp_path / f"{granularity}.tdt").code == 0
    assert errors[1] < errors[0]  # a scale for each row fits better than one for all


@pytest.mark.parametrize("codec", ["t2", "t5"])
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_pack_and_its_sizes(
    terdit: Terdit, small_run: Path, tmp_path: Path, codec: str, rest: str
) -> None:
    output = tmp_path / "new folder" / "m.tdt"
    words = ("pack", small_run, "-o", output, "--force", "--codec", codec, "--rest", rest)
    done = terdit(*words)
    assert done.code == 0
    assert f"{output.stat().st_size:,} bytes" in done.out
    assert "56,658" in done.out
    values = one_object(terdit(*words, "--json").out)
    assert values["file_bytes"] == output.stat().st_size
    assert values["fp32_bytes"] == 4 * 56_658
    smallest = {"t2": 2.0, "t5": 1.6}[codec]
    assert smallest <= values["bits_per_weight"] < 2 * smallest  # these short rows are padded
    model = TdtFile(output)
    assert model.info.weights == "ema"
    assert model.info.step == 30
    assert model.info.class_names[0] == FASHION
    assert {path.name for path in output.parent.iterdir()} == {"m.tdt"}


def content(path: Path) -> dict[str, Any]:
    """Return everything a .tdt says: its metadata, with a digest of each tensor."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return {key: json.loads(text) if key != "format" else text for key, text in metadata.items()}


def test_the_three_ways_to_a_tdt_agree(
    terdit: Terdit, small_run: Path, small_tdt: Path, tmp_path: Path
) -> None:
    middle = tmp_path / "middle.safetensors"
    assert terdit("ternarize", small_run, "-o", middle).code == 0
    assert terdit("pack", middle, "-o", tmp_path / "a.tdt").code == 0
    assert terdit("pack", small_run / "ckpt.pt", "-o", tmp_path / "b.tdt").code == 0
    assert terdit("pack", small_tdt, "-o", tmp_path / "c.tdt").code == 0
    wanted = content(small_tdt)
    for name in "abc":
        assert content(tmp_path / f"{name}.tdt") == wanted


def test_the_packed_network_equals_the_trained_one(small_run: Path, small_tdt: Path) -> None:
    trained = terdit_cli.load_model(small_run)
    packed = terdit_cli.load_model(small_tdt, backend="reference")
    assert any(isinstance(module, TernaryLinear) for module in trained.modules())
    assert not any(isinstance(module, TernaryLinear) for module in packed.modules())
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10])
    with torch.inference_mode():
        assert torch.equal(trained(x, t, y), packed(x, t, y))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_how_it_ran_is_in_the_json(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, runtime_left_alone: None, backend: str
) -> None:
    if backend == "cpu" and (reason := cpu.available(torch.device("cpu"))):
        pytest.skip(reason)
    words = ("--prompt-class", 1, "--steps", 2, "-o", tmp_path / "a.npz", "--backend", backend)
    words += ("--activations", "int16", "--threads", 2, "--device", "cpu")
    done = terdit("sample", "--model", small_tdt, *words, "--json")
    values = one_object(done.out)
    isa = cpu.isa() if backend == "cpu" else None
    wanted = {"backend": backend, "isa": isa, "threads": 2, "activations": "int16"}
    assert {name: values[name] for name in wanted} == wanted
    assert f"backend {backend} (as asked), {isa + ', ' if isa else ''}threads 2, " in done.err
    assert "activations int16 (as asked) on cpu" in done.err
    assert torch.get_num_threads() == 2


def test_how_a_checkpoint_ran_is_in_the_json(
    terdit: Terdit, small_run: Path, tmp_path: Path, runtime_left_alone: None
) -> None:
    words = ("--prompt-class", 1, "--steps", 2, "-o", tmp_path / "a.npz", "--device", "cpu")
    values = one_object(terdit("sample", "--model", small_run, *words, "--json").out)
    assert (values["backend"], values["isa"], values["activations"]) == ("torch", None, "fp32")
    assert values["threads"] == torch.get_num_threads()


def test_the_last_weights_of_a_run(terdit: Terdit, small_run: Path, tmp_path: Path) -> None:
    words = ("--prompt-class", "all", "--steps", 2, "--device", "cpu", "--json")
    images = {}
    for flag, packed in (("--ema", "ema.tdt"), ("--raw", "raw.tdt")):
        model, out = tmp_path / packed, tmp_path / f"{packed}.npz"
        values = one_object(terdit("sample", "--model", small_run, "-o", out, *words, flag).out)
        assert values["weights"] == flag[2:]
        images[flag] = np.load(out)["arr_0"]
        assert terdit("pack", small_run, "-o", model, "--rest", "fp32", flag).code == 0
        exact = ("--backend", "reference", "--activations", "fp32")
        values = one_object(
            terdit("sample", "--model", model, "-o", out, "--force", *words, *exact).out
        )
        assert values["weights"] == flag[2:]
        assert np.array_equal(np.load(out)["arr_0"], images[flag])
    assert not np.array_equal(images["--ema"], images["--raw"])


def test_threads_of_the_environment(
    terdit: Terdit,
    small_tdt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runtime_left_alone: None,
) -> None:
    words = ("sample", "--model", small_tdt, "--prompt-class", 1, "--steps", 2, "--json")
    words += ("-o", tmp_path / "a.npz", "--force")
    monkeypatch.setenv("TERDIT_THREADS", "2")
    assert one_object(terdit(*words).out)["threads"] == 2
    assert one_object(terdit(*words, "--threads", 1).out)["threads"] == 1  # a flag wins
    for text in ("0", "257", "-3"):
        monkeypatch.setenv("TERDIT_THREADS", text)
        done = terdit(*words)
        assert (done.code, done.out) == (2, "")
        assert text in done.err
        assert "TERDIT_THREADS" in done.err


def test_an_unknown_instruction_set(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := cpu.available(torch.device("cpu")):
        pytest.skip(reason)
    monkeypatch.setenv("TERDIT_ISA", "mmx")
    cpu._open.cache_clear()
    done = terdit("sample", "--model", small_tdt, "--prompt-class", 1, "-o", tmp_path / "a.npz")
    assert (done.code, done.out) == (2, "")
    assert "unknown instruction set: got 'mmx', expected one of auto, " in done.err
    assert "(TERDIT_ISA). Fix: unset TERDIT_ISA" in done.err


def test_runtime_options_that_cannot_be(
    terdit: Terdit, small_tdt: Path, small_run: Path, tmp_path: Path
) -> None:
    words = ("--prompt-class", 1, "-o", tmp_path / "a.npz")
    done = terdit("sample", "--model", small_run, *words, "--activations", "int8")
    assert done.code == 2
    assert "--activations is for packed models: got --activations int8" in done.err
    assert f"Fix: terdit pack {small_run} -o model.tdt" in done.err
    done = terdit("sample", "--model", small_tdt, *words, "--activations", "int4")
    assert done.code == 2
    assert "unknown activations: got 'int4'" in done.err
    done = terdit("sample", "--model", small_tdt, *words, "--threads", 0)
    assert done.code == 2
    assert "--threads" in done.err
    assert not (tmp_path / "a.npz").exists()


def drawn(terdit: Terdit, model: Path, output: Path, *words: object) -> Any:
    """Return the .npz that `terdit sample` writes."""
    steps = ("--sampler", "ddpm", "--steps", 8)
    done = terdit("sample", "--model", model, "-o", output, "--force", *steps, *words)
    assert done.code == 0, done.err
    return np.load(output)


def test_an_image_depends_on_nothing_but_seed_class_and_copy(
    terdit: Terdit, small_tdt: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.npz"
    fp32 = ("--activations", "fp32", "--prompt-class")
    all_of_them = drawn(terdit, small_tdt, output, *fp32, "3,7,9", "-n", 3)
    images, labels = all_of_them["arr_0"], all_of_them["labels"]
    assert images.shape == (9, 28, 28, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 3, 3, 7, 7, 7, 9, 9, 9]
    assert images.std() > 10
    assert len({image.tobytes() for image in images}) == 9
    singly = drawn(terdit, small_tdt, output, *fp32, "3,7,9", "-n", 3, "--batch-size", 1)
    alone = drawn(terdit, small_tdt, output, *fp32, 7)
    named = drawn(terdit, small_tdt, output, *fp32, "ankle boot", "-n", 2)
    packed = drawn(terdit, small_tdt, output, *fp32, 7, "--seed", 1)
    # torch's products of other batch sizes may round otherwise: at most one level of a pixel.
    # With int8 activations such a difference can move a value to the next step, which is more.
    assert np.abs(singly["arr_0"].astype(int) - images).max() <= 1
    assert np.abs(alone["arr_0"].astype(int) - images[3:4]).max() <= 1
    assert np.abs(named["arr_0"].astype(int) - images[6:8]).max() <= 1
    assert np.abs(packed["arr_0"].astype(int) - images[3:4]).max() > 20


def test_the_batch_that_a_gpu_has_room_for(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "largest_batch", lambda model, guided: 3 if guided else 6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    output = tmp_path / "a.npz"
    words = (
        "sample",
        "--model",
        small_tdt,
        "--prompt-class",
        "all",
        "--steps",
        2,
        "--force",
        "-o",
        output,
    )
    done = terdit(*words, "--device", "auto")
    assert done.code == 0, done.err
    assert "--batch-size 3: too little GPU memory for 8" in done.err
    images = np.load(output)["arr_0"]
    assert terdit(*words, "--batch-size", 3).code == 0
    np.testing.assert_array_equal(np.load(output)["arr_0"], images)
    done = terdit(*words, "--batch-size", 7, "--cfg-scale", 1)
    assert (done.code, done.out) == (4, "")
    assert "got 1.00 GB free, expected room for 7 images at once" in done.err
    assert "Fix: --batch-size 6." in done.err


def test_the_same_call_gives_the_same_bytes(
    terdit: Terdit, small_tdt: Path, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        words = ("--steps", 4, "--prompt-class", "all", "-o", tmp_path / name)
        assert terdit("sample", "--model", small_tdt, *words).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "unipc", "euler"])
def test_a_labelled_grid_with_its_origin_in_text_chunks(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, sampler: str
) -> None:
    import hashlib

    output = tmp_path / "grid.png"
    words = ("--sampler", sampler, "--steps", 4, "--seed", 5, "--cfg-scale", 1.5)
    done = terdit(
        "sample", "--model", small_tdt, "--prompt-class", "Bag, 3", "-n", 2, *words, "-o", output
    )
    assert done.code == 0
    assert done.out.startswith(f"{output}: 4 images, 8 NFE each")
    with Image.open(output) as picture:
        text = picture.text  # type: ignore[attr-defined]
        assert picture.width > 2 * 28
    assert text["seed"] == "5"
    assert text["class"] == "Bag, Dress"
    assert text["sampler"] == f"{sampler} 4 steps"
    assert text["cfg_scale"].startswith("1.5")
    assert text["model_sha256"] == hashlib.sha256(small_tdt.read_bytes()).hexdigest()
    assert text["software"] == f"terdit {terdit_cli.__version__}"


def test_a_folder_of_images(terdit: Terdit, small_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "many"
    words = ("--steps", 4, "--cfg-scale", 1, "--prompt-class", "2,4", "-n", 2, "-o", output)
    done = terdit("sample", "--model", small_run, *words, "--json")
    values = one_object(done.out)
    assert (values["images"], values["nfe"], values["classes"]) == (4, 4, [2, 4])
    assert sorted(path.name for path in output.iterdir()) == [
        "000000-class0002.png",
        "000001-class0002.png",
        "000002-class0004.png",
        "000003-class0004.png",
    ]
    with Image.open(output / "000003-class0004.png") as picture:
        assert picture.size == (28, 28)
        assert picture.text["class"] == "Coat"  # type: ignore[attr-defined]
        assert picture.text["index"] == "14"  # type: ignore[attr-defined]


def test_nothing_of_the_user_is_replaced_without_being_asked(
    terdit: Terdit, small_run: Path, small_tdt: Path, tmp_path: Path
) -> None:
    sample = ("sample", "--model", small_tdt, "--steps", 2, "--prompt-class")
    for name, words in (
        ("model.tdt", ("pack", small_run)),
        ("model.safetensors", ("ternarize", small_run)),
        ("a.npz", (*sample, 1)),
        ("theirs.png", (*sample, 1)),
    ):
        path = tmp_path / name
        path.write_bytes(b"precious")
        done = terdit(*words, "-o", path)
        assert (done.code, path.read_bytes()) == (2, b"precious")
        assert f"the output exists: got {name}" in done.err
        assert terdit(*words, "-o", path, "--force").code == 0
        assert path.read_bytes() != b"precious"
    # A grid of this command says how to make it again.
    assert terdit(*sample, 2, "-o", tmp_path / "theirs.png").code == 0
    folder = tmp_path / "cfg-1.5-seed-0"
    assert terdit(*sample, "1,2", "-o", f"{folder}/").code == 0
    assert terdit(*sample, "1,2", "-o", folder).code == 2
    assert terdit(*sample, "3", "-o", folder, "--force").code == 0
    assert [path.name for path in folder.iterdir()] == ["000000-class0003.png"]


@pytest.mark.parametrize("name", ["DiT-256-cfg-1.5-seed-0/", "v1.5", "x.PNG/", "a.folder/"])
def test_folders_with_dots_in_their_names(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, name: str
) -> None:
    words = ("sample", "--model", small_tdt, "--prompt-class", "1", "--steps", 2)
    assert terdit(*words, "-o", f"{tmp_path}/{name}").code == 0
    assert [path.name for path in (tmp_path / name).iterdir()] == ["000000-class0001.png"]


def test_suffixes_in_capitals(terdit: Terdit, small_tdt: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", small_tdt, "--prompt-class", "1", "--steps", 2)
    assert terdit(*words, "-o", tmp_path / "OUT.PNG").code == 0
    with Image.open(tmp_path / "OUT.PNG") as picture:
        assert picture.format == "PNG"
    assert terdit(*words, "-o", tmp_path / "OUT.NPZ").code == 0
    assert np.load(tmp_path / "OUT.NPZ")["arr_0"].shape == (1, 28, 28, 3)


def test_which_model_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terdit: Terdit
) -> None:
    import os

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TERDIT_MODEL", raising=False)
    monkeypatch.setenv("TERDIT_MODELS", str(tmp_path))
    done = terdit("sample", "--prompt-class", 1)
    assert done.code == 2
    assert "no model to sample from" in done.err
    assert "terdit train" in done.err
    monkeypatch.delenv("TERDIT_MODELS")
    for age, name in ((200, "new"), (900, "old")):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "ckpt.pt").touch()
        os.utime(folder / "ckpt.pt", (1e9 - age, 1e9 - age))
    Path("runs/unfinished").mkdir()
    assert find_model(None, "1").path == Path("runs/new/ckpt.pt")
    Path("b.tdt").touch()
    assert find_model(None, "1").path == Path("b.tdt")
    Path("a.tdt").touch()
    with pytest.raises(UsageError, match=r"got a\.tdt, b\.tdt.*--model"):
        find_model(None, "1")
    monkeypatch.setenv("TERDIT_MODEL", "elsewhere.tdt")
    with pytest.raises(InputFileError, match=r"no such model: got 'elsewhere\.tdt'"):
        find_model(None, "1")
    assert find_model(Path("b.tdt"), "1").path == Path("b.tdt")
    assert terdit("sample", "--prompt-class", 1).code == 3  # there is no elsewhere.tdt
