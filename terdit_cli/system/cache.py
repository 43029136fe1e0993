"""The folder of files that can be made or downloaded again: $TERDIT_CACHE or ~/.cache/terdit."""

from __future__ import annotations

import os
from pathlib import Path

from terdit_cli.errors import EnvironmentProblem


def cache_folder() -> Path:
    """Return the folder, which need not exist.

    Raises:
        EnvironmentProblem: this user has no home, and the variable is not set.
    """
    if named := os.environ.get("TERDIT_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "terdit"
    except RuntimeError as error:
        raise EnvironmentProblem(
            "no folder for terdit's cache", got="a user without a home folder",
            fix="set TERDIT_CACHE to a writable folder",
        ) from error  # fmt: skip
