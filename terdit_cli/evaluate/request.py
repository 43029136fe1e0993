"""What `terdit eval-fid` can be asked for, and which combinations make sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from terdit_cli.data.images import BadImagePolicy
from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.evaluate.features import Precision
from terdit_cli.evaluate.scores import NEIGHBOURS
from terdit_cli.generate.generator import Labels
from terdit_cli.system.atomic import check_writable


@dataclass(frozen=True)
class EvalOptions:
    """What to score, against what, how, and what to write.

    Give `model` (a path or the name of a packaged one; draws the images) or `images`: a folder,
    zip, tar shards, .npz, or "embedded[:train|:heldout]"; and `reference`, one of these or
    statistics (.npz). With `make_reference` alone nothing is compared.
    """

    model: Path | None = None
    images: str | None = None
    reference: str | None = None
    n: int | None = None  # images, and at most so many of a reference of images
    # features
    features: str = "adm"
    weights: Path | None = None
    precision: Precision = "fp32"
    on_bad_image: BadImagePolicy = "error"
    # metrics
    pr_samples: int | None = 10_000  # see `Asked`
    per_class: str | None = None  # class names or ids, comma separated, or "all"
    bootstrap: int = 0
    over_n: bool = False
    # sampling
    sampler: str | None = None  # these three and eps_scale: see `sampler_for`
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_channels: str = "3"
    eps_scale: float | None = None
    labels: Labels = "balanced"
    seed: int = 0
    batch_size: int = 8
    backend: str = "auto"
    activations: str = "auto"
    compiled: bool = False
    model_weights: Literal["ema", "raw"] = "ema"  # of a checkpoint
    threads: int | None = None  # of this process from now on, torch's too
    device: str | None = None
    vae: str | None = None
    # gates
    max_distance: float | None = None
    min_score: float | None = None
    max_regression: Path | None = None
    tolerance: float = 0.05
    # what to write
    work: Path | None = None  # features, to go on after a stop; None: a temporary folder
    make_reference: Path | None = None
    reference_features: bool = False  # in it, for KID, precision and recall
    save_images: Path | None = None
    grid: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    html: Path | None = None
    command: str = "terdit eval-fid"  # how it was called, for the provenance


def check_options(options: EvalOptions) -> None:
    """Refuse combinations that make no sense, before anything is opened.

    Raises:
        UsageError: one of them. EnvironmentProblem: an output that cannot be written.
    """
    if (options.model is None) == (options.images is None):
        raise UsageError(
            "what to score is not clear",
            got="both --model and --images" if options.model else "neither --model nor --images",
            expected="one of them",
        )
    if options.reference is None:
        if options.make_reference is None and options.save_images is None:
            raise UsageError("nothing to compare with", fix="give --reference")
        for option, value in (
            ("--max-fid", options.max_distance),
            ("--min-is", options.min_score),
            ("--max-regression", options.max_regression),
            ("--per-class", options.per_class),
            ("--junit", options.junit),
            ("--markdown", options.markdown),
            ("--html", options.html),
        ):
            if value is not None:
                raise UsageError(f"{option} needs a reference", fix="give --reference")
    for option, number, least in (
        ("-n", options.n, 2),
        ("--batch-size", options.batch_size, 1),
        ("--bootstrap", options.bootstrap, 0),
        ("--seed", options.seed, 0),
    ):
        if number is not None and number < least:
            raise UsageError(
                f"wrong {option}",
                got=number,
                expected=f"at least {least}",
                fix=f"{option} {least}",
            )
    if options.bootstrap == 1:
        raise UsageError(
            "wrong --bootstrap", got=1, expected="0 for none, or at least 2", fix="--bootstrap 100"
        )
    if options.pr_samples is not None and 0 < options.pr_samples <= NEIGHBOURS:
        raise UsageError(
            "wrong --pr-samples",
            got=options.pr_samples,
            expected=f"0 for none, or more than {NEIGHBOURS}",
            fix="--pr-samples 10000",
        )
    if options.reference_features and options.make_reference is None:
        raise UsageError(
            "--reference-features is for --make-reference",
            fix="give --make-reference, or leave --reference-features out",
        )
    _check_outputs(options)
    if options.labels not in ("balanced", "uniform"):
        raise UsageError(
            "unknown --labels",
            got=options.labels + did_you_mean(options.labels, ("balanced", "uniform")),
            expected="balanced or uniform",
        )


def _check_outputs(options: EvalOptions) -> None:
    """Refuse names that nothing can be written to: a night of sampling would end there."""
    for option, path, suffix in (
        ("--make-reference", options.make_reference, ".npz"),
        ("--grid", options.grid, ".png"),
        ("--html", options.html, ".html"),
        ("--junit", options.junit, None),
        ("--markdown", options.markdown, None),
    ):
        if path is None:
            continue
        if suffix is not None and path.suffix.lower() != suffix:
            raise UsageError(
                f"wrong name for {option}",
                got=path.name,
                expected=f"a name that ends in {suffix}",
                fix=f"{option} {path.with_suffix(suffix)}",
            )
        check_writable(path)
    for folder in (options.work, options.save_images):
        if folder is not None:
            check_writable(folder / "file")
