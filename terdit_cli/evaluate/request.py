"""What `terdit eval-fid` can be asked for, and which combinations make sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from terdit_cli.errors import UsageError
from terdit_cli.option import option
from terdit_cli.system.atomic import check_writable

NEIGHBOURS = 3  # k of precision and recall
REPORTS = (".html", ".md", ".xml", ".png")  # a page, a summary, JUnit, a grid of the first images


@dataclass(frozen=True)
class EvalOptions:
    """What to score, against what, with which features, and what to write.

    Give `model` (a path or the name of a packaged one, which generates the images) or `images`; and
    `reference`, images or statistics. With `make_reference` alone nothing is compared.
    """

    # what to score
    model: Path | None = option(
        None, "Generate the images with this model: a path or the name of a packaged one."
    )
    images: str | None = option(
        None,
        "Score these images: folder, zip, tars, .npz, parquet, CIFAR-10 or Fashion-MNIST folder, "
        "or embedded; with :SPLIT for a part (:train, :heldout).",
    )
    reference: str | None = option(
        None, "Images as above, or an .npz of statistics (ours, ADM's, pytorch-fid's)."
    )
    n: int | None = option(
        None,
        "Number of images to score; also the maximum taken from a reference set of images.  "
        "[default: all; 1000 with --model]",
        "-n",
    )
    labels: Literal["balanced", "uniform"] = option(
        "balanced", "Classes of generated images: in turn, or at random as in DiT's sample_ddp."
    )
    per_class: str | None = option(
        None, "Distance and classifier accuracy per class: names, ids or all."
    )
    # features
    features: str = option(
        "adm",
        "Features: adm or clean (FID), efficientnet-lite0, or torchscript:FILE.",
        group="Features and metrics",
    )
    weights: Path | None = option(
        None,
        "Weights file of the feature extractor.",
        group="Features and metrics",
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32",
        "Precision of the feature extractor; the effect of bf16 is measured and reported.",
        group="Features and metrics",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "Stop at an unreadable image, or skip and count it.",
        group="Features and metrics",
    )
    pr_samples: str = option(
        "10000",
        "Images per side for precision and recall: a number (0 disables) or all.",
        group="Features and metrics",
    )
    confidence: int = option(
        0,
        "Bootstrap replicates for a 95 % interval, and FID versus sample count, extrapolated; "
        "0 disables, 100 suffices.",
        group="Features and metrics",
    )
    # gates
    max_fid: float | None = option(
        None,
        "Exit with 5 if the distance is larger.",
        group="Quality gates",
    )
    min_is: float | None = option(
        None,
        "Exit with 5 if the Inception Score is smaller.",
        group="Quality gates",
    )
    max_regression: Path | None = option(
        None,
        "Exit with 5 if the distance is larger than in this earlier result (of --json).",
        group="Quality gates",
    )
    tolerance: float = option(
        0.05,
        "Allowed relative increase for --max-regression.",
        group="Quality gates",
    )
    # what to write
    report: tuple[Path, ...] = option(
        (),
        "Write a report, by suffix: .html a self-contained page, .md a summary, .xml JUnit, .png a "
        "grid of images. Repeatable.",
        metavar="<file>",
        group="Output",
    )
    work: Path | None = option(
        None,
        "Folder that keeps the features; rerun to resume.  [default: a temporary folder]",
        group="Output",
    )
    make_reference: Path | None = option(
        None,
        "Write the statistics of the images as a reference .npz.",
        group="Output",
    )
    reference_features: bool = option(
        False,
        "Also store features in the reference, for KID, precision and recall.",
        "--reference-features",
        group="Output",
    )
    save_images: Path | None = option(
        None,
        "Write the images into this folder as PNG.",
        group="Output",
    )

    @property
    def pr_count(self) -> int | None:
        """Images of each side for precision and recall; 0 for neither, None for all."""
        if self.pr_samples == "all":
            return None
        if not self.pr_samples.isdecimal():
            raise UsageError(
                "wrong --pr-samples",
                got=repr(self.pr_samples),
                expected="a number of images, 0 for no precision and recall, or all",
                fix="--pr-samples 10000",
            )
        return int(self.pr_samples)

    def reports(self, suffix: str) -> list[Path]:
        """Return the reports of a kind."""
        return [path for path in self.report if path.suffix.lower() == suffix]


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
        if not (options.make_reference or options.save_images or options.reports(".png")):
            raise UsageError("nothing to compare with", fix="give --reference")
        for option, value in (
            ("--max-fid", options.max_fid),
            ("--min-is", options.min_is),
            ("--max-regression", options.max_regression),
            ("--per-class", options.per_class),
            ("--confidence", options.confidence or None),
            ("--report", next((f for f in options.report if f.suffix.lower() != ".png"), None)),
        ):
            if value is not None:
                raise UsageError(f"{option} needs a reference", fix="give --reference")
    for option, number, least in (
        ("-n", options.n, 2),
        ("--confidence", options.confidence, 0),
    ):
        if number is not None and number < least:
            raise UsageError(
                f"wrong {option}",
                got=number,
                expected=f"at least {least}",
                fix=f"{option} {least}",
            )
    if options.confidence == 1:
        raise UsageError(
            "wrong --confidence", got=1, expected="0 for none, or at least 2",
            fix="--confidence 100",
        )  # fmt: skip
    if (count := options.pr_count) is not None and 0 < count <= NEIGHBOURS:
        raise UsageError(
            "wrong --pr-samples",
            got=count,
            expected=f"0 for none, or more than {NEIGHBOURS}",
            fix="--pr-samples 10000",
        )
    if options.reference_features and options.make_reference is None:
        raise UsageError(
            "--reference-features is for --make-reference",
            fix="give --make-reference, or leave --reference-features out",
        )
    _check_outputs(options)


def _check_outputs(options: EvalOptions) -> None:
    """Refuse names that nothing can be written to: a night of sampling would end there."""
    named: list[tuple[str, Path, tuple[str, ...]]] = [
        ("--report", path, REPORTS) for path in options.report
    ]
    if options.make_reference is not None:
        named.append(("--make-reference", options.make_reference, (".npz",)))
    for option_name, path, suffixes in named:
        if path.suffix.lower() not in suffixes:
            raise UsageError(
                f"wrong name for {option_name}",
                got=path.name,
                expected="a name that ends in " + ", ".join(suffixes),
                fix=f"{option_name} {path.with_suffix(suffixes[0])}",
            )
        check_writable(path)
    for folder in (options.work, options.save_images):
        if folder is not None:
            check_writable(folder / "file")
