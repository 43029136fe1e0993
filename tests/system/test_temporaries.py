"""What a killed process leaves is removed by the next write, what a living one writes never."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from terdit_cli.generate.saved_images import SavedImages
from terdit_cli.system import temporaries
from terdit_cli.system.atomic import atomic_path, write_whole
from terdit_cli.system.temporaries import LEFT_SECONDS, is_temporary

WRITE = """
import sys, time
from pathlib import Path
from terdit_cli.system.atomic import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(bytes(1000))
    print(temporary.name, flush=True)
    time.sleep(60)
"""


@contextmanager
def a_writer(target: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run a process that is in the middle of writing `target`."""
    words = [sys.executable, "-c", WRITE, str(target)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, target.with_name(process.stdout.readline().strip())
        finally:
            process.kill()


def left_by(host: str, folder: Path, age: float) -> Path:
    path = folder / f".model.tdt.terdit-{host}-12-0123abcd.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture(autouse=True)
def swept_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporaries, "_SWEEP_SHARE", float("inf"))
    monkeypatch.setattr(temporaries, "_next_sweep", {})


@pytest.mark.parametrize("name", ["file", "another"])
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path, name: str) -> None:
    with a_writer(tmp_path / "file") as (process, left):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left.stat().st_size == 1000
        assert is_temporary(left.name)
        write_whole(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    with a_writer(tmp_path / "file") as (_, temporary):
        os.utime(temporary, (0, 0))  # however long it has been at it
        write_whole(tmp_path / "file", "ours")
        assert temporary.stat().st_size == 1000
    assert (tmp_path / "file").read_text() == "ours"


def test_threads_of_one_process_write_one_target(tmp_path: Path) -> None:
    target, contents = tmp_path / "file", [str(number) * 100_000 for number in range(8)]

    def write(content: str) -> None:
        for _ in range(20):
            write_whole(target, content)
            assert target.read_text() in contents

    failures: list[Any] = []
    before, threading.excepthook = threading.excepthook, failures.append
    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = before
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("host", "age", "stays"),
    [
        (socket.gethostname(), 0, False),
        ("another", 0, True),
        ("another", LEFT_SECONDS - 600, True),
        ("another", LEFT_SECONDS + 600, False),
    ],
)
def test_another_machines_file_goes_when_it_is_old(
    tmp_path: Path, host: str, age: float, stays: bool
) -> None:
    left = left_by(host, tmp_path, age)
    write_whole(tmp_path / "file", "x")
    assert left.exists() == stays


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_age_alone_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for age, stays in ((0, True), (LEFT_SECONDS + 600, False)):
        left = left_by(socket.gethostname(), tmp_path, age)
        write_whole(tmp_path / "file", "x")
        assert left.exists() == stays
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_taken_for_left_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    lock = temporaries._is_held

    def late(descriptor: int) -> bool:
        if not taken:
            taken.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            temporaries._remove_left(taken[0], True, time.time())
        return lock(descriptor)

    monkeypatch.setattr(temporaries, "_is_held", late)
    write_whole(tmp_path / "file", "whole")
    assert not Path(taken[0]).exists()
    assert (tmp_path / "file").read_text() == "whole"


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    names = [".file.1234abcd.tmp", "file.tmp", ".file.terdit-host.tmp", ".terdit-a-1-0123abcd.tmp"]
    for name in names:
        (tmp_path / name).touch()
        assert not is_temporary(name)
    (tmp_path / f".folder.terdit-{socket.gethostname()}-1-0123abcd.tmp").mkdir()
    write_whole(tmp_path / "file", "x")
    assert len(list(tmp_path.iterdir())) == len(names) + 2


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127, "new\nline", "\udcff"])
def test_names_as_long_and_odd_as_the_disk_takes(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("x")
        assert is_temporary(temporary.name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_large_folder_is_not_listed_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporaries, "_SWEEP_SHARE", 1e-9)
    listed: list[Any] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    for number in range(5):
        write_whole(tmp_path / str(number), "x")
    assert listed == [tmp_path]


def test_a_folder_of_images_whose_first_write_was_killed(tmp_path: Path) -> None:
    left_by("another", tmp_path, 0)
    SavedImages(tmp_path).claim({"seed": 0}, 1)
    SavedImages(tmp_path).claim({"seed": 0}, 1)
