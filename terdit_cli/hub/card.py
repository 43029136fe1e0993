"""The card of a packaged model: Markdown with a YAML header that programs read.

---
name: fashion-mnist
data: 60,000 training images of Fashion-MNIST, 28 x 28, grey
licence: MIT, as the data
recipe: fashion-mnist          # its name; the resolved recipe ends the text
steps: 20000                   # of training
began_with: the averaged weights of fashion-mnist-baseline, 20,000 steps   # or null
seed: 0
scores: {fd-efficientnet-lite0: 31.4, precision: 0.71}   # the primary distance first
measured: 10,000 images against 10,000; terdit eval-fid ...
sampler: {name: dpmpp-2m, steps: 20, cfg_scale: 2.0, eps_scale: 1.0}  # of the scores
limits: what the model is not good for
network: {parameters: 7507744, ternary: 7372800, image_size: 28, channels: 1, classes: [...]}
sha256: of NAME.tdt, so that a card of another model is detected
---
Text for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from terdit_cli.errors import InputFileError
from terdit_cli.hub import catalogue

LARGEST_CARD = 1 << 18  # bytes
_FENCE = "---\n"

Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n]*$")]
Count = Annotated[int, Field(ge=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Advice(_Part):
    """How to sample from a model; `SamplerConfig` explains the fields."""

    name: Line
    steps: Count
    cfg_scale: FiniteFloat
    eps_scale: FiniteFloat = 1.0


class Network(_Part):
    """Facts about the .tdt, for listing models without opening them."""

    parameters: Count  # ternary weights, alphas and all others
    ternary: Count
    image_size: Count  # pixels
    channels: Count  # of the network's input
    classes: Annotated[list[Line], Field(min_length=1)]


class Card(_Part):
    """The header of a card, and the text below it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    data: Line
    licence: Line
    recipe: Line
    steps: Count
    seed: Count
    began_with: Line | None = None
    scores: Annotated[dict[str, FiniteFloat], Field(min_length=1)]
    measured: Line
    sampler: Advice
    limits: Line
    network: Network
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    text: str

    @property
    def score(self) -> tuple[str, float]:
        """Return the name and the value of the primary distance."""
        return next(iter(self.scores.items()))

    def to_markdown(self) -> str:
        """Return the file's text, which `parse_card` turns back into this card."""
        head = yaml.safe_dump(self.model_dump(exclude={"text"}), sort_keys=False, width=100)
        return f"{_FENCE}{head}{_FENCE}{self.text}"


def read_card(name: str) -> Card:
    """Read the card of a packaged model.

    Raises:
        InputFileError: missing, damaged, or with fields that are missing, unknown or impossible.
    """
    path = catalogue.card_path(name)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CARD + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or error) from error
    if len(content) > LARGEST_CARD:
        raise _unreadable(path, f"more than {LARGEST_CARD} bytes")
    card = parse_card(text, path)
    if card.name != name:
        raise _unreadable(path, f"the card of {card.name!r}")
    return card


def parse_card(text: str, where: Path) -> Card:
    """Read a card's text; raises InputFileError as `read_card`."""
    start, *rest = text.partition(_FENCE)[2].partition("\n" + _FENCE)
    if not text.startswith(_FENCE) or not rest[0]:
        raise _unreadable(where, "no head between two lines of three dashes")
    try:
        values = yaml.safe_load(start)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unreadable(where, " ".join(str(error).split())[:300]) from error
    if not isinstance(values, dict) or "text" in values:
        raise _unreadable(where, "a head that is no mapping of its fields")
    return make_card({**values, "text": rest[1]}, where)


def make_card(values: dict[Any, Any], where: object) -> Card:
    """Check the fields of a card; raises InputFileError that names every wrong one."""
    try:
        return Card.model_validate(values)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise _unreadable(where, "; ".join(problems)) from error


def _unreadable(where: object, got: object) -> InputFileError:
    return InputFileError(
        "the card of a packaged model is invalid",
        got=got,
        expected="a YAML header with "
        + ", ".join(name for name in Card.model_fields if name != "text"),
        where=where,
        fix="install terdit again, or write the card with `make add-model`",
    )
