"""A study kept as one archive says what its folder says, and nothing of a stranger's is trusted."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study import run_study as command
from terdit_cli.lab.study.archive import RESOLVED, keep, opened, unpack
from terdit_cli.lab.study.collect import collect
from terdit_cli.lab.study.records import Folder
from terdit_cli.lab.study.spec import Study


@pytest.fixture
def runs(tmp_path: Path, study: Study, invent: Callable[[Study, Folder], None]) -> Path:
    folder = tmp_path / "runs" / study.name
    invent(study, Folder(folder))
    (folder / RESOLVED).write_text(study.to_yaml())
    (folder / "ternary" / "seed-0" / "step-00000040.pt").write_bytes(b"weights")
    return tmp_path / "runs"


def test_an_archive_says_what_the_folder_says(runs: Path, study: Study, tmp_path: Path) -> None:
    for name in ("a", "b"):
        keep(runs / study.name, study, tmp_path / name / "small.tar.xz")
    assert (tmp_path / "a/small.tar.xz").read_bytes() == (tmp_path / "b/small.tar.xz").read_bytes()
    whole = collect(study, Folder(runs / study.name))
    with opened(tmp_path / "a", study.name) as folder:
        kept = collect(study, Folder(folder))
        assert not list(folder.rglob("*.pt"))
    assert not folder.exists()
    assert whole.models
    for ours, theirs in zip(kept.models, whole.models, strict=True):
        for part in ("scores", "losses", "footprint"):
            assert repr(getattr(ours, part)) == repr(getattr(theirs, part))  # nan is not itself
        assert len(ours.metrics) == len(theirs.metrics)
        shown = theirs.variant.name in study.grids
        guided = {max(study.evaluation.cfg_scales)} & theirs.grids.keys()
        assert ours.grids.keys() == (guided if shown else set())
        assert repr(ours.neighbours) == repr(theirs.neighbours)


@pytest.mark.slow
def test_pages_are_made_of_an_archive(
    runs: Path, study: Study, study_file: Path, tmp_path: Path
) -> None:
    pages = [tmp_path / name / "r.md" for name in ("whole", "kept")]
    for page, place in zip(pages, (runs, tmp_path / "archives"), strict=True):
        command.run([study_file], render=True, runs=place, out=page, keep_in=tmp_path / "archives")
    assert pages[0].read_text() == pages[1].read_text()


def test_there_is_nothing_to_keep(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="there is no study to keep"):
        keep(tmp_path, study, tmp_path / "a.tar.xz")


def _archive(member: tarfile.TarInfo, data: bytes = b"") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return lzma.compress(content.getvalue())


def _link() -> tarfile.TarInfo:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        _archive(tarfile.TarInfo("../outside"), b"x"),
        _archive(tarfile.TarInfo("/terdit-outside"), b"x"),
        _archive(_link()),
        _archive(tarfile.TarInfo("a"), b"x" * 2000)[:80],
    ],
    ids=["empty", "text", "above", "absolute", "link", "truncated"],
)
def test_hostile_archives(content: bytes, tmp_path: Path) -> None:
    archive, folder = tmp_path / "small.tar.xz", tmp_path / "folder" / "inner"
    archive.write_bytes(content)
    folder.mkdir(parents=True)
    with pytest.raises(InputFileError, match="not the archive of a study") as caught:
        unpack(archive, folder)
    assert str(archive) in str(caught.value)
    assert not list(tmp_path.rglob("outside"))
    assert not (folder / "link").exists()
