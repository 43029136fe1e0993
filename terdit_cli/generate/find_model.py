"""Which model is used when none is given."""

from __future__ import annotations

import os
from pathlib import Path

from terdit_cli import console
from terdit_cli.class_names import find_classes, names_of_classes
from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.hub import catalogue
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.pack.tdt import TdtFile

SHOWN_CLASSES = 12  # names in one message


def find_model(named: Path | None, prompt_class: str) -> ModelFile:
    """Return the model to use: the given one, $TERDIT_MODEL, the only .tdt here, the newest run.

    If there is none of these, the packaged model that has the classes of the prompt.

    Raises:
        UsageError: none at all, or several .tdt files or packaged models to choose from.
        InputFileError: nothing of that name.
    """
    if named is None and os.environ.get("TERDIT_MODEL"):
        named = Path(os.environ["TERDIT_MODEL"])
    if named is not None:
        return ModelFile.open(named)
    packed = sorted(Path().glob("*.tdt"))
    if len(packed) == 1:
        return ModelFile.open(packed[0])
    if packed:
        raise UsageError(
            "several models in this folder",
            got=", ".join(map(str, packed)),
            fix="choose one with --model",
        )
    runs = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if runs:
        return ModelFile.open(runs[-1])
    if catalogue.names():
        return _packaged_model(prompt_class)
    raise UsageError(
        "no model to sample from",
        got="no --model, no TERDIT_MODEL, no .tdt here, no finished run, no packaged model",
        fix="give --model FILE, or make one with `terdit train` and `terdit pack`",
    )


def _packaged_model(prompt_class: str) -> ModelFile:
    """Return the packaged model that has the classes of a prompt, and say so on stderr.

    Raises:
        UsageError: several have them, or none of several has. A single model is always taken:
            a mistake in the prompt then shows when its classes are looked up.
    """
    classes = {name: _class_names(name) for name in catalogue.names()}
    fitting = [name for name, known in classes.items() if _knows(prompt_class, known)]
    if len(classes) == 1:
        fitting = list(classes)
    if len(fitting) == 1:
        console.note(f"No model given; using the packaged model {fitting[0]} (`terdit models`).")
        return ModelFile.open(catalogue.path_of(fitting[0]))
    if fitting:
        raise UsageError(
            "several packaged models have this class",
            got=repr(prompt_class),
            expected=f"a class that only one of {', '.join(fitting)} has",
            fix=f"choose one: --model {fitting[0]}",
        )
    spoken = [name.lower() for known in classes.values() for names in known for name in names]
    raise UsageError(
        "no packaged model has this class",
        got=repr(prompt_class) + did_you_mean(prompt_class.lower(), spoken),
        expected="; ".join(f"of {name}: {_shown(known)}" for name, known in classes.items()),
        fix="give another class, or your own model with --model",
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
