"""ckpt.pt from shards: bit for bit, in the memory of a tensor or two, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from terdit_cli.commands import export as command
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.train.checkpoint import Saved
from terdit_cli.train.sharded_tensors import Fingerprint, ShardWriter
from terdit_cli.train.write_ckpt import PARTS, write_ckpt

ROOT = Path(__file__).parents[2]


def write(folder: Path, tensors: dict[str, Tensor]) -> Saved:
    """Write shards and a recipe, as a checkpoint does."""
    files: dict[str, Fingerprint] = {}
    dcp.save(tensors, storage_writer=ShardWriter(folder, files.update))
    (folder / "recipe.yaml").write_text("name: x\n")
    return Saved(folder, 3, 0.0, {"anything": 1}, files)


def test_any_tensor_arrives_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.randn(7, 5),
        "model.layers.0.w": torch.randn(33).to(torch.bfloat16),
        "model.nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "model.none": torch.empty(0, 4),
        "model.number": torch.tensor(2.5, dtype=torch.float64),
        "ema.a": torch.randn(5, 7).T,
        "ema.codes": torch.arange(-100, 100, dtype=torch.int8),
        "optimizer.state.a.exp_avg": torch.randn(7, 5),
    }
    saved = write(tmp_path / "shards", tensors)
    write_ckpt(saved, tmp_path / "ckpt.pt")
    values = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert list(values) == ["format", "version", "info", "recipe", "model", "ema"]
    assert values["info"] == {"anything": 1}
    assert values["recipe"] == "name: x\n"
    found = {f"{part}.{k}": v for part in ("model", "ema") for k, v in values[part].items()}
    assert set(found) == {key for key in tensors if not key.startswith("optimizer")}
    for key, tensor in found.items():
        assert tensor.dtype == tensors[key].dtype, key
        assert tensor.shape == tensors[key].shape, key
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (tensor, tensors[key])]
        assert torch.equal(*bits), key
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as archive:
        assert archive.testzip() is None  # every checksum fits
    mapped = torch.load(tmp_path / "ckpt.pt", weights_only=True, mmap=True)
    assert torch.equal(mapped["model"]["a"], tensors["model.a"])


@pytest.mark.parametrize("part", ["model", "ema"])
def test_a_checkpoint_without_a_part(tmp_path: Path, part: str) -> None:
    other = {"model": "ema", "ema": "model"}[part]
    saved = write(tmp_path / "shards", {f"{other}.a": torch.ones(3)})
    with pytest.raises(InputFileError, match=f"lacks a part: got no {part}") as caught:
        write_ckpt(saved, tmp_path / "ckpt.pt")
    assert str(saved.path) in str(caught.value)
    assert "Fix: use another checkpoint" in str(caught.value)
    assert not (tmp_path / "ckpt.pt").exists()


MEMORY = """
import json, sys
from pathlib import Path
from terdit_cli.train.checkpoint import Saved
from terdit_cli.train.write_ckpt import write_ckpt

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

for name in ("small", "large"):  # what is allocated but once is by then
    folder = Path(sys.argv[1]) / name
    files = json.loads(folder.with_suffix(".json").read_text())
    before = peak()
    write_ckpt(Saved(folder, 3, 0.0, {}, files), folder.with_suffix(".pt"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    largest = 40 << 20  # bytes; below 32 MiB malloc keeps what is freed
    for name, size in (("small", 10), ("large", largest // 4)):
        content = {f"{part}.{i}": torch.full((size,), 1.0 * i) for part in PARTS for i in (1, 2, 3)}
        saved = write(tmp_path / name, content)
        (tmp_path / f"{name}.json").write_text(json.dumps(saved.files))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5 * largest  # of 6 that there are
    values = torch.load(tmp_path / "large.pt", weights_only=True, mmap=True)
    assert (values["ema"]["3"] == 3).all()


def test_a_full_disk_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = write(tmp_path / "shards", {"model.a": torch.ones(9), "ema.a": torch.ones(9)})
    (tmp_path / "ckpt.pt").write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        write_ckpt(saved, tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "shards"]


# The command


def test_the_newest_undamaged_checkpoint_of_a_run(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str],
    tensors_of: Callable[[Path], dict[str, Tensor]],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "ckpt.pt").unlink()
    result = command.run(folder)
    assert result == command.ExportResult(
        folder / "checkpoints" / "step-00000040", folder / "ckpt.pt", 40
    )
    assert (folder / "ckpt.pt").read_bytes() == (whole_run / "ckpt.pt").read_bytes()

    (folder / "checkpoints" / "step-00000040" / "__0_0.distcp").write_bytes(b"")
    result = command.run(folder, tmp_path / "other.pt")
    assert (result.step, result.out) == (30, tmp_path / "other.pt")
    assert "skipping a damaged checkpoint" in capsys.readouterr().err
    exported = load_ckpt(result.out)
    assert exported.info.step == 30
    stored = tensors_of(result.checkpoint)
    for name, weight in exported.ema.items():
        assert torch.equal(weight, stored[f"ema.{name}"]), name


def test_a_named_checkpoint(tmp_path: Path, whole_run: Path) -> None:
    shutil.copytree(whole_run / "checkpoints", tmp_path / "run" / "checkpoints")
    one = tmp_path / "run" / "checkpoints" / "step-00000030"
    assert command.run(one).out == tmp_path / "run" / "ckpt.pt"
    moved = one.rename(tmp_path / "moved")
    assert command.run(moved).out == moved / "ckpt.pt"
    (moved / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(InputFileError, match="is not what the manifest says"):
        command.run(moved)


def test_an_older_checkpoint_does_not_replace_the_product(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    before = (folder / "ckpt.pt").read_bytes()
    [older, _] = sorted((folder / "checkpoints").iterdir())
    with pytest.raises(UsageError, match=r"got step 40, expected step 30.*Fix: write another file"):
        command.run(older)
    assert (folder / "ckpt.pt").read_bytes() == before
    assert command.run(older, folder / "early.pt").step == 30
    assert command.run(folder).step == 40
    (folder / "ckpt.pt").write_bytes(before[:-100])
    assert command.run(older).out == folder / "ckpt.pt"  # instead of a damaged one


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="there is no complete checkpoint") as caught:
        command.run(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "Fix: give a run folder" in str(caught.value)
