"""ckpt.pt and its description: round trips, hostile files, wrong fields."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import pickle
import random
import zipfile
from contextlib import suppress

import pytest
import torch

from terdit_cli.diffusion.objectives import EpsObjective
from terdit_cli.errors import InputFileError
from terdit_cli.model.ckpt import VERSION, load_ckpt, load_tensors
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.metadata import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from tests.ckpt_file import save_ckpt


def test_round_trip(tmp_path, tiny_config, make_ckpt, random_network):
    ternary = TernaryConfig(granularity="row", activations="int8")
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config, ternary, class_names=["x"] * 5)
    opened = load_ckpt(path)
    assert opened.info.config == tiny_config
    assert opened.info.ternary == ternary
    assert opened.recipe.startswith("model:")
    assert opened.path == path
    for seed, weights in enumerate(("raw", "ema")):
        expected = random_network(tiny_config, ternary, seed).state_dict()
        got = opened.state_dict(weights)
        assert list(got) == list(expected)
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    plain = torch.load(path, weights_only=True)
    assert plain["format"] == "terdit-checkpoint"
    assert plain["version"] == VERSION


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_is_refused_and_never_run(tmp_path):
    path, mark = tmp_path / "evil.pt", tmp_path / "it-ran"
    torch.save({"format": "terdit-checkpoint", "model": Bomb(mark)}, path)
    with pytest.raises(InputFileError, match=r"more than tensors.*evil\.pt.*Fix: ") as error:
        load_ckpt(path)
    assert not mark.exists()
    assert "mkdir" in str(error.value)
    assert error.value.exit_code == 3

    raw = tmp_path / "raw.pt"
    raw.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputFileError, match=r"not written by torch\.save.*raw\.pt"):
        load_ckpt(raw)
    assert not mark.exists()


def test_plain_types_are_fine(tmp_path):
    values = {"a": [1, 2.5, None, "x", (True,)], "n": argparse.Namespace(k=1), "t": torch.ones(2)}
    torch.save(values, tmp_path / "plain.pt")
    got = load_tensors(tmp_path / "plain.pt")
    assert got["a"] == values["a"]
    assert got["n"] == values["n"]
    assert torch.equal(got["t"], values["t"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(tmp_path, tiny_config, make_ckpt):
    whole = make_ckpt(tmp_path / "ckpt.pt", tiny_config).read_bytes()
    path = tmp_path / "cut.pt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputFileError, match=r"cut\.pt.*Fix: copy it again") as error:
            load_ckpt(path)
        assert error.value.exit_code == 3
    with pytest.raises(InputFileError, match="no such file"):
        load_ckpt(tmp_path / "absent.pt")
    rng = random.Random(1)
    start = whole.rindex(b"PK\x01\x02") - 200  # also inside the archive's directory
    for position in [*range(200), *(rng.randrange(start, len(whole)) for _ in range(150))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with suppress(InputFileError):  # or a bit that nothing reads; never another exception
            load_ckpt(path)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.txt", "no torch file")
    path.write_bytes(archive.getvalue())
    with pytest.raises(InputFileError, match=r"damaged.*cut\.pt"):
        load_ckpt(path)


def test_other_contents(tmp_path, tiny_config, make_ckpt):
    good = torch.load(make_ckpt(tmp_path / "good.pt", tiny_config), weights_only=True)
    path = tmp_path / "other.pt"

    def refuse(values, match):
        torch.save(values, path)
        with pytest.raises(InputFileError, match=match) as error:
            load_ckpt(path)
        assert "other.pt" in str(error.value)

    refuse(good["model"], r"not a terdit checkpoint: got a OrderedDict with keys .*final_layer")
    refuse([1, 2], "got a list")
    refuse(torch.ones(3), "got a Tensor")
    for version in (0, 2, "1", None, True, torch.zeros(3)):
        refuse(good | {"version": version}, r"another format version.*Fix: update terdit")
    refuse(good | {"model": [1]}, "'model' is not a state dict")
    refuse(good | {"ema": {"x": 1}}, "'ema' is not a state dict")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value, what in (
        (torch.ones(3, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.ones(3, dtype=torch.int64), "torch.int64"),
        (nested, "a tensor that is nested on cpu"),
    ):
        refuse(good | {"ema": {"x": value}}, f"'ema' is not a state dict: got 'x': {what}")
    refuse(good | {"info": None}, "description cannot be read")
    refuse({k: v for k, v in good.items() if k != "info"}, "description cannot be read")
    info = good["info"]
    steps = info | {"diffusion": info["diffusion"] | {"steps": torch.zeros(2)}}
    refuse(good | {"info": steps}, "description cannot be read.* a diffusion of ")
    huge = info | {"config": info["config"] | {"n_layers": 1 << 20}}
    refuse(good | {"info": huge}, r"does not fit its own configuration.*1048576 layers")


def test_tensors_that_were_compressed(tmp_path, tiny_config, make_ckpt):
    """By mmap torch would take the compressed bytes for the numbers, without a word."""
    whole, path = make_ckpt(tmp_path / "ckpt.pt", tiny_config), tmp_path / "again.pt"
    for kind, match in ((zipfile.ZIP_STORED, None), (zipfile.ZIP_DEFLATED, "are compressed")):
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", kind) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        if match is None:
            assert load_ckpt(path).info == load_ckpt(whole).info
            continue
        with pytest.raises(InputFileError, match=rf"{match}.*again\.pt.*Fix: zip it without"):
            load_ckpt(path)


def test_interrupted_save_keeps_the_previous_file(tmp_path, tiny_config, make_ckpt):
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config)
    previous = path.read_bytes()
    info = load_ckpt(path).info
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_ckpt(path, info, "", {"x": torch.ones(5)}, {"f": lambda: None})
    assert path.read_bytes() == previous
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.fixture
def info(tiny_config) -> ModelInfo:
    space = SpaceInfo("vae", "some/vae", 0.18215)
    return ModelInfo(tiny_config, TernaryConfig(), space, 32, ["a", "b", "c", "d", "e"], step=3)


def test_description_round_trip(info):
    assert ModelInfo.from_json(info.to_json(), "here") == info
    assert ModelInfo.from_dict(info.to_dict(), "here") == info
    assert info.diffusion == EpsObjective.description


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (None, "step", "7"),
        (None, "step", 1.5),
        (None, "weights", "best"),
        (None, "class_names", ["a", 2]),
        (None, "class_order", None),
        (None, "unknown", 1),
        ("config", "dim", 0),
        ("config", "dim", 1 << 21),
        ("config", "qk_norm", 1),
        ("config", "n_kv_heads", 1.0),
        ("config", "input_size", 1 << 20),
        ("config", "ffn_dim_multiplier", 1e9),
        ("ternary", "granularity", "column"),
        ("ternary", "enabled", "yes"),
        ("space", "kind", "sound"),
        ("space", "scale_factor", "1"),
    ],
)
def test_wrong_fields_are_named(info, section, field, value):
    values = info.to_dict()
    (values if section is None else values[section])[field] = value
    with pytest.raises(InputFileError, match=r"model\.bin.*Fix: write the file again") as error:
        ModelInfo.from_dict(values, "model.bin")
    assert field in str(error.value) or "too large" in str(error.value)


def test_unknown_process(info):
    values = info.to_dict() | {"diffusion": EpsObjective.description | {"schedule": "cosine"}}
    with pytest.raises(InputFileError, match=r"'cosine'.*model\.bin.*Fix: update terdit"):
        ModelInfo.from_dict(values, "model.bin")


def test_label_rows_in_text_order():
    config = DiTConfig(dim=32, n_layers=1, n_heads=2)
    info = ModelInfo(config, TernaryConfig(), SpaceInfo(), 256, class_order="text")
    rows = info.label_rows()
    assert (rows[207], rows[89], rows[979], rows[1], rows[1000]) == (121, 878, 977, 1, 1000)
    assert sorted(rows) == list(range(1001))
    fixed = [k for k in range(1000) if rows[k] == k]
    assert fixed == [0, 1, *range(990, 1000)]
    standard = dataclasses.replace(info, class_order="standard")
    assert standard.label_rows() == list(range(1001))
