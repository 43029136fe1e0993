"""`terdit sample`: class prompts become a labelled grid, a folder of PNGs or an .npz."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import terdit_cli
from terdit_cli import console
from terdit_cli.class_names import find_classes, numbers_that_are_names
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import UsageError
from terdit_cli.generate.estimate import long_sampling
from terdit_cli.generate.find_model import find_model
from terdit_cli.generate.generator import (
    DEFAULT_BATCH,
    ImageGenerator,
    open_generator,
    sampler_for,
)
from terdit_cli.generate.image_output import SOFTWARE, ImageOutput
from terdit_cli.generate.options import ModelOptions, SamplingOptions
from terdit_cli.model.layout import forward_flops
from terdit_cli.report.grid import draw_grid, save_png
from terdit_cli.system.atomic import atomic_path
from terdit_cli.system.job import Job, join_job


@dataclass(frozen=True)
class SampleResult:
    """What was generated; `nfe` counts network calls per image."""

    output: Path
    images: int
    classes: list[int]
    sampler: str
    steps: int
    cfg_scale: float
    eps_scale: float
    nfe: int
    seconds: float
    model: Path
    model_sha256: str
    backend: str
    isa: str | None  # of the cpu backend
    threads: int
    activations: str
    weights: str


def run(
    prompt_class: str,
    model: Path | None = None,
    *,
    n: int = 1,
    output: str | Path = "sample.png",
    force: bool = False,
    sampling: SamplingOptions | None = None,
    loading: ModelOptions | None = None,
) -> SampleResult:
    """Generate `n` images of each class that `prompt_class` names.

    Under torchrun each process generates some of the batches; the result is that of one process
    and is returned in all of them.

    Args:
        prompt_class: an id, a name, a comma-separated list of either, or "all".
        model: a path, the name of a packaged model, or None: see `find_model`.
        output: .png (a labelled grid), .npz (arr_0 uint8 [N, H, W, 3], labels int64 [N]) or a
            folder (one PNG per image, numbered in the order of `prompt_class`).
        force: overwrite what is there.

    Raises:
        UsageError, InputFileError, EnvironmentProblem.
    """
    sampling, loading = sampling or SamplingOptions(), loading or ModelOptions()
    target = ImageOutput.named(output)
    with join_job() as job:
        for name, value in (("-n", n), ("--batch-size", sampling.batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"wrong {name}", got=value, expected="a positive number")
        target.check(force)
        file = find_model(model, prompt_class)
        asked = sampler_for(file, sampling)
        generator = open_generator(file, replace(loading, device=job.device_named(loading.device)))
        names = generator.class_names
        classes = find_classes(prompt_class, names)
        if (line := numbers_that_are_names(prompt_class, names)) is not None:
            console.note(line)
        target.check_count(n * len(classes), generator.model.info.image_size)
        indices = [copy * len(names) + class_id for class_id in classes for copy in range(n)]
        config = generator.fit(asked)
        _ = generator.space  # a VAE that cannot be opened fails before the work
        # The same in all processes, whatever else their GPUs do: images depend on it a little.
        size = job.smallest(generator.batch_size(sampling.batch_size, config.guided))
        if size < (sampling.batch_size or DEFAULT_BATCH):
            console.note(f"--batch-size {size}: too little GPU memory for {DEFAULT_BATCH}")
        if target.kind == "folder":
            if job.is_main:
                target.clear()
            job.require_shared(target.path, "-o")
        shape, forwards = generator.model.info.config, config.nfe * len(indices) // job.size
        if (seconds := long_sampling(shape, forwards, generator.device)) is not None:
            console.warn(
                f"this will take about {console.duration(seconds)}, for {forwards:,} forwards of "
                f"{forward_flops(shape):.2g} operations; fewer --steps or images take less"
            )
        text = {
            SOFTWARE: f"terdit {terdit_cli.__version__}",
            "model": file.path.name,
            "model_sha256": file.sha256,
            "seed": str(sampling.seed),
            "sampler": f"{config.name} {config.steps} steps",
            "cfg_scale": f"{config.cfg_scale:g} ({config.cfg_channels} channels)",
            "eps_scale": f"{config.eps_scale:g}",
        }
        started = time.monotonic()
        drawn = _draw(generator, config, sampling.seed, indices, size, job, target, text)
        seconds = time.monotonic() - started
        if drawn is not None:
            labels = [index % len(names) for index in indices]
            if target.kind == "grid":
                captions = [names[class_id][0] for class_id in labels]
                how = f"{config.name} {config.steps} steps, cfg {config.cfg_scale:g}"
                if config.eps_scale != 1:
                    how += f", eps {config.eps_scale:g}"
                title = f"{file.path.name}, {how}, seed {sampling.seed}"
                columns = n * max(1, round(math.sqrt(len(indices)) / n))  # a class never wraps
                grid = draw_grid(drawn, captions, title, columns)
                save_png(grid, target.path, text | {"class": ", ".join(dict.fromkeys(captions))})
            else:
                with atomic_path(target.path) as temporary, temporary.open("wb") as handle:
                    np.savez(handle, arr_0=drawn, labels=np.array(labels, dtype=np.int64))
    return SampleResult(
        output=target.path,
        images=len(indices),
        classes=classes,
        sampler=config.name,
        steps=config.steps,
        cfg_scale=config.cfg_scale,
        eps_scale=config.eps_scale,
        nfe=config.nfe,
        seconds=seconds,
        model=file.path,
        model_sha256=file.sha256,
        **generator.model.facts(),
    )


def _draw(
    generator: ImageGenerator,
    config: SamplerConfig,
    seed: int,
    indices: list[int],
    batch_size: int,
    job: Job,
    target: ImageOutput,
    text: dict[str, str],
) -> NDArray[np.uint8] | None:
    """Generate the images `indices` together with the other processes.

    Whole batches are dealt out: each is computed as if there were one process.

    Returns:
        uint8 [N, H, W, 3] in the main process. None in the others, and where `target` is a folder:
        there each process writes its own.
    """
    starts = range(0, len(indices), batch_size)
    mine = starts[job.rank :: job.size]
    whole: NDArray[np.uint8] | None = None
    parts: list[NDArray[np.uint8]] = []  # of this process, to be sent
    started = time.monotonic()
    calls = config.nfe // config.steps
    with console.progress("sampling", len(indices) * config.steps) as meter:

        def on_step(count: int) -> None:
            """Show the progress of all processes together, in sampling steps of single images."""
            done = job.add("steps", count)
            meter.update(done, f"{done * calls / (time.monotonic() - started):.3g} NFE/s")

        for start in mine:
            batch = indices[start : start + batch_size]
            images, labels = next(generator.images(batch, config, seed, len(batch), on_step))
            if target.kind == "folder":
                numbers = range(start, start + len(batch))
                for number, index, image, class_id in zip(
                    numbers, batch, images, labels, strict=True
                ):
                    words = text | {
                        "class": generator.class_names[class_id][0],
                        "index": str(index),
                    }
                    save_png(Image.fromarray(image), target.image_path(number, class_id), words)
            elif job.is_main:
                if whole is None:  # the first batch of all is the main process's
                    whole = np.empty((len(indices), *images.shape[1:]), np.uint8)
                whole[start : start + len(batch)] = images
            else:
                parts.append(images)
        if target.kind == "folder":
            job.wait()
            on_step(0)
            return None
        for part in parts:
            job.send(part)
        if whole is not None:
            for number, start in enumerate(starts):
                if number % job.size:
                    job.receive(whole[start : start + batch_size], number % job.size)
                    on_step(0)
    return whole
