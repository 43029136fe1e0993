"""A first recipe for a user's own images: sizes, patch, batch and steps for the machine at hand.

What is chosen are starting points that train, not the best values: on a CPU a small network on few
tokens in pixel space, with the settings of the shipped quickstart and cifar10 recipes; on a GPU a
larger one, from 128 pixels on in the latents of Stable Diffusion's VAE.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from terdit_cli.data.image_sources import EMBEDDED, open_labelled, source_of
from terdit_cli.errors import InputFileError
from terdit_cli.recipe import VAE_DOWNSAMPLE, nearest_divisor

LOOKED_AT = 64  # images that are decoded
SMALLEST, LARGEST_PIXELS = 8, 64  # side of the images of a pixel-space model
LATENT_SIDE = 128  # shorter sides from here on train in latents, on GPUs
VAE = "stabilityai/sd-vae-ft-ema"
_TOKENS_A_SIDE = 8  # on a CPU; twice as many on a GPU
# On a GPU: at least so many images -> size of the network and steps of 256 images.
_GPU_SIZES = ((500_000, "600m", 400_000), (50_000, "base", 150_000), (0, "small", 50_000))
_CPU_STEPS = 3_000

# Optimizers of a CPU's recipe. Muon learns more in a step (docs/lab.md), but computes in bfloat16,
# which some CPUs have no instructions for: there a step can take ten times as long.
MUON = {
    "kind": "muon", "lr": 5e-3, "alpha_lr_ratio": 0.1, "weight_decay": 0.2, "warmup_steps": 100,
    "schedule": "cosine",
}  # fmt: skip
ADAMW = {"kind": "adamw", "lr": 1e-3, "warmup_steps": 100, "schedule": "cosine"}


@dataclass(frozen=True)
class DataFacts:
    """What a set of images looks like."""

    source: str
    path: Path | None
    split: str | None  # that was taken, where the set has splits
    images: int
    class_names: list[str]
    shortest: tuple[int, int]  # smallest and largest shorter side of the images looked at, pixels
    median: int  # of the shorter sides
    square: bool  # all
    colour: bool
    notes: list[str]

    def describe(self) -> str:
        """Return one line for people."""
        low, high = self.shortest
        sides = f"{low} pixels" if low == high else f"{low} to {high} pixels on the shorter side"
        names = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        classes = f"{len(self.class_names)} class{'es' * (len(self.class_names) != 1)} ({names})"
        kind = "colour" if self.colour else "grey"
        return f"{self.images:,} {kind} images, {sides}, in {classes}"


def look_at(path: Path | None) -> DataFacts:
    """Look at a user's images (None: the packaged ones), decoding a few.

    Raises:
        InputFileError: nothing there, unreadable, or not in classes. UsageError: several splits.
    """
    if path is not None and not path.exists():
        raise InputFileError("images not found", where=path, fix="check the path")
    source = EMBEDDED if path is None else source_of(path)
    images = open_labelled(source, path)
    places = np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).round().astype(int))
    shapes, colour = [], False
    for place in places.tolist():
        pixels, _ = images.read(place)
        shapes.append(pixels.shape[:2])
        colour = colour or bool(np.ptp(pixels.astype(np.int16), axis=2).any())
    sides = [min(shape) for shape in shapes]
    return DataFacts(
        source=source,
        path=path,
        split="train" if source in (EMBEDDED, "cifar10", "fashion-mnist") else None,
        images=len(images),
        class_names=images.class_names,
        shortest=(min(sides), max(sides)),
        median=int(np.median(sides)),
        square=all(height == width for height, width in shapes),
        colour=colour,
        notes=images.notes,
    )


def suggest(facts: DataFacts, gpus: int, output: Path | None = None) -> dict[str, Any]:
    """Return the values of a recipe, section by section, that differ from the defaults.

    Args:
        gpus: how many train; 0: a CPU does.
        output: the file after which the recipe is named; None: after the data.
    """
    gpu = gpus > 0
    latents = gpu and facts.median >= LATENT_SIDE
    image_size = _image_size(facts, latents)
    side = image_size // VAE_DOWNSAMPLE if latents else image_size
    tokens = _TOKENS_A_SIDE * (2 if gpu else 1)
    data: dict[str, Any] = {"source": facts.source}
    if facts.path is not None:
        data["path"] = str(facts.path)
    if facts.split is not None:
        data["split"] = facts.split
    data |= {"image_size": image_size, "channels": 3 if facts.colour or latents else 1}
    data["flip"] = facts.colour
    if latents:
        data |= {"vae": VAE, "scale_factor": 0.18215}
    model: dict[str, Any] = {
        "size": "tiny",
        "patch_size": 2 if latents else nearest_divisor(side, max(1, round(side / tokens))),
        "num_classes": len(facts.class_names),
    }
    batch = 256 if gpu else 64
    while batch > 8 and batch > facts.images:
        batch //= 2
    train: dict[str, Any] = {"steps": _CPU_STEPS, "global_batch_size": batch}
    name = _name(facts.path if output is None else output)
    values: dict[str, Any] = {"name": name, "model": model, "data": data}
    if gpu:
        _, model["size"], train["steps"] = next(s for s in _GPU_SIZES if facts.images >= s[0])
        micro = max(1, min(32, batch // gpus))
        train["global_batch_size"] = max(1, batch // (micro * gpus)) * micro * gpus
        train |= {"micro_batch_size": micro, "precision": "bf16", "compile": True}
        values |= {"train": train, "optim": {"lr": 1e-4, "schedule": "constant"}}
        every = max(1, train["steps"] // 20)
    else:
        model |= {"multiple_of": 32, "pos_embed": True}
        train |= {"micro_batch_size": batch, "precision": "fp32"}
        values |= {
            "train": train,
            "ternary": {"ste": "identity"},
            "optim": dict(MUON),
            "ema": {"decay": 0.99, "warmup": True},
        }
        every = max(1, train["steps"] // 4)
    shown = min(20, 2 * len(facts.class_names))
    return values | {
        "sample": {"every": every, "count": shown, "steps": 20, "cfg_scale": 2.0},
        "logging": {"every": 50},
        "checkpoint": {"every": every},
    }


def _image_size(facts: DataFacts, latents: bool) -> int:
    low, high = facts.shortest
    if latents:
        return next(size for size in (512, 256, LATENT_SIDE) if facts.median >= size)
    if low == high and facts.square and SMALLEST <= low <= LARGEST_PIXELS:
        return low
    sizes = (LARGEST_PIXELS, 48, 32, 24, 16)
    return next((size for size in sizes if facts.median >= size), SMALLEST)


def _name(path: Path | None) -> str:
    """Return a recipe's name from the folder's."""
    stem = "first" if path is None else path.absolute().name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:64] or "first"


# What each key of a suggested recipe is for.
_COMMENTS = {
    "model.size": "nano, tiny, small, base, 600m, 4.2b, 7b",
    "model.patch_size": "side of a patch; half of it means four times the tokens",
    "model.num_classes": "classes of the data",
    "data.image_size": "pixels; images are scaled on the shorter side and centre-cropped",
    "data.channels": "1 grey, 3 colour",
    "data.flip": "mirror half of the images: true for photographs, false for letters",
    "train.steps": "more steps, better images",
    "train.micro_batch_size": "smaller where memory is short",
    "optim.lr": "peak learning rate",
    "sample.every": "steps between preview grids in the run folder",
}


def recipe_text(values: dict[str, Any], facts: DataFacts, file: Path) -> str:
    """Return the recipe as YAML with comments."""
    lines = [
        f"# terdit train {file}",
        f"# {facts.describe()}.",
        "# Every key: docs/recipes.md, or `terdit recipes --schema`. ternary.enabled=false trains",
        "# the full-precision baseline.",
    ]
    for section, content in values.items():
        if not isinstance(content, dict):
            lines.append(f"{section}: {_scalar(content)}")
            continue
        lines.append(f"{section}:")
        for key, value in content.items():
            line = f"  {key}: {_scalar(value)}"
            if comment := _COMMENTS.get(f"{section}.{key}"):
                line = f"{line:<32}  # {comment}"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, width=math.inf, allow_unicode=True).splitlines()[0]
