"""Medians, ratios, shares and the verdicts computed from them, on made-up times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from terdit_cli.lab.bench import results
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.results import (
    Figure,
    Goal,
    PeakRow,
    SampleRow,
    Spread,
    ratio,
    share_of_peak,
)

Make = dict[str, Callable[..., Any]]


def verdicts(result: Any) -> dict[str, Goal]:
    return {goal.text: goal for goal in goals(result)}


def test_median_of_odd_and_even_counts() -> None:
    assert Figure([3.0, 1.0, 9.0]).median == 3.0
    assert Figure([1.0, 2.0, 4.0, 100.0]).median == 3.0


def test_a_ratio_is_of_medians_and_its_spread_of_turns(make: Make) -> None:
    ours = make["gemm"]("terdit", [1.0, 2.0, 4.0])
    other = make["gemm"]("bf16", [4.0, 4.0, 10.0])
    assert ratio(ours, other) == Spread(4.0 / 2.0, 4.0 / 2.0, 4.0 / 1.0, best=4.0 / 1.0)
    assert ratio(ours, make["gemm"]("bf16", [])) is None


@pytest.mark.parametrize(
    ("arithmetic", "share"), [("int8", 0.25), ("int16", 0.5), ("bf16", 0.5), ("fp32", 1.0)]
)
def test_share_of_the_peak(arithmetic: str, share: float) -> None:
    peaks = {"int8": 400.0, "bf16": 200.0, "fp32": 100.0}
    assert share_of_peak(Figure([2.0]), 200.0, peaks, arithmetic) == share
    assert share_of_peak(Figure([2.0]), 200.0, {}, arithmetic) is None
    assert share_of_peak(Figure([]), 200.0, peaks, arithmetic) is None


def test_operations_and_images_a_second(make: Make) -> None:
    assert make["gemm"]("terdit", [1.0], shape=(2, 3, 5)).operations == 60
    # Two rows are one guided image: 20 steps of 0.1 s are 2 s.
    assert make["forward"]("terdit", [0.1]).images_per_second == pytest.approx(0.5)
    assert make["forward"]("terdit", [0.1], batch=8).images_per_second == pytest.approx(2.0)


def test_peaks_are_noted_once_and_whole() -> None:
    known: list[PeakRow] = []
    results.note_peaks(known, 2, "avx2", {"int8": 3.0, "bf16": 2.0, "fp32": 1.0})
    results.note_peaks(known, 2, "avx2", {"int8": 9.0, "bf16": 9.0, "fp32": 9.0})
    results.note_peaks(known, 1, "", {})
    assert known == [PeakRow(2, "avx2", 3.0, 2.0, 1.0)]


def test_the_worst_shape_and_the_best_rival_decide(make: Make) -> None:
    rows, errors = [], [3e-5, 6e-5, 9e-5, 1.2e-4]
    for index, shape in enumerate(results.GEMM_SHAPES):
        ours = 1.0 if index else 1.25
        rows += [
            make["gemm"]("terdit", [ours], shape=shape, share=0.95 / ours),
            make["gemm"]("terdit", [2.0], shape=shape, activations="int16", error=errors[index]),
            make["gemm"]("bf16", [3.0], shape=shape, activations="bf16"),
            make["gemm"]("int8-ao", [1.5], shape=shape),
            make["gemm"]("int8-mm", [1.4], shape=shape),
        ]  # fmt: skip
    found = verdicts(make["result"](gemm=rows))
    share = found["GEMM int8: share of the int8 peak"]
    assert share.found == pytest.approx((0.76,) * 4)
    assert share.met is False
    assert found["GEMM int8 against torch bf16"].found == pytest.approx((2.4,) * 4)
    assert found["GEMM int8 against torch bf16"].met is True
    best = found["GEMM int8 against the best torch int8"]
    assert best.found == pytest.approx((1.12,) * 4)
    assert best.met is False
    error = found["GEMM int16: relative error"]
    assert error.found == pytest.approx((1.2e-4,) * 4)
    assert error.met is False
    assert found["GEMM int8 against ggml TQ2_0"].met is None


def test_a_missing_shape_is_not_measured(make: Make) -> None:
    rows = [make["gemm"]("terdit", [1.0]), make["gemm"]("bf16", [3.0])]
    assert verdicts(make["result"](gemm=rows))["GEMM int8 against torch bf16"].found is None


def test_other_instruction_sets_have_goals_of_their_own(make: Make) -> None:
    rows = [
        make["gemm"]("terdit", [1.0], isa="avx2"),
        make["gemm"]("fp32-medium", [2.5, 2.5], isa="avx2", activations="fp32"),
        make["gemm"]("terdit", [9.0], isa="generic", activations="fp32", error=2e-6),
    ]
    found = verdicts(make["result"](gemm=rows))
    assert found['AVX2: GEMM int8 against torch fp32 "medium"'].found == (2.5, 2.5, 2.5, 2.5)
    assert found["generic C: relative error of fp32"].met is False
    assert found["GEMM int8 against torch bf16"].found is None


def test_goals_of_the_whole_network(make: Make) -> None:
    rows = [
        make["forward"]("terdit", [0.3, 0.2], share=0.9),
        make["forward"]("terdit", [0.5], threads=1),
        make["forward"]("bf16-compiled", [0.7, 0.7]),
        make["forward"]("int8-ao", [], why_not="needs 17 GB"),
        make["forward"]("int8-mm", [0.5, 0.5]),
        make["forward"]("terdit", [1.0], size=512),
        make["forward"]("bf16-compiled", [2.6], size=512),
    ]
    found = verdicts(make["result"](forward=rows))
    name = "forward 600m, 256 px"
    against = found[f"{name}: int8 against torch bf16 compiled"]
    assert against.found == pytest.approx((0.7 / 0.25, 0.7 / 0.3, 0.7 / 0.2, 0.7 / 0.2))
    assert against.met is True
    assert found[f"{name}: int8 against torch int8, the best"].found is not None
    assert found[f"{name}: int8 against torch fp32"].met is None
    share = found[f"{name}: int8, share of the peak"]
    assert share.found == pytest.approx((0.9, 0.9 * 0.25 / 0.3, 0.9 * 0.25 / 0.2, 0.9 * 0.25 / 0.2))
    # One thread takes 0.5 s for what two do in 0.25 s: exactly its part.
    assert found[f"{name}: int8 on one thread, of its part of the 2"].found is not None
    assert found[f"{name}: int8 on one thread, of its part of the 2"].found[0] == pytest.approx(1.0)
    change = found[f"{name} -> 512 px: change of the ratio to torch bf16 compiled"]
    assert change.found is not None
    assert change.found[0] == pytest.approx(2.6 / 2.8)
    assert change.met is False
    assert found[f"{name} -> 512 px: change of the ratio to torch int8"].met is None


def test_memory_goal_is_at_most(make: Make) -> None:
    rows = [
        SampleRow("t2", "cpu", "int8", 2, 20, 6.0, 479 << 20),
        SampleRow("t5", "cpu", "int8", 2, 20, 6.0, 481 << 20),
        SampleRow("t2", "reference", "fp32", 2, 2, 6.0, 900 << 20),
    ]
    found = verdicts(make["result"](sample=rows))
    assert found["`terdit sample`, t2: peak resident memory"].met is True
    assert found["`terdit sample`, t5: peak resident memory"].met is False


def test_whole_network_goals_are_for_600m_only(make: Make) -> None:
    rows = [make["forward"]("terdit", [0.3])]
    texts = verdicts(make["result"](model="4.2b", forward=rows))
    assert not any("forward" in text or "resident" in text for text in texts)
