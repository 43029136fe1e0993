"""A small .tdt, and a way to write files that no writer would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import write_tdt


def digest(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def tiny_tdts(tmp_path_factory, make_ckpt, tiny_config) -> dict[str, Path]:
    """The same model with each codec: {"t2": path, "t5": path, "int8": path}."""
    folder = tmp_path_factory.mktemp("tdt")
    path = make_ckpt(folder / "ckpt.pt", tiny_config, class_names=["a", "b", "c", "d", "e"])
    paths = {codec: folder / f"model-{codec}.tdt" for codec in ("t2", "t5", "int8")}
    for codec, target in paths.items():
        write_tdt(CheckpointExport(load_ckpt(path)), target, codec, "fp32")
    return paths


@pytest.fixture(scope="session")
def forge() -> Callable[..., Path]:
    """Return forge(source, target, edit): rewrite a .tdt after `edit(tensors, metadata)`.

    `metadata` has its JSON texts parsed. The digests are made anew, so that only the edit itself
    can be what a reader refuses.
    """

    def rewrite(source: Path, target: Path, edit: Callable[..., None]) -> Path:
        tensors = load_file(source)
        with safe_open(source, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata()
        for key in ("model", "ternary"):
            metadata[key] = json.loads(metadata[key])
        del metadata["sha256"]
        edit(tensors, metadata)
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        described = texts.get("model", "") + "\n" + texts.get("ternary", "")
        digests = {"__metadata__": hashlib.sha256(described.encode()).hexdigest()}
        digests |= {key: digest(value) for key, value in tensors.items()}
        texts.setdefault("sha256", json.dumps(digests))
        save_file(tensors, target, metadata=texts)
        return target

    return rewrite
