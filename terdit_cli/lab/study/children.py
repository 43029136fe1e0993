"""Every verb of a study as a process of its own: `python -m terdit_cli VERB ... --json`.

A child's memory is measured alone, and a crash in one verb cannot harm the study. A child is in a
session of its own, so that a stop from the keyboard reaches it once, through the study, which then
waits until it has saved. It holds the study's lock: where a killed study has left a child behind,
a second study of the same folder does not start beside it.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
    """A verb of the study failed; it has said why itself."""

    def __init__(self, words: Sequence[str], code: int) -> None:
        super().__init__(
            "a step of the study failed; its own message stands above",
            got=f"exit code {code}",
            where=command_of(words),
            fix="see that message, then run the study again: it goes on here",
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


def run_terdit(words: Sequence[str], descriptor: int, tick: Tick | None = None) -> Finished:
    """Run a verb and return what it printed.

    Args:
        descriptor: of the study's lock.
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
            pass_fds=(descriptor,),
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
                    "a step of the study was stopped; run the study again to go on",
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
            peak = max(peak, _peak_of(process.pid))
        if tick is not None and time.monotonic() >= due:
            tick()
            due = time.monotonic() + _TICK_SECONDS


def _peak_of(pid: int) -> int:
    """Return VmHWM in bytes; getrusage would count this process's memory before the exec."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


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
