"""`terdit models`: the packaged models by their cards, without opening a model or torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from terdit_cli.errors import InputFileError
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Card, read_card
from terdit_cli.system.atomic import file_sha256


@dataclass(frozen=True)
class PackagedModel:
    """A model's file and its card."""

    name: str
    path: Path
    file_bytes: int
    parameters: int  # ternary weights, alphas and all others
    ternary: int
    image_size: int  # pixels
    channels: int  # of the network's input
    classes: list[str]
    card: Card


def run(name: str | None = None) -> list[PackagedModel]:
    """Return the packaged models, or only the named one.

    Raises:
        UsageError: no model of that name.
        InputFileError: a damaged card, or a model file that is not the one of the card.
    """
    return [_describe(name) for name in (catalogue.names() if name is None else [name])]


def _describe(name: str) -> PackagedModel:
    path, card = catalogue.path_of(name), read_card(name)
    if (found := file_sha256(path)) != card.sha256:
        raise InputFileError(
            "a packaged model is damaged, or its card belongs to another model",
            got=f"SHA-256 {found}",
            expected=card.sha256,
            where=path,
            fix="install terdit again, or write both with `make add-model`",
        )
    fields = card.network.model_dump()
    return PackagedModel(name=name, path=path, file_bytes=path.stat().st_size, card=card, **fields)
