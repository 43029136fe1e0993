"""`make demo`: every verb once, from a recipe to a scored packed model, and one table.

Trains recipes/quickstart.yaml on the embedded images, ternarizes, packs, samples a labelled grid
from the .tdt and scores it against real images, next to uniform noise, the packaged model of the
same images and held-out real images.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from terdit_cli import console
from terdit_cli.commands import eval_fid, pack, sample, ternarize, train
from terdit_cli.errors import TerditError, UsageError
from terdit_cli.evaluate.request import EvalOptions
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.generate.options import SamplingOptions
from terdit_cli.hub import catalogue
from terdit_cli.recipe import load_recipe
from terdit_cli.train.loggers import read_metrics

RECIPE = Path("recipes/quickstart.yaml")
PACKAGED = "fashion-mnist"
FEATURES = "efficientnet-lite0"
SAMPLING = SamplingOptions(steps=20, sampler="dpmpp-2m", cfg_scale=2.0, batch_size=50)
SCORED = 400  # images of each set


def run(recipe: Path, folder: Path, overrides: list[str]) -> None:
    """Run the demo into `folder`, replacing what an earlier demo left there."""
    started = time.monotonic()
    load_recipe(recipe, overrides)  # a mistake in it costs nothing that is there
    if folder.exists() and any(folder.iterdir()) and not (folder / "run").is_dir():
        raise UsageError(
            "the demo's folder holds something else", where=folder,
            fix="name another, or delete it",
        )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    run_folder, packed = folder / "run", folder / "model.tdt"

    trained = train.run(recipe, overrides, out=run_folder)
    frozen = ternarize.run(run_folder, folder / "model.safetensors")
    small = pack.run(frozen.output, folder / "small.tdt", codec="t5", rest="bf16")
    fast = pack.run(frozen.output, packed)
    models = {"this model": packed}
    if PACKAGED in catalogue.names():
        models["the packaged model"] = catalogue.path_of(PACKAGED)
    grids = [
        sample.run(
            "all", model, n=4, output=folder / name, sampling=replace(SAMPLING, batch_size=40)
        ).output
        for model, name in zip(models.values(), ("grid.png", "packaged.png"), strict=False)
    ]  # fmt: skip
    distances = _distances(folder, models)

    losses = read_metrics(run_folder)
    rate = float(np.median([entry["images_per_second"] for entry in losses]))
    zero = sum(layer.zero * layer.shape[0] * layer.shape[1] for layer in frozen.layers)
    rows = [
        ("parameters", f"{fast.parameters:,}"),
        ("ternary", f"{fast.ternary:,} ({100 * fast.ternary / fast.parameters:.1f} %), "
                    f"{100 * zero / fast.ternary:.0f} % zeros"),
        ("weights as fp32", f"{fast.fp32_bytes:,} bytes"),
        ("ckpt.pt (masters and EMA)", f"{trained.checkpoint.stat().st_size:,} bytes"),
        ("model.tdt (t2, fp32 rest)", _packed(fast)),
        ("small.tdt (t5, bf16 rest)", _packed(small)),
        ("loss, first -> last", f"{trained.first_loss:.4f} -> {trained.last_loss:.4f}"),
        ("training", f"{rate:.0f} images/s"),
        *((f"{name}", value) for name, value in distances),
        ("loss curve", run_folder / "loss.png"),
        *(("images of " + name, path) for name, path in zip(models, grids, strict=True)),
        ("time", console.duration(time.monotonic() - started)),
    ]  # fmt: skip
    console.result_table("terdit demo", ("", ""), rows)


def _packed(result: pack.PackResult) -> str:
    return (
        f"{result.file_bytes:,} bytes ({result.ratio:.1f}x), "
        f"{result.bits_per_weight:.2f} bits per ternary weight"
    )


def _distances(folder: Path, models: dict[str, Path]) -> list[tuple[str, str]]:
    """Score noise, the models and held-out images against the same training images."""
    reference = folder / "reference.npz"
    _score(images="embedded:train", n=SCORED, make_reference=reference)
    noise = folder / "noise.npz"
    pixels = np.random.default_rng(SAMPLING.seed).integers(
        0, 256, (SCORED, 28, 28, 3), dtype=np.uint8
    )
    np.savez(noise, arr_0=pixels)
    against = str(reference)
    scores = [
        ("uniform noise", _score(reference=against, images=str(noise))),
        *(
            (
                name,
                _score(reference=against, model=model, n=SCORED),
            )
            for name, model in models.items()
        ),
        (
            "held-out real images",
            _score(reference=against, images="embedded:heldout", n=SCORED),
        ),
    ]  # fmt: skip
    return [
        (f"{score.distance_name}, {SCORED} images: {name}", f"{score.distance:.1f}")
        for name, score in scores
        if score is not None
    ]


def _score(**options: Any) -> EvalResult | None:
    return eval_fid.run(EvalOptions(features=FEATURES, **options), SAMPLING)


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to override")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="replaced if it exists")
    options = parser.parse_args()
    try:
        run(options.recipe, options.folder, options.overrides)
    except TerditError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
