"""How an option is declared once: a dataclass field that the command line makes a flag of."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *flags: str, **settings: Any) -> Any:
    """Declare a dataclass field that is also an option of the command line (`cli/flags.py`).

    Args:
        help: one line of `--help`.
        flags: how it is spelled; by default the field's name.
        settings: further arguments of `typer.Option`.
    """
    return field(default=default, metadata={"help": help, "flags": flags, "settings": settings})
