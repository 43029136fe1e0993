"""Preview grids: a few images from the EMA weights, with the same noise every time."""

from __future__ import annotations

from pathlib import Path

import torch

from terdit_cli.data.loader import BatchSource
from terdit_cli.data.vae import Space
from terdit_cli.diffusion.noise import ImageNoise
from terdit_cli.diffusion.process import Network
from terdit_cli.diffusion.sampler import SamplerConfig, sample
from terdit_cli.model.dit import DiTConfig
from terdit_cli.recipe import Recipe
from terdit_cli.report.grid import draw_grid, save_png
from terdit_cli.system.job import Job

FOLDER = "samples"


def preview_sampler(recipe: Recipe) -> SamplerConfig:
    """Return the sampler of the previews; CFG needs label dropout.

    Raises:
        UsageError: an impossible sampler, number of steps or scale.
    """
    section = recipe.sample
    guided = recipe.model.class_dropout_prob > 0
    scale = section.cfg_scale if guided else 1.0
    sampler = SamplerConfig(section.sampler, section.steps, scale)
    return sampler.clipped_for(pixels=recipe.data.vae is None)


@torch.no_grad()  # inference mode would spoil the buffers that fsdp keeps for training
def save_preview(
    network: Network, config: DiTConfig, recipe: Recipe, space: Space, source: BatchSource,
    run_folder: Path, step: int, job: Job,
) -> Path | None:  # fmt: skip
    """Generate `sample.count` images in the classes' order into samples/step-00000400.png.

    All processes must call, for their weights may be sharded; the main one decodes and writes.
    """
    device = job.device
    classes = [index % config.num_classes for index in range(recipe.sample.count)]
    sampler = preview_sampler(recipe)
    shape = (config.in_channels, config.input_size, config.input_size)
    noise = ImageNoise(recipe.seed, range(len(classes)), shape, device)
    y = torch.tensor(classes, device=device)
    latents = sample(network, sampler, noise.initial(), y, config.num_classes, noise)
    if not job.is_main:
        return None
    labels = [source.class_names[index] for index in classes]
    grid = draw_grid(space.decode(latents).cpu().numpy(), labels, f"{recipe.name}, step {step}")
    path = run_folder / FOLDER / f"step-{step:08d}.png"
    save_png(grid, path, {"recipe_sha256": recipe.sha256(), "step": str(step)})
    return path
