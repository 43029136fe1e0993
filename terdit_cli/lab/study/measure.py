"""What the study itself measures of a model: its loss, its classes, its nearest training images.

The loss is of the averaged weights, in float32, on images, timesteps and noise that are the same
for every model of the study, so that two losses differ by the models alone:

    t_i = the middle of the i-th of N equal stretches of the 1000 timesteps, in a shuffled order

Distances come from `eval-fid`; its work folder has the features of the images, which the probe
and the search for neighbours read, and which a score of more images goes on from.

Shapes: N images, D features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terdit_cli.data.image_sources import has_held_out
from terdit_cli.data.images import TrainingImages, open_images
from terdit_cli.data.sources.npz_images import NpzImages
from terdit_cli.diffusion.objectives import OBJECTIVES, objective_of
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.evaluate.feature_shards import FACTS_FILE, FeatureShards
from terdit_cli.evaluate.neighbours import check_neighbours
from terdit_cli.evaluate.probe import LinearProbe, accuracy_by_class
from terdit_cli.evaluate.statistics import spread
from terdit_cli.lab.study.records import Accuracy, Nearest, save_arrays
from terdit_cli.recipe import Recipe
from terdit_cli.runtime.load import load
from terdit_cli.train import build

QUARTERS = 4
_BATCH = 64
HELD_OUT = "heldout"  # a split

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class FixedNoise:
    """Clean images in the space of the diffusion, and all that is random about a loss."""

    x0: Tensor  # float32 [N, C, h, w]
    labels: Tensor  # int64 [N]
    t: Tensor  # int64 [N]
    noise: Tensor  # float32 [N, C, h, w]
    images: str  # what they are, for the page


def open_split(recipe: Recipe, split: str | None) -> TrainingImages:
    """Open a split of the recipe's images.

    Raises:
        UsageError: prepared latents. And what `open_images` raises.
    """
    data = recipe.data
    if data.source == "latents":
        raise UsageError(
            "a study needs images, not prepared latents", got="data.source=latents",
            fix="set data.source and data.path to the images",
        )  # fmt: skip
    return open_images(data.source, data.path, data.image_size, data.on_bad_image, split)


def fix_noise(recipe: Recipe, n: int) -> FixedNoise:
    """Return `n` images, held-out ones where the source has them, with timesteps and noise.

    Raises:
        What opening the recipe's images raises; UsageError for prepared latents.
    """
    split = HELD_OUT if has_held_out(recipe.data.source) else recipe.data.split
    source = open_split(recipe, split)
    chosen = spread(len(source), min(n, len(source)))
    pixels = torch.from_numpy(np.stack([source.read(index) for index in chosen]))
    space = build.open_space(recipe, torch.device("cpu"))
    x0 = torch.cat([space.encode(part) for part in pixels.split(_BATCH)])
    generator = torch.Generator().manual_seed(0)
    steps = OBJECTIVES[recipe.diffusion.objective].num_steps
    t = ((torch.arange(len(x0)) + 0.5) / len(x0) * steps).long()
    return FixedNoise(
        x0,
        torch.from_numpy(source.labels[chosen]),
        t[torch.randperm(len(t), generator=generator)],
        torch.randn(x0.shape, generator=generator),
        f"{len(x0):,} {'held-out' if split == HELD_OUT else 'training'} images",
    )


@torch.inference_mode()
def measure_loss(model: Path, fixed: FixedNoise, activations: str = "auto") -> dict[str, Any]:
    """Return {"loss", "mse", "vb", "quarters": four losses} of a model in a file.

    Raises:
        What `load` raises.
    """
    loaded = load(model, activations=activations)
    objective = objective_of(loaded.info.diffusion)
    rows = torch.tensor(loaded.info.label_rows())
    parts: dict[str, list[Tensor]] = {"loss": [], "mse": [], "vb": []}
    for batch in torch.arange(len(fixed.x0)).split(_BATCH):
        y = rows[fixed.labels[batch]]
        losses = objective.losses(
            loaded.network, fixed.x0[batch], fixed.t[batch], y, fixed.noise[batch]
        )
        for name, values in parts.items():
            values.append(losses.get(name, torch.zeros_like(losses["loss"])))
    found = {name: torch.cat(values) for name, values in parts.items()}
    quarter = fixed.t * QUARTERS // objective.num_steps
    quarters = [float(found["loss"][quarter == index].mean()) for index in range(QUARTERS)]
    return {name: float(values.mean()) for name, values in found.items()} | {"quarters": quarters}


@dataclass(frozen=True)
class Reals:
    """The training images: an .npz of them, and their features."""

    images: Path
    features: Samples  # [N, D]
    labels: NDArray[np.int64]  # [N]
    class_names: list[str]
    probe: LinearProbe


def write_images(recipe: Recipe, path: Path, most: int | None) -> list[str]:
    """Write the recipe's training images as an .npz that eval-fid reads; return class names.

    Args:
        most: so many, spread evenly, if there are more; None: all.

    Raises:
        UsageError: too many to lie in memory, or latents: then a study cannot search them.
    """
    data = recipe.data
    source = open_split(recipe, data.split)
    if source.images is None:
        raise UsageError(
            "too many training images for a study's neighbours and probe",
            got=f"{len(source):,} of {data.image_size} pixels",
            expected="a set that fits in memory (1 GiB)",
            where="data",
            fix="take a smaller part of them",
        )
    chosen = spread(len(source), most or len(source))
    save_arrays(path, arr_0=source.images[chosen], labels=source.labels[chosen])
    return source.class_names


def read_features(work: Path, n: int) -> Samples:
    """Return the features of the first `n` images that an eval-fid with `--work` has scored.

    Raises:
        InputFileError: no such folder, or an unfinished one.
    """
    folder = work / "images"
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        shards = FeatureShards(folder, n, int(facts["block"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(
            "no features of an evaluation", got=f"{type(error).__name__}: {error}", where=folder,
            fix="delete the folder and run the study again",
        ) from error  # fmt: skip
    rows = shards.rows("pool")
    assert rows is not None, "every extractor pools"
    return rows


def labels_of(images: Path) -> NDArray[np.int64]:
    """Return the labels of an .npz of images."""
    labels = NpzImages(images).labels
    assert labels is not None, "written with them"
    return labels


def judge(features: Samples, reals: Reals) -> tuple[Accuracy, Nearest]:
    """Return how many images look like their class, and how near they are to training images.

    Image i is of class i mod C, as in `eval-fid`.
    """
    classes = len(reals.class_names)
    labels = np.arange(len(features)) % classes
    found = reals.probe.classify(features)
    per_class = accuracy_by_class(found, labels, classes)
    accuracy = Accuracy(
        all=float((found == labels).mean()),
        per_class=dict(zip(reals.class_names, per_class, strict=True)),
    )
    check = check_neighbours(reals.features, features)
    nearest = Nearest(
        median=float(np.median(check.distances)),
        real_median=float(np.median(check.real_distances)),
        closest=float(check.distances.min()),
        real_closest=float(check.real_distances.min()),
        share_closer=check.share_closer,
        looked_at=len(check.distances),
        searched=check.searched,
    )
    return accuracy, nearest
