"""`terdit sample`: class prompts become a labelled grid, a folder of PNGs or an .npz."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import terdit_cli
from terdit_cli import console
from terdit_cli.atomic import atomic_path
from terdit_cli.commands.generate import (
    ImageGenerator,
    model_sha256,
    open_generator,
    sampler_for,
)
from terdit_cli.commands.models import model_for
from terdit_cli.commands.processes import Processes, join_processes
from terdit_cli.data.classes import find_classes
from terdit_cli.data.grid import draw_grid, save_png
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import UsageError
from terdit_cli.models import catalogue
from terdit_cli.runtime.cpu import set_threads

GRID_LIMIT = 256  # images in one picture


@dataclass(frozen=True)
class SampleResult:
    """What was drawn; `nfe` counts network calls an image."""

    output: Path
    images: int
    classes: list[int]
    sampler: str
    steps: int
    cfg_scale: float
    nfe: int
    seconds: float
    model: Path
    model_sha256: str
    backend: str
    isa: str | None  # of the cpu backend
    threads: int
    activations: str


def find_model(named: Path | None, prompt_class: str) -> Path:
    """Return the model to use: the named one, $TERDIT_MODEL, the only .tdt here, the newest run.

    Where there is none of these, the packaged model that knows the classes of the prompt.

    Raises:
        UsageError: none at all, or several .tdt files or packaged models to choose from.
        InputFileError: nothing of that name.
    """
    if named is None and os.environ.get("TERDIT_MODEL"):
        named = Path(os.environ["TERDIT_MODEL"])
    if named is not None:
        return catalogue.resolve(named)
    packed = sorted(Path().glob("*.tdt"))
    if len(packed) == 1:
        return packed[0]
    if packed:
        raise UsageError(
            "several models in this folder",
            got=", ".join(map(str, packed)),
            fix="choose one with --model",
        )
    runs = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if runs:
        return runs[-1]
    if catalogue.names():
        return model_for(prompt_class)
    raise UsageError(
        "no model to sample from",
        got="no --model, no TERDIT_MODEL, no .tdt here, no finished run in runs/, none packaged",
        fix="--model FILE, or make one with `terdit train` and `terdit pack`",
    )


def run(
    prompt_class: str,
    model: Path | None = None,
    n: int = 1,
    steps: int | None = None,
    sampler: str | None = None,
    cfg_scale: float | None = None,
    cfg_channels: str = "3",
    seed: int = 0,
    batch_size: int = 8,
    backend: str = "auto",
    device: str | None = None,
    vae: str | None = None,
    output: Path = Path("sample.png"),
    activations: str = "auto",
    threads: int | None = None,
) -> SampleResult:
    """Draw `n` images of each class that `prompt_class` names; under torchrun together.

    Each process draws some of the batches, and the result is that of one process. It is returned
    in all of them.

    Args:
        prompt_class: an id, a name, a comma separated list of either, or "all".
        model: a path, the name of a packaged model, or None: see `find_model`.
        steps, sampler, cfg_scale: None: see `sampler_for`.
        output: .png (a labelled grid), .npz (arr_0 uint8 [N, H, W, 3], labels int64 [N]) or a
            folder (one PNG an image).
        activations: see `open_generator`.
        threads: of this process from now on, torch's too; None leaves them as they are.

    Raises:
        UsageError, InputFileError, EnvironmentProblem.
    """
    for name, value in (("-n", n), ("--batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"wrong {name}", got=value, expected="a positive number")
    _check_output(output)
    path = find_model(model, prompt_class)
    asked = sampler_for(path, sampler, steps, cfg_scale, cfg_channels)
    if threads is not None:
        set_threads(threads)
    with join_processes() as processes:
        generator = open_generator(path, backend, processes.device(device), vae, activations)
        names = generator.class_names
        classes = find_classes(prompt_class, names)
        indices = [copy * len(names) + class_id for class_id in classes for copy in range(n)]
        if output.suffix == ".png" and len(indices) > GRID_LIMIT:
            raise UsageError(
                "too many images for one grid",
                got=len(indices),
                expected=f"at most {GRID_LIMIT}",
                fix="write a folder or an .npz: -o samples/",
            )
        config = generator.fit(asked)
        generator.require_memory(batch_size, config.guided)
        _ = generator.space  # a VAE that cannot be opened is found before the work
        digest = model_sha256(path)
        text = {
            "software": f"terdit {terdit_cli.__version__}",
            "model": path.name,
            "model_sha256": digest,
            "seed": str(seed),
            "sampler": f"{config.name} {config.steps} steps",
            "cfg_scale": f"{config.cfg_scale:g} ({config.cfg_channels} channels)",
        }
        started = time.monotonic()
        # Whole batches to each process: every one is computed as if there were one process.
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        drawn = _draw(generator, config, seed, batches, processes, output, text)
        seconds = time.monotonic() - started
        if processes.is_main and output.suffix:
            labels = [index % len(names) for index in indices]
            if output.suffix == ".png":
                captions = [names[class_id][0] for class_id in labels]
                how = f"{config.name} {config.steps} steps, cfg {config.cfg_scale:g}"
                title = f"{path.name}, {how}, seed {seed}"
                columns = n * max(1, round(math.sqrt(len(indices)) / n))  # a class never wraps
                grid = draw_grid(np.concatenate(drawn), captions, title, columns)
                save_png(grid, output, text | {"class": ", ".join(dict.fromkeys(captions))})
            else:
                with atomic_path(output) as temporary, temporary.open("wb") as file:
                    values = np.array(labels, dtype=np.int64)
                    np.savez(file, arr_0=np.concatenate(drawn), labels=values)
    return SampleResult(
        output=output,
        images=len(indices),
        classes=classes,
        sampler=config.name,
        steps=config.steps,
        cfg_scale=config.cfg_scale,
        nfe=config.nfe,
        seconds=seconds,
        model=path,
        model_sha256=digest,
        **generator.model.facts(),
    )


def _draw(
    generator: ImageGenerator,
    config: SamplerConfig,
    seed: int,
    batches: list[list[int]],
    processes: Processes,
    output: Path,
    text: dict[str, str],
) -> list[NDArray[np.uint8]]:
    """Draw this process's batches.

    Returns, in the main process and unless `output` is a folder, the images of all batches; into a
    folder each process writes its own.
    """
    mine = batches[processes.rank :: processes.size]
    names = generator.class_names
    drawn: list[NDArray[np.uint8]] = []
    started = time.monotonic()
    done = calls = 0
    with console.progress("sampling", len(mine) * config.steps) as meter:

        def on_step(count: int) -> None:
            nonlocal calls, done
            calls += count * (config.nfe // config.steps)
            done += 1
            rate = processes.size * calls / (time.monotonic() - started)
            meter.update(done, f"{rate:.3g} NFE/s")

        for batch in mine:
            for images, labels in generator.images(batch, config, seed, len(batch), on_step):
                if output.suffix:
                    drawn.append(images)
                    continue
                for index, image, class_id in zip(batch, images, labels, strict=True):
                    name = f"class{class_id:04d}-image{index:06d}.png"
                    words = text | {"class": names[class_id][0], "index": str(index)}
                    save_png(Image.fromarray(image), output / name, words)
    if not output.suffix:
        processes.wait()
        return []
    whole = [np.empty(0, np.uint8)] * len(batches)
    for rank, part in enumerate(processes.gather(drawn)):
        whole[rank :: processes.size] = part
    return whole


def _check_output(output: Path) -> None:
    """Refuse, before any work, a file where a folder is meant and unknown kinds of file."""
    if output.suffix not in ("", ".png", ".npz"):
        raise UsageError(
            "unknown kind of output",
            got=output.suffix,
            expected=".png (grid), .npz or a folder",
            where=output,
            fix="-o sample.png",
        )
    if output.suffix == "" and output.is_file():
        raise UsageError("the output folder is a file", where=output, fix="name another with -o")
