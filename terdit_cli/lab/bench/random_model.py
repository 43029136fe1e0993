"""A model of random weights in any published size, and how much work a forward of it is."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from terdit_cli.model.dit import DiT, build_config
from terdit_cli.model.layout import ADALN_NORM
from terdit_cli.model.metadata import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.exported import StateDictModel


class RandomModel(StateDictModel):
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

    def rest(self, name: str) -> Tensor:
        shape = self._state[name].shape
        noise = torch.randn(shape, device=self._device, generator=self._generator(name))
        if len(shape) > 1:
            return noise / shape[-1] ** 0.5
        gate = name.endswith(ADALN_NORM)  # small gates, as trained models have
        return 0.1 * noise + (0.2 if gate else 0.0 if name.endswith("bias") else 1.0)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))
