"""The signals that stop a program: Ctrl-C, a batch system's SIGTERM, a closed terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from terdit_cli.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal(BaseException):
    """A stop signal, raised wherever the program is at that moment.

    No `except Exception` may take it for a failure of what it guards.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def told(self) -> Interrupted:
        """Return it as an error with a message."""
        name = signal.Signals(self.number).name
        text = f"stopped by {name}: nothing half-written is left"
        return Interrupted(text, signal_number=self.number)


def raise_stop(number: int, frame: FrameType | None) -> None:
    """Raise StopSignal: the handler for verbs that have nothing to save."""
    raise StopSignal(number)


@contextmanager
def handled(receive: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Let `receive` handle the stop signals; yields the old handlers, restored at the end.

    A SIGHUP that is ignored, as under nohup, stays so. Where it comes, what is still printed goes
    nowhere: the terminal's end answers every write with an error.
    """

    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def heard(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _silence(terminals)
        receive(number, frame)

    previous: dict[int, Any] = {}
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, heard)
    try:
        yield previous
    finally:
        for heard_before, handler in previous.items():
            if signal.getsignal(heard_before) != signal.SIG_IGN:  # unless `ignore_stops` was called
                signal.signal(heard_before, handler)


def ignore_stops() -> None:
    """Ignore the stop signals for the rest of the process, in all its threads.

    A mask would be one thread's: another takes the signal, and Python's handler runs all the same.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _silence(descriptors: list[int]) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)
