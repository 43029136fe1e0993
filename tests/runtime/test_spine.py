"""The contract of the whole: QAT forward == ternarized == packed, bit for bit in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import TdtFile, write_tdt
from terdit_cli.pack.trits import CODECS
from terdit_cli.runtime.load import load
from terdit_cli.runtime.packed import PackedTernaryLinear


@st.composite
def configs(draw) -> DiTConfig:
    n_heads = draw(st.sampled_from([1, 2, 3]))
    return DiTConfig(
        input_size=2 * draw(st.integers(1, 3)),
        in_channels=draw(st.sampled_from([1, 3, 4])),
        dim=n_heads * 2 * draw(st.sampled_from([1, 3, 8, 11, 23])),
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([1, n_heads])),
        multiple_of=draw(st.sampled_from([1, 5, 64, 129])),
        num_classes=draw(st.integers(1, 4)),
        learn_sigma=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        adaln_norm=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(
    config=configs(),
    ternary=st.builds(
        TernaryConfig,
        scale=st.sampled_from(["learned", "absmean"]),
        granularity=st.sampled_from(["tensor", "row", "group128"]),
        activations=st.sampled_from(["none", "int8"]),
    ),
    seed=st.integers(0, 9999),
)
def test_training_ternarized_and_packed_agree(
    make_ckpt, random_network, random_inputs, config, ternary, seed
):
    network = random_network(config, ternary, seed).eval()
    inputs = random_inputs(config, batch=3, seed=seed)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        expected = network(*inputs)
        ckpt = make_ckpt(Path(folder) / "ckpt.pt", config, ternary, seed)
        assert torch.equal(load(ckpt, weights="raw").network(*inputs), expected)
        for codec in CODECS:
            path = Path(folder) / f"{codec}.tdt"
            write_tdt(CheckpointExport(load_ckpt(ckpt), "raw"), path, codec, "fp32")
            packed = load(path, backend="reference").network
            assert torch.equal(packed(*inputs), expected), codec
    assert expected.isfinite().all()


@pytest.mark.parametrize("source", ["int8", "t2", "t5"])
@pytest.mark.parametrize("target", CODECS)
def test_packing_again_changes_nothing(tmp_path, tiny_config, make_ckpt, source, target):
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config)))
    write_tdt(export, tmp_path / "straight.tdt", target, "fp32")
    write_tdt(export, tmp_path / "first.tdt", source, "fp32")
    with TdtFile(tmp_path / "first.tdt") as model:
        write_tdt(model, tmp_path / "again.tdt", target, "fp32")
    with TdtFile(tmp_path / "straight.tdt") as one, TdtFile(tmp_path / "again.tdt") as two:
        assert one.info == two.info
        for name in one.ternary_names():
            assert torch.equal(one.blob(name), two.blob(name))
            assert torch.equal(one.alphas(name), two.alphas(name))
        assert all(torch.equal(one.rest(key), two.rest(key)) for key in one.rest_names())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_network_holds_packed_bytes_only(tmp_path, tiny_config, make_ckpt, request, backend):
    if backend == "cpu":
        request.getfixturevalue("native")
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config)))
    write_tdt(export, tmp_path / "m.tdt", "t2", "bf16")
    network = load(tmp_path / "m.tdt", backend=backend, activations="bf16").network
    layers = [m for m in network.modules() if isinstance(m, PackedTernaryLinear)]
    assert len(layers) == 8 * tiny_config.n_layers
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)
    floats = [v for v in network.state_dict().values() if v.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert f"backend={backend}, precision=bf16" in repr(layers[0])
