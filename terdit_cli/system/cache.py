"""Where files are kept that can be made or fetched again: $TERDIT_CACHE or ~/.cache/terdit."""

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
            "no place for terdit's cache", got="a user without a home folder",
            fix="set TERDIT_CACHE to a folder that can be written to",
        ) from error  # fmt: skip
