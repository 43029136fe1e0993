"""What the tests of the native library and of the GPU kernels share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from terdit_cli.runtime import cpu
from terdit_cli.runtime.gpu import backend as gpu


def _why_no_kernels() -> str | None:
    """Return why the GPU kernels cannot be tested here, or None.

    Where there is no GPU they run in Triton's interpreter (`tests/conftest.py`).
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return gpu.available(torch.device("cuda"))
    return None if gpu.kernels().INTERPRETED else "Triton was imported without its interpreter"


WHY_NO_KERNELS = _why_no_kernels()

WHY_NOT = cpu.available(torch.device("cpu"))
ISAS = [] if WHY_NOT else cpu.isas_usable()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERDIT_BACKEND", "TERDIT_THREADS", "TERDIT_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(
    scope="session",
    params=[pytest.param("gpu", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"],
)
def kernels_on() -> torch.device:
    """The device that the GPU kernels run on: a GPU, else the CPU in Triton's interpreter."""
    if WHY_NO_KERNELS is not None:
        pytest.skip(WHY_NO_KERNELS)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def native() -> None:
    """Skip where there is no native library."""
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)


@pytest.fixture(params=ISAS or ["any"])
def isa(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Each instruction set that this CPU can run, in use during the test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def reopened(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch for the environment: the library is opened anew in the test and after it."""
    cpu._open.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    cpu._open.cache_clear()
    if WHY_NOT is None:
        cpu.set_isa("auto")
