"""Training on prepared latents: rows of mapped shards in, latents out.

    x = scale_factor * (mean + exp(log variance / 2) * noise)

The noise is drawn at each use, so an image differs from epoch to epoch as when it is encoded anew.

Shapes: B rows; moments bfloat16 [B, 2C, h, w]; latents float32 [B, C, h, w].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.latent_shards import INDEX, LatentIndex, Shard, read_index
from terdit_cli.data.vae import VaeSpace, sample_moments
from terdit_cli.errors import UsageError
from terdit_cli.recipe import DataSection

ROWS_A_TASK = 256  # milliseconds of work: less is lost to the interpreter's lock


class LatentSource:
    """The images of a folder that `terdit prepare` made, as the loader's source.

    Raises:
        InputFileError: no such folder, or damaged files.
        UsageError: it was prepared for another image size, latent shape or scale factor, or
            without the mirrored views that data.flip needs.
    """

    def __init__(self, data: DataSection) -> None:
        self.index = read_index(_folder(data))
        check_recipe(self.index, data)
        records = self.index.shards
        self._shards = [Shard(_folder(data), self.index, record) for record in records]
        self._first = np.cumsum([0, *(record.images for record in records)])
        self.class_names = self.index.class_names
        self.labels = np.concatenate([shard.labels for shard in self._shards])
        self.skipped = [name for record in records for name in record.skipped]

    def __len__(self) -> int:
        return self.index.images

    @property
    def rows_a_task(self) -> int:
        """How many rows of a batch one thread should fill at once."""
        return ROWS_A_TASK

    def allocate(self, count: int) -> torch.Tensor:
        """Return room for moments: bfloat16 [count, 2C, h, w]."""
        shape = (count, *self.index.moments_shape(1)[2:])
        return torch.empty(shape, dtype=torch.bfloat16)

    def fill(
        self, out: torch.Tensor, indices: NDArray[np.int64], mirrored: NDArray[np.bool_]
    ) -> None:
        """Fill rows with the moments of images, or of their mirrors.

        Raises:
            InputFileError: a checksum is wrong.
        """
        rows = out.view(torch.uint16).flatten(1).numpy()
        shards = np.searchsorted(self._first, indices, side="right") - 1
        places = zip(
            shards.tolist(),
            (indices - self._first[shards]).tolist(),
            mirrored.tolist(),
            strict=True,
        )
        for row, (shard, image, view) in zip(rows, places, strict=True):
            self._shards[shard].read(image, int(view), row)


class LatentSpace:
    """Diffusion on prepared latents: `encode` takes their moments, `decode` loads the VAE.

    Raises:
        InputFileError: no prepared latents there.
    """

    def __init__(self, data: DataSection, device: torch.device) -> None:
        self._data = data
        self._index = read_index(_folder(data))
        self._vae: VaeSpace | None = None
        self.device = device
        self.channels, side, _ = self._index.latent_shape
        self.downsample = self._index.image_size // side

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) for square images of `image_size` pixels."""
        side = image_size // self.downsample
        return self.channels, side, side

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Turn moments [B, 2C, h, w] into latents float32 [B, C, h, w].

        `noise` is N(0, 1) [B, C, h, w] on any device; without it the mean is taken.
        """
        return sample_moments(images.to(self.device), self._data.scale_factor, noise)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents [B, C, h, w] into images uint8 [B, H, W, 3] on the VAE's device."""
        return self.load_vae().decode(latents)

    def load_vae(self) -> VaeSpace:
        """Load the recipe's VAE, once, and check that it is the one that made the latents.

        Raises:
            UsageError: its encoder is another. InputFileError, EnvironmentProblem: see VaeSpace.
        """
        if self._vae is None:
            vae = VaeSpace(str(self._data.vae), self._data.scale_factor, self.device)
            if vae.encoder_sha256() != self._index.encoder_sha256:
                raise UsageError(
                    "the latents were prepared with another VAE",
                    got=f"data.vae {self._data.vae}, whose encoder has other weights",
                    expected=f"{self._index.vae}, encoder {self._index.encoder_sha256[:12]}",
                    where=_folder(self._data) / INDEX,
                    fix="set data.vae to that VAE, or prepare the latents again",
                )
            self._vae = vae
        return self._vae


def check_recipe(index: LatentIndex, data: DataSection) -> None:
    """Compare a folder of latents with a recipe's data section.

    Raises:
        UsageError: one of them has another image size or scale factor, or lacks the mirrors.
    """
    wanted = {"image_size": data.image_size, "scale_factor": data.scale_factor}
    wrong = {name: value for name, value in wanted.items() if getattr(index, name) != value}
    if data.flip and not index.mirrored:
        wrong["flip"] = True
    if wrong:
        found = {name: getattr(index, name, False) for name in wrong}
        raise UsageError(
            "the latents were prepared for another recipe",
            got=", ".join(f"data.{name}={value}" for name, value in wrong.items()),
            expected=", ".join(f"data.{name}={value}" for name, value in found.items()),
            where=_folder(data) / INDEX,
            fix="change the recipe, or prepare the latents again",
        )


def _folder(data: DataSection) -> Path:
    if data.path is None:
        raise UsageError("latents need their folder", where="data.path", fix="set data.path")
    return data.path
