"""What to measure: the words and options of `terdit bench`, checked."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.lab.bench import rivals
from terdit_cli.model.dit import SIZES
from terdit_cli.runtime.reference import Precision

What = Literal["network", "gemm", "images", "limits", "all"]
METRICS = "metrics"  # a subject
_FORMER = {  # of --what
    "forward": "--what network",
    "sample": "--what network --full",
    "metrics": "terdit bench metrics",
    "training": "terdit bench RECIPE.yaml",
    "roofline": "--what limits",
    "kernels": "--what limits --full",
}
ACTIVATIONS: tuple[Precision, ...] = ("int8", "int16", "bf16", "fp32")  # by speed
DOWNSAMPLE = 8  # an image's pixels to a latent's
IMAGE_MULTIPLE = 2 * DOWNSAMPLE  # patches are 2 wide
LARGEST_IMAGE = 1024
LARGEST_BATCH = 128  # images
REPEATS, QUICK_REPEATS = 7, 3
QUICK_RIVALS = ("fp32", "bf16")  # what needs no compiler: each compilation takes a minute


@dataclass(frozen=True)
class Options:
    """What to measure; see `terdit bench --help`.

    Raises:
        UsageError: what cannot be measured, naming the flag.
    """

    subject: str = "fashion-mnist"
    overrides: tuple[str, ...] = ()  # of a recipe
    what: What = "network"
    full: bool = False  # everything, more often; or a first look
    sizes: tuple[int, ...] = ()  # of images, in pixels; a model file has its own
    images: tuple[int, ...] = ()  # per batch, with guidance
    threads: tuple[int, ...] = ()  # from the most to the fewest
    activations: tuple[str, ...] = ()  # none: those that the model and `full` ask for
    rivals: tuple[str, ...] = ()
    ggml: Path | None = None  # a libggml-cpu.so: one more rival
    device: str = ""  # of `limits`: whose data sheet
    backend: str = "auto"
    seed: int = 0
    command: str = ""  # the line that asked for it, for the page

    def __post_init__(self) -> None:
        if self.what in _FORMER:
            raise UsageError(f"--what {self.what} has another spelling", fix=_FORMER[self.what])
        _one_of("--what", (self.what,), get_args(What))
        _one_of("--activations", self.activations, ACTIVATIONS)
        _one_of("--rivals", self.rivals, rivals.RIVALS)
        _within("--threads", self.threads, 1, os.cpu_count() or 1)
        _within("--images", self.images, 1, LARGEST_BATCH)
        _within("--size", self.sizes, IMAGE_MULTIPLE, LARGEST_IMAGE)
        for size in self.sizes:
            if size % IMAGE_MULTIPLE:
                raise UsageError(
                    "wrong --size", got=size, expected=f"a multiple of {IMAGE_MULTIPLE}",
                    fix="--size 256",
                )  # fmt: skip
        if self.sizes and not self.models:
            raise UsageError(
                "a model file has its own image size",
                got=f"--size for {self.subject}",
                expected="one of the sizes " + ", ".join(SIZES) + did_you_mean(self.subject, SIZES),
                fix="leave --size away, or name a size",
            )
        if self.overrides and self.recipe is None:
            raise UsageError(
                "only a recipe has keys to override", got=" ".join(self.overrides),
                fix="name a recipe: terdit bench recipes/quickstart.yaml KEY=VALUE",
            )  # fmt: skip
        if (self.recipe or self.of_metrics) and self.what != "network":
            raise UsageError(
                "--what is for models", got=f"--what {self.what} of {self.subject}",
                fix="leave --what out",
            )  # fmt: skip
        if self.what == "images" and self.models:
            raise UsageError(
                "images are compared of trained models", got=f"random weights of {self.subject}",
                expected="a .tdt or a packaged model", fix="terdit bench model.tdt --what images",
            )  # fmt: skip
        if self.on_gpu and not self.models:
            raise UsageError(
                "GPUs are measured with random weights", got=self.subject,
                expected="sizes: " + ", ".join(SIZES) + did_you_mean(self.subject, SIZES),
                fix="terdit bench 600m,4.2b --device cuda",
            )  # fmt: skip
        if self.on_gpu and self.what == "gemm":
            raise UsageError(
                "on a GPU whole networks are measured", got=f"--what {self.what}",
                fix="--what network",
            )  # fmt: skip
        if not self.on_gpu and (len(self.models) > 1 or len(self.images) > 1):
            raise UsageError(
                "on a CPU one model runs at one batch", got=f"{self.subject} {self.images or ''}",
                fix="name one, or --device cuda",
            )  # fmt: skip

    @property
    def models(self) -> tuple[str, ...]:
        """The sizes whose random weights are the subject; none for a model file."""
        named = words(self.subject)
        return named if all(word in SIZES for word in named) else ()

    @property
    def recipe(self) -> Path | None:
        """The recipe whose training is the subject."""
        return Path(self.subject) if self.subject.endswith((".yaml", ".yml")) else None

    @property
    def recorded(self) -> Path | None:
        """The recorded values, a .json with an .npz beside it, that metrics are compared with."""
        return Path(self.subject) if self.subject.endswith(".json") else None

    @property
    def of_metrics(self) -> bool:
        return self.subject == METRICS or self.recorded is not None

    @property
    def on_gpu(self) -> bool:
        """Return whether sizes are measured on a GPU, or counted for one."""
        on_device = self.device.partition(":")[0] == "cuda" and self.what != "images"
        return on_device or self.what == "limits"

    @property
    def unused(self) -> tuple[str, ...]:
        """The options of the command line that would change nothing."""
        if self.of_metrics or self.recipe:
            return ("size", "images", "device", "activations", "rivals")
        if self.on_gpu:
            return ("threads", "activations", "rivals")
        return {"images": ("images", "rivals"), "gemm": ("size", "images")}.get(self.what, ())

    @property
    def repeats(self) -> int:
        return REPEATS if self.full else QUICK_REPEATS

    def activations_of(self, trained: str) -> tuple[str, ...]:
        """Return those asked for, or else what a model trained with `trained` is measured in."""
        usual = ACTIVATIONS if self.full and trained != "int8" else ACTIVATIONS[:1]
        return self.activations or usual

    @property
    def thread_counts(self) -> tuple[int, ...]:
        return self.threads or (torch.get_num_threads(),)

    @property
    def batch(self) -> int:
        """Rows of a forward on a CPU: two per image."""
        return 2 * (self.images or (1,))[0]

    @property
    def gemm_rivals(self) -> tuple[str, ...]:
        return (*self.rivals, rivals.GGML) if self.ggml else self.rivals

    @property
    def input_sizes(self) -> tuple[int, ...]:
        """The sizes as the network sees them; none for a model file."""
        return tuple(s // DOWNSAMPLE for s in self.sizes or ((256,) if self.models else ()))


def parse(
    subject: Sequence[str], what: str, full: bool, size: str, images: str, device: str,
    threads: str, activations: str, others: str, command: str,
) -> Options:  # fmt: skip
    """Return the options that a command line asks for.

    Args:
        subject: what to measure, and a recipe's key=value words.
        size, images, threads, activations, others: comma separated; "" is the default of each;
            `others` are the rivals, "all", "none" or names, and a libggml-cpu.so.

    Raises:
        UsageError: a word that cannot be read.
    """
    first, *more = subject or (Options.subject,)
    named = words(others)
    libraries = [word for word in named if ".so" in word or "/" in word]
    chosen = [word for word in named if word not in libraries]
    usual = tuple(rivals.RIVALS) if full or "all" in chosen else QUICK_RIVALS
    if not chosen or chosen == ["all"]:
        chosen = list(usual)
    known: What = what  # type: ignore[assignment] # checked by Options
    return Options(
        subject=first,
        overrides=tuple(more),
        what=known,
        full=full,
        sizes=numbers("--size", size),
        images=numbers("--images", images),
        threads=tuple(sorted(numbers("--threads", threads), reverse=True)),
        activations=words(activations),
        rivals=() if chosen == ["none"] else tuple(chosen),
        ggml=Path(libraries[0]) if libraries else None,
        device=device,
        command=command,
    )


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


def _one_of(flag: str, values: Sequence[str], known: Collection[str]) -> None:
    for value in values:
        if value not in known:
            raise UsageError(
                f"wrong {flag}",
                got=repr(value) + did_you_mean(value, known),
                expected="of " + ", ".join(known),
                fix=f"{flag} {next(iter(known))}",
            )


def _within(flag: str, values: Sequence[int], low: int, high: int) -> None:
    for value in values:
        if not low <= value <= high:
            raise UsageError(f"wrong {flag}", got=value, expected=f"{low} to {high}")
