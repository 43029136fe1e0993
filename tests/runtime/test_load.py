"""load_model from each kind of file, by its public name."""

from __future__ import annotations

import shutil

import pytest
import torch

import terdit_cli
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.qat import CheckpointExport
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.runtime.load import load


@pytest.fixture
def run_folder(tmp_path, tiny_config, make_ckpt):
    folder = tmp_path / "run"
    folder.mkdir()
    make_ckpt(folder / "ckpt.pt", tiny_config)
    return folder


def test_every_kind_of_file(run_folder, tiny_config, random_network, random_inputs):
    ckpt = run_folder / "ckpt.pt"
    export = CheckpointExport(load_ckpt(ckpt), "ema")
    write_tdt(export, run_folder / "out.safetensors", "int8", "fp32")
    write_tdt(export, run_folder / "out.tdt", "t5", "fp32")
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        expected = random_network(tiny_config, seed=1).eval()(*inputs)  # the averaged weights
        for path in (run_folder, ckpt, run_folder / "out.safetensors", run_folder / "out.tdt"):
            network = terdit_cli.load_model(path)
            assert torch.equal(network(*inputs), expected), path
            assert network.config == tiny_config
            assert torch.equal(terdit_cli.load_model(str(path), device="cpu")(*inputs), expected)
            assert not network.training


def test_raw_and_averaged_weights(run_folder, tiny_config, random_network, random_inputs):
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        for seed, weights in enumerate(("raw", "ema")):
            expected = random_network(tiny_config, seed=seed).eval()(*inputs)
            assert torch.equal(load(run_folder, weights=weights).network(*inputs), expected)


def test_full_precision_checkpoints_sample_too(
    tmp_path, tiny_config, make_ckpt, random_network, random_inputs
):
    full = TernaryConfig(enabled=False)
    loaded = load(make_ckpt(tmp_path / "ckpt.pt", tiny_config, full))
    assert "full precision" in loaded.backend
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        expected = random_network(tiny_config, full, seed=1).eval()(*inputs)
        assert torch.equal(loaded.network(*inputs), expected)


def test_released_folder(released_folder, golden_case):
    tensors = golden_case("public_a").tensors
    network = terdit_cli.load_model(released_folder, n_heads=4)
    with torch.inference_mode():
        out = network(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    assert (out - tensors["out.packed"]).abs().max() <= 1e-5


def test_needless_overrides(run_folder):
    for path in (run_folder, run_folder / "ckpt.pt"):
        with pytest.raises(UsageError, match="only a released TerDiT folder takes overrides"):
            terdit_cli.load_model(path, n_heads=2)


def test_state_that_does_not_fit(tmp_path, tiny_config, make_ckpt):
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config)
    values = torch.load(path, weights_only=True)
    del values["ema"]["x_embedder.bias"]
    torch.save(values, path)
    with pytest.raises(InputFileError, match=r"its own configuration.*x_embedder\.bias.*ckpt\.pt"):
        terdit_cli.load_model(path)
    with pytest.raises(InputFileError, match="no such model"):
        terdit_cli.load_model(tmp_path / "absent")


def test_backend_is_told_and_checked(run_folder, monkeypatch):
    monkeypatch.delenv("TERDIT_BACKEND", raising=False)
    export = CheckpointExport(load_ckpt(run_folder / "ckpt.pt"))
    write_tdt(export, run_folder / "m.tdt", "t2", "fp32")
    assert load(run_folder / "m.tdt").backend.startswith("backend ")
    assert "as asked" in load(run_folder / "m.tdt", backend="reference").backend
    with pytest.raises(EnvironmentProblem):
        load(run_folder / "m.tdt", backend="gpu")
    with pytest.raises(UsageError):
        load(run_folder / "m.tdt", backend="fpga")


def test_mapped_file_survives_its_deletion(run_folder, tiny_config, random_inputs):
    """The t2 bytes stay mapped: an unlinked file must not change the network."""
    export = CheckpointExport(load_ckpt(run_folder / "ckpt.pt"))
    path = run_folder / "m.tdt"
    write_tdt(export, path, "t2", "fp32")
    network = terdit_cli.load_model(path)
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        expected = network(*inputs)
        shutil.rmtree(run_folder)
        assert torch.equal(network(*inputs), expected)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="load_modle"):
        terdit_cli.load_modle  # noqa: B018
