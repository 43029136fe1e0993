"""Options are declared once, as dataclass fields from which the command line makes flags."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *flags: str, group: str | None = None, **settings: Any) -> Any:
    """Declare a dataclass field that is also an option of the command line (`cli/flags.py`).

    Args:
        help: one line of `--help`.
        flags: its spellings on the command line; by default the field's name.
        group: its heading in `--help`; by default that of the dataclass.
        settings: further arguments of `typer.Option`.
    """
    metadata = {"help": help, "flags": flags, "group": group, "settings": settings}
    return field(default=default, metadata=metadata)
