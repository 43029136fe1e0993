"""How an option is declared once: a dataclass field that the command line makes a flag of."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *flags: str, group: str | None = None, **settings: Any) -> Any:
    """Declare a dataclass field that is also an option of the command line (`cli/flags.py`).

    Args:
        help: one line of `--help`.
        flags: how it is spelled; by default the field's name.
        group: the heading of `--help` under which it stands; by default that of the dataclass.
        settings: further arguments of `typer.Option`.
    """
    metadata = {"help": help, "flags": flags, "group": group, "settings": settings}
    return field(default=default, metadata=metadata)
