"""The file ckpt.pt: a trained model, tensors and plain types only.

    {"format": "terdit-checkpoint", "version": 1, "info": ModelInfo as a dict,
     "recipe": YAML text, "model": state dict, "ema": state dict}

Written by training, read by ternarize, pack and load_model. Loadable with
`torch.load(weights_only=True)`; read through mmap, so that a tensor is in memory only while it is
used.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from terdit_cli.errors import InputFileError
from terdit_cli.model.metadata import ModelInfo

CKPT = "ckpt.pt"  # its name in a run folder
FORMAT = "terdit-checkpoint"
VERSION = 1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8)
_MADV_PAGEOUT = 21  # <linux/mman.h>; Python's mmap has no name for it


@dataclass(frozen=True)
class Checkpoint:
    """The opened file; state dicts are mapped, not read."""

    path: Path
    info: ModelInfo
    recipe: str
    model: dict[str, Tensor]
    ema: dict[str, Tensor]

    def state_dict(self, weights: Literal["ema", "raw"]) -> dict[str, Tensor]:
        return self.ema if weights == "ema" else self.model


def ckpt_values(
    info: dict[str, Any], recipe: str, model: dict[str, Tensor], ema: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the contents of a ckpt.pt; `info` is the result of `ModelInfo.to_dict`."""
    head = {"format": FORMAT, "version": VERSION, "info": info, "recipe": recipe}
    return head | {"model": model, "ema": ema}


def save_tensors(values: Any, path: Path) -> None:
    """Write `values` with torch.save; raises OSError when the disk refuses.

    torch's zip writer hides that error: closing the archive then raises a RuntimeError.
    """
    try:
        with path.open("wb") as file:
            torch.save(values, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_tensors(path: Path) -> Any:
    """Load a file of torch.save by mmap, refusing everything but tensors and plain types.

    `argparse.Namespace`, which upstream's model_args.pth holds, counts as a plain type.

    Raises:
        InputFileError: missing, truncated, no torch file, or holding code.
    """
    import argparse

    if not path.is_file():
        raise InputFileError("no such file", where=path, fix="check the path")
    members = _members(path)
    if members is None:
        raise InputFileError(
            "the file is truncated or was not written by torch.save",
            got=f"{path.stat().st_size} bytes that are no zip archive",
            expected="a file of torch.save",
            where=path,
            fix="copy it again, or save it with torch 1.6 or newer",
        )
    # torch uses the mapped bytes as the tensors, compressed or not.
    if packed := [member for member in members if member.compress_type != zipfile.ZIP_STORED]:
        raise InputFileError(
            "the file's tensors are compressed: torch would read the compressed bytes as numbers",
            got=f"{packed[0].filename[:100]}, compressed",
            expected="a file written by torch.save",
            where=path,
            fix="zip it without compression (zip -0), or save it again with torch.save",
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise InputFileError(
            "the file holds more than tensors and plain types, and was not loaded",
            got=refused[1] if refused else str(error).split("\n")[0][:200],
            where=path,
            fix="if you trust the file, save its state dict alone with torch.save",
        ) from error
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise InputFileError(
            "the file is damaged",
            got=str(error).split("\n")[0][:200],
            expected="a file of torch.save",
            where=path,
            fix="copy it again",
        ) from error


def check_state_dict(values: Any, what: str, where: object) -> None:
    """Raise InputFileError unless `values` is a flat dictionary of plain dense tensors.

    A tensor must have as many bytes in the file as in its shape: one whose strides are 0 would
    become as large as its shape claims where it is converted.
    """
    got = None if isinstance(values, dict) else f"a {type(values).__name__}"
    for key, value in values.items() if got is None else ():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            got = f"{str(key)[:100]!r}: a {type(value).__name__}"
        elif value.layout != torch.strided or value.device.type != "cpu" or value.is_nested:
            kind = "nested" if value.is_nested else value.layout
            got = f"{key[:100]!r}: a tensor that is {kind} on {value.device}"
        elif value.dtype not in _DTYPES:
            got = f"{key[:100]!r}: {value.dtype}"
        elif value.nbytes > value.untyped_storage().nbytes():
            got = f"{key[:100]!r}: shape {list(value.shape)} with fewer values behind it"
        if got is not None:
            break
    if got is not None:
        raise InputFileError(
            f"{what} is not a state dict", got=got,
            expected="names with complete tensors of float16, bfloat16, float32, float64 or bytes",
            where=where, fix="copy it again, or save its state dict alone with torch.save",
        )  # fmt: skip


def _members(path: Path) -> list[zipfile.ZipInfo] | None:
    """Return the members of an archive, None if the file is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    # What zipfile raises for a damaged directory.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        return None


def release_pages(tensor: Tensor) -> None:
    """Let the system reclaim the memory of a mapped tensor until it is read again.

    Without this a whole checkpoint becomes resident while it is converted matrix by matrix.
    MADV_PAGEOUT never loses contents, whatever memory the tensor lies in; where the system does
    not know it, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def ckpt_in(path: Path) -> Path:
    """Return the ckpt.pt that a path means: itself, or that of a run folder."""
    return path / CKPT if path.is_dir() else path


def load_ckpt(path: Path) -> Checkpoint:
    """Open a ckpt.pt.

    Raises:
        InputFileError: not a file that `terdit train` wrote, or a newer version.
    """
    values = load_tensors(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputFileError(
            "not a terdit checkpoint",
            got=f"a {type(values).__name__}"
            + (f" with keys {sorted(map(str, values))[:5]}" if isinstance(values, dict) else ""),
            expected="the ckpt.pt of a run folder",
            where=path,
            fix="for released TerDiT weights, give their folder",
        )
    if type(values.get("version")) is not int or values["version"] != VERSION:
        raise InputFileError(
            "this checkpoint has another format version",
            got=values.get("version"),
            expected=VERSION,
            where=path,
            fix="update terdit",
        )
    for part in ("model", "ema"):
        check_state_dict(values.get(part), f"the checkpoint's {part!r}", path)
    info = ModelInfo.from_dict(values.get("info"), path)
    if info.config.n_layers > min(len(values["model"]), len(values["ema"])):
        raise InputFileError(
            "the checkpoint does not fit its own configuration",
            got=f"{len(values['model'])} tensors",
            expected=f"those of {info.config.n_layers} layers",
            where=path,
            fix="copy it again",
        )
    return Checkpoint(path, info, str(values.get("recipe", "")), values["model"], values["ema"])
