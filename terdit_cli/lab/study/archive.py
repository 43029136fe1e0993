"""A study's findings as one file: RUNS/NAME.tar.xz stands for the folder RUNS/NAME.

It holds the records, the logged metrics with numbers of six digits, the images of variants that
the study shows side by side, and the nearest training images; no weights and no features. The
same findings give the same bytes. Whatever reads a study's folder reads an archive by `opened`.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study.spec import Study
from terdit_cli.system.atomic import atomic_path
from terdit_cli.train.loggers import FILE as METRICS

SUFFIX = ".tar.xz"
RESOLVED = "study.yaml"  # in a study's folder: what was asked for there last
LARGEST = 1 << 30  # bytes of all that an archive holds
MOST_FILES = 100_000
_DIGITS = 6  # more than any page shows


def archive_of(runs: Path, name: str) -> Path:
    """Return where the archive of a study lies."""
    return runs / f"{name}{SUFFIX}"


def keep(folder: Path, study: Study, archive: Path) -> None:
    """Write the findings in a study's folder as an archive, whole or not at all.

    Raises:
        InputFileError: there is no such folder. EnvironmentProblem: it cannot be written.
    """
    if not (folder / RESOLVED).is_file():
        raise InputFileError(
            "there is no study to keep", where=folder, fix="run the study first, without --keep"
        )
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and _is_kept(path.relative_to(folder), study):
                data = path.read_bytes()
                if path.name == METRICS:
                    data = _rounded(data)
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with atomic_path(archive) as temporary:
        temporary.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def _is_kept(path: Path, study: Study) -> bool:
    """Return whether a file, named within the study's folder, belongs into its archive."""
    parts = path.parts
    if any(part.endswith(".work") for part in parts):
        return False
    if "run" in parts:  # of a training that goes on; of a finished one they lie beside it
        return parts[-2:] == ("run", METRICS)
    if "grids" in parts:
        shown = path.stem == f"cfg-{study.largest_scale:g}" and parts[0] in study.grids
        return path.stem == "nearest" or shown
    return path.suffix in (".json", ".jsonl") or path == Path(RESOLVED)


def _rounded(lines: bytes) -> bytes:
    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.{_DIGITS}g}")
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        return [rounded(inner) for inner in value] if isinstance(value, list) else value

    parsed = (rounded(json.loads(line)) for line in lines.splitlines())
    return "".join(json.dumps(entry) + "\n" for entry in parsed).encode()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder.

    Raises:
        InputFileError: it is damaged, too large, or names files outside of the folder.
    """
    try:
        with tarfile.open(archive, "r:xz") as tar:
            size = 0
            for number, member in enumerate(tar):
                size += member.size
                if not member.isreg() or size > LARGEST or number >= MOST_FILES:
                    raise ValueError(f"{member.name}: no small plain file")
                name = PurePosixPath(member.name)
                file = tar.extractfile(member)
                if name.is_absolute() or ".." in name.parts or file is None:
                    raise ValueError(f"{member.name}: not inside of the folder")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise InputFileError(
            "not the archive of a study", got=f"{type(error).__name__}: {error}", where=archive,
            fix="restore it, or make it again with --keep",
        ) from error  # fmt: skip


@contextmanager
def opened(runs: Path, name: str) -> Iterator[Path]:
    """Yield the folder of a study: its own, or, for a while, a temporary one of its archive."""
    folder, archive = runs / name, archive_of(runs, name)
    if folder.exists() or not archive.exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="terdit-") as temporary:
        unpack(archive, Path(temporary))
        yield Path(temporary)
