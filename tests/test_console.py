"""What is printed: results on stdout, the rest on stderr, plain lines where nobody watches."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.system.launcher import NEEDED


def test_results_and_notes_go_apart(capsys: pytest.CaptureFixture[str]) -> None:
    console.result("a [bold] result")
    console.note("a [red] note")
    console.warn("careful")
    console.fail("no [x]")
    captured = capsys.readouterr()
    assert captured.out == "a [bold] result\n"
    assert captured.err == "a [red] note\nwarning: careful\nerror: no [x]\n"


def test_only_the_main_process_talks_but_all_fail_aloud(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(NEEDED, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    console.result("x")
    console.result_json({"a": 1})
    console.result_table("x", ("a",), [(1,)])
    console.note("x")
    console.warn("x")
    console.fail("rank 1 fails")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: rank 1 fails\n"


@pytest.mark.parametrize(
    ("rank", "size"), [("1", None), ("1", "1"), ("1", ""), ("", "1"), ("", None), ("1", "x")]
)
def test_a_rank_left_in_the_environment_silences_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, size: str | None
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    console.result("x")
    console.note("y")
    assert capsys.readouterr() == ("x\n", "y\n")


def test_lines_and_tables_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    console.result("word " * 60)
    console.result_table("title", ("name", "value"), [("x" * 100, "y" * 40), ("[b]", 3)])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "word " * 60
    assert any("x" * 100 in line and "y" * 40 in line for line in out)
    assert any(line.startswith("[b]") and line.rstrip().endswith("3") for line in out)


@pytest.mark.parametrize("width", [20, 80, 300])
def test_a_narrow_terminal_cuts_no_digits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console, "_out", Console(width=width, force_terminal=True))
    row = ["a long name of a model " * 4, "1,234,567", "116.0"]
    console.result_table("title", ["name", "bytes", "ms"], [row])
    printed = " ".join(capsys.readouterr().out.split())
    assert "1,234,567 116.0" in printed
    assert row[0].strip() in printed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk_behind_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(EnvironmentProblem, match="cannot be written to stdout: got No space"):
            console.result_json({"a": 1})
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    console.result_json({"path": Path("a/b"), "number": 1.5})
    assert json.loads(capsys.readouterr().out) == {"path": "a/b", "number": 1.5}


def test_progress_without_a_terminal_is_a_line_every_so_many(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progress("work", 7, every=3) as meter:
        for done in range(1, 8):
            meter.update(done, f"at {done}")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:2] == ["work: 3/7 at 3", "work: 6/7 at 6"]
    assert len(lines) <= 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (6.74, "6.7s"), (60, "1m 00s"), (245, "4m 05s"), (7380, "2h 03m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (134_200_000, "134.2 MB"), (5e12, "5.00 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert console.byte_size(count) == text


def test_a_pipe_gets_lines_whatever_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FORCE_COLOR rich takes a pipe for a terminal, and would draw bars into a log of CI."""
    forced = Console(stderr=True, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(console, "_err", forced)
    with console.progress("work", 2, every=1) as meter:
        meter.update(1, "one")
        meter.update(2, "two")
    assert capsys.readouterr().err == "work: 1/2 one\nwork: 2/2 two\n"


def test_an_error_ends_in_one_stop_and_a_list_that_goes_on_in_three() -> None:
    assert str(UsageError("wrong.", fix="stop.")) == "wrong. Fix: stop."
    assert (
        str(UsageError("wrong", fix="name one of a, b, ...")) == "wrong. Fix: name one of a, b, ..."
    )
