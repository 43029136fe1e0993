"""Stop signals: remembered, heard twice without harm, a later one kills, none after the save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from terdit_cli.system.signals import STOP_SIGNALS
from terdit_cli.train import stop
from terdit_cli.train.stop import stop_signals

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_remembered(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(name) for name in STOP_SIGNALS]
    with stop_signals() as request:
        assert not any(request.flags)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # from the batch system and from torchrun
        assert request.number == number
        assert request.flags == tuple(number == each for each in STOP_SIGNALS)
    assert capfd.readouterr().err == f"{number.name}: saving after this step (again to kill)\n"
    assert [signal.getsignal(name) for name in STOP_SIGNALS] == before


def test_another_kind_of_signal_does_not_replace_the_first() -> None:
    with stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.flags == (True, False, False)


def test_no_signal_interrupts_what_is_left_after_the_save() -> None:
    before = [signal.getsignal(name) for name in STOP_SIGNALS]
    try:
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            request.heed()
            request._at -= 2 * stop.AGAIN_SECONDS
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert [signal.getsignal(name) for name in STOP_SIGNALS] == [signal.SIG_IGN] * 3
    finally:
        for name, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(name, handler)


IMPATIENT = """
import os, signal
from terdit_cli.train import stop
stop.AGAIN_SECONDS = 0.0
with stop.stop_signals():
    os.kill(os.getpid(), signal.SIGINT)
    print("one", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("two", flush=True)
"""


def test_a_later_signal_kills() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "one\n"
