"""Shared fixtures: the recorded cases of the original model, and tiny models in files."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.metadata import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.system.openmp import bound_spinning
from tests.ckpt_file import save_ckpt

GOLDEN = Path(__file__).parent / "golden"
RECIPE_TEXT = "model:\n  size: nano\n"


def _import_triton() -> None:
    """Import Triton for its interpreter, where there is no GPU.

    Triton's own functions are made for it or for a GPU when Triton is first imported, which
    torch does too: so here, before any other test.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("terdit_cli.runtime.gpu.triton_kernels", "triton.experimental.gluon"):
        importlib.import_module(name)
    del os.environ["TRITON_INTERPRET"]


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    _import_triton()
torch.set_num_threads(1)
bound_spinning()  # of the processes that tests start: in this one no thread waits for another
# Under nohup it is ignored, here and in all children, which is what a few tests are not about.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("terdit", deadline=None, derandomize=True)
settings.load_profile("terdit")


class Case(NamedTuple):
    """A recorded model: its configuration, its facts and its tensors by "part.name"."""

    config: DiTConfig
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under `prefix`, by their names without it."""
        return {
            key.removeprefix(f"{prefix}."): value
            for key, value in self.tensors.items()
            if key.startswith(f"{prefix}.")
        }


@cache
def _load_case(name: str) -> Case:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    config = DiTConfig(**facts["model"])
    if "label_rows.index" in tensors:  # only the rows that the recorded labels read
        table = torch.zeros(config.num_classes + 1, config.conditioning_width)
        table[tensors["label_rows.index"]] = tensors["label_rows.values"]
        tensors["train.y_embedder.embedding_table.weight"] = table
    return Case(config, facts, tensors)


@pytest.fixture(scope="session")
def golden_case() -> Callable[[str], Case]:
    """Return golden_case("public_a" | "public_b" | "public_wide")."""
    return _load_case


@pytest.fixture(scope="session")
def golden_units() -> dict[str, Tensor]:
    """The recorded inputs and outputs of single functions."""
    return load_file(GOLDEN / "public_units.safetensors")


@pytest.fixture(scope="session")
def released_folder() -> Path:
    """A checkpoint folder as TerDiT's authors write it: the packed form of public_a."""
    return GOLDEN / "public_a_ckpt"


@pytest.fixture(scope="session")
def tiny_config() -> DiTConfig:
    """Grouped k/v heads, q/k norm and sizes that no tile divides."""
    return DiTConfig(
        input_size=4, patch_size=2, in_channels=3, dim=20, n_layers=2, n_heads=2, n_kv_heads=1,
        multiple_of=3, num_classes=5, qk_norm=True,
    )  # fmt: skip


@torch.no_grad()
def _randomise(network: DiT, seed: int) -> DiT:
    """Fill every parameter with its own random values: nothing is zero, one or shared."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or name.endswith("adaLN_modulation.2.weight"):
            parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif name.endswith("alphas"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return network


@pytest.fixture(scope="session")
def random_network() -> Callable[..., DiT]:
    """Return random_network(config, ternary=TernaryConfig(), seed=0): a training network."""

    def make(config: DiTConfig, ternary: TernaryConfig | None = None, seed: int = 0) -> DiT:
        return _randomise(DiT(config, (ternary or TernaryConfig()).linear()), seed)

    return make


@pytest.fixture(scope="session")
def random_inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return random_inputs(config, batch=2, seed=0): x, t and y, the null class among them."""

    def make(config: DiTConfig, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        side = config.input_size
        x = torch.randn(batch, config.in_channels, side, side, generator=generator)
        t = torch.randint(0, 1000, (batch,), generator=generator)
        y = torch.randint(0, config.num_classes, (batch,), generator=generator)
        if config.null_class is not None:
            y[-1] = config.null_class
        return x, t, y

    return make


@pytest.fixture(scope="session")
def make_ckpt(random_network: Callable[..., DiT]) -> Callable[..., Path]:
    """Return make_ckpt(path, config, ternary=..., seed=0, **info): writes a ckpt.pt.

    The raw weights are those of `random_network(config, ternary, seed)`, the averaged ones of
    `seed + 1`.
    """

    def make(
        path: Path,
        config: DiTConfig,
        ternary: TernaryConfig | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> Path:
        ternary = ternary or TernaryConfig()
        raw, ema = (random_network(config, ternary, s).state_dict() for s in (seed, seed + 1))
        values: dict[str, Any] = {"step": 7, "recipe_sha256": "0" * 64, **fields}
        info = ModelInfo(config, ternary, SpaceInfo(), image_size=config.input_size, **values)
        save_ckpt(path, info, RECIPE_TEXT, raw, ema)
        return path

    return make
