"""load_model from each kind of file, by its public name."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil

import pytest
import torch

import terdit_cli
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.model import mapped
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.runtime import load as load_module
from terdit_cli.runtime.fused import FusedDiT
from terdit_cli.runtime.gpu import backend as gpu
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
            backend = "auto" if path in (run_folder, ckpt) else "reference"
            network = terdit_cli.load_model(path, backend=backend)
            assert torch.equal(network(*inputs), expected), path
            assert network.config == tiny_config
            again = terdit_cli.load_model(str(path), "cpu", "auto", backend)
            assert torch.equal(again(*inputs), expected)
            assert not network.training


@pytest.mark.slow
def test_a_compiled_checkpoint_draws_the_same(run_folder, tiny_config, random_inputs):
    inputs = random_inputs(tiny_config)
    plain, compiled = load(run_folder), load(run_folder, compiled=True)
    assert (plain.backend, compiled.backend) == ("torch", "torch-compile")
    assert "compiled" in compiled.reason
    with torch.inference_mode():
        expected, got = plain.network(*inputs), compiled.network(*inputs)
    # The same products; only roundings between them differ.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_packed_model_is_not_compiled_and_has_one_set_of_weights(run_folder, tiny_config):
    path = run_folder / "out.tdt"
    write_tdt(CheckpointExport(load_ckpt(run_folder / "ckpt.pt"), "raw"), path, "t2", "fp32")
    assert load(path).facts()["weights"] == "raw"
    with pytest.raises(UsageError, match=r"--raw is for checkpoints.*out\.tdt.*leave --raw out"):
        load(path, weights="raw")
    with pytest.raises(UsageError, match=r"--compile is for checkpoints.*out\.tdt.*leave --comp"):
        load(path, compiled=True)


def test_raw_and_averaged_weights(run_folder, tiny_config, random_network, random_inputs):
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        for seed, weights in enumerate(("raw", "ema")):
            expected = random_network(tiny_config, seed=seed).eval()(*inputs)
            loaded = load(run_folder, weights=weights)
            assert torch.equal(loaded.network(*inputs), expected)
            assert loaded.facts()["weights"] == weights
            assert f"ternary master weights, {weights}, " in loaded.reason


def test_full_precision_checkpoints_sample_too(
    tmp_path, tiny_config, make_ckpt, random_network, random_inputs
):
    full = TernaryConfig(enabled=False)
    loaded = load(make_ckpt(tmp_path / "ckpt.pt", tiny_config, full))
    assert "full precision" in loaded.reason
    assert (loaded.backend, loaded.precision, loaded.isa) == ("torch", "fp32", None)
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        expected = random_network(tiny_config, full, seed=1).eval()(*inputs)
        assert torch.equal(loaded.network(*inputs), expected)


def test_released_folder(released_folder, golden_case):
    tensors = golden_case("public_a").tensors
    network = terdit_cli.load_model(released_folder, activations="fp32", n_heads=4)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_of_half_the_bits(tmp_path, tiny_config, make_ckpt, random_inputs, dtype):
    """Computes in float32 with the values that it holds, as what is packed of it does."""
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config)
    values = torch.load(path, weights_only=True)
    values["ema"] = {key: value.to(dtype) for key, value in values["ema"].items()}
    torch.save(values, path)
    write_tdt(CheckpointExport(load_ckpt(path)), tmp_path / "m.tdt", "t2", "fp32")
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        found = load(path).network(*inputs)
        assert torch.equal(load(tmp_path / "m.tdt", backend="reference").network(*inputs), found)


@pytest.fixture
def packed(run_folder):
    """Return packed(codec="t2", rest="fp32"): writes a .tdt."""

    def write(codec="t2", rest="fp32"):
        path = run_folder / f"{codec}-{rest}.tdt"
        write_tdt(CheckpointExport(load_ckpt(run_folder / "ckpt.pt")), path, codec, rest)
        return path

    return write


def test_backend_is_told_and_checked(packed):
    loaded = load(packed())
    assert loaded.reason.startswith(f"backend {loaded.backend} (")
    assert loaded.reason.endswith(
        f"threads {loaded.threads}, activations {loaded.precision} (auto)"
    )
    assert loaded.facts() == {
        "backend": loaded.backend,
        "isa": loaded.isa,
        "threads": loaded.threads,
        "activations": loaded.precision,
        "weights": "ema",
    }
    loaded = load(packed(), backend="reference", activations="bf16")
    assert (loaded.backend, loaded.precision, loaded.isa) == ("reference", "bf16", None)
    assert loaded.reason == (
        f"backend reference (as asked), threads {torch.get_num_threads()}, "
        "activations bf16 (as asked)"
    )
    with pytest.raises(EnvironmentProblem):
        load(packed(), backend="gpu")
    with pytest.raises(UsageError):
        load(packed(), backend="fpga")
    with pytest.raises(UsageError, match="unknown activations: got 'fp4'"):
        load(packed(), activations="fp4")
    with pytest.raises(UsageError, match="the reference backend has no fp8 activations"):
        load(packed(), backend="reference", activations="fp8")


def test_the_native_backend_is_told_with_its_isa(packed, isa):
    loaded = load(packed(), backend="cpu", activations="int16")
    assert isinstance(loaded.network, FusedDiT)
    assert (loaded.backend, loaded.isa, loaded.precision) == ("cpu", isa, "int16")
    assert f"(as asked), {isa}, threads " in loaded.reason


def test_where_conditions_lie(packed):
    loaded = load(packed(), device="meta", backend="reference")
    assert loaded.conditions == torch.device("meta")
    assert dataclasses.replace(loaded, runs_on=gpu).conditions == torch.device("cpu")


@pytest.mark.parametrize("kind", ["packed", "checkpoint"])
def test_weights_that_do_not_fit_the_gpu(packed, run_folder, monkeypatch, kind):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    path = packed() if kind == "packed" else run_folder
    monkeypatch.setattr(load_module, "packed_network", run_out)
    monkeypatch.setattr(load_module, "restore_network", run_out)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Small GPU")
    backend = "reference" if kind == "packed" else "auto"
    with pytest.raises(EnvironmentProblem, match="too little GPU memory for the model's") as error:
        load(path, "cuda:1", backend)
    assert "got 1.00 GB free of 8.00 GB (cuda:1, Small GPU)" in str(error.value)
    assert "Fix: free memory of that GPU, name another with --device, or" in str(error.value)


def test_checkpoints_choose_nothing(run_folder):
    for flag, options in (
        ("--backend reference", {"backend": "reference"}),
        ("--activations fp32", {"activations": "fp32"}),
    ):
        with pytest.raises(UsageError, match=f"is for packed models: got {flag} for a") as e:
            load(run_folder, **options)
        assert "ckpt.pt" in str(e.value)
        assert f"Fix: terdit pack {run_folder} -o model.tdt" in str(e.value)


def test_a_model_trained_with_int8_runs_as_trained(tmp_path, tiny_config, make_ckpt, random_inputs):
    trained = TernaryConfig(activations="int8")
    ckpt = make_ckpt(tmp_path / "ckpt.pt", tiny_config, trained)
    path = tmp_path / "m.tdt"
    write_tdt(CheckpointExport(load_ckpt(ckpt)), path, "t2", "fp32")
    for backend in ("auto", "reference"):
        loaded = load(path, backend=backend)
        assert loaded.precision == "int8"
        assert "activations int8 (as trained)" in loaded.reason
    with pytest.raises(UsageError, match="trained with int8 activations and needs them"):
        load(path, activations="fp32")
    assert load(ckpt).precision == "int8"
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        expected = load(ckpt).network(*inputs)
        assert torch.equal(load(path, backend="reference").network(*inputs), expected)


@pytest.mark.parametrize("codec", ["t5", "int8"])
def test_other_codecs_are_repacked_to_the_same_network(packed, native, codec):
    wanted, found = (load(packed(each), backend="cpu").network for each in ("t2", codec))
    assert wanted.state_dict().keys() == found.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_scales_of_another_granularity_than_the_model_s(tmp_path, tiny_config, make_ckpt):
    """Not even written: a file's header would be consistent with itself, not with the model."""
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config)))

    class Lying:
        info = export.info
        ternary_names, matrix_shape = export.ternary_names, export.matrix_shape
        rest_names, rest, trits = export.rest_names, export.rest, export.trits

        def alphas(self, name):
            rows = self.matrix_shape(name)[0]
            return export.alphas(name).expand(rows) if name.endswith("w1") else export.alphas(name)

    with pytest.raises(InputFileError, match=r"do not match the model's own conf.*w1\.alphas"):
        write_tdt(Lying(), tmp_path / "m.tdt", "t2", "fp32")


def test_a_matrix_too_wide_for_the_kernels(tmp_path, native, make_ckpt, random_inputs):
    config = DiTConfig(
        input_size=2, patch_size=2, in_channels=1, dim=4, n_layers=1, n_heads=1,
        multiple_of=65_001, num_classes=2,
    )  # fmt: skip
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", config)))
    write_tdt(export, tmp_path / "m.tdt", "t2", "fp32")
    with pytest.raises(EnvironmentProblem, match=r"w2 of shape \[4, 65001\].*--backend reference"):
        load(tmp_path / "m.tdt")
    with torch.inference_mode():
        out = load(tmp_path / "m.tdt", backend="reference").network(*random_inputs(config))
    assert out.isfinite().all()


def test_misaligned_tensors_of_a_foreign_file(packed, native, tiny_config, random_inputs):
    """Every float of the file at an odd address: the header is one byte longer."""
    path = packed()
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shifted = path.with_name("shifted.tdt")
    shifted.write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    inputs = random_inputs(tiny_config)
    with torch.inference_mode():
        for backend in ("cpu", "reference"):
            expected = load(path, backend=backend).network(*inputs)
            assert torch.equal(load(shifted, backend=backend).network(*inputs), expected)


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_computes_the_same_and_needs_no_file(
    run_folder, tiny_config, random_inputs, backend, copied
):
    path = run_folder / "out.tdt"
    write_tdt(CheckpointExport(load_ckpt(run_folder / "ckpt.pt"), "ema"), path, "t2", "fp32")
    inputs = random_inputs(tiny_config)
    network = load(path, backend=backend).network
    with torch.inference_mode():
        before = copied(network)
        expected = network(*inputs)
        after = copied(network)  # addresses of the first are known to the native library by now
        assert torch.equal(before(*inputs), expected)
        assert torch.equal(after(*inputs), expected)
        after.layers[0].attention.wq.alphas.zero_()
        assert not torch.equal(after(*inputs), expected)
        assert torch.equal(network(*inputs), expected)
        os.utime(path, (0, 0))  # as if it had been written to in place
        assert torch.equal(before(*inputs), expected)
        with pytest.raises(InputFileError, match="changed while it was in use"):
            network(*inputs)


@pytest.mark.parametrize("kind", ["out.tdt", "ckpt.pt"])
@pytest.mark.parametrize(
    ("system", "remote"),
    [("ext4", False), ("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("fuseblk", False)],
)
def test_weights_on_a_networks_disk_are_copied(
    run_folder, tiny_config, random_inputs, tmp_path, monkeypatch, kind, system, remote
):
    """There a file may be cut while a forward runs, which would end the process."""
    device = run_folder.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 27 0:0 / /proc rw,relatime - proc proc rw\nodd\n"
        f"36 35 {os.major(device)}:{os.minor(device)} / /data rw shared:1 - {system} server:/x rw\n"
    )
    monkeypatch.setattr(mapped, "_MOUNTS", mounts)
    path = run_folder / kind
    if kind == "out.tdt":
        write_tdt(CheckpointExport(load_ckpt(run_folder / "ckpt.pt"), "ema"), path, "t2", "fp32")
    assert mapped.is_remote(path) == remote
    inputs = random_inputs(tiny_config)
    network = load(path).network
    with torch.inference_mode():
        expected = network(*inputs)
        if remote:
            os.truncate(path, 100)
            assert torch.equal(network(*inputs), expected)
        else:
            os.utime(path, (0, 0))
            with pytest.raises(InputFileError, match="changed while it was in use"):
                network(*inputs)


def test_what_the_system_does_not_say_counts_as_local(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_MOUNTS", tmp_path / "none")
    assert not mapped.is_remote(tmp_path)
    assert not mapped.is_remote(tmp_path / "gone")
