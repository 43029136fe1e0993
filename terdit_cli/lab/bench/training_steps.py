"""What the quantiser costs in training: a recipe's steps, ternary against full precision.

Both networks train on the same random images, eager and with `full` compiled, in turns. The
full-precision baseline is the recipe with `ternary.enabled=false`, which also leaves out the norm
after adaLN where the recipe does not ask for it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from terdit_cli import console
from terdit_cli.lab.bench.results import Figure, TrainingRow
from terdit_cli.lab.bench.settings import Options
from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.trainer import Trainer

WARM_UP = 2  # steps, the first of which compiles and makes the optimizer's state
BASELINE = "ternary.enabled=false"


def compare(options: Options) -> list[TrainingRow]:
    """Time steps of a recipe and its overrides.

    Raises:
        UsageError, InputFileError: of the recipe.
    """
    assert options.recipe is not None
    rows = []
    torch.set_num_threads(options.thread_counts[0])
    for compiled in (False, True) if options.full else (False,):
        console.note(f"bench: training, {'compiled' if compiled else 'eager'}")
        words = [*options.overrides, f"train.compile={str(compiled).lower()}"]
        recipes = [load_recipe(options.recipe, [*words, *more]) for more in ([], [BASELINE])]
        with tempfile.TemporaryDirectory(prefix="terdit-bench-") as folder:
            rows.append(_compare(recipes, options, Path(folder)))
    return rows


def _compare(recipes: list[Recipe], options: Options, folder: Path) -> TrainingRow:
    trainers = []
    for recipe in recipes:
        job = Job()
        space = build.open_space(recipe, job.device)
        trainers.append(Trainer(recipe, build.open_data(recipe), space, job, folder))
    section, data = recipes[0].train, recipes[0].data
    generator = torch.Generator().manual_seed(options.seed)
    shape = (section.global_batch_size, data.image_size, data.image_size, data.channels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(len(images)) % recipes[0].model.num_classes
    samples: list[list[float]] = [[], []]
    for repeat in range(WARM_UP + options.repeats):
        for trainer, seconds in zip(trainers, samples, strict=True):
            started = time.perf_counter()
            trainer.train_step(images, labels)
            if repeat >= WARM_UP:
                seconds.append(time.perf_counter() - started)
    network = trainers[0].network
    return TrainingRow(
        name=recipes[0].name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        images=len(images),
        tokens=network.config.tokens,
        precision=section.precision,
        compiled=section.compile,
        threads=options.thread_counts[0],
        ternary=Figure(samples[0]),
        full=Figure(samples[1]),
    )
