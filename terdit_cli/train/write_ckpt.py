"""ckpt.pt, the result of a run, assembled from the shards of a checkpoint.

    write all but the tensors' bytes      torch.save of tensors without data, under skip_data
    for each tensor: read its shards, write its bytes into the file, enter its CRC-32

Runs in one process, whatever the number that wrote the shards. Memory holds one tensor and one of
its shards: at most twice the bytes of the largest tensor (4.2b: 2 x 226 MB).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from terdit_cli.errors import InputFileError
from terdit_cli.model.ckpt import ckpt_values, save_tensors
from terdit_cli.system.atomic import atomic_path
from terdit_cli.train.checkpoint import RECIPE, Saved
from terdit_cli.train.sharded_tensors import ShardReader

PARTS = ("model", "ema")


def write_ckpt(saved: Saved, target: Path) -> None:
    """Write model and EMA weights of a checkpoint as ckpt.pt, completely or not at all.

    Raises:
        InputFileError: the checkpoint holds no model, or was changed.
        EnvironmentProblem: disk full or not writable.
    """
    reader = ShardReader(saved.path, saved.files)
    stored = reader.tensors()
    names = [key for part in PARTS for key in stored if key.startswith(part + ".")]
    with FakeTensorMode():
        hollow = {key: torch.empty(stored[key].size, dtype=_dtype(stored[key])) for key in names}
    parts: dict[str, dict[str, Tensor]] = {}
    for part in PARTS:
        prefix = part + "."
        parts[part] = {
            key.removeprefix(prefix): hollow[key] for key in names if key.startswith(prefix)
        }
        if not parts[part]:
            raise InputFileError(
                "the checkpoint lacks a part", got=f"no {part}", where=saved.path,
                fix="use another checkpoint of the run",
            )  # fmt: skip
    recipe = (saved.path / RECIPE).read_text(encoding="utf-8")
    values = ckpt_values(saved.info, recipe, **parts)
    with atomic_path(target) as temporary:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            save_tensors(values, temporary)
        places = _places(temporary)
        with temporary.open("r+b") as file:
            for number, key in enumerate(names):  # in torch.save's numbering: by first use
                tensor = torch.empty(stored[key].size, dtype=_dtype(stored[key]))
                reader.read({key: tensor}, one_process=True)
                places[f"data/{number}"].fill(file, tensor)


class _Place:
    """The positions of a file and its two checksums in a zip archive."""

    def __init__(self, start: int, size: int, entry: int) -> None:
        self._start = start
        self._size = size
        self._entry = entry

    def fill(self, file: BinaryIO, tensor: Tensor) -> None:
        """Write a tensor's bytes and their CRC-32."""
        if tensor.nbytes != self._size:
            raise RuntimeError(f"{self._size} bytes for a tensor of {tensor.nbytes}")
        if not tensor.nbytes:
            return
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        checksum = struct.pack("<I", zlib.crc32(data))
        file.seek(self._start)
        file.write(data)
        if file.read(4) != b"PK\x07\x08":
            raise RuntimeError("no data descriptor behind a tensor")
        for offset in (self._start + self._size + 4, self._entry + 16):
            file.seek(offset)
            file.write(checksum)


def _places(path: Path) -> dict[str, _Place]:
    """Return the positions of an archive's files by name, without the archive's own."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        places = {}
        entry = archive.start_dir
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            places[info.filename.partition("/")[2]] = _Place(start, info.file_size, entry)
            file.seek(entry + 28)
            entry += 46 + sum(struct.unpack("<HHH", file.read(6)))
        return places


def _dtype(entry: TensorStorageMetadata) -> torch.dtype:
    return entry.properties.dtype
