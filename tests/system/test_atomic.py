"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system.atomic import (
    atomic_path,
    check_writable,
    make_folder,
    sync_folder,
    write_whole,
)


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def fail_half_way(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_any_exception_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)):
        fail_half_way(target, error)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "free disk space"),
        (errno.EFBIG, "free disk space"),
        (errno.EROFS, "name a folder you can write to"),
    ],
)
def test_a_disk_that_refuses(tmp_path: Path, number: int, fix: str) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(EnvironmentProblem) as caught:
        fail_half_way(target, OSError(number, os.strerror(number)))
    assert caught.value.exit_code == 4
    assert os.strerror(number) in str(caught.value)
    assert str(target) in str(caught.value)
    assert f"Fix: {fix}" in str(caught.value)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_where_a_folder_is_needed_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target, reason in (("file/x", "a file where a folder is needed"), ("folder", "directory")):
        with (
            pytest.raises(EnvironmentProblem, match=reason),
            atomic_path(tmp_path / target) as temporary,
        ):
            temporary.write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_folder_with_its_parents(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(EnvironmentProblem, match="a file where a folder is needed") as error:
            make_folder(path)
        assert str(path) in str(error.value)


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        (tmp_path / "other").read_text()


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for fine in ("new", "file", "new/folder/new"):
        check_writable(tmp_path / fine)
    with pytest.raises(EnvironmentProblem, match=r"cannot write: got Is a directory.*Fix: "):
        check_writable(tmp_path)
    for below in ("file/new", "file/folder/new"):
        with pytest.raises(EnvironmentProblem, match=r"file where a folder is needed.*file/.*new"):
            check_writable(tmp_path / below)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "fails"),
    [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True)],
)
def test_file_systems_that_sync_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    sync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    if fails:
        with pytest.raises(EnvironmentProblem, match=os.strerror(number)):
            write_whole(tmp_path / "file", "x")
        with pytest.raises(OSError, match=os.strerror(number)):
            sync_folder(tmp_path)
    else:
        write_whole(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(EnvironmentProblem, match="Invalid argument"):
        write_whole(tmp_path / "file", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "somewhere")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(EnvironmentProblem, match=r"cannot write: got Permission denied \(.*file\)"):
        write_whole(tmp_path / "file", "x")
