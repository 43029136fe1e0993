"""Files of prepared latents: what a VAE's encoder says of every image, ready to be mapped.

    folder/index.json                the description of the whole and its shards, written last
    folder/shard-00000.safetensors   labels int64 [n], crc32 int64 [n, V],
                                     moments bfloat16 [n, V, 2C, h, w] = mean and log variance

A shard's header is a function of its shape alone, so a reader compares it and parses nothing.
It is padded until the moments begin at a multiple of 4096 bytes. `crc32` has the checksum of each
view's bytes, tested whenever the view is read; the index has the SHA-256 of each file.

Bytes of N images: N * V * 2C * h * w * 2, and 8 V + 8 an image. ImageNet at 256 pixels in both
views: 1.28e6 * 2 * 8 * 32 * 32 * 2 = 42 GB.

While the shards are made, `prepare.json` holds the plan and `shard-00000.json` the record of each
finished shard; the index replaces them.

Shapes: n images of a shard; V views, the image and then its mirror; C channels, h x w latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from terdit_cli.errors import InputFileError
from terdit_cli.system.atomic import atomic_path, file_sha256

INDEX = "index.json"
PLAN = "prepare.json"
FORMAT_VERSION: Literal[1] = 1
LARGEST_INDEX = 64 << 20  # bytes
_ALIGNMENT = 4096  # bytes of a page

Count = Annotated[int, Field(ge=1, le=1 << 40)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Description = TypeVar("Description", bound=BaseModel)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# What decides the bytes of the shards: only work of an equal plan goes on in a folder.
_CONTENT = (
    "format", "version", "image_size", "latent_shape", "mirrored", "encoder_sha256",
    "scale_factor", "class_names", "listed", "listing_sha256", "images_a_shard", "batch_size",
)  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardRecord(_Strict):
    """One finished shard; `skipped` names its unreadable images, which it leaves out."""

    number: Annotated[int, Field(ge=0, le=99_999)]
    images: Annotated[int, Field(ge=0, le=1 << 40)]
    bytes: Count
    sha256: Sha256
    skipped: list[str] = []

    @property
    def file(self) -> str:
        return shard_name(self.number)


class LatentPlan(_Strict):
    """What a folder of latents holds, known before any is made.

    `listed` images were found; shard k is made from the listed images k * images_a_shard and on,
    in batches of `batch_size`. `data` is the recipe's section, `data_sha256` its hash.
    """

    format: Literal["terdit-latents"] = "terdit-latents"
    version: Literal[1] = FORMAT_VERSION
    image_size: Side
    latent_shape: Annotated[list[Side], Field(min_length=3, max_length=3)]
    mirrored: bool
    vae: Annotated[str, Field(max_length=4096)]
    encoder_sha256: Sha256
    scale_factor: Annotated[float, Field(gt=0, lt=1e9)]
    class_names: Annotated[list[str], Field(min_length=1)]
    listed: Count
    listing_sha256: Sha256
    images_a_shard: Count
    batch_size: Count
    data: dict[str, Any]
    data_sha256: Sha256

    @property
    def views(self) -> int:
        return 2 if self.mirrored else 1

    @property
    def num_shards(self) -> int:
        return -(-self.listed // self.images_a_shard)

    def images_of(self, number: int) -> range:
        """Return the listed images that a shard is made from."""
        start = number * self.images_a_shard
        return range(start, min(start + self.images_a_shard, self.listed))

    def moments_shape(self, images: int) -> tuple[int, int, int, int, int]:
        """Return (n, V, 2C, h, w)."""
        channels, height, width = self.latent_shape
        return images, self.views, 2 * channels, height, width

    def shard_bytes(self, images: int) -> int:
        """Return the length of a shard's file."""
        return _layout(self.moments_shape(images)).end

    @property
    def total_bytes(self) -> int:
        return sum(self.shard_bytes(len(self.images_of(k))) for k in range(self.num_shards))

    def differences(self, other: LatentPlan) -> list[str]:
        """Name what would make other shards."""
        return [name for name in _CONTENT if getattr(self, name) != getattr(other, name)]


class LatentIndex(LatentPlan):
    """A finished folder of latents."""

    images: Count
    shards: list[ShardRecord]

    @model_validator(mode="after")
    def _check(self) -> LatentIndex:
        numbers = [shard.number for shard in self.shards]
        if len(numbers) != self.num_shards or numbers != list(range(len(numbers))):
            raise ValueError(f"expected {self.num_shards} shards in order")
        for shard in self.shards:
            listed = len(self.images_of(shard.number))
            if shard.images + len(shard.skipped) != listed:
                raise ValueError(f"{shard.file} was made from {listed} images, not from all")
            if shard.bytes != self.shard_bytes(shard.images):
                raise ValueError(f"{shard.file} of {shard.images} images has other bytes")
        if sum(shard.images for shard in self.shards) != self.images:
            raise ValueError("the shards have another number of images")
        return self


class _Layout(NamedTuple):
    """Offsets in a shard's file, in bytes."""

    header: bytes
    crc32: int
    moments: int
    end: int


def _layout(shape: tuple[int, int, int, int, int]) -> _Layout:
    """Return the safetensors header of a shard of moments [n, V, 2C, h, w], and its offsets."""
    n, views = shape[:2]
    sizes = [8 * n, 8 * n * views, 2 * math.prod(shape)]
    ends = [sum(sizes[: k + 1]) for k in range(3)]
    entries = {
        "labels": {"dtype": "I64", "shape": [n], "data_offsets": [0, ends[0]]},
        "crc32": {"dtype": "I64", "shape": [n, views], "data_offsets": ends[:2]},
        "moments": {"dtype": "BF16", "shape": list(shape), "data_offsets": ends[1:]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text) + ends[1]) // _ALIGNMENT) * _ALIGNMENT - ends[1] - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    start = len(header)
    return _Layout(header, start + ends[0], start + ends[1], start + ends[2])


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    moments: NDArray[np.uint16],
    labels: NDArray[np.int64],
    skipped: list[str],
) -> ShardRecord:
    """Write a shard and then its record.

    Args:
        moments: the bits of bfloat16 [n, V, 2C, h, w].
        labels: int64 [n].
        skipped: the images left out.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    n, views = moments.shape[:2]
    crc32 = np.array([zlib.crc32(view) for image in moments for view in image], dtype=np.int64)
    shape = (n, views, *moments.shape[2:])
    layout = _layout(shape)
    parts = (layout.header, labels.tobytes(), crc32.tobytes(), moments.data)
    digest = hashlib.sha256()
    with atomic_path(folder / shard_name(number)) as temporary, temporary.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
    record = ShardRecord(
        number=number, images=n, bytes=layout.end, sha256=digest.hexdigest(), skipped=skipped
    )
    write_json(folder / record_name(number), record)
    return record


def record_name(number: int) -> str:
    """Return the name of a finished shard's record, which lies there until the index does."""
    return f"shard-{number:05d}.json"


def write_json(path: Path, value: BaseModel) -> None:
    """Write a description whole or not at all; raises EnvironmentProblem."""
    with atomic_path(path) as temporary:
        text = json.dumps(value.model_dump(mode="json"), indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_index(folder: Path) -> LatentIndex:
    """Read and check a folder's index.

    Raises:
        InputFileError: no finished folder of latents, or an index that contradicts itself.
    """
    if not (folder / INDEX).is_file():
        unfinished = (folder / PLAN).is_file()
        raise InputFileError(
            "no prepared latents here",
            got="latents that are not finished" if unfinished else f"no {INDEX}",
            expected="a folder that `terdit prepare` has finished",
            where=folder,
            fix="run the same `terdit prepare` again" if unfinished else "set data.path to one",
        )
    return read_json(folder / INDEX, LatentIndex)


def read_json(path: Path, kind: type[Description]) -> Description:
    """Read a description of one of the kinds above; raises InputFileError for any other file."""
    try:
        size = path.stat().st_size
        if size > LARGEST_INDEX:
            raise ValueError(f"{size} bytes, over {LARGEST_INDEX}")
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        else:
            got = str(error)
        raise InputFileError(
            "cannot read the description of prepared latents",
            got=got,
            expected=f"what `terdit prepare` writes, version {FORMAT_VERSION}",
            where=path,
            fix="copy the folder again, or prepare the latents again",
        ) from error


class Shard:
    """A mapped shard: labels int64 [n] and moments uint16 [n, V, 2C * h * w] (bfloat16's bits).

    Raises:
        InputFileError: the file is missing, cut or not what the index says.
    """

    def __init__(self, folder: Path, index: LatentIndex, record: ShardRecord) -> None:
        self.path = folder / record.file
        layout = _layout(index.moments_shape(record.images))
        try:
            size = self.path.stat().st_size
            if size != record.bytes:
                raise damaged(self.path, f"{size} bytes", f"{record.bytes} bytes")
            with self.path.open("rb") as file:
                if file.read(len(layout.header)) != layout.header:
                    raise damaged(self.path, "another header", "that of the index's shapes")
            # Not numpy's or Python's map, each of which keeps a file open.
            mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise damaged(self.path, str(error), f"{record.bytes} bytes") from error
        content = mapped.numpy()
        start = len(layout.header)
        self.labels = content[start : layout.crc32].view(np.int64)
        self._crc32 = content[layout.crc32 : layout.moments].view(np.int64)
        self._crc32 = self._crc32.reshape(record.images, index.views)
        rows = (record.images, index.views, math.prod(index.moments_shape(1)[2:]))
        self._moments = content[layout.moments :].view(np.uint16).reshape(rows)
        classes = len(index.class_names)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < classes:
            raise damaged(self.path, "labels of no class", f"0 to {classes - 1}")

    def read(self, row: int, view: int, out: NDArray[np.uint16]) -> None:
        """Copy the moments of one view of an image into uint16 [2C * h * w].

        Raises:
            InputFileError: their checksum is wrong.
        """
        out[:] = self._moments[row, view]
        if zlib.crc32(out.data) != self._crc32[row, view]:
            raise damaged(self.path, f"a wrong checksum in image {row}", "the bytes written")


def damaged(path: Path, got: str, expected: str) -> InputFileError:
    """Return the error for a shard that is not what was written."""
    return InputFileError(
        "a shard of latents is damaged",
        got=got,
        expected=expected,
        where=path,
        fix=f"copy it again, or delete it and run `terdit prepare RECIPE -o {path.parent}` again",
    )


def damage_of(folder: Path, record: ShardRecord) -> str | None:
    """Read a whole shard and say what is wrong with it, or None."""
    path = folder / record.file
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{size} bytes, expected {record.bytes}"
        found = file_sha256(path)
    except OSError as error:
        return error.strerror or str(error)
    if found != record.sha256:
        return f"SHA-256 {found[:12]}..., expected {record.sha256[:12]}..."
    return None
