"""Verbs as processes of their own: `python -m terdit_cli VERB ... --json`.

A child's memory is measured alone, and a crash in one verb harms nothing else. A child is in a
session of its own, so that a stop from the keyboard reaches it once, through its parent, which then
waits until it has saved. It holds a study's lock: where a killed study has left a child behind, a
second study of the same folder does not start beside it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terdit_cli.errors import Interrupted, TerditError, UsageError
from terdit_cli.system.locks import held
from terdit_cli.system.signals import STOP_SIGNALS

_POLL_SECONDS = 0.05
_TICK_SECONDS = 1.0
_SAVING_SECONDS = 600.0  # that a child may take to save after it was told to stop


class ChildFailed(TerditError):
    """A verb failed; it has said why itself."""

    def __init__(self, words: Sequence[str], code: int) -> None:
        super().__init__(
            "a step failed; its own message stands above",
            got=f"exit code {code}",
            where=command_of(words),
            fix="see that message, then run the same command again",
        )
        self.exit_code = code if 0 < code < 128 else 1


@dataclass(frozen=True)
class Finished:
    """What a verb printed with --json, and what it took."""

    result: dict[str, Any]
    seconds: float
    peak_bytes: int  # resident; 0 where the system does not tell
    command: str


Tick = Callable[[], None]
Run = Callable[..., Finished]  # (words, tick=None) -> Finished


def command_of(words: Sequence[str]) -> str:
    """Return the command line of a verb, for a record or a message."""
    return shlex.join(["terdit", *words])


@contextmanager
def lock(folder: Path) -> Iterator[int]:
    """Hold a study's folder; yields the descriptor that children are to hold as well.

    Raises:
        UsageError: another study, or a child that one has left behind, is at work there.
        EnvironmentProblem: the folder cannot be written.
    """
    with held(folder) as descriptor:
        if descriptor is None:
            raise UsageError(
                "another process is at work on this study",
                where=folder,
                fix="wait until it has ended, or name another folder with --runs",
            )
        yield descriptor


def run_terdit(
    words: Sequence[str],
    tick: Tick | None = None,
    descriptor: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a verb and return what it printed.

    Args:
        descriptor: of a lock that it holds.
        environment: more variables.
        tick: called about every second while it runs, and once after it.

    Raises:
        ChildFailed: another exit code than 0.
        Interrupted: this process was told to stop; the child has saved and ended.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "terdit_cli", *words, "--json"],
            stdout=out,
            start_new_session=True,
            pass_fds=() if descriptor is None else (descriptor,),
            env={**os.environ, **(environment or {})},
        )
        try:
            peak = _wait(process, tick)
        except BaseException:
            _stop(process)
            raise
        if process.returncode:
            code = process.returncode
            stopped = -code if code < 0 else code - 128
            if stopped in STOP_SIGNALS:
                raise Interrupted(
                    "a step was stopped; run the same command again to go on",
                    signal_number=stopped,
                )
            raise ChildFailed(words, code)
        out.seek(0)
        result = json.loads(out.read())
    if tick is not None:
        tick()
    return Finished(result, time.monotonic() - started, peak, command_of(words))


def _wait(process: subprocess.Popen[bytes], tick: Tick | None) -> int:
    """Wait for a process to end and return its peak of resident memory."""
    peak, due = 0, time.monotonic() + _TICK_SECONDS
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return peak
        except subprocess.TimeoutExpired:
            peak = resident_bytes(str(process.pid))[1] or peak  # it only grows
        if tick is not None and time.monotonic() >= due:
            tick()
            due = time.monotonic() + _TICK_SECONDS


def resident_bytes(process: str) -> tuple[int | None, int | None]:
    """Return resident memory now and its peak (VmRSS, VmHWM) of a process id or "self".

    None where the system does not say (no /proc, or the process has ended). getrusage would count
    the parent's memory before the exec.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    values = dict(line.split(":", 1) for line in lines)
    found = [int(values[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM") if key in values]
    return (found[0], found[1]) if len(found) == 2 else (None, None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a child save and end."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_SAVING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
