"""Files that are no good .tdt: always InputFileError with the path, never anything else."""

from __future__ import annotations

import json
import pickle
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from terdit_cli.errors import InputFileError
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.runtime.load import load

SECONDS = 5.0
WQ = "layers.0.attention.wq"


def refuse(path, match: str | None = None) -> str:
    """Open and load `path`; return the message of the error it must raise."""
    started = time.monotonic()
    with pytest.raises(InputFileError, match=match) as error:
        load(path)
    assert time.monotonic() - started < SECONDS
    assert error.value.exit_code == 3
    assert len(str(error.value)) < 2000
    return str(error.value)


@pytest.mark.parametrize("codec", ["t2", "t5", "int8"])
def test_truncated(tmp_path, tiny_tdts, codec):
    whole = tiny_tdts[codec].read_bytes()
    path = tmp_path / "cut.tdt"
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) - 1}
    lengths |= set(range(0, len(whole), len(whole) // 40))
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert "cut.tdt" in refuse(path, "truncated, damaged or not a .tdt")
    path.write_bytes(whole + b"\0")
    refuse(path)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["t2", "t5", "int8"])
def test_every_bit_counts(tmp_path, tiny_tdts, codec):
    """A flipped bit anywhere, in header, metadata, blobs or the rest, is found."""
    whole = tiny_tdts[codec].read_bytes()
    path = tmp_path / "flipped.tdt"
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    positions = [*range(10)]
    positions += [rng.randrange(header) for _ in range(250)]
    positions += [rng.randrange(header, len(whole)) for _ in range(60)]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputFileError):
            TdtFile(path).close()


def test_unchanged_forgery_is_accepted(tmp_path, tiny_tdts, forge):
    """The other tests of this file prove nothing if the forger itself is refused."""
    path = forge(tiny_tdts["t2"], tmp_path / "same.tdt", lambda tensors, metadata: None)
    assert load(path).info.step == 7


@pytest.mark.parametrize("version", ["0", "2", "", "one", "9" * 5000, "1.0", " 1", "\u0661", "01"])
def test_other_versions(tmp_path, tiny_tdts, forge, version):
    path = forge(tiny_tdts["t2"], tmp_path / "v.tdt", lambda _, m: m.update(format_version=version))
    message = refuse(path, "another format version")
    assert version[:20] in message
    assert "update terdit" in message
    assert "v.tdt" in message


def test_no_version(tmp_path, tiny_tdts, forge):
    path = forge(tiny_tdts["t2"], tmp_path / "v.tdt", lambda _, m: m.pop("format_version"))
    refuse(path, "another format version")


def test_foreign_files(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    assert "terdit pack" in refuse(path, "a safetensors file, but not a .tdt")
    save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    refuse(path, "'pt'")
    contents = {
        "empty.tdt": b"",
        "text.tdt": b"hello " * 100,
        "pickle.tdt": pickle.dumps({"a": 1}),
        "zeros.tdt": bytes(4096),
        "ones.tdt": b"\xff" * 4096,
        "huge_header.tdt": (1 << 40).to_bytes(8, "little") + b"{}",
        "deep.tdt": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "list.tdt": (2).to_bytes(8, "little") + b"[]",
        "nothing.tdt": (2).to_bytes(8, "little") + b"{}",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert name in refuse(path)
    refuse(tmp_path / "absent.tdt", "no such model")
    with pytest.raises(InputFileError, match=r"no such model file.*terdit pack"):
        TdtFile(tmp_path)


def test_codes_that_are_no_trits(tmp_path, tiny_tdts, forge):
    """With a digest that fits: the values themselves are checked."""
    for codec, value in (("t2", 0b00001100), ("t5", 243), ("int8", 2), ("int8", -128)):

        def edit(tensors, metadata, value=value):
            tensors[f"{WQ}.weight"].flatten()[3] = value

        path = forge(tiny_tdts[codec], tmp_path / "codes.tdt", edit)
        assert f"{WQ}.weight holds invalid codes" in refuse(path)


def test_numbers_that_are_not_finite(tmp_path, tiny_tdts, forge):
    for key in (f"{WQ}.alphas", "x_embedder.bias"):
        for value in (torch.nan, -torch.inf):

            def edit(tensors, metadata, key=key, value=value):
                tensors[key].flatten()[0] = value

            path = forge(tiny_tdts["t2"], tmp_path / "numbers.tdt", edit)
            assert f"{key} holds values that are not finite" in refuse(path)


def _edit_tensor(key, value):
    return lambda tensors, metadata: tensors.update({key: value})


def _edit_ternary(**fields):
    return lambda tensors, metadata: metadata["ternary"][WQ].update(fields)


def _edit_config(**fields):
    return lambda tensors, metadata: metadata["model"]["config"].update(fields)


def _edit_model(**fields):
    return lambda tensors, metadata: metadata["model"].update(fields)


DEEP = "[" * 100_000
FORGERIES = {
    "tensor missing": lambda t, m: t.pop("x_embedder.bias"),
    "blob missing": lambda t, m: t.pop(f"{WQ}.weight"),
    "alphas missing": lambda t, m: t.pop(f"{WQ}.alphas"),
    "extra tensor": _edit_tensor("extra", torch.zeros(2)),
    "rest of another shape": _edit_tensor("x_embedder.bias", torch.zeros(21)),
    "rest without dimensions": _edit_tensor("x_embedder.bias", torch.zeros(())),
    "rest of no values": _edit_tensor("x_embedder.bias", torch.zeros(0)),
    "rest of integers": _edit_tensor("x_embedder.bias", torch.zeros(20, dtype=torch.int64)),
    "rest of booleans": _edit_tensor("x_embedder.bias", torch.zeros(20, dtype=torch.bool)),
    "rest of doubles": _edit_tensor("x_embedder.bias", torch.zeros(20, dtype=torch.float64)),
    "blob of another shape": _edit_tensor(f"{WQ}.weight", torch.zeros(1, 4, 64, dtype=torch.uint8)),
    "blob of floats": _edit_tensor(f"{WQ}.weight", torch.zeros(1, 5, 64)),
    "blob of int8": _edit_tensor(f"{WQ}.weight", torch.zeros(1, 5, 64, dtype=torch.int8)),
    "alphas of another shape": _edit_tensor(f"{WQ}.alphas", torch.zeros(2)),
    "alphas of bfloat16": _edit_tensor(f"{WQ}.alphas", torch.zeros(1).bfloat16()),
    "unknown codec": _edit_ternary(codec="t3"),
    "codec of a list": _edit_ternary(codec=[]),
    "another codec": _edit_ternary(codec="t5"),
    "shape too small": _edit_ternary(shape=[16, 20]),
    "other shape with the same blob": _edit_ternary(shape=[19, 20]),
    "shape of zero": _edit_ternary(shape=[0, 20]),
    "negative shape": _edit_ternary(shape=[-20, -20]),
    "huge shape": _edit_ternary(shape=[1 << 62, 1 << 62]),
    "shape of text": _edit_ternary(shape="ab"),
    "shape of floats": _edit_ternary(shape=[20.0, 20.0]),
    "shape of infinities": _edit_ternary(shape=[float("inf"), float("nan")]),
    "shape of booleans": _edit_ternary(shape=[True, True]),
    "shape of three": _edit_ternary(shape=[20, 20, 1]),
    "unknown granularity": _edit_ternary(granularity="column"),
    "another granularity": _edit_ternary(granularity="row"),
    "entry of text": lambda t, m: m["ternary"].update({WQ: "t2"}),
    "entry missing": lambda t, m: m["ternary"].pop(WQ),
    "entry of another name": lambda t, m: m["ternary"].update(x=m["ternary"].pop(WQ)),
    "ternary of a list": lambda t, m: m.update(ternary="[]"),
    "ternary of nothing": lambda t, m: m.update(ternary="{}"),
    "ternary no JSON": lambda t, m: m.update(ternary="{"),
    "ternary too deep": lambda t, m: m.update(ternary=DEEP),
    "ternary missing": lambda t, m: m.pop("ternary"),
    "digests no JSON": lambda t, m: m.update(sha256="{"),
    "digests too deep": lambda t, m: m.update(sha256=DEEP),
    "digests of nothing": lambda t, m: m.update(sha256="{}"),
    "digests of numbers": lambda t, m: m.update(sha256='{"__metadata__": 1}'),
    "model no JSON": lambda t, m: m.update(model="{"),
    "model too deep": lambda t, m: m.update(model=DEEP),
    "model a list": lambda t, m: m.update(model="[1]"),
    "model null": lambda t, m: m.update(model="null"),
    "model missing": lambda t, m: m.pop("model"),
    "model of a huge integer": lambda t, m: m.update(model="9" * 6000),
    "config missing": lambda t, m: m["model"].pop("config"),
    "config of text": _edit_model(config="600m"),
    "unknown field": _edit_model(extra=1),
    "unknown config field": _edit_config(extra=1),
    "unknown diffusion": _edit_model(diffusion={"steps": 10}),
    "class names of numbers": _edit_model(class_names=[1, 2]),
    "class names of text": _edit_model(class_names="abc"),
    "unknown class order": _edit_model(class_order="random"),
    "unknown space": _edit_model(space={"kind": "sound"}),
    "image size of text": _edit_model(image_size="4"),
    "huge n_layers": _edit_config(n_layers=1 << 20),
    "larger n_layers": _edit_config(n_layers=3),
    "enormous n_layers": _edit_config(n_layers=1 << 70),
    "zero n_layers": _edit_config(n_layers=0),
    "negative dim": _edit_config(dim=-20),
    "another dim": _edit_config(dim=24),
    "huge dim": _edit_config(dim=1 << 20),
    "boolean dim": _edit_config(dim=True),
    "dim of text": _edit_config(dim="20"),
    "zero kv heads": _edit_config(n_kv_heads=0),
    "other kv heads": _edit_config(n_kv_heads=2),
    "huge input size": _edit_config(input_size=1 << 20),
    "no tokens": _edit_config(input_size=0),
    "another patch size": _edit_config(patch_size=4),
    "huge multiplier": _edit_config(ffn_dim_multiplier=1e300),
    "infinite multiplier": _edit_config(ffn_dim_multiplier=float("inf")),
    "no multiplier": _edit_config(ffn_dim_multiplier=float("nan")),
    "huge multiple_of": _edit_config(multiple_of=1 << 20),
    "epsilon that is no number": _edit_config(norm_eps=float("nan")),
    "more classes": _edit_config(num_classes=1 << 20),
    "other options": _edit_config(qk_norm=False),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(tmp_path, tiny_tdts, forge, name):
    path = forge(tiny_tdts["t2"], tmp_path / "forged.tdt", FORGERIES[name])
    refuse(path)


def test_digests_are_compared(tmp_path, tiny_tdts, forge):
    good = load_file(tiny_tdts["t2"])

    def edit(tensors, metadata):
        tensors["x_embedder.bias"][0] += 1
        digests = dict.fromkeys(good, "0" * 64)
        metadata["sha256"] = json.dumps(digests)

    refuse(forge(tiny_tdts["t2"], tmp_path / "d.tdt", edit), "the metadata does not match")


def test_message_names_path_and_fix(tmp_path, tiny_tdts, forge):
    path = forge(tiny_tdts["t2"], tmp_path / "x.tdt", FORGERIES["blob missing"])
    message = refuse(path)
    assert "the .tdt is damaged" in message
    assert str(path) in message
    assert "Fix: make it again with `terdit pack`" in message
