"""Which models are packaged: every NAME.tdt in this folder is the model NAME.

The .tdt describes the network, its card (`card.py`) where it came from. TERDIT_MODELS names another
folder to use instead. Nothing here imports torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from terdit_cli.errors import InputFileError, UsageError, did_you_mean

SIZE_LIMIT = 6_000_000  # bytes of all packaged models and cards together
OF_A_MODEL = ("ckpt.pt", "recipe.yaml", "*.pth")  # in run folders and released ones


def folder() -> Path:
    """Return the folder of the packaged models; raises UsageError if TERDIT_MODELS is not one."""
    named = os.environ.get("TERDIT_MODELS")
    if not named:
        return Path(__file__).parent
    if not Path(named).is_dir():
        raise UsageError("TERDIT_MODELS is not a folder", got=named, fix="unset TERDIT_MODELS")
    return Path(named)


def names() -> list[str]:
    """Return the names of the packaged models, sorted."""
    return sorted(path.stem for path in folder().glob("*.tdt"))


def path_of(name: str) -> Path:
    """Return the file of a packaged model; raises UsageError for an unknown name."""
    known = names()
    if name not in known:
        raise UsageError(
            "no such packaged model",
            got=repr(name) + did_you_mean(name, known),
            expected=", ".join(known) or "no name: there are no packaged models",
            where=folder(),
            fix="see `terdit models`",
        )
    return folder() / f"{name}.tdt"


def card_path(name: str) -> Path:
    """Return the path of a packaged model's card."""
    return folder() / f"{name}.md"


def name_of(path: Path) -> str | None:
    """Return the name under which a file is packaged, or None."""
    is_packaged = path.suffix == ".tdt" and path.absolute().parent == folder().absolute()
    return path.stem if is_packaged else None


def resolve(model: str | os.PathLike[str]) -> Path:
    """Return the file or folder meant by a path or by the name of a packaged model.

    An existing path comes first, unless it is a folder without a model: a folder of images may have
    the name of a packaged model.

    Raises:
        InputFileError: neither.
    """
    path = Path(model)
    if path.is_file() or any(found for part in OF_A_MODEL for found in path.glob(part)):
        return path
    known = names()
    if str(path) in known:
        return path_of(str(path))
    if path.exists():  # opening it reports what is missing
        return path
    raise InputFileError(
        "no such model",
        got=repr(str(path)) + did_you_mean(str(path), known),
        expected="a file, a folder" + (f", or a packaged model: {', '.join(known)}" * bool(known)),
        where=path,
        fix="check the path" + ", or see `terdit models`" * bool(known),
    )
