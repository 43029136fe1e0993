"""Builds what a recipe names: network configuration, metadata, space, images."""

from __future__ import annotations

from pathlib import Path

import torch

from terdit_cli import console
from terdit_cli.data.check_recipe import class_mistakes, data_mistakes
from terdit_cli.data.images import TrainingImages, open_images
from terdit_cli.data.latents import LatentSource, LatentSpace
from terdit_cli.data.loader import BatchSource
from terdit_cli.data.vae import PixelSpace, Space, VaeSpace
from terdit_cli.diffusion.objectives import OBJECTIVES
from terdit_cli.errors import UsageError
from terdit_cli.model.dit import DiT, DiTConfig, build_config
from terdit_cli.model.metadata import ModelInfo, SpaceInfo
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.recipe import Recipe, refusal
from terdit_cli.system.launcher import is_main


def model_config(recipe: Recipe) -> DiTConfig:
    """Return the network's configuration; raises UsageError for impossible shapes."""
    fields = recipe.model.model_dump(exclude={"size"}, exclude_none=True)
    adaln_norm = recipe.ternary.adaln_norm
    return build_config(
        recipe.model.size,
        **fields,
        input_size=recipe.input_size,
        in_channels=recipe.in_channels,
        adaln_norm=recipe.ternary.enabled if adaln_norm is None else adaln_norm,
    )


def ternary_config(recipe: Recipe) -> TernaryConfig:
    """Return how the large matrices are quantised."""
    return TernaryConfig(**recipe.ternary.model_dump(exclude={"adaln_norm", "ste_clip"}))


def build_network(recipe: Recipe) -> DiT:
    """Build the network to train, freshly initialised on the default device."""
    return DiT(model_config(recipe), ternary_config(recipe).linear())


def model_info(recipe: Recipe, class_names: list[str], step: int) -> ModelInfo:
    """Return the metadata of the model that a run trains."""
    data = recipe.data
    space = (
        SpaceInfo("pixel") if data.vae is None else SpaceInfo("vae", data.vae, data.scale_factor)
    )
    return ModelInfo(
        config=model_config(recipe),
        ternary=ternary_config(recipe),
        space=space,
        image_size=data.image_size,
        class_names=class_names,
        diffusion=dict(OBJECTIVES[recipe.diffusion.objective].description),
        step=step,
        recipe_sha256=recipe.sha256(),
    )


def open_data(recipe: Recipe) -> BatchSource:
    """Open the training images, or their latents, and check them against the recipe.

    Raises:
        InputFileError: missing, empty, unreadable or damaged data.
        UsageError: another number of classes than the model has; latents of another recipe.
    """
    data = recipe.data
    if data.source == "latents":
        source: BatchSource = LatentSource(data)
    else:
        source = images = _open_images(recipe)
        for note in images.notes:
            console.note(note)
    check_classes(recipe, source.class_names)
    if source.skipped:
        console.warn(f"{len(source.skipped)} unreadable images skipped, first: {source.skipped[0]}")
    return source


def check_classes(recipe: Recipe, names: list[str]) -> None:
    """Raise UsageError unless the model has as many classes as the data has names."""
    if found := list(class_mistakes(recipe, names)):
        raise refusal(found, recipe.data.path or recipe.data.source)


def _open_images(recipe: Recipe) -> TrainingImages:
    data = recipe.data
    meter: dict[str, int] = {"last": 0}

    def on_progress(done: int, total: int) -> None:
        if done - meter["last"] >= 20_000 or (done == total and meter["last"]):
            meter["last"] = done
            console.note(f"reading images: {done}/{total}")

    try:
        return open_images(
            data.source,
            data.path,
            data.image_size,
            on_bad_image=data.on_bad_image,
            split=data.split,
            on_progress=on_progress,
        )
    except UsageError as error:
        if len(found := list(data_mistakes(recipe))) > 1:
            raise refusal(found, data.path) from error
        raise


def open_space(recipe: Recipe, device: torch.device) -> Space:
    """Open the space that diffusion runs in and check that the network's input fits it."""
    data = recipe.data
    if data.vae is None:
        return PixelSpace(data.channels)
    space: Space
    if data.source == "latents":
        space = LatentSpace(data, device)
        if recipe.sample.every and is_main():
            space.load_vae()  # a wrong VAE should be refused now, not at the first preview
    else:
        space = VaeSpace(data.vae, data.scale_factor, device)
    expected = (recipe.in_channels, recipe.input_size, recipe.input_size)
    if space.latent_shape(data.image_size) != expected:
        raise UsageError(
            "the VAE's latents do not fit the network",
            got=space.latent_shape(data.image_size),
            expected=expected,
            where=f"data.vae {data.vae}",
            fix="use a VAE with 4 channels and 8 pixels per latent, such as Stable Diffusion's",
        )
    return space


def default_run_folder(recipe: Recipe) -> Path:
    """Return the default run folder."""
    return Path("runs") / recipe.name
