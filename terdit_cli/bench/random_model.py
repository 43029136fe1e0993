"""A model of random weights in any published size, and how much work a forward of it is."""

from __future__ import annotations

import zlib
from types import TracebackType

import torch
from torch import Tensor

from terdit_cli.model.dit import DiT, DiTConfig, build_config
from terdit_cli.model.info import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.exported import ExportedModel, matrix_names


class RandomModel(ExportedModel):
    """A model of random trits made one matrix at a time: nothing of full precision is held.

    Pixels of three channels instead of a VAE's latents, so that it can be sampled from. The
    scales keep the size of the activations: alpha = 1 / sqrt(2/3 K).
    """

    path = None

    def __init__(
        self, size: str, input_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """Describe the model.

        Args:
            device: where its tensors are made, and with whose generator.
        """
        self._device = torch.device(device)
        config = build_config(size, input_size=input_size, in_channels=3, qk_norm=True)
        self.info = ModelInfo(config, TernaryConfig(), SpaceInfo(), image_size=input_size)
        self._seed = seed
        with torch.device("meta"):
            self._state = DiT(config).state_dict()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def ternary_names(self) -> list[str]:
        return matrix_names(self.info.config.n_layers)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._state[f"{name}.weight"].shape
        return rows, columns

    def trits(self, name: str) -> Tensor:
        return torch.randint(
            -1, 2, self.matrix_shape(name), dtype=torch.int8, device=self._device,
            generator=self._generator(name),
        )  # fmt: skip

    def alphas(self, name: str) -> Tensor:
        return torch.tensor([(2 / 3 * self.matrix_shape(name)[1]) ** -0.5], device=self._device)

    def rest_names(self) -> list[str]:
        large = {f"{name}.{part}" for name in self.ternary_names() for part in ("weight", "alphas")}
        return [name for name in self._state if name not in large]

    def rest(self, name: str) -> Tensor:
        shape = self._state[name].shape
        noise = torch.randn(shape, device=self._device, generator=self._generator(name))
        if len(shape) > 1:
            return noise / shape[-1] ** 0.5
        gate = name.endswith("adaLN_modulation.2.weight")  # small gates, as trained models have
        return 0.1 * noise + (0.2 if gate else 0.0 if name.endswith("bias") else 1.0)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))


def large_weights(info: ModelInfo) -> int:
    """Return the number of ternary weights."""
    per_token, per_image = _block_weights(info.config)
    return info.config.n_layers * (per_token + per_image)


def forward_operations(info: ModelInfo, batch: int) -> float:
    """Return the operations of a forward's large matrices: 2 M K N each."""
    per_token, per_image = _block_weights(info.config)
    config = info.config
    return 2.0 * batch * config.n_layers * (config.tokens * per_token + per_image)


def _block_weights(config: DiTConfig) -> tuple[int, int]:
    """Return the weights of a block that see every token, and those that see every image."""
    dim, kv_width = config.dim, config.kv_heads * config.head_dim
    attention = 2 * dim * dim + 2 * dim * kv_width
    return attention + 3 * dim * config.ffn_width, 6 * dim * config.conditioning_width
