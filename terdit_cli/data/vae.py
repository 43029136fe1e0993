"""The space that diffusion runs in: pixels, or the latents of an autoencoder.

    pixels            x = image / 127.5 - 1
    AutoencoderKL     latents = scale_factor * (mean + std * noise), x = decoder(latents / scale)
    AutoencoderTiny   without noise, with its own scale: it was trained on scaled latents
    back to images    uint8(clamp(127.5 x + 128, 0, 255))

Shapes: B images of H x W pixels, uint8 [B, H, W, 3]; latents float32 [B, C, h, w], where
h = H / downsample.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, Protocol

import torch

from terdit_cli.data.vae_files import load_autoencoder
from terdit_cli.errors import InputFileError, UsageError

_LUMA = (19595, 38470, 7471)  # of red, green and blue / 2**16, ITU-R 601, as Pillow rounds them


class Space(Protocol):
    """Images to what diffusion works on, and back."""

    channels: int
    downsample: int

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) for square images of `image_size` pixels."""

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Turn images uint8 [B, H, W, 3] into latents float32 [B, C, h, w].

        Where images become distributions, `noise` N(0, 1) [B, C, h, w] samples them; without it
        their means are taken.
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents [B, C, h, w] into images uint8 [B, H, W, 3]."""


class PixelSpace:
    """Diffusion on the pixels themselves, in colour (3 channels) or grey (1)."""

    downsample = 1

    def __init__(self, channels: Literal[1, 3]) -> None:
        if channels not in (1, 3):
            raise UsageError("bad number of pixel channels", got=channels, expected="1 or 3")
        self.channels: int = channels

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, S, S) for square images of S pixels."""
        return self.channels, image_size, image_size

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Turn images uint8 [B, H, W, 3] into float32 [B, C, H, W] in [-1, 1].

        Grey is the luma of ITU-R 601, of three equal channels their value; `noise` is not used.
        """
        if self.channels == 1:
            weighted = images.int() * torch.tensor(_LUMA, dtype=torch.int32, device=images.device)
            images = (weighted.sum(-1, dtype=torch.int32, keepdim=True) + (1 << 15)) >> 16
        return _to_float(images).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn [B, C, H, W] into images uint8 [B, H, W, 3]; grey fills all three channels."""
        return _to_images(latents)


class VaeSpace:
    """Diffusion on the latents of a pretrained autoencoder, which never trains.

    Raises:
        InputFileError: a folder that is missing, incomplete, corrupt or of another model class.
        EnvironmentProblem: a hub id that cannot be downloaded.
    """

    def __init__(
        self,
        vae_id_or_folder: str,
        scale_factor: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        vae = load_autoencoder(vae_id_or_folder)
        if vae.config.in_channels != 3 or vae.config.out_channels != 3:
            raise InputFileError(
                "the VAE is not for colour images",
                got=f"{vae.config.in_channels} channels in, {vae.config.out_channels} out",
                expected=3,
                where=vae_id_or_folder,
                fix="give a VAE for RGB images",
            )
        vae = vae.to(self.device)
        if dtype != vae.dtype:  # diffusers warns of every cast, also of one that changes nothing
            vae = vae.to(dtype)
        self._vae = vae.eval().requires_grad_(False)
        self._is_tiny = type(vae).__name__ == "AutoencoderTiny"
        self.scale_factor = float(vae.config.scaling_factor) if self._is_tiny else scale_factor
        self.channels: int = vae.config.latent_channels
        # Every stage but one halves the picture.
        stages = "encoder_block_out_channels" if self._is_tiny else "block_out_channels"
        self.downsample = 2 ** (len(vae.config[stages]) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) for square images of `image_size` pixels.

        Raises:
            UsageError: the size does not divide by the VAE's factor.
        """
        if image_size < 1 or image_size % self.downsample:
            raise UsageError(
                "the image size does not fit the VAE",
                got=image_size,
                expected=f"a multiple of {self.downsample}",
                fix=f"set image_size to {max(1, image_size // self.downsample) * self.downsample}",
            )
        size = image_size // self.downsample
        return self.channels, size, size

    @torch.no_grad()
    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Turn images uint8 [B, H, W, 3] into latents float32 [B, C, h, w].

        The posterior of an AutoencoderKL is sampled with `noise` N(0, 1) [B, C, h, w], or its
        mean is taken when there is none; an AutoencoderTiny uses no noise.
        """
        if self._is_tiny:
            return self._encoded(images).latents.float() * self.scale_factor
        return sample_moments(self.moments(images), self.scale_factor, noise)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images uint8 [B, H, W, 3] into mean and log variance, float32 [B, 2C, h, w].

        They are of the latents before scaling. An AutoencoderTiny has none: `has_moments`.
        """
        posterior = self._encoded(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def _encoded(self, images: torch.Tensor) -> Any:
        return self._vae.encode(_to_float(images.to(self.device)).to(self.dtype))

    @property
    def has_moments(self) -> bool:
        """Say whether images become distributions, and not points."""
        return not self._is_tiny

    def encoder_sha256(self) -> str:
        """Return the hash of the encoder's weights: equal ones make equal latents.

        VAEs that differ only in their decoder, as Stable Diffusion's ft-ema and ft-mse, agree.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self._vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                content = value.cpu().contiguous()
                digest.update(f"{name} {content.dtype} {list(content.shape)}\n".encode())
                digest.update(content.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents [B, C, h, w] into images uint8 [B, H, W, 3] on the VAE's device."""
        unscaled = latents.to(self.device, torch.float32) / self.scale_factor
        return _to_images(self._vae.decode(unscaled.to(self.dtype)).sample)


def sample_moments(
    moments: torch.Tensor, scale_factor: float, noise: torch.Tensor | None
) -> torch.Tensor:
    """Draw latents float32 [B, C, h, w] from mean and log variance [B, 2C, h, w].

    `noise` is N(0, 1) [B, C, h, w] on any device; without it the mean is taken.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
    return mean * scale_factor


def _to_float(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _to_images(pixels: torch.Tensor) -> torch.Tensor:
    """Turn [B, 1 or 3, H, W] around [-1, 1] into uint8 [B, H, W, 3], rounding as DiT does."""
    levels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
