"""A stop signal: finish the step, save, exit; a second one: exit now."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from terdit_cli.system.signals import STOP_SIGNALS, handled

# A batch system signals every process of a job, and torchrun, which forwards it: the processes
# receive it twice.
AGAIN_SECONDS = 3.0


class StopRequest:
    """Which stop signal this process has received."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0
        self._final = False

    def heed(self) -> None:
        """Ignore further signals until the exit."""
        self._final = True

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; one that comes seconds later ends the process."""
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
            # Not through a buffered file: the signal may have interrupted a write to it.
            text = f"{signal.Signals(number).name}: saving after this step (again to kill)\n"
            os.write(2, text.encode())
        elif not self._final and now - self._at > AGAIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def flags(self) -> tuple[bool, ...]:
        """Return for each of STOP_SIGNALS whether it was received."""
        return tuple(self.number == number for number in STOP_SIGNALS)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Collect the stop signals inside; after `heed` the process ignores them."""
    request = StopRequest()
    with handled(request.receive) as previous:
        try:
            yield request
        finally:
            if request._final:
                previous.update(dict.fromkeys(previous, signal.SIG_IGN))
