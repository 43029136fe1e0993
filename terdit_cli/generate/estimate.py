"""How long sampling will take, roughly, before it begins: a file may ask for years of work."""

from __future__ import annotations

import time

import torch

from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.layout import forward_flops

LONG = 3600.0  # seconds, of which a user is told beforehand
_SLOWEST = 1e10  # operations a second of any machine: where that is fast enough, none is measured
_WIDTH = 512  # of the matrices multiplied to measure


def long_sampling(config: DiTConfig, forwards: int, device: torch.device) -> float | None:
    """Return about how many seconds so many forwards of one row take, None for less than `LONG`.

    The device's rate is that of torch's own matrix product just now, in float32 on a CPU and in
    bfloat16 elsewhere: packed weights may be some times faster, small matrices slower.
    """
    operations = forwards * forward_flops(config)
    if operations / _SLOWEST < LONG:
        return None
    seconds = operations / _rate(device)
    return seconds if seconds > LONG else None


def _rate(device: torch.device) -> float:
    """Return the operations a second of a matrix product; takes some milliseconds."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first starts threads and loads kernels
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * _WIDTH**3 / best
