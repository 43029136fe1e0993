"""How long the threads of torch's pool spin at the end of a parallel loop before they sleep.

torch's Linux wheels bring GNU's OpenMP, whose threads spin 300,000 times, 10 ms. Where other
programs take some of the CPUs, a thread that is done so keeps its CPU from the one it waits for,
at hundreds of loops per step. On a quiet machine the same spinning is worth its while, for the next
loop is near (docs/runtime.md, "Beside other work", has both measured).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

SPINS = 1000  # about 35 microseconds, as long as it takes to wake a thread
_USERS_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LOADAVG = Path("/proc/loadavg")
_LOOKS, _SECONDS_BETWEEN = 5, 0.002


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT, for this process and its children, if other programs compute just now.

    What the user has chosen stays. The library reads it when it is loaded: after `import torch`
    this is for the children alone. Intel's and LLVM's OpenMP, as in torch for macOS, know other
    variables and stay as they are.
    """
    if not any(name in os.environ for name in _USERS_CHOICE) and others_compute():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def others_compute() -> bool:
    """Return whether, at several looks, a thread besides this one had or wanted a CPU.

    One look would take what starts and ends all the time for work. False where the system does not
    tell. In a container this counts the whole machine.
    """
    for _ in range(_LOOKS):
        try:
            runnable = int(_LOADAVG.read_text().split()[3].partition("/")[0])
        except OSError:
            return False
        if runnable < 2:
            return False
        time.sleep(_SECONDS_BETWEEN)
    return True
