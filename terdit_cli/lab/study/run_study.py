"""`terdit study`: train and score every variant of a study, and show them on one page."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from terdit_cli import console
from terdit_cli.errors import UsageError
from terdit_cli.lab.children import lock, run_terdit
from terdit_cli.lab.study.archive import RESOLVED, archive_of, keep, opened, unpack
from terdit_cli.lab.study.collect import Findings, collect
from terdit_cli.lab.study.records import Folder
from terdit_cli.lab.study.runner import Runner
from terdit_cli.lab.study.spec import Study, load_study
from terdit_cli.lab.study.study_page import write_pages
from terdit_cli.strict_yaml import read_mapping
from terdit_cli.system.atomic import atomic_path, check_writable

DEFAULT_RUNS = Path("runs/studies")
DEFAULT_PAGE = Path("runs/results.md")


@dataclass(frozen=True)
class StudyResult:
    """The pages, and the result of each study in one line."""

    page: Path
    html: Path
    studies: list[str]
    verdicts: list[str]
    missing: int  # scores that are not there yet


def run(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    render: bool = False,
    runs: Path = DEFAULT_RUNS,
    out: Path = DEFAULT_PAGE,
    keep_in: Path | None = None,
) -> StudyResult:
    """Do what the studies lack, and write the pages.

    Args:
        paths: studies; their sections stand on the pages in this order.
        overrides: key=value words for the recipes of all of them, such as data.path.
        only: names of variants to work on; the pages show all that is there.
        render: only write the pages; without overrides, of the words that a study was run with.
        runs: where each study has a folder of its own, or an archive.
        out: the .md page; that of all tables, the .html and the figures lie beside it.
        keep_in: write the findings of each study into this folder as an archive.

    Raises:
        UsageError, InputFileError, EnvironmentProblem; Interrupted after saving.
    """
    if not paths:
        raise UsageError("there is no study", fix="terdit study recipes/studies/quick.yaml")
    if out.suffix != ".md":
        raise UsageError(
            "wrong name for --out", got=out.name, expected="a name that ends in .md",
            fix=f"--out {out.with_suffix('.md')}",
        )  # fmt: skip
    if len(paths) > 1 and only:
        raise UsageError("--only is for one study", got=f"{len(paths)} studies", fix="name one")
    check_writable(out)
    studies = [load_study(path, overrides) for path in paths]
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise UsageError("two studies of one name", got=", ".join(names), fix="rename one")
    with ExitStack() as stack:
        if not render:
            for name in names:
                _unpack_kept(runs, name)
        folders = [stack.enter_context(opened(runs, name)) for name in names]
        if render and not overrides:
            words = [_words_before(folder / RESOLVED) for folder in folders]
            pairs = zip(paths, words, strict=True)
            studies = [load_study(path, before) for path, before in pairs]
        return _run(studies, folders, only, render, runs, out, keep_in)


def _unpack_kept(runs: Path, name: str) -> None:
    """Unpack a study that is to go on where only its archive is there."""
    if archive_of(runs, name).exists() and not (runs / name).exists():
        with tempfile.TemporaryDirectory(dir=runs, prefix=f".{name}-") as temporary:
            unpack(archive_of(runs, name), Path(temporary) / name)
            (Path(temporary) / name).rename(runs / name)


def _run(
    studies: Sequence[Study],
    folders: Sequence[Path],
    only: Sequence[str],
    render: bool,
    runs: Path,
    out: Path,
    keep_in: Path | None,
) -> StudyResult:
    """Work in the studies' folders; see `run`."""

    def pages() -> list[Findings]:
        found = [
            collect(study, Folder(folder)) for study, folder in zip(studies, folders, strict=True)
        ]
        if render and not any(model.scores for one in found for model in one.models):
            raise UsageError(
                "there is nothing to show yet", got="--render", expected="a study that has scores",
                where=runs, fix="run the studies without --render first, or name their --runs",
            )  # fmt: skip
        write_pages(out, found)
        return found

    if not render:
        for study in studies:
            _work(study, runs, only, pages)
    found = pages()
    if keep_in is not None:
        for study, folder in zip(studies, folders, strict=True):
            keep(folder, study, archive_of(keep_in, study.name))
    return StudyResult(
        page=out,
        html=out.with_suffix(".html"),
        studies=[study.name for study in studies],
        verdicts=[findings.verdict for findings in found],
        missing=sum(findings.missing for findings in found),
    )


def _words_before(path: Path) -> list[str]:
    """Return the key=value words with which a study was run, by its resolved copy."""
    if not path.exists():
        return []
    words = read_mapping(path, "study").get("words", [])
    return [str(word) for word in words] if isinstance(words, list) else []


def _work(study: Study, runs: Path, only: Sequence[str], changed: Callable[[], object]) -> None:
    folder = Folder(runs / study.name)
    with lock(folder.path) as descriptor:
        runner = Runner(
            study, folder, functools.partial(run_terdit, descriptor=descriptor), changed
        )
        runner.check(only)  # a study that is refused changes nothing of the one that lies there
        with atomic_path(folder.path / RESOLVED) as temporary:
            temporary.write_text(study.to_yaml(), encoding="utf-8")
        console.note(f"study {study.name}: {len(study.variants)} variants, in {folder.path}")
        runner.work(only)
