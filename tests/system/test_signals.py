"""Stop signals: no `except Exception` keeps them, and a terminal may be gone."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from terdit_cli.system.signals import STOP_SIGNALS, StopSignal, handled, raise_stop


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_is_no_failure_of_what_it_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def stop() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception:  # as of a library that imports another one
            pytest.fail("taken for a failure")

    with handled(raise_stop), pytest.raises(StopSignal) as caught:
        stop()
    told = caught.value.told()
    assert told.exit_code == 128 + number
    assert str(told) == f"stopped by {number.name}: nothing half-written is left."
    assert signal.getsignal(number) == before


def test_under_nohup_the_terminals_end_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled(raise_stop):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


GONE = """
import os, signal, sys, time
from terdit_cli.system.signals import handled
heard = []
with handled(lambda number, frame: heard.append(number)):
    print("ready", flush=True)
    while not heard:
        time.sleep(0.01)
    print("still talking", flush=True)
    print("and complaining", file=sys.stderr, flush=True)
sys.exit(7)
"""


def test_what_is_said_after_the_terminals_end_goes_nowhere() -> None:
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GONE], stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    assert b"ready" in os.read(main, 100)
    os.close(main)  # from now on every write to it is an error
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 7
