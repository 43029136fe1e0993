"""OpenMP's threads wait shortly beside other work, unless the user has decided."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from terdit_cli.system import openmp

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COMMAND_LINE = """
import sys
from terdit_cli.cli.app import main
sys.argv = ["terdit", "--version"]
try:
    main()
except SystemExit:
    pass
"""
# The library alone, for torch takes seconds.
LOAD = """
import ctypes, importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib"
for path in folder.glob("libgomp*"):
    ctypes.CDLL(str(path))
"""
API = "from terdit_cli import load_model"
BUSY, QUIET = (
    f"from terdit_cli.system import openmp; openmp.others_compute = lambda: {busy}\n"
    for busy in (True, False)
)


def spins(code: str, **chosen: str) -> int:
    """Return how often a thread spins, as the library that torch brings along tells it."""
    known = {name: text for name, text in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=known | chosen | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if told is None:
        pytest.skip("this torch has another OpenMP than GNU's")
    return int(told[1])


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMMAND_LINE + LOAD, API], ids=["command line", "API"])
def test_the_library_that_torch_loads_knows_it(code: str) -> None:
    assert spins(BUSY + code) == openmp.SPINS
    assert spins(QUIET + code) == spins(LOAD) > openmp.SPINS


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"KMP_BLOCKTIME": "1"}]
)
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    assert spins(BUSY + COMMAND_LINE + LOAD, **chosen) == spins(LOAD, **chosen)


@pytest.mark.parametrize(("runnable", "busy"), [(1, False), (2, True), (40, True), (None, False)])
def test_others_are_seen(
    runnable: int | None, busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loadavg"
    if runnable is not None:
        path.write_text(f"0.52 0.58 0.59 {runnable}/612 14188\n")
    monkeypatch.setattr(openmp, "_LOADAVG", path)
    assert openmp.others_compute() is busy
