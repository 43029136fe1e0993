"""What the kind of activations does to images: the same noise, sampled with each of them.

PSNR = 10 log10(255^2 / mean squared difference) of uint8 images against those of fp32, in dB.
Rounding to uint8 alone, where the two disagree by at most 1 in every value, would give 48 dB.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from terdit_cli import console
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.generate.generator import open_generator
from terdit_cli.generate.options import ModelOptions
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.lab.bench.results import ImagesRow
from terdit_cli.lab.bench.settings import Options

IMAGES, QUICK_IMAGES = 100, 20
SAMPLER = SamplerConfig("dpmpp-2m", 20, cfg_scale=2.0)
BATCH = 50


def compare(options: Options, model: Path, trained: str) -> list[ImagesRow]:
    """Generate images of a .tdt with fp32 and with each of the activations, and compare.

    A model that was trained with int8 activations runs with no others: nothing to compare.

    Raises:
        UsageError, InputFileError: as `open_generator` and its VAE.
    """
    others = [name for name in options.activations if name != "fp32"]
    if trained == "int8" or not others:
        return []
    exact = _generate(options, model, "fp32")
    rows = []
    for name in others:
        difference = np.abs(_generate(options, model, name) - exact)
        each = np.square(difference, dtype=np.float64).reshape(len(exact), -1).mean(1)
        rows.append(
            ImagesRow(
                activations=name,
                images=len(exact),
                psnr=_psnr(float(each.mean())),
                worst_psnr=_psnr(float(each.max())),
                largest=int(difference.max()),
                equal=float((difference == 0).mean()),
            )
        )
    return rows


def _generate(options: Options, model: Path, activations: str) -> np.ndarray:
    """Return images as int16 [N, H, W, 3]; without guidance where the model has no null class."""
    asked = ModelOptions(
        backend=options.backend, device=options.device or "cpu", activations=activations
    )
    generator = open_generator(ModelFile.open(model), asked)
    guided = generator.model.info.config.null_class is not None
    sampler = SAMPLER if guided else replace(SAMPLER, cfg_scale=1.0)
    count, batches = IMAGES if options.full else QUICK_IMAGES, []
    with console.progress(f"images with {activations}", count) as meter:
        for batch, _ in generator.images(range(count), generator.fit(sampler), options.seed, BATCH):
            batches.append(batch)
            meter.update(sum(map(len, batches)))
    return np.concatenate(batches).astype(np.int16)


def _psnr(mean_square: float) -> float | None:
    return 10 * float(np.log10(255.0**2 / mean_square)) if mean_square else None
