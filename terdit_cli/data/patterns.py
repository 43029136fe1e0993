"""Patterns of file names with braces and wildcards: "train-{000..009}.tar", "*/train-*.tar"."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from terdit_cli.errors import InputFileError, UsageError

MAX_FILES = 100_000  # that a pattern may stand for


def is_pattern(where: str) -> bool:
    """Say whether a path has braces or wildcards in it."""
    return any(sign in where for sign in "{*?[")


def is_file_of(path: Path, suffix: str) -> bool:
    """Say whether a path is a file with that suffix, and not a hidden one."""
    return path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file()


def match_files(pattern: str, suffix: str, what: str) -> list[Path]:
    """Return the files that a pattern names.

    What is in braces is a range of numbers, as wide as its first, or a list with commas; each
    result must exist. Wildcards give sorted paths.

    Args:
        suffix: which all must have.
        what: the kind of file, for the message.

    Raises:
        InputFileError: nothing there, or another kind of file. UsageError: too many.
    """
    files: dict[Path, None] = {}
    for count, name in enumerate(_expand(pattern)):
        if count >= MAX_FILES:
            raise UsageError(
                "too many files",
                got=f"over {MAX_FILES} in {pattern}",
                expected=f"at most {MAX_FILES}",
                fix="check the range in braces",
            )
        names = sorted(glob.glob(name, recursive=True)) if is_pattern(name) else [name]  # noqa: PTH207
        paths = [Path(found) for found in names]
        files |= dict.fromkeys(paths)
        bad = (path for path in paths if not is_file_of(path, suffix))
        wrong = next(bad, None) if paths else Path(name)
        if wrong is not None:
            got = f"a folder without {suffix} files" if wrong.is_dir() else "another file"
            raise InputFileError(
                f"{what} not found",
                got=got if wrong.exists() else "nothing there",
                expected=f"a {suffix} file for each part of {pattern}",
                where=wrong,
                fix="check the pattern, and that all files were copied",
            )
    return list(files)


def _expand(pattern: str) -> Iterator[str]:
    """Iterate over what braces stand for, the last pair changing fastest."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(braced: str) -> list[str]:
    if found := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braced):
        first, last = int(found[1]), int(found[2])
        if first <= last:
            numbers = range(first, min(last, first + MAX_FILES) + 1)
            return [f"{number:0{len(found[1])}d}" for number in numbers]
    return braced.split(",")
