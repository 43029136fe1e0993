"""What to measure: the options of a benchmark and their limits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.lab.bench import rivals
from terdit_cli.model.dit import SIZES
from terdit_cli.runtime.reference import Precision

What = Literal["gemm", "forward", "sample", "images", "metrics", "training", "all"]
ACTIVATIONS: tuple[Precision, ...] = ("int8", "int16", "bf16", "fp32")  # by speed
DOWNSAMPLE = 8  # an image's pixels to a latent's
IMAGE_MULTIPLE = 2 * DOWNSAMPLE  # patches are 2 wide
LARGEST_IMAGE = 1024


@dataclass(frozen=True)
class Options:
    """What to measure; see `terdit bench --help`.

    Raises:
        UsageError: what cannot be measured, naming the flag.
    """

    model: str = "600m"  # a size, for random weights, or a .tdt
    what: What = "all"
    sizes: tuple[int, ...] = ()  # of images, in pixels; a .tdt has its own
    batch: int = 2
    threads: tuple[int, ...] = (1,)  # from the most to the fewest
    activations: tuple[str, ...] = ACTIVATIONS
    backend: str = "auto"
    rivals: tuple[str, ...] = tuple(rivals.RIVALS)
    repeats: int = 7
    seed: int = 0
    ggml: Path | None = None
    recorded: Path | None = None  # metrics that others computed, a .json with an .npz beside it
    command: str = ""  # the line that asked for it, for the page

    def __post_init__(self) -> None:
        _one_of("--what", (self.what,), get_args(What))
        _one_of("--activations", self.activations, ACTIVATIONS)
        _one_of("--rivals", self.rivals, tuple(rivals.RIVALS))
        if self.what == "images" and self.model in SIZES:
            raise UsageError(
                "images are compared of trained models",
                got=f"random weights of {self.model}",
                expected="a .tdt",
                fix="terdit bench model.tdt --what images",
            )
        if self.what == "training" and self.model in SIZES:
            raise UsageError(
                "training is measured of a recipe",
                got=self.model,
                expected="a recipe, in quotes together with its overrides",
                fix="terdit bench recipes/quickstart.yaml --what training",
            )
        if self.recorded is not None and self.what != "metrics":
            raise UsageError(
                "recorded values are of metrics",
                got=f"--recorded {self.recorded} with --what {self.what}",
                fix=f"--what metrics --recorded {self.recorded}",
            )
        _within("--threads", self.threads, 1, os.cpu_count() or 1)
        _within("--batch", (self.batch,), 1, 256)
        _within("--repeats", (self.repeats,), 1, 1000)
        _within("--size", self.sizes, IMAGE_MULTIPLE, LARGEST_IMAGE)
        for size in self.sizes:
            if size % IMAGE_MULTIPLE:
                raise UsageError(
                    "wrong --size",
                    got=size,
                    expected=f"a multiple of {IMAGE_MULTIPLE}",
                    fix="--size 256",
                )
        if self.sizes and self.model not in SIZES:
            raise UsageError(
                "a model file has its own image size",
                got=f"--size for {self.model}",
                expected="one of the sizes " + ", ".join(SIZES) + did_you_mean(self.model, SIZES),
                fix="leave --size away, or name a size",
            )

    @property
    def gemm_rivals(self) -> tuple[str, ...]:
        return (*self.rivals, rivals.GGML) if self.ggml else self.rivals

    @property
    def input_sizes(self) -> tuple[int, ...]:
        """The sizes as the network sees them; none for a model file."""
        sizes = self.sizes or ((256,) if self.model in SIZES else ())
        return tuple(size // DOWNSAMPLE for size in sizes)


def words(text: str) -> tuple[str, ...]:
    """Split "a,b" into its words, each once, in order."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Split "1,2" into numbers.

    Raises:
        UsageError: a word that is no number.
    """
    for word in words(text):
        if not word.isdecimal():
            raise UsageError(f"wrong {flag}", got=repr(word), expected="numbers, as 1,2")
    return tuple(map(int, words(text)))


def _one_of(flag: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise UsageError(
                f"wrong {flag}",
                got=repr(value) + did_you_mean(value, known),
                expected="of " + ", ".join(known),
                fix=f"{flag} {known[0]}",
            )


def _within(flag: str, values: Sequence[int], low: int, high: int) -> None:
    for value in values:
        if not low <= value <= high:
            raise UsageError(f"wrong {flag}", got=value, expected=f"{low} to {high}")
