"""The .tdt file as written: layout, metadata, memory, and writes that are cut short."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.layout import matrix_names
from terdit_cli.model.metadata import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import TdtFile, write_tdt
from terdit_cli.pack.trits import CODECS

GRANULARITIES = ("tensor", "row", "group128")


def header_of(path: Path) -> tuple[dict, int]:
    """Read a safetensors header without any library; return it and where the data begins."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_write_then_read(tmp_path, tiny_config, make_ckpt, codec, granularity, rest):
    ternary = TernaryConfig(granularity=granularity)
    source = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config, ternary)))
    path = tmp_path / "new" / "model.tdt"
    progress = []
    write_tdt(source, path, codec, rest, lambda done, total: progress.append((done, total)))
    count = 2 * len(source.ternary_names()) + len(source.rest_names())
    assert progress == [(k + 1, count) for k in range(count)]
    assert [p.name for p in path.parent.iterdir()] == ["model.tdt"]

    dtype = torch.float32 if rest == "fp32" else torch.bfloat16
    with TdtFile(path) as model:
        assert model.info == source.info
        assert model.ternary_names() == source.ternary_names()
        assert sorted(model.rest_names()) == sorted(source.rest_names())
        for name in model.ternary_names():
            assert model.codec(name) == codec
            assert model.matrix_shape(name) == source.matrix_shape(name)
            assert torch.equal(model.trits(name), source.trits(name))
            assert torch.equal(model.alphas(name), source.alphas(name))
            assert torch.equal(model.blob(name), CODECS[codec].encode(source.trits(name)))
        for name in model.rest_names():
            assert model.rest(name).dtype == dtype
            assert torch.equal(model.rest(name), source.rest(name).to(dtype))
        assert 2 * len(model.ternary_names()) + len(model.rest_names()) == count


@pytest.mark.parametrize("codec", CODECS)
def test_any_safetensors_reader_opens_it(tiny_tdts, codec):
    path = tiny_tdts[codec]
    loaded = load_file(path)
    header, start = header_of(path)
    metadata = header.pop("__metadata__")
    assert set(loaded) == set(header)
    assert start % 64 == 0
    assert metadata["format"] == "tdt"
    assert metadata["format_version"] == "1"
    ternary = json.loads(metadata["ternary"])
    digests = json.loads(metadata["sha256"])
    described = f"{metadata['model']}\n{metadata['ternary']}".encode()
    assert digests.pop("__metadata__") == hashlib.sha256(described).hexdigest()
    assert set(digests) == set(loaded)

    raw = path.read_bytes()
    end = 0
    for index, (key, entry) in enumerate(header.items()):
        begin, stop = entry["data_offsets"]
        assert begin == end
        end = stop
        is_blob = key.removesuffix(".weight") in ternary
        assert is_blob == (index < len(ternary))  # the blobs come first
        assert not is_blob or (start + begin) % 64 == 0 or codec == "int8"
        assert hashlib.sha256(raw[start + begin : start + stop]).hexdigest() == digests[key]
    assert start + end == len(raw)


@pytest.mark.parametrize("codec", ["t2", "t5"])
def test_packed_blobs_are_aligned(tiny_tdts, codec):
    header, start = header_of(tiny_tdts[codec])
    ternary = json.loads(header["__metadata__"]["ternary"])
    for name, entry in ternary.items():
        assert entry.keys() == {"codec", "shape", "granularity"}
        assert (start + header[f"{name}.weight"]["data_offsets"][0]) % 64 == 0


def test_metadata_say_everything(tmp_path, tiny_config, make_ckpt):
    names = ["one", "two", "dr\u00e9i", "4", "\u4e94"]
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config, class_names=names, class_order="text")
    write_tdt(CheckpointExport(load_ckpt(path), "raw"), tmp_path / "m.tdt", "t5", "bf16")
    with safe_open(tmp_path / "m.tdt", framework="pt") as file:
        told = json.loads(file.metadata()["model"])
    assert told["config"]["dim"] == tiny_config.dim
    assert told["class_names"] == names
    assert told["class_order"] == "text"
    assert told["weights"] == "raw"
    assert told["step"] == 7
    assert told["recipe_sha256"] == "0" * 64
    assert told["diffusion"]["schedule"] == "linear"
    assert told["space"] == {"kind": "pixel", "vae": None, "scale_factor": 1.0}
    assert told["tool_version"]
    with TdtFile(tmp_path / "m.tdt") as model:
        assert model.info.class_names == names


class Fake(ExportedModel):
    """A model made on demand, which counts how many of its large tensors are alive."""

    def __init__(self, config, trit: int = 1) -> None:
        self.info = ModelInfo(config, TernaryConfig(), SpaceInfo(), image_size=4)
        tensors = DiT(config, TernaryConfig().linear()).state_dict()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self.trit = trit
        self.alive: list[weakref.ref] = []
        self.most = 0

    def _made(self, value: Tensor) -> Tensor:
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(value)]
        self.most = max(self.most, len(self.alive))
        return value

    def ternary_names(self) -> list[str]:
        return matrix_names(self.info.config)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        return self.shapes[f"{name}.weight"]

    def trits(self, name: str) -> Tensor:
        return self._made(torch.full(self.matrix_shape(name), self.trit, dtype=torch.int8))

    def alphas(self, name: str) -> Tensor:
        return torch.ones(1)

    def rest_names(self) -> list[str]:
        known = {f"{name}.{part}" for name in self.ternary_names() for part in ("weight", "alphas")}
        return [key for key in self.shapes if key not in known]

    def rest(self, name: str) -> Tensor:
        return self._made(torch.zeros(self.shapes[name]))

    def __exit__(self, *error) -> None:
        return None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_one_tensor_at_a_time(tmp_path, tiny_config, codec, rest):
    model = Fake(tiny_config)
    write_tdt(model, tmp_path / "m.tdt", codec, rest)
    assert model.most == 1


@pytest.mark.parametrize("trit", [2, -2, -128, 127])
def test_values_that_are_no_trits_are_refused(tmp_path, tiny_config, trit):
    with pytest.raises(InputFileError, match=f"layers.0.attention.wq.*from {trit} to {trit}"):
        write_tdt(Fake(tiny_config, trit), tmp_path / "m.tdt", "t2", "fp32")
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_previous_file(tmp_path, tiny_config, tiny_tdts):
    path = tmp_path / "model.tdt"
    previous = tiny_tdts["t2"].read_bytes()
    path.write_bytes(previous)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tdt(Fake(tiny_config), path, "t2", "fp32", stop)
    assert path.read_bytes() == previous
    assert [p.name for p in tmp_path.iterdir()] == ["model.tdt"]


def test_unwritable_target(tmp_path, tiny_config):
    (tmp_path / "file").write_text("not a folder")
    target = tmp_path / "file" / "model.tdt"
    with pytest.raises(EnvironmentProblem, match=r"cannot write.*model\.tdt.*Fix: ") as error:
        write_tdt(Fake(tiny_config), target, "t2", "fp32")
    assert error.value.exit_code == 4


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from terdit_cli.pack.tdt import TdtFile, write_tdt
def die(done, total):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)
write_tdt(TdtFile(Path(sys.argv[1])), Path(sys.argv[2]), "t5", "bf16", die)
"""


@pytest.mark.slow
def test_killed_write_keeps_the_previous_file(tmp_path, tiny_tdts):
    path = tmp_path / "model.tdt"
    previous = tiny_tdts["t2"].read_bytes()
    path.write_bytes(previous)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tiny_tdts["t2"]), str(path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == previous
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["model.tdt"]
    with TdtFile(path) as model:
        assert model.info.step == 7
