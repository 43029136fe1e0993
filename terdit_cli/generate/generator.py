"""Images from a model: the part that `sample` and `eval-fid` share.

Image i of a model with C classes is of class i mod C ("balanced": (class c, copy j) is image
j * C + c) or of a random class ("uniform", as in DiT's sample_ddp); its noise is a
function of (seed, i). So an image does not depend on which others are generated with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.class_names import names_of_classes
from terdit_cli.data.vae import PixelSpace, Space, VaeSpace
from terdit_cli.diffusion.noise import ImageNoise
from terdit_cli.diffusion.objectives import objective_of
from terdit_cli.diffusion.sampler import SamplerConfig, sample
from terdit_cli.errors import EnvironmentProblem, InputFileError, TerditError, UsageError
from terdit_cli.generate.options import Labels, ModelOptions, SamplingOptions
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.layout import forward_bytes
from terdit_cli.runtime.cpu import set_threads
from terdit_cli.runtime.load import LoadedModel, load
from terdit_cli.system import memory
from terdit_cli.system.gpu_memory import ELSEWHERE, explained, free_bytes

DEFAULT_BATCH = 8  # images generated at once

OnStep = Callable[[int], None]


def class_of(index: int, num_classes: int, labels: Labels, seed: int) -> int:
    """Return the class of image `index`; a uniform one is a function of (seed, index)."""
    if labels == "balanced":
        return index % num_classes
    digest = hashlib.sha256(f"terdit label 1:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:16], "little") % num_classes


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class ImageGenerator:
    """A loaded model and the space of its output, which is opened when first used."""

    file: ModelFile
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
        with explained("the VAE", self.device, ELSEWHERE):
            space = VaeSpace(vae, info.space.scale_factor, self.device)
        latent = (info.config.in_channels, info.config.input_size, info.config.input_size)
        if space.latent_shape(info.image_size) != latent:
            raise UsageError(
                "the VAE does not match the model",
                got=f"latents {space.latent_shape(info.image_size)}",
                expected=latent,
                where=vae,
                fix="give the VAE it was trained with: --vae FOLDER",
            )
        return space

    @property
    def class_names(self) -> list[list[str]]:
        info = self.model.info
        return names_of_classes(info.class_names, info.config.num_classes)

    def fit(self, sampler: SamplerConfig) -> SamplerConfig:
        """Return the sampler as this model needs it: for pixels it clips x0 to [-1, 1].

        Raises:
            UsageError: a sampler of another objective, or CFG with a model trained without label
                dropout.
        """
        info = self.model.info
        fitting = objective_of(info.diffusion).samplers
        if sampler.name not in fitting:
            raise UsageError(
                "the sampler does not work with the objective", got=f"--sampler {sampler.name}",
                expected="one of " + ", ".join(fitting), where=self.file.path,
                fix=f"--sampler {fitting[0]}",
            )  # fmt: skip
        if sampler.guided and info.config.null_class is None:
            raise UsageError(
                "this model has no null class for classifier-free guidance",
                got=f"--cfg-scale {sampler.cfg_scale:g}",
                expected=1,
                where=self.file.path,
                fix="--cfg-scale 1",
            )
        return sampler.clipped_for(pixels=info.space.kind == "pixel")

    def batch_size(self, asked: int | None, guided: bool) -> int:
        """Return how many images to generate at once: as many as asked for, or as fit on the GPU.

        Args:
            asked: None: `DEFAULT_BATCH`, or fewer if the GPU has no room.

        Raises:
            EnvironmentProblem: fewer fit than were asked for, or none.
        """
        wanted = asked or DEFAULT_BATCH
        fits = self.model.largest_batch(guided)
        if fits is None or fits >= wanted:
            return wanted
        if asked is None and fits:
            return fits
        raise EnvironmentProblem(
            "too little GPU memory for this batch",
            got=f"{free_bytes(self.device) / 1e9:.2f} GB free",
            expected=f"room for {wanted} images at once" if fits else "room for one image",
            where=self.device,
            fix=_smaller(fits),
        )

    @torch.inference_mode()
    def images(
        self,
        indices: Sequence[int],
        sampler: SamplerConfig,
        seed: int,
        batch_size: int,
        on_step: OnStep = lambda images: None,
        labels: Labels = "balanced",
    ) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
        """Yield batches of images uint8 [B, H, W, 3] and their class ids, in order of `indices`.

        `on_step` is called after each sampling step with the number of images in the batch.

        Raises:
            InputFileError: an image is not finite.
        """
        info = self.model.info
        config, row_of = info.config, info.label_rows()
        shape = (config.in_channels, config.input_size, config.input_size)
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            classes = [class_of(index, config.num_classes, labels, seed) for index in batch]
            y = torch.tensor(
                [row_of[class_id] for class_id in classes], device=self.model.conditions
            )
            noise = ImageNoise(seed, batch, shape, self.device)
            what = f"{len(batch)} images at once"
            rows = len(batch) * (2 if sampler.guided else 1)
            needs = partial(forward_bytes, config, rows)
            if self.device.type == "cpu":
                memory.require(what, needs, _smaller(len(batch) // 2))
            with explained(what, self.device, _smaller(len(batch) // 2), needs):
                latents = sample(
                    self.model.network,
                    sampler,
                    noise.initial(),
                    y,
                    config.num_classes,
                    noise,
                    on_step=partial(_count_images, on_step),
                )
                self._require_finite(latents, batch)
                images = self.space.decode(latents).cpu().numpy()
            yield images, classes

    def _require_finite(self, latents: torch.Tensor, batch: Sequence[int]) -> None:
        """Raise InputFileError if an image is not finite: as bytes it would be black."""
        broken = (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise InputFileError(
                "the model's output is not finite",
                got=f"{len(broken)} of {len(batch)} images, the first of them number "
                f"{batch[broken[0]]}",
                where=self.file.path,
                fix="use an earlier checkpoint, or another precision (--activations)",
            )


def _smaller(batch_size: int) -> str:
    return f"--batch-size {batch_size}" if batch_size else ELSEWHERE


def _count_images(on_step: OnStep, k: int, x: torch.Tensor) -> None:
    on_step(len(x))


def sampler_for(file: ModelFile, asked: SamplingOptions) -> SamplerConfig:
    """Return the sampler that was asked for; options of None are `SamplerConfig`'s defaults.

    For a packaged model they are the settings of its card, and a line on stderr says so. The card's
    steps belong to the card's sampler: another sampler has its own default. The card's factor on
    the predicted noise belongs to that sampler with those steps and that CFG scale.

    Raises:
        UsageError: impossible values. InputFileError: a damaged card.
    """
    found: dict[str, Any] = {
        "sampler": asked.sampler, "steps": asked.steps, "cfg_scale": asked.cfg_scale,
        "eps_scale": asked.eps_scale,
    }  # fmt: skip
    if None in found.values() and file.card is not None:
        advice = file.card.sampler
        whole = {"sampler": advice.name, "steps": advice.steps, "cfg_scale": advice.cfg_scale}
        advised: dict[str, Any] = dict(whole)
        if asked.sampler not in (None, advice.name):
            del advised["steps"]
        taken = {field: value for field, value in advised.items() if found[field] is None}
        found |= taken
        if asked.eps_scale is None and all(found[field] == whole[field] for field in whole):
            found |= (taken := taken | {"eps_scale": advice.eps_scale})
        words = [f"--{field.replace('_', '-')} {taken[field]}" for field in found if field in taken]
        if words:
            console.note(f"{file.name}: {' '.join(words)}, from its card")
    given = {field: value for field, value in found.items() if value is not None}
    if "sampler" in given:
        given["name"] = given.pop("sampler")
    return SamplerConfig(**given, cfg_channels=asked.cfg_channels)


def open_generator(file: ModelFile, options: ModelOptions) -> ImageGenerator:
    """Load a model; its VAE is opened later, after cheaper checks.

    Raises:
        InputFileError, UsageError, EnvironmentProblem.
    """
    if options.threads is not None:
        set_threads(options.threads)
    place = usable_device(options.device)
    exact_convolutions(place)
    model = load(
        file, place, options.backend, options.weights, options.activations, options.compiled
    )
    if model.info.space.kind == "pixel" and options.vae is not None:
        raise UsageError(
            "this model generates pixels, without a VAE",
            got=f"--vae {options.vae}",
            expected="no --vae",
            where=file.path,
            fix="leave --vae out",
        )
    console.note(f"{file.path}: {model.reason} on {place}")
    return ImageGenerator(file, model, place, options.vae)


DEVICES = ("cpu", "cuda", "mps")  # the kinds, by torch's names


def exact_convolutions(device: torch.device) -> None:
    """Turn off TF32, the default of a GPU's convolutions, and algorithms chosen by timing.

    The flags are the process's: set once, for a VAE and a network of features may run in two
    threads, and images must not depend on the caller.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def usable_device(name: str | None) -> torch.device:
    """Return a device by name, or the default one for None and "auto".

    Raises:
        UsageError: no such kind of device. EnvironmentProblem: a GPU that is absent.
    """
    if name is None or name == "auto":
        return default_device()
    kind: type[TerditError] = UsageError
    if name.partition(":")[0] not in DEVICES:
        raise UsageError(
            "the device cannot be used", got=repr(name), expected="auto, cpu, cuda or cuda:1",
            fix="--device cpu",
        )  # fmt: skip
    try:
        device = torch.device(name)
        if device.type == "cuda":
            _require_gpu(device)
            kind = EnvironmentProblem
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise kind(
            "the device cannot be used",
            got=f"{name!r}: {str(error).splitlines()[0]}",
            fix="--device cpu",
        ) from error
    return device


def _require_gpu(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        why = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        raise EnvironmentProblem(
            "this machine has no usable GPU",
            got=f"--device {device}; torch {torch.__version__} {why}",
            fix="--device cpu, or install NVIDIA's driver and torch for CUDA",
        )
    if (device.index or 0) >= count:
        raise EnvironmentProblem(
            "this machine has no such GPU",
            got=f"--device {device}",
            expected="cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}",
            fix="--device cuda",
        )
