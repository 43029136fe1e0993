"""The command line of `terdit eval-fid`: a verb with many options; no torch here."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import (
    Activations,
    BackendName,
    BatchSize,
    CfgChannels,
    CfgScale,
    Device,
    EpsScale,
    GuidedChannels,
    Json,
    RawWeights,
    Sampler,
    Seed,
    Steps,
    Threads,
    Vae,
    chosen_weights,
    refuse_given,
)
from terdit_cli.errors import UsageError

_OF_MODELS = (
    "sampler", "steps", "cfg_scale", "cfg_channels", "eps_scale", "labels", "batch_size", "backend",
    "activations", "compiled", "ema", "vae",
)  # fmt: skip
_OF_REFERENCES = ("bootstrap", "over_n", "pr_samples")

EXAMPLES = (
    "terdit eval-fid --model model.tdt --reference imagenet_val/ -n 50000 --work work/ "
    "--max-fid 10",
    "terdit eval-fid --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz",
    "terdit eval-fid --model q.tdt --reference embedded:heldout -n 500 "
    "--features efficientnet-lite0 --sampler dpmpp-2m --steps 20 --html report.html",
    "terdit eval-fid --model q.tdt --reference stats.npz --max-regression ref.json --junit j.xml",
    "terdit eval-fid --images train/ --make-reference stats.npz",
    "torchrun --nproc-per-node 8 -m terdit_cli eval-fid --model model.tdt --reference stats.npz "
    "-n 50000 --work work/",
)


class Precision(StrEnum):
    """What a feature extractor computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


class LabelRule(StrEnum):
    """Which class each image of a model has."""

    balanced = "balanced"
    uniform = "uniform"


class BadImages(StrEnum):
    """What an unreadable image does."""

    error = "error"
    skip = "skip"


def eval_fid(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="Draw the images with this model: a path or a packaged one.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Score these: folder, zip, tars, .npz, or embedded[:train|:heldout]."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The same, or an .npz of statistics (ours, ADM's, pytorch-fid's)."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            help="Images, and at most so many of a reference of images.  "
            "[default: all; 1000 of a model]",
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(help="adm or clean (FID), efficientnet-lite0 or torchscript:FILE."),
    ] = "adm",
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights file of the feature extractor."),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the extractor; the effect of bf16 is measured.")
    ] = Precision.fp32,
    on_bad_image: Annotated[
        BadImages, typer.Option(help="Stop at an unreadable image, or count and skip it.")
    ] = BadImages.error,
    pr_samples: Annotated[
        str, typer.Option(help="Images of each side for precision and recall: a number or all.")
    ] = "10000",
    per_class: Annotated[
        str | None,
        typer.Option(
            help="Distances of classes, and what a linear probe recognises: names, ids or all."
        ),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(help="Replicates for the 95 % interval, 0 for none; 100 do.")
    ] = 0,
    over_n: Annotated[
        bool, typer.Option("--over-n", help="The distance over n, and its limit (FID infinity).")
    ] = False,
    sampler: Sampler = None,
    steps: Steps = None,
    cfg_scale: CfgScale = None,
    cfg_channels: GuidedChannels = CfgChannels.three,
    eps_scale: EpsScale = None,
    labels: Annotated[
        LabelRule, typer.Option(help="Classes in turn, or drawn at random as DiT's sample_ddp.")
    ] = LabelRule.balanced,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile a checkpoint's network: worth it for thousands of images.",
        ),
    ] = False,
    ema: RawWeights = True,
    threads: Threads = None,
    device: Device = None,
    vae: Vae = None,
    max_fid: Annotated[
        float | None, typer.Option(help="Exit with 5 if the distance is larger.")
    ] = None,
    min_is: Annotated[
        float | None, typer.Option(help="Exit with 5 if the Inception Score is smaller.")
    ] = None,
    max_regression: Annotated[
        Path | None,
        typer.Option(help="Exit with 5 if the distance is worse than this result's (--json)."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="How much worse it may be: 0.05 is 5 %.")] = 0.05,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep the features here, to go on after a stop.  [default: temporary]"),
    ] = None,
    make_reference: Annotated[
        Path | None, typer.Option(help="Write the images' statistics as a reference .npz.")
    ] = None,
    reference_features: Annotated[
        bool,
        typer.Option(
            "--reference-features", help="And their features: for KID, precision and recall."
        ),
    ] = False,
    save_images: Annotated[
        Path | None, typer.Option(help="Write the images into this folder as PNG.")
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="A .png of the first 64 images.")] = None,
    html: Annotated[Path | None, typer.Option(help="A page to look at, one file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="The gates as JUnit XML.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="A summary for a pull request, in Markdown.")
    ] = None,
    json: Json = False,
) -> None:
    """Score a model or images against a reference; exit with 5 if a gate is missed."""
    if images is not None:
        refuse_given(context, _OF_MODELS, "for images that --model draws")
    if reference is None:
        refuse_given(context, _OF_REFERENCES, "for a comparison with --reference")
    if max_regression is None:
        refuse_given(context, ("tolerance",), "for --max-regression")
    from terdit_cli.commands import eval_fid as command
    from terdit_cli.evaluate.request import EvalOptions

    result = command.run(
        EvalOptions(
            model=model,
            images=images,
            reference=reference,
            n=n,
            features=features,
            weights=weights,
            precision=precision.value,
            on_bad_image=on_bad_image.value,
            pr_samples=_number_or_all(pr_samples),
            per_class=per_class,
            bootstrap=bootstrap,
            over_n=over_n,
            sampler=sampler,
            steps=steps,
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels.value,
            eps_scale=eps_scale,
            labels=labels.value,
            seed=seed,
            batch_size=batch_size,
            backend=backend,
            activations=activations,
            compiled=compiled,
            model_weights=chosen_weights(ema),
            threads=threads,
            device=device,
            vae=vae,
            max_distance=max_fid,
            min_score=min_is,
            max_regression=max_regression,
            tolerance=tolerance,
            work=work,
            make_reference=make_reference,
            reference_features=reference_features,
            save_images=save_images,
            grid=grid,
            html=html,
            junit=junit,
            markdown=markdown,
            command=shlex.join(["terdit", *sys.argv[1:]]),
        )
    )
    if result is None:
        written = {"reference": make_reference, "images": save_images, "grid": grid}
        if json:
            console.result_json(written)
            return
        for name, path in written.items():
            if path is not None:
                console.result(f"{path}: {name} written")
        return
    for text in result.warnings:
        console.warn(text)
    if json:
        console.result_json(result.to_dict())
    else:
        tables.print_evaluation(result)
    command.require_passed(result)


def _number_or_all(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(
            "wrong --pr-samples",
            got=repr(text),
            expected="a number of images, 0 for no precision and recall, or all",
            fix="--pr-samples 10000",
        )
    return int(text)
