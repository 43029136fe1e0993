"""Tile sizes of the products: a short list for each kind of shape, and the best measured one.

    $TERDIT_CACHE or ~/.cache/terdit/gpu.json    {device and triton: {kind of shape: tile}}

The first of a list that fits the device's shared memory is used, unless `tune` has measured and
written another; nothing is measured at start-up.

Shapes: M rows of x (times planes), N out features; BN, BM, BK the tile.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.system import atomic
from terdit_cli.system.cache import cache_folder

Epilogue = Literal["plain", "swiglu", "gated"]

SLICE = 128  # as in triton_kernels.py
ITEM_BYTES = {"int8": 1, "fp8": 1, "bf16": 2, "fp32": 4}
SMALLEST_SHARED = 99 << 10  # bytes a program may have on any GPU from sm_80 on
GPU_CACHE = "gpu.json"


class Device(NamedTuple):
    """The device facts that the choice of a tile depends on."""

    name: str  # with the version of Triton
    shared: int  # bytes of shared memory that a program may have
    processors: int  # multiprocessors
    wgmma: bool  # Hopper's tensor instructions, which read one operand from shared memory


class Problem(NamedTuple):
    """The problem that a tile is chosen for."""

    kind: str  # of the operands: int8, fp8, bf16, fp32
    grouped: bool
    epilogue: Epilogue
    rows: int  # M times planes
    columns: int  # N

    def key(self) -> str:
        """Return its class: shapes of one class share a tile."""
        bucket = next((size for size in (16, 64, 256, 1024, 4096) if self.rows <= size), "many")
        group = "-group" if self.grouped else ""
        return f"{self.kind}{group}-{self.epilogue}-{bucket}-{self.columns}"


class Tile(NamedTuple):
    """BN x BM outputs per program; BK bytes of each row of codes (4 BK of K) per step."""

    BN: int
    BM: int
    BK: int
    warps: int
    stages: int

    def shared_bytes(self, problem: Problem) -> int:
        """Return an upper bound of the stages' shared memory, in bytes."""
        codes = self.BN * (2 if problem.epilogue == "swiglu" else 1)
        depth = SLICE if problem.grouped else self.BK
        return self.stages * depth * (codes + 4 * self.BM * ITEM_BYTES[problem.kind])


# Two reasons for the sizes: an unpacked weight should meet many columns of x (BM), and there
# should be a program for each multiprocessor, better two. The accumulators of all matrices take
# at most 128 registers per thread.
_FEW = (Tile(128, 16, 128, 4, 2), Tile(64, 16, 128, 4, 2), Tile(64, 16, 64, 4, 3))
_FEW_GROUPED = (Tile(128, 16, 128, 4, 2), Tile(64, 16, 128, 4, 2))
_LARGE: dict[tuple[int, Epilogue], tuple[Tile, ...]] = {
    (1, "plain"): (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 64, 128, 4, 3),
        Tile(64, 64, 64, 4, 3),
    ),
    (1, "gated"): (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 64, 128, 4, 3),
        Tile(64, 64, 64, 4, 3),
    ),
    (1, "swiglu"): (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 2),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 32, 64, 4, 3),
    ),
    (2, "plain"): (
        Tile(128, 256, 32, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 32, 4, 3),
    ),
    (2, "gated"): (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 32, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 32, 4, 3),
    ),
    (2, "swiglu"): (
        Tile(128, 128, 32, 8, 4),
        Tile(128, 128, 32, 8, 2),
        Tile(64, 64, 32, 4, 3),
        Tile(64, 32, 32, 4, 3),
    ),
    (4, "plain"): (Tile(64, 32, 32, 4, 2),),
    (4, "gated"): (Tile(64, 32, 32, 4, 2),),
}
# BK is the group. The partial sums of a group are accumulators too.
_LARGE_GROUPED: dict[tuple[int, Epilogue], tuple[Tile, ...]] = {
    (1, "plain"): (Tile(128, 64, 128, 8, 2), Tile(64, 64, 128, 4, 2), Tile(64, 32, 128, 4, 2)),
    (1, "gated"): (Tile(128, 64, 128, 8, 2), Tile(64, 64, 128, 4, 2), Tile(64, 32, 128, 4, 2)),
    (1, "swiglu"): (Tile(128, 32, 128, 8, 2), Tile(64, 32, 128, 4, 2), Tile(64, 16, 128, 4, 2)),
    (2, "plain"): (Tile(128, 64, 128, 8, 2), Tile(64, 32, 128, 4, 2)),
    (2, "gated"): (Tile(128, 64, 128, 8, 2), Tile(64, 32, 128, 4, 2)),
    (2, "swiglu"): (Tile(64, 32, 64, 4, 2), Tile(64, 16, 128, 4, 2)),
    (4, "plain"): (Tile(64, 16, 32, 4, 2),),
    (4, "gated"): (Tile(64, 16, 32, 4, 2),),
}


def candidates(problem: Problem, device: Device) -> list[Tile]:
    """Return the tiles to choose from, the likely best first; never none."""
    item = ITEM_BYTES[problem.kind]
    if problem.rows <= 16 and problem.kind != "fp32" and problem.epilogue == "plain":
        tiles: tuple[Tile, ...] = _FEW_GROUPED if problem.grouped else _FEW
    else:
        tiles = (_LARGE_GROUPED if problem.grouped else _LARGE)[item, problem.epilogue]
    fitting = [
        tile
        for tile in tiles
        if tile.shared_bytes(problem) <= device.shared
        # Without wgmma both operands of a group are in registers.
        and (device.wgmma or not problem.grouped or tile.BN * tile.BM <= 2048)
    ]

    def is_busy(tile: Tile) -> bool:
        programs = -(-problem.columns // tile.BN) * -(-problem.rows // tile.BM)
        return programs >= device.processors and 2 * problem.rows > tile.BM

    # The largest of those that keep every multiprocessor busy, else the smallest.
    busy = [tile for tile in fitting if is_busy(tile)]
    idle = [tile for tile in fitting if not is_busy(tile)]
    return busy + idle[::-1] or [tiles[-1]]


def cache_path() -> Path:
    """Return the file of the measured choices."""
    return cache_folder() / GPU_CACHE


@functools.cache
def _measured(path: Path) -> dict[str, dict[str, list[int]]]:
    """Return the contents of a cache file; nothing if it is missing or broken."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def choose(problem: Problem, device: Device) -> Tile:
    """Return the tile for a problem: the measured one if there is one, else the first."""
    tiles = candidates(problem, device)
    measured = _measured(cache_path()).get(device.name)
    best = measured.get(problem.key()) if isinstance(measured, dict) else None
    return next((tile for tile in tiles if list(tile) == best), tiles[0])


def tune(problem: Problem, device: Device, measure: Callable[[Tile], float]) -> Tile:
    """Measure the candidates, keep the best in the user's cache folder and return it.

    Args:
        measure: returns the seconds of a product with a tile; infinity if it cannot run.
    """
    tiles = candidates(problem, device)
    best = min(tiles, key=measure)
    path = cache_path()
    _measured.cache_clear()
    found = dict(_measured(path))
    mine = found.get(device.name)
    found[device.name] = {**(mine if isinstance(mine, dict) else {}), problem.key(): list(best)}
    # Without a writable cache the choice is measured again next time.
    with contextlib.suppress(EnvironmentProblem), atomic.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    _measured.cache_clear()
    return best
