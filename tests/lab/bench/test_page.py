"""The page says what was measured, where and how, in well-formed Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from terdit_cli.lab.bench.bench_page import page, tables
from terdit_cli.lab.bench.results import SampleRow

Make = dict[str, Callable[..., Any]]


def whole(make: Make) -> Any:
    return make["result"](
        command="terdit bench 600m --out 'a b.md'",
        gemm=[
            make["gemm"]("terdit", [0.003, 0.004, 0.005], share=0.93),
            make["gemm"]("bf16", [0.008, 0.008, 0.012], activations="bf16"),
            make["gemm"]("ggml", [0.024]),
            make["gemm"]("terdit", [0.01], isa="avx2"),
        ],
        forward=[
            make["forward"]("terdit", [0.25], share=0.8),
            make["forward"]("fp32", [], why_not="needs 17.0 GB of memory, 2.0 GB are free"),
        ],
        sample=[SampleRow("t2", "cpu", "int8", 2, 20, 6.0, 400 << 20),
                SampleRow("t2", "reference", "fp32", 2, 2, 7.0, 700 << 20)],
    )  # fmt: skip


def test_every_table_is_rectangular(make: Make) -> None:
    found = tables(whole(make))
    assert len(found) == 6  # goals, peaks, two matrix products, networks, processes
    for table in found:
        assert table.rows
        narrow = table.narrow()
        columns = zip(narrow.header, *narrow.rows, strict=True)
        widths = [
            max(len(line) for text in column for line in text.split("\n")) for column in columns
        ]
        assert sum(widths) + 2 * len(widths) - 2 <= 80
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
        lines = [line for line in table.markdown().splitlines() if "|" in line]
        assert {line.count("|") for line in lines} == {len(table.header) + 1}


def test_the_page_says_how_and_where(make: Make) -> None:
    text = page(whole(make))
    assert text.startswith("# terdit bench: 600m\n")
    assert "terdit bench 600m --out 'a b.md'" in text
    for fact in (
        "Test CPU, 2 cores",
        "avx2",
        "torch 2.13",
        "Python 3.12",
        "2026-01-01",
        "(seed 0)",
    ):
        assert fact in text
    assert text.isascii()


def test_cells_hold_median_spread_ratio_and_reason(make: Make) -> None:
    text = page(whole(make))
    # 2 * 512 * 1536 * 4096 operations in 4 ms are 1611 GOPS.
    assert re.search(r"\| terdit int8 \| 4\.000 \| 3\.000 \.\. 5\.000 \| 1611 \| 93% \|", text)
    assert re.search(r"\| torch bf16 \| 8\.000 .* \| 2\.00 \(2\.00 \.\. 2\.67\) \|", text)
    assert "| ggml TQ2_0 |" in text
    assert "not run: needs 17.0 GB of memory, 2.0 GB are free" in text
    assert "avx2 forced" in text
    assert "| t2 | cpu | int8 | 2 | 20 | 6.0 | 400 MiB |" in text
    assert "| t2 | reference | fp32 | 2 | 2 | 70.0 | 700 MiB |" in text


def test_the_roofline_in_words(make: Make) -> None:
    text = page(whole(make))
    assert "int8 has 4.0 times the peak of fp32 and 2.0 times that of bf16" in text
    assert "int8 93% to 93%" in text
    assert "takes 250 ms, of which the large matrices need 200 ms at the peak (80%)" in text
    assert "the other 50 ms" in text


def test_without_the_native_library_there_are_no_shares(make: Make) -> None:
    text = page(make["result"](peaks=[], gemm=[make["gemm"]("terdit", [0.1], isa="")]))
    assert "roofline" not in text.lower()
    assert "## Goals" not in text  # nothing of them was measured
