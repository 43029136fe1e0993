"""`terdit models`: what is packaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from terdit_cli.class_names import names_of_classes
from terdit_cli.errors import InputFileError
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Card, read_card
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.system.atomic import file_sha256


@dataclass(frozen=True)
class PackagedModel:
    """What the file of a model says, and its card."""

    name: str
    path: Path
    file_bytes: int
    parameters: int  # ternary weights + alphas + the rest
    ternary: int
    image_size: int  # pixels
    channels: int  # of the network's input
    classes: list[str]
    card: Card


def run(name: str | None = None) -> list[PackagedModel]:
    """Return the packaged models, or only the one of a name.

    Raises:
        UsageError: no model of that name.
        InputFileError: a damaged model or card, or the card of another model.
    """
    return [_describe(name) for name in (catalogue.names() if name is None else [name])]


def _describe(name: str) -> PackagedModel:
    path = catalogue.path_of(name)
    with TdtFile(path) as file:
        info, ternary = file.info, count_weights(file)
        scales = sum(file.alphas(matrix).numel() for matrix in file.ternary_names())
        others = sum(file.rest(key).numel() for key in file.rest_names())
    card = read_card(name)
    if (found := file_sha256(path)) != card.sha256:
        raise InputFileError(
            "the card of a packaged model is of another model",
            got=f"SHA-256 {found}",
            expected=card.sha256,
            where=path,
            fix="install terdit again, or make both with `make add-model`",
        )
    return PackagedModel(
        name=name,
        path=path,
        file_bytes=path.stat().st_size,
        parameters=ternary + scales + others,
        ternary=ternary,
        image_size=info.image_size,
        channels=info.config.in_channels,
        classes=[names[0] for names in names_of_classes(info.class_names, info.config.num_classes)],
        card=card,
    )
