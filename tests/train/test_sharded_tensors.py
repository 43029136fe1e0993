"""Shards: what is written is hashed, what is read is only what torch's metadata may hold."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from terdit_cli.errors import InputFileError
from terdit_cli.train.sharded_tensors import (
    METADATA,
    Fingerprint,
    ShardReader,
    ShardWriter,
    fingerprint,
    flatten,
)

Files = dict[str, Fingerprint]
TENSORS = {
    "a.matrix": torch.arange(12.0).reshape(3, 4),
    "a.bf16": torch.arange(5).to(torch.bfloat16),
    "b.number": torch.tensor(7.0),
    "b.empty": torch.empty(0, 3),
    "b.int8": torch.arange(-3, 3, dtype=torch.int8),
    "b.slice": torch.arange(12.0).reshape(3, 4)[:, 1:3],
}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Files]:
    """A folder of TENSORS, and what its files are."""
    found: Files = {}
    dcp.save(TENSORS, storage_writer=ShardWriter(tmp_path / "shards", found.update))
    return tmp_path / "shards", found


def test_every_tensor_comes_back(written: tuple[Path, Files]) -> None:
    reader = ShardReader(*written)
    assert {k: (e.size, e.properties.dtype) for k, e in reader.tensors().items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in TENSORS.items()
    }
    room = {key: torch.full_like(tensor, 9) for key, tensor in TENSORS.items()}
    reader.read(room)
    for key, tensor in room.items():
        assert torch.equal(tensor, TENSORS[key]), key


def test_the_fingerprints_are_those_of_the_files(written: tuple[Path, Files]) -> None:
    folder, files = written
    assert files == {path.name: fingerprint(path) for path in folder.iterdir()}
    assert set(files) == {METADATA, "__0_0.distcp"}


def test_nothing_of_this_machine_is_written(written: tuple[Path, Files]) -> None:
    folder, _ = written
    for path in folder.iterdir():
        assert os.fsencode(folder) not in path.read_bytes()


def test_flatten_keeps_tensors_only() -> None:
    w = torch.ones(1)
    assert flatten({"a": {"b": {"c": w}, "d": 1}, "e": [w], "f": w}) == {"a.b.c": w, "f": w}


# What others may have put there


def forge(folder: Path, files: Files, content: Any) -> Files:
    """Replace the metadata; return fingerprints that fit them."""
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    (folder / METADATA).write_bytes(data)
    return files | {METADATA: fingerprint(folder / METADATA)}


class Shout:
    def __reduce__(self) -> Any:
        return (os.system, ("touch hacked",))


def hidden_in(metadata: Metadata) -> Metadata:
    metadata.planner_data = Shout()
    return metadata


def another_file(metadata: Metadata) -> Metadata:
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = dataclasses.replace(place, relative_path="../../secret")
    return metadata


def pickled_entry(metadata: Metadata) -> Metadata:
    metadata.state_dict_metadata["a.matrix"] = BytesStorageMetadata()
    return metadata


def huge(metadata: Metadata) -> Metadata:
    entry = metadata.state_dict_metadata["a.matrix"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.size = torch.Size([1 << 40, 1 << 20])
    return metadata


def negative(metadata: Metadata) -> Metadata:
    huge(metadata).state_dict_metadata["a.matrix"].size = torch.Size([-(1 << 40)])  # type: ignore
    return metadata


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda _: Shout(), "it holds posix.system"),
        (hidden_in, "it holds posix.system"),
        (another_file, "a reference to '../../secret'"),
        (pickled_entry, "it holds torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        (huge, "tensors of "),
        (negative, "a negative size"),
        (lambda _: {"no": "metadata"}, "a dict"),
        (lambda _: b"", "Ran out of input"),
        (lambda _: pickle.dumps(Metadata({}))[:-9], "pickle data was truncated"),
        (lambda _: b"cbuiltins\neval\n(S'1'\ntR.", "it holds builtins.eval"),
        (lambda _: b"ctorch\nload\n(S'1'\ntR.", "it holds torch.load"),
        (lambda _: b"ctorch.serialization\nload\n.", "it holds torch.serialization.load"),
    ],
)
def test_hostile_metadata_is_refused(
    written: tuple[Path, Files], change: Callable[[Any], Any], got: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder, files = written
    metadata = pickle.loads((folder / METADATA).read_bytes())
    reader = ShardReader(folder, forge(folder, files, change(metadata)))
    with pytest.raises(InputFileError, match="list of tensors cannot be used") as caught:
        reader.read({"a.matrix": torch.empty(3, 4)})
    assert f"got {got}" in str(caught.value)
    assert str(folder / METADATA) in str(caught.value)
    assert "Fix: use --resume auto" in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_metadata_that_changed_since_the_manifest_is_not_opened(
    written: tuple[Path, Files],
) -> None:
    folder, files = written
    data = bytearray((folder / METADATA).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / METADATA).write_bytes(data)
    with pytest.raises(InputFileError, match="a file with another checksum than in the manifest"):
        ShardReader(folder, files).tensors()
    (folder / METADATA).write_bytes(data[:-1])
    with pytest.raises(InputFileError, match=rf"{len(data) - 1} bytes, expected {len(data)}"):
        ShardReader(folder, files).tensors()
    (folder / METADATA).unlink()
    with pytest.raises(InputFileError, match="No such file"):
        ShardReader(folder, files).tensors()


def test_a_shard_that_is_a_pickle_of_code_is_not_run(
    written: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, files = written
    shard = folder / "__0_0.distcp"
    torch.save(Shout(), shard)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    whole = {"offset": 0, "length": shard.stat().st_size}
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(place, **whole)
    files = forge(folder, files, metadata) | {shard.name: fingerprint(shard)}
    with pytest.raises(InputFileError, match="a shard cannot be read") as caught:
        ShardReader(folder, files).read({"a.matrix": torch.empty(3, 4)})
    assert "got Weights only load failed" in str(caught.value)
    assert f"({folder}, by rank 0). Fix: use --resume auto" in str(caught.value)
    assert not (tmp_path / "hacked").exists()
