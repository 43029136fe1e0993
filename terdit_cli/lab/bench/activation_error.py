"""What the kind of activations does to images: the same noise, drawn with each of them.

PSNR = 10 log10(255^2 / mean squared difference) of uint8 images against those of fp32, in dB.
Rounding to uint8 alone, where the two disagree by at most 1 in every value, would give 48 dB.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from terdit_cli import console
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.generate.generator import ImageGenerator, open_generator
from terdit_cli.generate.options import ModelOptions
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.lab.bench.results import ImagesRow
from terdit_cli.pack.tdt import TdtFile

IMAGES = 100
SAMPLER = SamplerConfig("dpmpp-2m", 20, cfg_scale=2.0)
BATCH = 50


def compare(
    model: Path, backend: str, activations: tuple[str, ...], seed: int, device: str = "cpu"
) -> list[ImagesRow]:
    """Draw 100 images of a .tdt with fp32 and with each of `activations`, and compare.

    A model that was trained with int8 activations runs with no others: nothing to compare.

    Raises:
        UsageError, InputFileError: as `open_generator` and its VAE.
    """
    with TdtFile(model) as packed:
        if packed.info.ternary.activations == "int8" or set(activations) <= {"fp32"}:
            return []
    file = ModelFile.open(model)
    asked = ModelOptions(backend=backend, device=device)
    drawn = _draw(open_generator(file, replace(asked, activations="fp32")), "fp32", seed)
    rows = []
    for name in activations:
        if name == "fp32":
            continue
        images = _draw(open_generator(file, replace(asked, activations=name)), name, seed)
        difference = np.abs(images.astype(np.int16) - drawn.astype(np.int16))
        each = np.square(difference, dtype=np.float64).reshape(len(images), -1).mean(1)
        rows.append(
            ImagesRow(
                activations=name,
                images=len(images),
                psnr=_psnr(float(each.mean())),
                worst_psnr=_psnr(float(each.max())),
                largest=int(difference.max()),
                equal=float((difference == 0).mean()),
            )
        )
    return rows


def _draw(generator: ImageGenerator, name: str, seed: int) -> np.ndarray:
    sampler = SAMPLER if generator.model.info.config.null_class is not None else _UNGUIDED
    with console.progress(f"images with {name}", IMAGES) as meter:
        batches = []
        for batch, _ in generator.images(range(IMAGES), generator.fit(sampler), seed, BATCH):
            batches.append(batch)
            meter.update(sum(map(len, batches)))
    return np.concatenate(batches)


_UNGUIDED = SamplerConfig(SAMPLER.name, SAMPLER.steps, cfg_scale=1.0)


def _psnr(mean_square: float) -> float | None:
    return 10 * float(np.log10(255.0**2 / mean_square)) if mean_square else None
