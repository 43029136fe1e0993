"""Made-up results to judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.results import BenchResult, Figure, ForwardRow, GemmRow, Machine, PeakRow

MACHINE = Machine("Test CPU", 2, ["avx2"], 8 << 30, 0.1, "3.12", "2.13", "0.1", "2026-01-01")


def gemm_row(who: str, seconds: list[float], **fields: Any) -> GemmRow:
    """A row of the second published shape unless `fields` say otherwise."""
    m, k, n = fields.pop("shape", results.GEMM_SHAPES[1])
    values: dict[str, Any] = {
        "threads": 2, "isa": "avx512", "activations": "int8", "why_not": None,
        "granularity": "tensor", "error": 1e-3, "share": None, "m": m, "k": k, "n": n,
    }  # fmt: skip
    return GemmRow(who=who, figure=Figure(seconds), **(values | fields))


def forward_row(who: str, seconds: list[float], **fields: Any) -> ForwardRow:
    """A row of 600m at 256 pixels unless `fields` say otherwise."""
    values: dict[str, Any] = {
        "threads": 2, "isa": "avx512", "activations": "int8", "why_not": None, "size": 256,
        "batch": 2, "tokens": 256, "backend": "cpu", "operations": 4e11, "error": None,
        "share": None, "resident": 1 << 28, "peak_resident": 1 << 29,
    }  # fmt: skip
    return ForwardRow(who=who, figure=Figure(seconds), **(values | fields))


def bench_result(**fields: Any) -> BenchResult:
    """A result with peaks and nothing else unless `fields` say so."""
    values: dict[str, Any] = {
        "model": "600m", "command": "terdit bench", "seed": 0, "repeats": 3, "machine": MACHINE,
        "peaks": [PeakRow(2, "avx512", 2e12, 1e12, 5e11)], "gemm": [], "forward": [], "sample": [],
        "images": [],
    }  # fmt: skip
    return BenchResult(**(values | fields))


@pytest.fixture
def make() -> dict[str, Callable[..., Any]]:
    """Return the makers of rows and results by name."""
    return {"gemm": gemm_row, "forward": forward_row, "result": bench_result}
