"""Sharded tensors on disk: torch.distributed.checkpoint with fingerprints and without code.

Every process writes one file of its shards, `__<rank>_0.distcp`, hashed while it is written and
synced; the main one adds `.metadata`, which says where each part of each tensor is. An error of one
process is raised on all of them. Tensors can be read by another number of processes.

`.metadata` is a pickle, and a pickle can hold code: it is read by an unpickler that knows the
classes of torch's metadata and nothing else, after its fingerprint was compared. Only tensors are
stored, so that there is no other pickle.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from terdit_cli.errors import InputFileError

METADATA = ".metadata"
LARGEST_METADATA = 1 << 31  # bytes; about 350 per shard: 0.5 GB for 512 processes of a 4.2b

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}

# A single process without a process group is handled like many with one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class Fingerprint(TypedDict):
    """Size and hash that a file must have."""

    bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


class _HashedFile(io.RawIOBase):
    """A file that is hashed while it is written, from start to end."""

    def __init__(self, file: io.IOBase) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any, /) -> int:
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return cast(int, self._file.write(data))

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._bytes

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        super().close()

    @property
    def fingerprint(self) -> Fingerprint:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


class _HashingFiles(FileSystem):
    """torch's file system, which records the fingerprints of written files."""

    def __init__(self) -> None:
        self.written: dict[str, Fingerprint] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            hashed = _HashedFile(file)
            yield hashed
            hashed.flush()
            self.written[Path(path).name] = hashed.fingerprint


@dataclass(frozen=True)
class _Written:
    """What one process has written."""

    results: list[WriteResult]
    files: dict[str, Fingerprint]


class ShardWriter(dcp.FileSystemWriter):
    """Writes shards into a new folder.

    `publish` is called on the main process with the fingerprints of all files, when all processes
    have written and synced theirs; what it raises is raised on all of them.
    """

    def __init__(self, folder: Path, publish: Callable[[dict[str, Fingerprint]], None]) -> None:
        super().__init__(folder)
        self.fs: _HashingFiles = _HashingFiles()
        self._publish = publish

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch's own names this machine's folders

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            results = super().write_data(plan, planner).value()
        except RuntimeError as error:
            # torch's zip writer hides the disk's refusal: closing the archive fails once more.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        done: Future[_Written] = Future()
        done.set_result(_Written(results, dict(self.fs.written)))
        return done

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        super().finish(metadata, [written.results for written in results])
        files = {name: mark for written in results for name, mark in written.files.items()}
        files[METADATA] = self.fs.written[METADATA + ".tmp"]
        self._publish(files)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


class ShardReader(dcp.FileSystemReader):
    """Reads shards from a folder whose files have the given fingerprints."""

    def __init__(self, folder: Path, files: dict[str, Fingerprint]) -> None:
        super().__init__(folder)
        self._folder = folder
        self._files = files
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata: where each part of each tensor is.

        Raises:
            InputFileError: missing, changed, or holding anything but torch's metadata.
        """
        if self._metadata is None:
            try:
                self._metadata = self._read()
            except Exception as error:  # whatever a foreign pickle makes the unpickler raise
                raise InputFileError(
                    "the checkpoint's list of tensors cannot be used",
                    got=str(error).split("\n")[0][:200] or type(error).__name__,
                    expected="what torch.distributed.checkpoint wrote",
                    where=self._folder / METADATA,
                    fix="use --resume auto to take the newest complete checkpoint",
                ) from error
        return self._metadata

    def _read(self) -> Metadata:
        path = self._folder / METADATA
        size = self._files[METADATA]["bytes"]
        if size > LARGEST_METADATA or path.stat().st_size != size:
            raise ValueError(f"{path.stat().st_size} bytes, expected {size}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self._files[METADATA]["sha256"]:
            raise ValueError("a file with another checksum than in the manifest")
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"a {type(metadata).__name__}")
        unknown = {place.relative_path for place in metadata.storage_data.values()} - {*self._files}
        if unknown:
            raise ValueError(f"a reference to {min(unknown)!r}")
        claimed = 0
        for entry in metadata.state_dict_metadata.values():
            if not isinstance(entry, TensorStorageMetadata):
                raise TypeError(f"a {type(entry).__name__}")
            if min(entry.size, default=0) < 0:
                raise ValueError(f"a negative size: {list(entry.size)}")
            claimed += entry.size.numel() * entry.properties.dtype.itemsize
        written = sum(mark["bytes"] for mark in self._files.values())
        if claimed > written:
            raise ValueError(f"tensors of {claimed} bytes in files of {written}")
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return shape and dtype of every tensor by its name."""
        return cast(dict[str, TensorStorageMetadata], self.read_metadata().state_dict_metadata)

    def read(self, tensors: dict[str, Tensor], one_process: bool = False) -> None:
        """Fill tensors, or this process's shards of them; all processes call, unless `one_process`.

        Raises:
            InputFileError: a missing tensor, or one of another shape; a shard that
                cannot be read.
        """
        stored = self.tensors()
        for key, tensor in tensors.items():
            if key not in stored or stored[key].size != tensor.size():
                got = f"shape {list(stored[key].size)}" if key in stored else "nothing"
                raise InputFileError(
                    "the checkpoint lacks a tensor",
                    got=got,
                    expected=f"{key} of shape {list(tensor.size())}",
                    where=self._folder,
                    fix="use the recipe it was trained with",
                )
        try:
            dcp.load(tensors, storage_reader=self, no_dist=one_process)
        except CheckpointException as failures:  # not an Exception
            rank, (error, _) = next(iter(failures.failures.items()))
            raise InputFileError(
                "a shard cannot be read",
                got=str(error).split("\n")[0][:200] or type(error).__name__,
                where=f"{self._folder}, by rank {rank}",
                fix="use --resume auto to take the newest complete checkpoint",
            ) from error


def flatten(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries by their dotted names, and nothing else."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            flat[prefix + key] = value
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
    return flat
