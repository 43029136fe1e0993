"""The study: one YAML file names a base recipe, its variants, and how all of them are scored.

A variant is trained (the base recipe with a few fields changed) or made of another one's
checkpoint: ternarized after training, or packed for deployment. All variants of one seed see the
same data in the same order and the same noise, for these depend on the recipe's seed alone.
Strict as recipes are: every mistake is named, all at once.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic import model_validator as validator

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.recipe import Recipe, find_recipe, load_recipe
from terdit_cli.strict_yaml import Section, mistakes, read_mapping

AFTER = "$after"  # in an override: the path of the last ckpt.pt of the variant named by `after`
TRAIN_SPLIT = "train"  # a reference that is the recipe's own training images

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
Steps = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Ends = Annotated[tuple[str, ...], Field(min_length=2)]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class Packing(Section):
    """How a variant is packed, and in what precision the packed one computes."""

    codec: Literal["t2", "t5"] = "t2"
    rest: Literal["bf16", "fp32"] = "fp32"
    activations: Literal["auto", "int8", "int16", "bf16", "fp32"] = "auto"


class Variant(Section):
    """One model of the study.

    Trained with `overrides`, or else made of the last checkpoint of the variant `of`: by
    `ternarize` (PTQ, scales per ...) or by `pack`. Or it is that checkpoint,
    sampled with the predicted noise times `eps_scale`.
    """

    name: Name
    label: Annotated[str, Field(min_length=1, max_length=60)]  # in tables and figures
    question: Annotated[str, Field(min_length=1)]  # one sentence: what it is there to answer
    overrides: tuple[str, ...] = ()
    after: str | None = None  # trained after this one, whose checkpoint $after names in overrides
    of: str | None = None
    ternarize: Literal["tensor", "row", "group128"] | None = None
    pack: Packing | None = None
    eps_scale: PositiveFloat = 1.0  # 1.0 = off
    seeds: Seeds | None = None  # None: the study's
    steps: Steps | None = None  # None: the study's; of a derived variant its last

    @validator(mode="after")
    def _check(self) -> Variant:
        made = (self.ternarize is not None) + (self.pack is not None)
        if self.of is None and (made or self.eps_scale != 1):
            raise ValueError(f"{self.name}: ternarize, pack and eps_scale need `of`, a variant")
        if self.of is not None and made != 1 and (made or self.eps_scale == 1):
            raise ValueError(
                f"{self.name}: a variant made of another is ternarized or packed, or has an "
                "eps_scale"
            )
        if self.of is not None and (self.overrides or self.after):
            raise ValueError(f"{self.name}: a variant made of another is not trained: no overrides")
        if (self.after is not None) != any(AFTER in word for word in self.overrides):
            raise ValueError(f"{self.name}: `after` and {AFTER} in overrides come together")
        return self

    @property
    def is_trained(self) -> bool:
        return self.of is None

    @property
    def is_converted(self) -> bool:
        """Return whether there is a file of its own, made of another variant's checkpoint."""
        return self.ternarize is not None or self.pack is not None


class Evaluation(Section):
    """How every model is scored."""

    features: str = "efficientnet-lite0"  # as eval-fid takes them
    weights: Path | None = None  # of the extractor
    precision: Literal["fp32", "bf16"] = "fp32"  # of the extractor
    reference: str = TRAIN_SPLIT  # "train", or what eval-fid takes as a reference
    n: Annotated[int, Field(ge=10)] = 10_000  # images, at a variant's last step
    curve_n: Annotated[int, Field(ge=10)] | None = None  # images at every step; None: n
    sampler: str = "dpmpp-2m"
    sampling_steps: PositiveInt = 20
    cfg_scales: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1.0, 2.0)
    cfg_channels: Literal["3", "all"] = "3"
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 50
    compile: bool = False  # the networks of checkpoints, to sample faster
    reals: Annotated[int, Field(ge=20)] | None = None  # training images looked at; None: all
    loss_n: PositiveInt = 2048  # images whose loss is measured, with noise that is always the same
    grid: Annotated[int, Field(ge=1, le=16)] = 4  # images of each class in the pictures

    @property
    def curve_images(self) -> int:
        return self.curve_n or self.n


class Bars(Section):
    """A figure of bars: variants that are equal in something, at their last steps."""

    title: Annotated[str, Field(min_length=1)]
    variants: Annotated[tuple[str, ...], Field(min_length=2)]


class Lines(Section):
    """Figures of lines over training: of each variant one, or of a list one through their ends.

    A list is of trainings of different length, with the decay that suits each; its line has its
    first one's label.
    """

    title: Annotated[str, Field(min_length=1)]
    variants: Annotated[tuple[str | Ends, ...], Field(min_length=1)]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the variants of each line."""
        return tuple((each,) if isinstance(each, str) else each for each in self.variants)


class Pair(Section):
    """Two variants whose ratio is a result."""

    ternary: str
    baseline: str  # full precision, all else equal
    again: str | None = None  # full precision that has taken as many steps in all as `ternary`
    goal: Annotated[float, Field(gt=0)] = 1.10  # ternary distance : baseline's, at most

    @validator(mode="before")
    @classmethod
    def _refuse_twin(cls, values: Any) -> Any:
        if isinstance(values, dict) and "twin" in values:
            raise ValueError("the key `twin` is called `baseline` now")
        return values

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.ternary, self.baseline, self.again)))


class Headline(Pair):
    """The first pair, to whose baseline all other variants are compared."""

    n: Annotated[int, Field(ge=10)] | None = None  # images of every pair; None: evaluation.n


class Study(Section):
    """A whole comparison."""

    name: Name
    title: Annotated[str, Field(min_length=1)]
    recipe: Path  # of the file's folder
    overrides: tuple[str, ...] = ()  # of all variants
    seeds: Seeds = (0,)
    steps: Steps  # at which to score the first seed; the others at the last one
    headline: Headline
    also: tuple[Pair, ...] = ()  # other pairs, as many images each
    variants: Annotated[tuple[Variant, ...], Field(min_length=2)]
    lines: tuple[Lines, ...] = ()  # none: one figure of all that is trained
    bars: tuple[Bars, ...] = ()
    grids: tuple[str, ...] = ()  # variants shown side by side, from the same noise
    evaluation: Evaluation = Evaluation()
    # How it was called; `load_study` sets these two.
    file: Path | None = None
    words: tuple[str, ...] = ()  # recipe fields changed on the command line, of all variants

    @validator(mode="after")
    def _check(self) -> Study:
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"variants: the name {name!r} stands twice")
        mentions = {
            "headline": self.headline.names,
            **{f"also.{i}": pair.names for i, pair in enumerate(self.also)},
            "grids": self.grids,
            **{f"lines.{i}": figure.names for i, figure in enumerate(self.lines)},
            **{f"bars.{i}": figure.variants for i, figure in enumerate(self.bars)},
        }
        for place, mentioned in mentions.items():
            for name in mentioned:
                if name not in names:
                    raise ValueError(f"{place}: no variant {name!r}{did_you_mean(name, names)}")
        for number, variant in enumerate(self.variants):
            trained = [other.name for other in self.variants[:number] if other.is_trained]
            for field in ("of", "after"):
                name = getattr(variant, field)
                if name is not None and name not in trained:
                    raise ValueError(
                        f"{variant.name}.{field}: {name!r} is no trained variant above it"
                        + did_you_mean(name, trained)
                    )
            source = self.variant(variant.of) if variant.of else None
            if source and not set(self.steps_of(variant)) <= set(self.steps_of(source)):
                raise ValueError(f"{variant.name}.steps: steps at which {variant.of} is not kept")
            needed = source or (self.variant(variant.after) if variant.after else None)
            if needed and not set(self.seeds_of(variant)) <= set(self.seeds_of(needed)):
                raise ValueError(f"{variant.name}.seeds: seeds that {needed.name} does not have")
        return self

    def to_yaml(self) -> str:
        """Return the resolved study as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def all_lines(self) -> tuple[Lines, ...]:
        """Return the figures of lines: as given, or one of all trained variants."""
        trained = tuple(variant.name for variant in self.variants if variant.is_trained)
        return self.lines or (Lines(title="All trainings", variants=trained),)

    @property
    def largest_scale(self) -> float:
        """Return the largest CFG scale: that of pictures, latency and costs."""
        return max(self.evaluation.cfg_scales)

    @property
    def headline_images(self) -> int:
        """Return how many images of each of a pair give its ratio."""
        return self.headline.n or self.evaluation.n

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Return all pairs, the headline first."""
        return (self.headline, *self.also)

    @property
    def paired(self) -> tuple[str, ...]:
        """Return the names of the variants of all pairs, each once."""
        names = (name for pair in self.pairs for name in (pair.baseline, pair.ternary))
        return tuple(dict.fromkeys(names))

    @property
    def shown(self) -> tuple[str, ...]:
        """Return the variants that are looked at one by one: those of `grids`, or all."""
        return self.grids or tuple(variant.name for variant in self.variants)

    def baseline_of(self, name: str) -> str:
        """Return the full-precision variant of the first pair of a variant, or the headline's."""
        found = (pair.baseline for pair in self.pairs if name in (pair.ternary, pair.baseline))
        return next(found, self.headline.baseline)

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        return tuple(dict.fromkeys(variant.seeds or self.seeds))

    def steps_of(self, variant: Variant) -> tuple[int, ...]:
        """Return the steps at which a variant is scored, ascending."""
        if variant.steps is not None:
            return tuple(sorted(set(variant.steps)))
        if variant.of is not None:
            return self.steps_of(self.variant(variant.of))[-1:]
        return tuple(sorted(set(self.steps)))

    def steps_at(self, variant: Variant, seed: int) -> tuple[int, ...]:
        """Return the steps at which a model is scored: the curve's, or of later seeds the last."""
        steps = self.steps_of(variant)
        return steps if seed == self.seeds_of(variant)[0] else steps[-1:]

    @property
    def command(self) -> str:
        """Return the command that does the whole study."""
        return shlex.join(["terdit", "study", str(self.file or self.name), *self.words])

    def lineage(self, variant: Variant) -> tuple[Variant, ...]:
        """Return the variants whose trainings a variant's weights went through, in order."""
        initialised = f"train.init_from={AFTER}" in variant.overrides
        earlier = variant.of or (variant.after if initialised else None)
        before = self.lineage(self.variant(earlier)) if earlier else ()
        return before if variant.of else (*before, variant)

    def steps_taken(self, variant: Variant) -> tuple[int, ...]:
        """Return the last step of each training that a variant's weights went through, in order."""
        return tuple(self.steps_of(trained)[-1] for trained in self.lineage(variant))

    def steps_before(self, variant: Variant) -> int:
        """Return how many steps a variant's weights went through before its own training."""
        return sum(self.steps_taken(variant)[: -1 if variant.is_trained else None])

    def images_at(self, variant: Variant, step: int) -> tuple[int, ...]:
        """Return the numbers of images that a model is scored with: curves, and the last step."""
        found = {self.evaluation.curve_images} if variant.is_trained else set()
        if step == self.steps_of(variant)[-1]:
            found.add(self.evaluation.n)
            if variant.name in self.paired:
                found.add(self.headline_images)
        return tuple(sorted(found or {self.evaluation.curve_images}))

    def closure(self, wanted: Iterable[str]) -> list[Variant]:
        """Return variants by name with those that they are made of, in the study's order.

        Raises:
            UsageError: an unknown name.
        """
        names = [variant.name for variant in self.variants]
        needed: set[str] = set()
        for name in wanted:
            if name not in names:
                raise UsageError(
                    "the study has no such variant",
                    got=repr(name) + did_you_mean(name, names),
                    expected="of " + ", ".join(names),
                    where="--only",
                )
            needed.add(name)
        while missing := {
            other
            for name in needed
            for other in (self.variant(name).of, self.variant(name).after)
            if other and other not in needed
        }:
            needed |= missing
        return [variant for variant in self.variants if variant.name in needed]


def load_study(path: Path, overrides: Iterable[str] = ()) -> Study:
    """Read a study; `overrides` become its words, and `recipe` becomes a path.

    Raises:
        InputFileError: missing, or not YAML.
        UsageError: every mistake of the study, and those of each variant's recipe.
    """
    path = find_recipe(path)
    values = read_mapping(path, "study")
    study = _parse(values, path)
    changes: dict[str, Any] = {
        "recipe": Path(os.path.normpath(path.parent / study.recipe)),  # for commands on the page
        "file": path,
        "words": tuple(overrides),
    }
    study = _parse(study.model_dump() | changes, path)
    for variant in study.variants:
        if variant.is_trained:
            recipe = recipe_of(study, variant, study.seeds_of(variant)[0])
            _check_steps(study, variant, recipe, path)
    return study


def _parse(values: dict[str, Any], path: Path) -> Study:
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise mistakes(error, Study, "study", path, "correct the study") from error


def _check_steps(study: Study, variant: Variant, recipe: Recipe, path: Path) -> None:
    last = study.steps_of(variant)[-1]
    if last > recipe.train.steps:
        raise UsageError(
            "a variant is scored at a step that it never reaches",
            got=f"step {last} of {variant.name}",
            expected=f"at most train.steps = {recipe.train.steps}",
            where=path,
            fix="change `steps`, or train.steps in `overrides`",
        )


def words_of(study: Study, variant: Variant, seed: int, after: Path | None = None) -> list[str]:
    """Return the key=value words that make the base recipe a trained variant's.

    Args:
        after: the checkpoint that $after stands for; None leaves the placeholder.
    """
    words = [*study.overrides, *study.words, *variant.overrides]
    if after is not None:
        words = [word.replace(AFTER, str(after)) for word in words]
    return [*words, f"seed={seed}", f"name={study.name}-{variant.name}"[:69]]


def recipe_of(study: Study, variant: Variant, seed: int, after: Path | None = None) -> Recipe:
    """Return the resolved recipe of a trained variant, without the study's own checkpoints.

    Raises:
        UsageError, InputFileError: as `load_recipe`.
    """
    return load_recipe(study.recipe, words_of(study, variant, seed, after))


def checkpoint_words(study: Study, variant: Variant, recipe: Recipe) -> list[str]:
    """Return the words that keep a checkpoint at every step that is scored.

    They are saved at every divisor of all these steps that is nearest to the recipe's own
    `checkpoint.every`, and none is pruned by training: `runner` does when one is exported.
    """
    common = math.gcd(*study.steps_of(variant))
    wanted = min(common, recipe.checkpoint.every)
    every = max(divisor for divisor in _divisors(common) if divisor <= wanted)
    return [f"checkpoint.every={every}", f"checkpoint.keep_last={recipe.train.steps // every + 1}"]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in small]
