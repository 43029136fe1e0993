"""What the tests of the native library share: its instruction sets, and a fresh look for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from terdit_cli.runtime import cpu

WHY_NOT = cpu.available(torch.device("cpu"))
ISAS = [] if WHY_NOT else cpu.isas_usable()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERDIT_BACKEND", "TERDIT_THREADS", "TERDIT_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


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
