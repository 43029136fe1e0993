"""Images from a model: the part that `sample` and `eval-fid` share.

Image i of a model with C classes is of class i mod C, and its noise is a function of (seed, i):
so (class c, copy j) is image j * C + c, whoever asks for it and together with whatever else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.data.classes import names_of_classes
from terdit_cli.data.vae import PixelSpace, Space, VaeSpace
from terdit_cli.diffusion.noise import ImageNoise
from terdit_cli.diffusion.sampler import SamplerConfig, sample
from terdit_cli.errors import UsageError
from terdit_cli.pack.convert import is_released_folder
from terdit_cli.pack.sources import checkpoint_path
from terdit_cli.runtime.load import LoadedModel, load

OnStep = Callable[[int], None]


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class ImageGenerator:
    """A loaded model and, opened when first used, the space that its output lives in."""

    path: Path
    model: LoadedModel
    device: torch.device
    vae: str | None

    @cached_property
    def space(self) -> Space:
        """The pixels or the VAE; raises what `VaeSpace` raises, or UsageError for another VAE."""
        info = self.model.info
        if info.space.kind == "pixel":
            return PixelSpace(3 if info.config.in_channels == 3 else 1)
        vae = self.vae or str(info.space.vae)
        space = VaeSpace(vae, info.space.scale_factor, self.device)
        latent = (info.config.in_channels, info.config.input_size, info.config.input_size)
        if space.latent_shape(info.image_size) != latent:
            raise UsageError(
                "the VAE does not fit the model",
                got=f"latents {space.latent_shape(info.image_size)}",
                expected=latent,
                where=vae,
                fix="name the VAE it was trained with: --vae FOLDER",
            )
        return space

    @property
    def class_names(self) -> list[list[str]]:
        info = self.model.info
        return names_of_classes(info.class_names, info.config.num_classes)

    def fit(self, sampler: SamplerConfig) -> SamplerConfig:
        """Return the sampler as this model needs it: pixels clip the guess of x0 to [-1, 1].

        Raises:
            UsageError: guidance of a model trained without label dropout.
        """
        info = self.model.info
        if sampler.guided and info.config.null_class is None:
            raise UsageError(
                "this model has no null class for guidance",
                got=f"--cfg-scale {sampler.cfg_scale:g}",
                expected=1,
                where=self.path,
                fix="--cfg-scale 1",
            )
        clip = info.space.kind == "pixel" and sampler.name in ("ddpm", "ddim")
        return dataclasses.replace(sampler, clip_denoised=clip)

    @torch.inference_mode()
    def images(
        self,
        indices: Sequence[int],
        sampler: SamplerConfig,
        seed: int,
        batch_size: int,
        on_step: OnStep = lambda images: None,
    ) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
        """Yield batches of images uint8 [B, H, W, 3] and their class ids, in order of `indices`.

        `on_step` is called after each sampling step with the number of images in the batch.
        """
        info = self.model.info
        config, rows = info.config, info.label_rows()
        shape = (config.in_channels, config.input_size, config.input_size)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            classes = [index % config.num_classes for index in batch]
            y = torch.tensor([rows[class_id] for class_id in classes], device=self.device)
            noise = ImageNoise(seed, batch, shape, self.device)
            latents = sample(
                self.model.network,
                sampler,
                noise.initial(),
                y,
                config.num_classes,
                noise,
                on_step=partial(_count_images, on_step),
            )
            yield self.space.decode(latents).cpu().numpy(), classes


def _count_images(on_step: OnStep, k: int, x: torch.Tensor) -> None:
    on_step(len(x))


def open_generator(
    path: Path,
    backend: str = "auto",
    device: str | None = None,
    vae: str | None = None,
    activations: str = "auto",
) -> ImageGenerator:
    """Load a model; its VAE is opened later, after cheaper checks.

    Args:
        path: anything `load_model` takes.
        vae: folder or hub id that stands in for the one the model names.
        activations: "auto" or a precision, as `load` takes it.

    Raises:
        InputFileError, UsageError, EnvironmentProblem.
    """
    place = _device(device)
    model = load(path, place, backend, activations=activations)
    info = model.info
    if info.space.kind == "pixel" and vae is not None:
        raise UsageError(
            "this model draws pixels", got=f"--vae {vae}", expected="no VAE", where=path
        )
    console.note(f"{path}: {model.reason} on {place}")
    return ImageGenerator(path, model, place, vae)


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "the device cannot be used",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            fix="--device cpu",
        ) from error
    return device


def model_sha256(path: Path) -> str:
    """Return the SHA-256 of a model's file (of a folder: of the file that holds its weights)."""
    if is_released_folder(path):
        path = sorted(path.glob("consolidated*.pth"))[0]
    else:
        path = checkpoint_path(path) or path
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
