"""Released TerDiT folders: end to end against the recording, and folders that do not fit."""

from __future__ import annotations

import argparse
import dataclasses
import shutil

import pytest
import torch

from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.dit import DiTConfig, build_config
from terdit_cli.pack import read_release as convert
from terdit_cli.pack.read_release import (
    ARGUMENTS_FILE,
    ReleasedFolder,
    _ffn_fields,
    is_released_folder,
)
from terdit_cli.pack.tdt import TdtFile, write_tdt
from terdit_cli.pack.trits import released_encode
from terdit_cli.runtime.load import load, load_model

WEIGHTS = "consolidated_ema_ternary.00-of-01.pth"
WQ = "layers.0.attention.wq.weight"
SIZES_BY_NAME = {"600M": "600m", "3B": "4.2b", "7B": "7b"}


@pytest.fixture
def folder(tmp_path, released_folder):
    """A copy that a test may change."""
    target = tmp_path / "released"
    shutil.copytree(released_folder, target)
    return target


def rewrite(folder, edit) -> None:
    """Change the weights with `edit(state)`."""
    state = torch.load(folder / WEIGHTS, weights_only=True)
    edit(state)
    torch.save(state, folder / WEIGHTS)


def rewrite_arguments(folder, **values) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        arguments = torch.load(folder / ARGUMENTS_FILE, weights_only=True)
    torch.save(argparse.Namespace(**vars(arguments) | values), folder / ARGUMENTS_FILE)


@pytest.mark.parametrize("codec", ["t2", "t5"])
def test_end_to_end(tmp_path, golden_case, released_folder, codec):
    case = golden_case("public_a")
    x, t, y = (case.tensors[f"in.{key}"] for key in "xty")
    with torch.inference_mode():
        direct = load_model(released_folder, activations="fp32", n_heads=4)(x, t, y)
        with ReleasedFolder(released_folder, n_heads=4) as model:
            write_tdt(model, tmp_path / "m.tdt", codec, "fp32")
        loaded = load(tmp_path / "m.tdt", activations="fp32")
        packed = loaded.network(x, t, y)
    assert (direct - case.tensors["out.packed"]).abs().max() <= 1e-5
    assert torch.equal(packed, direct)
    info = loaded.info
    # Another multiple_of may give the same feed-forward width: the tensors show the width only.
    assert info.config.ffn_width == case.config.ffn_width
    assert dataclasses.replace(info.config, multiple_of=case.config.multiple_of) == case.config
    assert info.class_order == "text"
    assert info.weights == "ema"
    assert info.image_size == 64
    assert (info.space.kind, info.space.scale_factor) == ("vae", 0.18215)
    assert info.space.vae == "stabilityai/sd-vae-ft-ema"


def test_matrices_are_the_recorded_ones(golden_case, released_folder):
    masters = golden_case("public_a").part("train")
    with ReleasedFolder(released_folder, n_heads=4) as model:
        assert len(model.ternary_names()) == 16
        for name in model.ternary_names():
            weight = masters[f"{name}.weight"]
            assert model.matrix_shape(name) == tuple(weight.shape)
            trits = (weight / (weight.abs().mean() + 1e-6)).round().clamp(-1, 1)
            assert torch.equal(model.trits(name).float(), trits)
            assert torch.equal(model.alphas(name), masters[f"{name}.alphas"])
        for name in model.rest_names():
            assert torch.equal(model.rest(name), masters[name])


def test_redundant_overrides(golden_case, released_folder):
    """The whole configuration may be given; it must agree with the tensors."""
    whole = golden_case("public_a").facts["model"]
    with ReleasedFolder(released_folder, **whole) as model:
        assert {name: getattr(model.info.config, name) for name in whole} == whole


def test_grouped_heads_and_other_shapes(tmp_path, golden_case):
    """public_b: 6 heads over 3 k/v heads, q/k norm, a label table of 1001."""
    case = golden_case("public_b")
    state = case.part("train") | case.part("packed")
    torch.save(state, tmp_path / WEIGHTS)
    torch.save(argparse.Namespace(image_size=64, qk_norm=True), tmp_path / ARGUMENTS_FILE)
    network = load_model(tmp_path, activations="fp32", n_heads=6)
    config = network.config
    assert (config.n_kv_heads, config.qk_norm, config.num_classes) == (3, True, 1000)
    assert config.ffn_width == case.config.ffn_width
    x, t, y = (case.tensors[f"in.{key}"] for key in "xty")
    with torch.inference_mode():
        error = (network(x, t, y) - case.tensors["out.packed"]).abs().max()
    assert error <= 1e-5
    # Another number of heads that fits as well cannot be told from the tensors.
    assert load_model(tmp_path, n_heads=12).config.n_kv_heads == 6
    with pytest.raises(UsageError, match=r"n_kv_heads does not match.*got 6, expected 3"):
        load_model(tmp_path, n_heads=6, n_kv_heads=6)


def test_heads_from_the_arguments(folder):
    with pytest.raises(UsageError, match=r"heads is not in the checkpoint.*Fix: add n_heads=N"):
        ReleasedFolder(folder)
    rewrite_arguments(folder, n_heads=4)
    assert ReleasedFolder(folder).info.config.n_heads == 4


def test_without_arguments(folder, golden_case):
    (folder / ARGUMENTS_FILE).unlink()
    assert is_released_folder(folder)
    model = ReleasedFolder(folder, n_heads=4, input_size=8)
    assert model.info.config.num_classes == 10
    assert model.info.image_size == 64
    x, t, y = (golden_case("public_a").tensors[f"in.{key}"] for key in "xty")
    with torch.inference_mode():
        network = load_model(folder, activations="fp32", n_heads=4, input_size=8)
        error = (network(x, t, y) - golden_case("public_a").tensors["out.packed"]).abs().max()
    assert error <= 1e-5


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            {"n_heads": 5},
            r"n_heads does not match the checkpoint: got 5, expected a divisor of dim 64",
        ),
        ({"n_heads": 64}, r"dim: got 64, expected a multiple of 128, 2 x n_heads 64"),
        ({"n_heads": 0}, "n_heads is 0, expected a positive number"),
        ({"n_heads": -4}, "n_heads is -4"),
        ({"n_heads": "four"}, "n_heads is 'four', expected int"),
        ({"n_heads": 4.0}, "n_heads is 4.0"),
        ({"n_heads": True}, "n_heads is True"),
        ({"n_heads": 4, "n_kv_heads": 2}, "n_kv_heads does not match the checkpoint: got 2"),
        ({"n_heads": 4, "heads": 3}, r"unknown model field.*'heads' \(did you mean 'n_heads'"),
        ({"n_heads": 4, "patch_size": 3}, r"patch_size\^2 \* in_channels = 16"),
        ({"n_heads": 4, "in_channels": 3}, "does not match the checkpoint"),
        ({"n_heads": 4, "in_channels": 0}, "in_channels is 0"),
        ({"n_heads": 4, "dim": 96}, "override of dim contradicts the checkpoint: got 96"),
        ({"n_heads": 4, "n_layers": 3}, "override of n_layers contradicts"),
        ({"n_heads": 4, "qk_norm": True}, "override of qk_norm contradicts"),
        ({"n_heads": 4, "multiple_of": 256}, "override of ffn_width contradicts.*got 256"),
        ({"n_heads": 4, "class_dropout_prob": 2.0}, r"class_dropout_prob: got 2\.0"),
    ],
)
def test_wrong_overrides(released_folder, overrides, match):
    with pytest.raises(UsageError, match=match) as error:
        load_model(released_folder, **overrides)
    assert error.value.exit_code == 2


def edits():
    def drop(key):
        return lambda state: state.pop(key)

    def put(key, value):
        return lambda state: state.update({key: value})

    code_3 = torch.full((16, 64), 0b11, dtype=torch.uint8)
    return {
        "no matrix": drop(WQ),
        "no alphas": drop("layers.1.attention.wo.alphas"),
        "no embedder": drop("x_embedder.weight"),
        "no label table": drop("y_embedder.embedding_table.weight"),
        "no bias": drop("final_layer.linear.bias"),
        "no first layer": lambda s: [s.pop(k) for k in list(s) if k.startswith("layers.0.")],
        "extra": put("extra", torch.ones(1)),
        "flat matrix": put(WQ, torch.zeros(1024, dtype=torch.uint8)),
        "other shape": put(WQ, torch.zeros(8, 64, dtype=torch.uint8)),
        "masters": put(WQ, torch.zeros(16, 64)),
        "code 3": put(WQ, code_3),
        "foreign layer": put("layers.x.weight", torch.ones(1)),
        "gap in layers": put("layers.7.weight", torch.ones(1)),
        "alphas of a matrix": put("layers.0.attention.wq.alphas", torch.ones(1, 1)),
        "two alphas": put("layers.0.attention.wq.alphas", torch.ones(2)),
        "no rows": put("y_embedder.embedding_table.weight", torch.zeros(0, 64)),
        "no width": put("x_embedder.weight", torch.zeros(0, 16)),
        "spread": put(WQ, torch.zeros(1, 1, dtype=torch.uint8).expand(1 << 18, 1 << 22)),
        "sparse": put("x_embedder.bias", torch.zeros(64).to_sparse()),
        "complex": put("x_embedder.bias", torch.zeros(64, dtype=torch.complex64)),
        "not finite": put("x_embedder.bias", torch.full((64,), torch.inf)),
        "no tensor": put("number", 3),
        "key no text": put(3, torch.ones(1)),
    }


@pytest.mark.parametrize("name", edits())
def test_damaged_weights(folder, name):
    rewrite(folder, edits()[name])
    with pytest.raises(InputFileError) as error:
        load_model(folder, n_heads=4)
    assert error.value.exit_code == 3


def test_files_that_are_missing_or_foreign(folder, tmp_path):
    torch.save({"a": 1}, folder / ARGUMENTS_FILE)
    with pytest.raises(InputFileError, match=r"does not hold the training arguments.*got dict"):
        load_model(folder, n_heads=4)
    torch.save(argparse.Namespace(image_size="big"), folder / ARGUMENTS_FILE)
    with pytest.raises(InputFileError, match=r"image_size = 'big'.*model_args.pth.*Fix: "):
        load_model(folder, n_heads=4)
    (folder / WEIGHTS).rename(folder / "consolidated_ema.00-of-02.pth")
    with pytest.raises(
        InputFileError, match=r"no weights in the folder.*consolidated_ema_ternary.00-of-01"
    ):
        load_model(folder, n_heads=4)
    torch.save([1], folder / WEIGHTS)
    with pytest.raises(InputFileError, match="the released file is not a state dict: got a list"):
        load_model(folder, n_heads=4)
    (folder / WEIGHTS).write_bytes(b"junk")
    with pytest.raises(InputFileError, match=r"not written by torch\.save"):
        load_model(folder, n_heads=4)
    assert not is_released_folder(tmp_path / "absent")


@pytest.mark.parametrize("name", edits())
def test_damaged_weights_are_not_packed(folder, tmp_path, name):
    """Nor read at length: what does not fit is refused before anything is decoded."""
    rewrite(folder, edits()[name])
    with pytest.raises(InputFileError) as error:
        write_tdt(ReleasedFolder(folder, n_heads=4), tmp_path / "m.tdt", "t2", "fp32")
    assert str(folder) in str(error.value)
    assert not (tmp_path / "m.tdt").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [(2**20, "too large"), (2**30, "from 1 to"), (40, "16 times a whole number"), (0, "from 1 to")],
)
def test_impossible_image_sizes(folder, value, words):
    """The first two would ask for 34 GB and 36 PB of positions."""
    arguments = torch.load(folder / ARGUMENTS_FILE, weights_only=False)
    arguments.image_size = value
    torch.save(arguments, folder / ARGUMENTS_FILE)
    with pytest.raises(InputFileError, match=words) as error:
        ReleasedFolder(folder, n_heads=4)
    assert str(folder) in str(error.value)


def test_weights_without_average(folder):
    (folder / WEIGHTS).rename(folder / "consolidated_ternary.00-of-01.pth")
    assert ReleasedFolder(folder, n_heads=4).info.weights == "raw"


def test_pack_refuses_code_3(folder, tmp_path):
    rewrite(folder, edits()["code 3"])
    with pytest.raises(InputFileError, match=f"{WQ} of torch.uint8 with code 3"):
        write_tdt(ReleasedFolder(folder, n_heads=4), tmp_path / "m.tdt", "t2", "fp32")
    assert not (tmp_path / "m.tdt").exists()


def test_bfloat16_rest_stays_close(tmp_path, golden_case, released_folder):
    write_tdt(ReleasedFolder(released_folder, n_heads=4), tmp_path / "m.tdt", "t5", "bf16")
    case = golden_case("public_a")
    with torch.inference_mode():
        got = load_model(tmp_path / "m.tdt")(*(case.tensors[f"in.{key}"] for key in "xty"))
    assert (got - case.tensors["out.packed"]).abs().mean() < 0.02
    with TdtFile(tmp_path / "m.tdt") as model:
        trits = model.trits("layers.0.attention.wq")
    expected = torch.load(released_folder / WEIGHTS, weights_only=True)[WQ]
    assert torch.equal(released_encode(trits), expected)


@pytest.mark.parametrize(
    ("name", "dim", "heads"), [("600M", 1536, 32), ("3B", 3072, 32), ("7B", 4096, 32)]
)
def test_published_names_tell_the_heads(tmp_path, monkeypatch, name, dim, heads):
    for check in ("check_state_dict", "check_fit"):  # of the values, which are not here
        monkeypatch.setattr(convert, check, lambda *arguments: None)
    ffn = build_config(SIZES_BY_NAME[name]).ffn_width
    shapes = {
        "x_embedder.weight": (dim, 16),
        "y_embedder.embedding_table.weight": (1001, 1024),
        "final_layer.linear.weight": (32, dim),
        "layers.0.attention.wk.weight": (dim // 4, dim),
        "layers.0.feed_forward.w1.weight": (ffn // 4, dim),
    }
    # Expanded from one value: the file holds shapes, no weights.
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    torch.save(state, tmp_path / WEIGHTS)
    torch.save(argparse.Namespace(model=f"DiT_Llama_{name}_patch2"), tmp_path / ARGUMENTS_FILE)
    config = ReleasedFolder(tmp_path).info.config
    assert (config.dim, config.n_heads, config.n_kv_heads) == (dim, heads, None)
    assert config.multiple_of == 256
    assert config.ffn_width == ffn


@pytest.mark.parametrize("dim", [20, 64, 100, 1536])
def test_any_feed_forward_width_has_a_configuration(dim):
    for width in [4, 8, 12, 40, 132, 172, 340, 1000, 4100, 16388]:
        fields = _ffn_fields(dim, width)
        assert DiTConfig(dim=dim, n_heads=1, **fields).ffn_width == width


@pytest.mark.parametrize("case_name", ["public_a", "public_b"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_folder_of_upstreams_training_is_ternarized(tmp_path, golden_case, case_name, weights):
    """Master weights, consolidated[_ema].00-of-01.pth: the same model as its packed release."""
    case = golden_case(case_name)
    name = "consolidated_ema" if weights == "ema" else "consolidated"
    torch.save(case.part("train"), tmp_path / f"{name}.00-of-01.pth")
    torch.save(argparse.Namespace(image_size=64, qk_norm=True), tmp_path / ARGUMENTS_FILE)
    heads = case.facts["model"]["n_heads"]
    x, t, y = (case.tensors[f"in.{key}"] for key in "xty")
    with torch.inference_mode():
        network = load_model(tmp_path, activations="fp32", n_heads=heads)
        assert (network(x, t, y) - case.tensors["out.packed"]).abs().max() <= 1e-5
        with ReleasedFolder(tmp_path, n_heads=heads) as model:
            assert model.info.weights == weights
            write_tdt(model, tmp_path / "m.tdt", "t2", "fp32")
        packed = load_model(tmp_path / "m.tdt", activations="fp32")
        assert torch.equal(packed(x, t, y), network(x, t, y))


def test_full_precision_training_of_others_is_not_taken_for_ternary(tmp_path, golden_case):
    case = golden_case("public_a")
    state = {key: value for key, value in case.part("train").items() if "alphas" not in key}
    torch.save(state, tmp_path / "consolidated_ema.00-of-01.pth")
    with pytest.raises(InputFileError, match="alphas"):
        ReleasedFolder(tmp_path, n_heads=4)
