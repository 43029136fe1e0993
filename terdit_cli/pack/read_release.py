"""Reads the folders of TerDiT's release, and those of training with its code.

A folder holds `consolidated[_ema]_ternary.00-of-01.pth`, a flat state dict with uint8 matrices
packed by quarters (`pack/trits.py`), and `model_args.pth`, the training arguments. A folder of
their training holds `consolidated[_ema].00-of-01.pth` instead, with master weights, which are
ternarized here as in their forward pass. Shapes come from the tensors; the number of heads, which
no shape shows, from the model's name or from the caller. Labels are in the text order of class
numbers, because upstream trained on folders named "0", "1", "10".
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from terdit_cli.errors import InputFileError, UsageError, did_you_mean
from terdit_cli.model.ckpt import check_state_dict, load_tensors
from terdit_cli.model.dit import SIZES, DiTConfig
from terdit_cli.model.layout import ADALN_NORM, GATE_MATRIX, KEY_MATRIX, Q_NORM
from terdit_cli.model.metadata import LARGEST_INTEGER, ModelInfo, SpaceInfo, check_types
from terdit_cli.model.ternary import TernaryConfig, ternarize
from terdit_cli.pack.exported import StateDictModel, check_fit
from terdit_cli.pack.trits import CODECS, released_decode

ARGUMENTS_FILE = "model_args.pth"
_PACKED = "_ternary"
_WEIGHT_FILES = tuple(
    f"consolidated{ema}{packed}.00-of-01.pth" for packed in (_PACKED, "") for ema in ("_ema", "")
)
_SIZE_OF_NAME = {"600M": "600m", "3B": "4.2b", "7B": "7b"}
_VAE_IDS = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
_VAE_DOWNSAMPLE = 8
_OVERRIDES = tuple(field.name for field in dataclasses.fields(DiTConfig))
_SHOWN = (
    "dim",
    "n_layers",
    "learn_sigma",
    "qk_norm",
    "adaln_norm",
    "pos_embed",
)  # by keys and shapes


def is_released_folder(path: Path) -> bool:
    """Return whether `path` is a folder of TerDiT's release or training."""
    return path.is_dir() and (
        (path / ARGUMENTS_FILE).exists() or any(path.glob("consolidated*.pth"))
    )


def released_weights(folder: Path) -> Path:
    """Return the file that holds a folder's weights: packed before master weights, EMA before raw.

    Raises:
        InputFileError: there is none.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    raise InputFileError(
        "no weights in the folder",
        got=", ".join(sorted(path.name for path in folder.glob("*.pth"))) or "no .pth files",
        expected=_WEIGHT_FILES[0],
        where=folder,
        fix="download the complete folder, or join model-parallel parts first",
    )


class ReleasedFolder(StateDictModel):
    """A released TerDiT checkpoint; `overrides` are `DiTConfig` fields that the shapes do not show.

    Raises:
        InputFileError: a missing, damaged or inconsistent file.
        UsageError: an unknown number of heads, or an override that contradicts the tensors.
    """

    def __init__(self, folder: Path, /, **overrides: Any) -> None:
        _check_overrides(overrides, folder)
        self._where = folder
        self.path = weights = released_weights(folder)
        self._factor = 4 if _PACKED in weights.name else 1  # rows of a matrix per row in the file
        self._state: dict[str, Tensor] = load_tensors(weights)
        check_state_dict(self._state, "the released file", weights)
        arguments = self._read_arguments()
        config = self._config(arguments, overrides)
        image_size = config.input_size * _VAE_DOWNSAMPLE
        vae = str(getattr(arguments, "vae", None) or "ema")
        info = ModelInfo(
            config=config,
            ternary=TernaryConfig(),
            space=SpaceInfo("vae", _VAE_IDS.get(vae, vae), 0.18215),
            image_size=image_size,
            class_order="text",
            weights="ema" if "_ema" in weights.name else "raw",
        )
        self.info = ModelInfo.from_dict(info.to_dict(), folder)  # checks all sizes
        shapes = {key: tuple(tensor.shape) for key, tensor in self._state.items()}
        matrices = {f"{name}.weight" for name in self.ternary_names()}
        for key in matrices & shapes.keys():
            shapes[key] = (self._factor * shapes[key][0], *shapes[key][1:]) if shapes[key] else ()
        check_fit(config, info.ternary, shapes, folder, "download the released folder again")

    def _read_arguments(self) -> argparse.Namespace:
        path = self._where / ARGUMENTS_FILE
        if not path.exists():
            return argparse.Namespace()
        arguments = load_tensors(path)
        if not isinstance(arguments, argparse.Namespace):
            raise InputFileError(
                "this file does not hold the training arguments",
                got=type(arguments).__name__,
                expected="an argparse.Namespace",
                where=path,
                fix="download the released folder again",
            )
        return arguments

    def _argument(self, arguments: argparse.Namespace, name: str, default: int) -> int:
        value = getattr(arguments, name, default)
        if type(value) is not int or not 1 <= value <= LARGEST_INTEGER:
            raise self._wrong(f"{name} = {value!r}", f"a whole number from 1 to {LARGEST_INTEGER}")
        return value

    def _wrong(self, got: str, expected: str) -> InputFileError:
        return InputFileError(
            "a training argument has a wrong value",
            got=got,
            expected=expected,
            where=self._where / ARGUMENTS_FILE,
            fix="download the released folder again",
        )

    def _shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        tensor = self._state.get(key)
        if tensor is None or tensor.dim() != dimensions or 0 in tensor.shape:
            raise InputFileError(
                "the checkpoint lacks a tensor of a TerDiT",
                got="nothing" if tensor is None else f"shape {tuple(tensor.shape)}",
                expected=f"{key} with {dimensions} dimensions",
                where=self._where,
                fix="download the released folder again",
            )
        return tuple(tensor.shape)

    def _config(self, arguments: argparse.Namespace, overrides: dict[str, Any]) -> DiTConfig:
        """Work out the configuration: shapes first, then overrides, then the arguments."""
        dim, patch_inputs = self._shape("x_embedder.weight", 2)
        layer = "layers.0"
        rows, _ = self._shape(f"{layer}.{GATE_MATRIX}.weight", 2)
        kv_rows, _ = self._shape(f"{layer}.{KEY_MATRIX}.weight", 2)
        table_rows, _ = self._shape("y_embedder.embedding_table.weight", 2)
        outputs, _ = self._shape("final_layer.linear.weight", 2)
        layers = {key.split(".")[1] for key in self._state if key.startswith("layers.")}
        n_layers = len(layers)
        if layers != {str(index) for index in range(n_layers)}:
            raise InputFileError(
                "the layers are not numbered from 0",
                got=", ".join(sorted(layers)[:10]),
                expected=f"0 to {n_layers - 1}",
                where=self._where,
                fix="download the released folder again",
            )
        in_channels = overrides.get("in_channels", 4)
        patch_size = overrides.get("patch_size", math.isqrt(patch_inputs // in_channels))
        if patch_inputs != in_channels * patch_size**2:
            raise UsageError(
                "the patch size does not match the checkpoint",
                got=f"patch_size {patch_size} with in_channels {in_channels}",
                expected=f"patch_size^2 * in_channels = {patch_inputs}",
                where=self._where,
                fix="add patch_size=N in_channels=N",
            )
        n_heads, n_kv_heads = self._heads(arguments, overrides, dim, self._factor * kv_rows)
        image_size = self._argument(arguments, "image_size", 256)
        if "input_size" not in overrides and image_size % (_VAE_DOWNSAMPLE * patch_size):
            raise self._wrong(
                f"image_size = {image_size}", f"{_VAE_DOWNSAMPLE * patch_size} times a whole number"
            )
        num_classes = overrides.get("num_classes")
        if num_classes is None:
            num_classes = self._argument(arguments, "num_classes", table_rows - 1)
        dropout = overrides.get("class_dropout_prob", 0.1 if table_rows > num_classes else 0.0)
        config = DiTConfig(
            input_size=overrides.get("input_size", image_size // _VAE_DOWNSAMPLE),
            patch_size=patch_size,
            in_channels=in_channels,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            norm_eps=overrides.get("norm_eps", 1e-5),
            class_dropout_prob=dropout,
            num_classes=num_classes,
            learn_sigma=outputs != patch_inputs,
            qk_norm=f"{layer}.{Q_NORM}" in self._state,
            adaln_norm=f"{layer}.{ADALN_NORM}" in self._state,
            **_ffn_fields(dim, self._factor * rows),
        )
        return self._agreed(config, overrides)

    def _agreed(self, config: DiTConfig, overrides: dict[str, Any]) -> DiTConfig:
        """Check the overrides against what the tensors show; raises UsageError."""
        asked = {name: overrides[name] for name in _SHOWN if name in overrides}
        if "multiple_of" in overrides or "ffn_dim_multiplier" in overrides:
            asked["multiple_of"] = overrides.get("multiple_of", 256)
            asked["ffn_dim_multiplier"] = overrides.get("ffn_dim_multiplier")
        given = dataclasses.replace(config, **asked)
        for name in (*_SHOWN, "ffn_width"):
            if getattr(given, name) != getattr(config, name):
                raise UsageError(
                    f"the override of {name} contradicts the checkpoint",
                    got=getattr(given, name),
                    expected=getattr(config, name),
                    where=self._where,
                    fix="leave it out",
                )
        return given

    def _heads(
        self, arguments: argparse.Namespace, overrides: dict[str, Any], dim: int, kv_width: int
    ) -> tuple[int, int | None]:
        """Return (n_heads, n_kv_heads); the model's name gives them only for its own width."""
        n_heads = overrides.get("n_heads")
        if n_heads is None and getattr(arguments, "n_heads", None) is not None:
            n_heads = self._argument(arguments, "n_heads", 0)
        name = str(getattr(arguments, "model", ""))
        for part, size in _SIZE_OF_NAME.items():
            if n_heads is None and f"_{part}_" in name and SIZES[size][0] == dim:
                n_heads = SIZES[size][2]
        if n_heads is None:
            raise UsageError(
                "the number of attention heads is not in the checkpoint",
                got=f"model {name or 'unnamed'} with dim {dim}",
                where=self._where,
                fix="add n_heads=N",
            )
        if dim % n_heads or kv_width % (dim // n_heads):
            raise UsageError(
                "n_heads does not match the checkpoint", got=n_heads,
                expected=f"a divisor of dim {dim} whose head width divides {kv_width}",
                where=self._where, fix="add n_heads=N",
            )  # fmt: skip
        n_kv_heads = kv_width // (dim // n_heads)
        given = overrides.get("n_kv_heads")
        if given is not None and given != n_kv_heads:
            raise UsageError(
                "n_kv_heads does not match the checkpoint", got=given, expected=n_kv_heads,
                where=self._where, fix=f"leave n_kv_heads out or set it to {n_kv_heads}",
            )  # fmt: skip
        return n_heads, None if n_kv_heads == n_heads else n_kv_heads

    def matrix_shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._shape(f"{name}.weight", 2)
        return self._factor * rows, columns

    def trits(self, name: str) -> Tensor:
        key = f"{name}.weight"
        packed = self._state[key]
        if self._factor == 1:
            return ternarize(self._finite(key).float()).to(torch.int8)
        if packed.dtype != torch.uint8 or CODECS["t2"].has_invalid_codes(packed):
            raise InputFileError(
                "the matrix does not hold packed trits",
                got=f"{key} of {packed.dtype}"
                + (" with code 3" if packed.dtype == torch.uint8 else ""),
                expected="uint8 with codes 0, 1 and 2",
                where=self._where,
                fix="download the released folder again",
            )
        return released_decode(packed)

    def alphas(self, name: str) -> Tensor:
        return self._finite(f"{name}.alphas").float()


def _check_overrides(overrides: dict[str, Any], folder: Path) -> None:
    """Raise UsageError unless each override is a `DiTConfig` field with a value of its type."""
    for name, value in overrides.items():
        if name not in _OVERRIDES:
            raise UsageError(
                "unknown model field",
                got=repr(name) + did_you_mean(name, _OVERRIDES),
                expected="one of " + ", ".join(_OVERRIDES),
                where=folder,
                fix=f"leave {name} out",
            )
        try:
            check_types(DiTConfig, {name: value})
            if type(value) is int and value < 1 and name not in ("norm_eps", "class_dropout_prob"):
                raise ValueError(f"{name} is {value}, expected a positive number")
        except ValueError as error:
            raise UsageError(
                "an override has a wrong value", got=error, where=folder, fix=f"change {name}"
            ) from error


def _ffn_fields(dim: int, ffn_width: int) -> dict[str, Any]:
    """Return the `multiple_of` and `ffn_dim_multiplier` that give a feed-forward width."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if DiTConfig(dim=dim, n_heads=1, multiple_of=multiple_of).ffn_width == ffn_width:
            return {"multiple_of": multiple_of}
    # A multiplier half a unit above the exact ratio survives int()'s rounding down.
    hidden = int(2 * 4 * dim / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn_width + 0.5) / hidden}
