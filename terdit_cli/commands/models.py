"""`terdit models`: what is packaged, and which of it a prompt means."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from terdit_cli import console
from terdit_cli.data.classes import find_classes, names_of_classes
from terdit_cli.errors import InputFileError, UsageError, did_you_mean
from terdit_cli.hub import catalogue
from terdit_cli.hub.card import Card, read_card
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import TdtFile

SHOWN_CLASSES = 12  # names in one message


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
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != card.sha256:
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


def model_for(prompt_class: str) -> Path:
    """Return the packaged model that knows the classes of a prompt, and say so on stderr.

    Raises:
        UsageError: several know them, or none of several does. A single model is taken in any
            case: what is wrong with the prompt then shows when its classes are looked up.
    """
    classes = {name: _class_names(name) for name in catalogue.names()}
    fitting = [name for name, known in classes.items() if _knows(prompt_class, known)]
    if len(classes) == 1:
        fitting = list(classes)
    if len(fitting) == 1:
        console.note(f"no --model, none here: the packaged model {fitting[0]} (`terdit models`)")
        return catalogue.path_of(fitting[0])
    if fitting:
        raise UsageError(
            "several packaged models know this class",
            got=repr(prompt_class),
            expected=f"a class of one of {', '.join(fitting)}",
            fix=f"choose one: --model {fitting[0]}",
        )
    spoken = [name.lower() for known in classes.values() for names in known for name in names]
    raise UsageError(
        "no packaged model knows this class",
        got=repr(prompt_class) + did_you_mean(prompt_class.lower(), spoken),
        expected="; ".join(f"of {name}: {_shown(known)}" for name, known in classes.items()),
        fix="name another class, or your own model with --model",
    )


def _class_names(name: str) -> list[list[str]]:
    with TdtFile(catalogue.path_of(name)) as file:
        return names_of_classes(file.info.class_names, file.info.config.num_classes)


def _knows(prompt_class: str, known: list[list[str]]) -> bool:
    try:
        find_classes(prompt_class, known)
    except UsageError:
        return False
    return True


def _shown(known: list[list[str]]) -> str:
    """Return the first names of classes, and how many there are."""
    first = ", ".join(names[0] for names in known[:SHOWN_CLASSES])
    return first if len(known) <= SHOWN_CLASSES else f"{first}, ... ({len(known)} classes)"
