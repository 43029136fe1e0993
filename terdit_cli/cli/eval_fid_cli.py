"""The command line of `terdit eval-fid`; no torch here."""

from __future__ import annotations

import shlex
import sys

import typer

from terdit_cli import console
from terdit_cli.cli import tables
from terdit_cli.cli.flags import Json, names_of, refuse_given
from terdit_cli.evaluate.request import EvalOptions, check_options
from terdit_cli.generate.options import ModelOptions, SamplingOptions
from terdit_cli.hub import catalogue

# Options that do something only beside another.
_OF_MODELS = tuple(
    name
    for name in (*names_of(SamplingOptions, ModelOptions), "labels")
    if name not in ("seed", "threads", "device")  # of the scores too
)
_OF_REFERENCES = ("confidence", "pr_samples")

EXAMPLES = (
    "terdit eval-fid --model model.tdt --reference imagenet_val/ -n 50000 --work work/ "
    "--max-fid 10",
    "terdit eval-fid --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz",
    "terdit eval-fid --model q.tdt --reference embedded:heldout -n 500 "
    "--features efficientnet-lite0 --sampler dpmpp-2m --steps 20 --report report.html",
    "terdit eval-fid --model q.tdt --reference stats.npz --max-regression ref.json "
    "--report quality.xml --report quality.md",
    "terdit eval-fid --images train/ --make-reference stats.npz",
    "torchrun --nproc-per-node 8 -m terdit_cli eval-fid --model model.tdt --reference stats.npz "
    "-n 50000 --work work/",
)


def eval_fid(
    context: typer.Context,
    options: EvalOptions,
    sampling: SamplingOptions,
    loading: ModelOptions,
    json: Json = False,
) -> None:
    """Score a model or images against a reference.

    Ends with exit code 5 if a quality gate fails.
    """
    if options.images is not None:
        refuse_given(context, _OF_MODELS, "for images generated with --model")
    if options.reference is None:
        refuse_given(context, _OF_REFERENCES, "for a comparison with --reference")
    if options.max_regression is None:
        refuse_given(context, ("tolerance",), "for --max-regression")
    check_options(options)
    if options.model is not None:
        catalogue.resolve(options.model)  # a wrong path shows before torch is imported
    from terdit_cli.data.image_sources import find_images

    for where in (options.images, options.reference):
        if where is not None:
            find_images(where)
    from terdit_cli.commands import eval_fid as command

    line = shlex.join(["terdit", *sys.argv[1:]])
    result = command.run(options, sampling, loading, line)
    if result is None:
        grids = options.reports(".png")
        written = {
            "reference": options.make_reference,
            "images": options.save_images,
            "grid": grids[0] if grids else None,
        }
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
