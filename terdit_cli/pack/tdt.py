"""The .tdt file: a packed ternary model in one safetensors file (format version 1).

Any safetensors reader opens it: 8 bytes header length, a JSON header, the tensors. Beyond that:

    metadata "format"          "tdt"
    metadata "format_version"  "1"; readers refuse a higher number
    metadata "model"           JSON: network configuration, ternary options, diffusion schedule,
                               VAE id and scale factor or pixel space, class names and order,
                               EMA flag, step, recipe hash, tool version (`ModelInfo`)
    metadata "ternary"         JSON: {matrix: {"codec": "t2" | "t5" | "int8", "shape": [N, K],
                               "granularity": "tensor" | "row" | "group128"}}
    metadata "sha256"          JSON: {tensor: hex digest of its bytes}, and as "__metadata__" that
                               of the text of "model", a newline and the text of "ternary"
    tensor "<matrix>.weight"   the trits, as `pack/trits.py` lays them out
    tensor "<matrix>.alphas"   float32 [1], [N] or [N, ceil(K/128)]
    all other tensors          bfloat16 or float32, under the training state dict's names

Ternary blobs come first, and those of t2 and t5 start at multiples of 64 bytes in the file, so
that kernels read them where they are mapped. The same format with codec "int8" is what
`terdit ternarize` writes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from terdit_cli.errors import InputFileError
from terdit_cli.model.layout import block_layout
from terdit_cli.model.metadata import LARGEST_INTEGER, ModelInfo
from terdit_cli.model.ternary import GRANULARITIES, alpha_shape
from terdit_cli.pack.exported import ExportedModel, check_fit
from terdit_cli.pack.trits import ALIGNMENT, CODECS
from terdit_cli.system.atomic import atomic_path

FORMAT = "tdt"
FORMAT_VERSION = 1
RestDtype = Literal["bf16", "fp32"]

_REPACK = "make it again with `terdit pack`, or copy it again if it was downloaded"
_DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
}
_REST_DTYPES = ("BF16", "F32")
_METADATA = "__metadata__"  # the key of the metadata in a safetensors header; never a tensor


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: its position is known before its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _granularity(alphas: Tensor) -> str:
    return "group128" if alphas.dim() == 2 else "row" if alphas.numel() > 1 else "tensor"


def write_tdt(
    model: ExportedModel,
    path: Path,
    codec: str,
    rest: RestDtype,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `model` to `path` with one tensor in memory at a time, verify it, rename it there.

    Raises:
        EnvironmentProblem: the path cannot be written.
        InputFileError: a value of `model` is not a trit or not finite, or the written file does
            not read back.
    """
    rest_dtype = torch.bfloat16 if rest == "bf16" else torch.float32
    blobs, small, ternary = [], [], {}
    for name in model.ternary_names():
        rows, columns = model.matrix_shape(name)
        alphas = model.alphas(name).float()
        ternary[name] = {
            "codec": codec,
            "shape": [rows, columns],
            "granularity": _granularity(alphas),
        }
        blobs.append(
            _Entry(
                f"{name}.weight",
                CODECS[codec].dtype,
                CODECS[codec].shape(rows, columns),
                partial(_encode_matrix, model, name, codec),
            )
        )
        small.append(
            _Entry(
                f"{name}.alphas", torch.float32, tuple(alphas.shape), partial(model.alphas, name)
            )
        )
    for name in model.rest_names():
        shape = tuple(model.rest(name).shape)  # the tensor itself is released at once
        small.append(_Entry(name, rest_dtype, shape, partial(model.rest, name)))
    small.sort(key=lambda entry: -entry.dtype.itemsize)  # float32 before bfloat16: all aligned
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": model.info.to_json(),
        "ternary": json.dumps(ternary),
    }
    with atomic_path(path) as temporary:
        _write_safetensors(temporary, blobs + small, metadata, on_progress)
        TdtFile(temporary).close()


def _encode_matrix(model: ExportedModel, name: str, codec: str) -> Tensor:
    trits = model.trits(name)
    if CODECS["int8"].has_invalid_codes(trits):
        raise InputFileError(
            f"{name} holds values that are not trits",
            got=f"values from {int(trits.min())} to {int(trits.max())}",
            expected="-1, 0 and 1",
        )
    return CODECS[codec].encode(trits)


def _metadata_digest(metadata: dict[str, str]) -> str:
    text = metadata.get("model", "") + "\n" + metadata.get("ternary", "")
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_safetensors(
    path: Path,
    entries: list[_Entry],
    metadata: dict[str, str],
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the header with empty digests, stream the tensors, then fill the digests in.

    The header's length does not change between the two: a digest is always 64 characters.
    """
    digests = {_METADATA: _metadata_digest(metadata)}
    digests |= {entry.name: "0" * 64 for entry in entries}
    header = _header(entries, metadata, digests)
    with path.open("wb") as file:
        file.write(header)
        for index, entry in enumerate(entries):
            value = entry.load().to(entry.dtype)
            if tuple(value.shape) != entry.shape:
                raise ValueError(f"{entry.name} has shape {tuple(value.shape)} not {entry.shape}")
            if value.is_floating_point() and not value.isfinite().all():
                raise InputFileError(
                    "a value is not finite",
                    got=f"{entry.name}, converted to {value.dtype}",
                    fix="use --rest fp32, if it is finite there",
                )
            data = _bytes_of(value)
            digests[entry.name] = hashlib.sha256(data).hexdigest()
            file.write(data)
            del value, data  # before the next one is loaded
            on_progress(index + 1, len(entries))
        file.seek(0)
        file.write(_header(entries, metadata, digests))


def _header(entries: list[_Entry], metadata: dict[str, str], digests: dict[str, str]) -> bytes:
    """Return length and JSON of a safetensors header, padded so that the data is aligned."""
    header: dict[str, Any] = {_METADATA: metadata | {"sha256": json.dumps(digests)}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class TdtFile(ExportedModel):
    """An open .tdt: checked when opened, tensors mapped when asked for.

    Raises:
        InputFileError: missing, truncated, damaged, foreign or newer than this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputFileError(
                "no such model file", where=path, fix="give a .tdt written by `terdit pack`"
            )
        try:
            self._file = safe_open(path, framework="pt")
            self._file.__enter__()
            metadata = self._file.metadata() or {}
            self._keys = set(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise InputFileError(
                "the file is truncated, damaged or not a .tdt",
                got=error,
                expected="a complete safetensors file",
                where=path,
                fix=_REPACK,
            ) from error
        self._check_version(metadata)
        self._digests = self._read_json(metadata, "sha256")
        if self._digests.pop(_METADATA, None) != _metadata_digest(metadata):
            raise self._damaged("the metadata does not match its SHA-256")
        self.info = ModelInfo.from_json(metadata.get("model", ""), path)
        self._ternary = self._read_json(metadata, "ternary")
        self._check_layout()
        self._check_values()

    def _check_version(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise InputFileError(
                "a safetensors file, but not a .tdt",
                got=f"metadata format {metadata.get('format')!r}",
                expected=repr(FORMAT),
                where=self.path,
                fix="make one with `terdit pack`",
            )
        version = metadata.get("format_version", "")
        if version != str(FORMAT_VERSION):
            raise InputFileError(
                "this .tdt has another format version",
                got=version[:20],
                expected=FORMAT_VERSION,
                where=self.path,
                fix="update terdit, or pack the model again",
            )

    def _read_json(self, metadata: dict[str, str], key: str) -> dict[str, Any]:
        try:
            value = json.loads(metadata.get(key, ""))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"metadata {key!r} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise self._damaged(f"metadata {key!r} is not a mapping")
        return value

    def _damaged(self, reason: str) -> InputFileError:
        return InputFileError("the .tdt is damaged", got=reason, where=self.path, fix=_REPACK)

    def _check_layout(self) -> None:
        """Check that every declared matrix is present, in the shape of its codec."""
        config = self.info.config
        # Counted before any name is made: a forged number of layers can be huge.
        if len(self._ternary) != config.n_layers * len(block_layout(config).matrices):
            raise self._damaged(
                f"{len(self._ternary)} ternary matrices for {self.info.config.n_layers} layers"
            )
        if set(self._digests) != self._keys:
            raise self._damaged("the digests name other tensors than the file holds")
        dtypes: dict[str, tuple[str, ...]] = dict.fromkeys(self._keys, _REST_DTYPES)
        for name, entry in self._ternary.items():
            try:
                codec, (rows, columns) = entry["codec"], entry["shape"]
                wanted = {
                    f"{name}.weight": CODECS[codec].shape(rows, columns),
                    f"{name}.alphas": alpha_shape(rows, columns, entry["granularity"]),
                }
                valid = entry["granularity"] in GRANULARITIES and all(
                    type(n) is int and 0 < n <= LARGEST_INTEGER for n in (rows, columns)
                )
            except (TypeError, KeyError, ValueError) as error:
                raise self._damaged(f"the description of {name} is {entry!r}") from error
            if not valid:
                raise self._damaged(f"the description of {name} is {entry!r}")
            dtypes[f"{name}.weight"] = (_DTYPE_NAMES[CODECS[codec].dtype],)
            dtypes[f"{name}.alphas"] = ("F32",)
            for key, shape in wanted.items():
                if key not in self._keys:
                    raise self._damaged(f"tensor {key} is missing")
                found = tuple(self._file.get_slice(key).get_shape())
                if found != shape:
                    raise self._damaged(f"tensor {key} has shape {found}, expected {shape}")
        shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._keys}
        shapes |= {f"{name}.weight": self.matrix_shape(name) for name in self._ternary}
        ternary = replace(
            self.info.ternary, enabled=True, scale="learned"
        )  # all have alphas in a .tdt
        check_fit(self.info.config, ternary, shapes, self.path, _REPACK)
        for key, allowed in dtypes.items():
            if (dtype := self._file.get_slice(key).get_dtype()) not in allowed:
                raise self._damaged(f"tensor {key} is {dtype}, expected {' or '.join(allowed)}")

    def _check_values(self) -> None:
        """Check every tensor's digest, that every packed code is a trit and every number finite."""
        codec_of = {f"{name}.weight": entry["codec"] for name, entry in self._ternary.items()}

        def problem(key: str) -> str | None:
            value = self._tensor(key)
            if hashlib.sha256(_bytes_of(value)).hexdigest() != self._digests[key]:
                return f"the bytes of {key} do not match their SHA-256"
            if key in codec_of and CODECS[codec_of[key]].has_invalid_codes(value):
                return f"{key} holds invalid codes"
            if value.is_floating_point() and not value.isfinite().all():
                return f"{key} holds values that are not finite"
            return None

        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
            for reason in pool.map(problem, sorted(self._keys)):
                if reason is not None:
                    raise self._damaged(reason)

    def _tensor(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise self._damaged(f"tensor {key} cannot be read: {error}") from error

    def close(self) -> None:
        self._file.__exit__(None, None, None)

    def __exit__(self, *error: object) -> None:
        self.close()

    def ternary_names(self) -> list[str]:
        return list(self._ternary)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._ternary[name]["shape"]
        return rows, columns

    def codec(self, name: str) -> str:
        """Return the codec of a matrix."""
        return self._ternary[name]["codec"]

    def blob(self, name: str) -> Tensor:
        """Return the packed bytes of a matrix, mapped from the file."""
        return self._tensor(f"{name}.weight")

    def trits(self, name: str) -> Tensor:
        return CODECS[self.codec(name)].decode(self.blob(name), *self.matrix_shape(name))

    def alphas(self, name: str) -> Tensor:
        return self._tensor(f"{name}.alphas")

    def rest_names(self) -> list[str]:
        ternary = {f"{name}.{part}" for name in self._ternary for part in ("weight", "alphas")}
        return sorted(self._keys - ternary)

    def rest(self, name: str) -> Tensor:
        return self._tensor(name)
