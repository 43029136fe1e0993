"""The benchmark on a GPU, without one: its counts by hand, its page, and its code run in Triton's
interpreter on a small network with a stopwatch that counts calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.lab.bench import cuda_networks as bench
from terdit_cli.lab.bench import run_bench
from terdit_cli.lab.bench.bench_page import page
from terdit_cli.lab.bench.cuda_networks import GpuBench, Plan
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.results import AdalnRow, BenchResult, Figure, GpuPeaks, GpuRow
from terdit_cli.lab.bench.roofline import Product, analyse, bound, products
from terdit_cli.model.dit import DiTConfig, build_config
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import tiles as gpu_config
from terdit_cli.system.gpus import GPUS, Gpu

Make = dict[str, Callable[..., Any]]
CHIP = Gpu("a chip", memory=1, bf16=100.0, int8=200.0, fp8=None, bandwidth=10.0)
NO_GPU = not torch.cuda.is_available()


# Counting


def test_bytes_and_operations_by_hand() -> None:
    product = Product("w", m=4, n=8, k=16, count=2, outputs=8)
    assert product.operations == 2 * 4 * 8 * 16
    # Codes of 2 bits: 8 x 16 / 4; activations 4 x 16; results 4 x 8 in bfloat16.
    assert product.bytes("int8", 2) == 32 + 64 + 64
    assert product.bytes("bf16", 16) == 256 + 128 + 64


def test_the_slower_of_arithmetic_and_memory_is_the_limit() -> None:
    wide, narrow = Product("w", 64, 64, 64, 1, 64), Product("n", 1, 64, 64, 1, 64)
    assert bound(wide, CHIP, "int8").limit == "operations"
    assert bound(wide, CHIP, "int8").seconds == 2 * 64**3 / 200
    assert bound(narrow, CHIP, "bf16", 16).limit == "bytes"
    assert bound(narrow, CHIP, "bf16", 16).seconds == (2 * 64 * 64 + 2 * 64 + 2 * 64) / 10
    with pytest.raises(UsageError, match="no fp8"):
        bound(wide, CHIP, "fp8")


def test_products_have_all_weights_of_a_published_model() -> None:
    config = build_config("600m", input_size=32, qk_norm=True)
    weights = sum(each.n * each.k * each.count for each in products(config, 1))
    assert weights == 16 * (4 * 1536**2 + 3 * 1536 * 4096 + 9216 * 1024)


def test_grouped_heads_have_narrower_keys_and_values() -> None:
    config = DiTConfig(input_size=4, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=8)
    first = products(config, 2)[0]
    assert (first.m, first.n, first.k, first.count) == (4 * 4, 32 + 2 * 16, 32, 3)


def test_the_last_row_is_the_sum() -> None:
    *rows, total = analyse(build_config("nano", input_size=8), GPUS["h100"], 1, "nano", 64)
    assert total.operations == sum(row.operations for row in rows)
    assert total.ternary.seconds == pytest.approx(sum(row.ternary.seconds for row in rows))
    assert all(row.at_most >= 1 for row in rows)


# Goals and pages


def row(who: str, activations: str, seconds: float, model: str = "600m", images: int = 8) -> GpuRow:
    return GpuRow(
        model=model, size=256, images=images, who=who, activations=activations,
        figure=Figure([seconds, 1.1 * seconds]), why_not=None, operations=1e12, share=0.5,
        weight_bytes=10**9, peak_bytes=2 * 10**9, error=0.01,
    )  # fmt: skip


def findings(make: Make, least_share: float = 0.85, **more: Any) -> BenchResult:
    values = {
        "peaks": [],
        "gpu_peaks": [GpuPeaks("a device", 1e15, 2e15, None, 3e12)],
        "gpu": [
            row("terdit", "int8", 1.0), row("terdit", "bf16", 2.0),
            row("bf16-compiled", "bf16", 1.6), row("unpack", "fp32", 7.0),
            row("terdit", "int8", 0.3, "4.2b", 1),
        ],
        "adaln": [
            AdalnRow("600m", "int8", Figure([1e-5]), 38_000_000, 0.9),
            AdalnRow("4.2b", "int8", Figure([4e-5]), 150_000_000, least_share),
        ],
        "roofline": analyse(build_config("nano", input_size=8), GPUS["h100"], 1, "nano", 64),
    }  # fmt: skip
    return make["result"](**values | more)


def test_goals_are_met_missed_or_not_measured(make: Make) -> None:
    verdicts = [goal.met for goal in goals(findings(make))]
    assert verdicts == [True, False, False, None, None, None, True, True]
    assert [goal.met for goal in goals(findings(make, 0.5))] == [*verdicts[:-1], False]
    first = goals(findings(make))[0].found
    assert first is not None
    assert first[0] == pytest.approx(1.6)
    assert {goal.met for goal in goals(findings(make, gpu=[], adaln=[]))} == {None}


def test_the_page_says_what_was_measured_and_what_was_not(make: Make) -> None:
    text = page(findings(make))
    assert "| 600m | 256 px | 8 | terdit int8 | 1050.000 | 1000.000 .. 1100.000 | 50% |" in text
    assert "| a device | 1000 | 2000 | none | 3.00 |" in text
    assert text.count("| yes |") == 3
    without = page(findings(make, gpu=[], adaln=[], gpu_peaks=[]))
    assert "Goals" not in without
    assert "Whole networks" not in without
    assert "Limits on H100 SXM" in without


# The command


def limits(subject: str = "600m", **words: Any) -> BenchResult:
    given = {"full": False, "size": "", "images": "", "device": "", "output": None} | words
    output = given.pop("output")
    options = run_bench.parse(
        [subject], "limits", threads="", activations="", others="", command="", **given
    )
    return run_bench.run(options, output)


def test_counting_needs_no_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    found = limits(size="256", images="1,8", device="a100", output=path)
    assert "A100 SXM 80 GB" in path.read_text()
    assert json.loads(json.dumps(run_bench.as_json(found)))["roofline"][0]["product"] == "wq wk wv"


def test_compiled_kernels_are_a_table(make: Make) -> None:
    kernel = {
        "sm": 90, "kernel": "int8-plain", "tile": "128x256x64 w8 s3", "registers": 200,
        "shared": 100_000, "spills": 0, "tensor_cores": ["wgmma"],
    }  # fmt: skip
    text = page(findings(make, kernels=[kernel]))
    assert "| sm_90 | int8-plain | 128x256x64 w8 s3 | 200 | 100.0 kB | 0 | wgmma |" in text


def test_compiling_needs_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "kernels", lambda: SimpleNamespace(INTERPRETED=True))
    with pytest.raises(EnvironmentProblem, match="unset TRITON_INTERPRET"):
        limits("nano", full=True)


def test_a_tile_that_does_not_fit_is_one_that_cannot_run() -> None:
    """Triton's errors are no RuntimeErrors."""
    errors = pytest.importorskip("triton.runtime.errors")
    contender = bench._Contender("terdit", "int8")
    with contender.trying():
        raise errors.OutOfResources(300_000, 232_448, "shared memory")
    assert "shared memory" in str(contender.why_not)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_measuring_without_a_gpu_is_refused() -> None:
    options = run_bench.parse(["nano"], "network", False, "", "", "cuda", "", "", "", "")
    with pytest.raises(EnvironmentProblem, match="no GPU to measure"):
        run_bench.run(options)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"subject": "600n"}, "did you mean '600m'"),
        ({"size": "100"}, "a multiple of 16"),
        ({"images": "0"}, "1 to 128"),
        ({"device": "h101"}, "one of b200, h200, h100"),
        ({"output": Path("gpu.txt")}, "expected .md"),
    ],
)
def test_wrong_words(words: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        limits(**words)


# Measuring, in the interpreter


class Counter:
    """Runs what it times, and says the same each time."""

    calls = 0

    def seconds(self, run: Callable[[], object]) -> float:
        Counter.calls += 1
        run()
        return 0.25

    def extra_bytes(self, run: Callable[[], object]) -> int | None:
        run()
        return None


@pytest.mark.slow
@pytest.mark.skipif(not NO_GPU, reason="the interpreter is for machines without a GPU")
def test_everything_is_measured_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    if not gpu.kernels().INTERPRETED:
        pytest.skip("Triton was imported without its interpreter")
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(bench, "PRECISIONS", ("int8",))
    monkeypatch.setattr(bench, "WARM_UP", 1)
    some, chosen = gpu_config.candidates, []

    def last_two(*arguments: Any) -> list[gpu_config.Tile]:  # the small ones
        chosen.append(arguments)
        return some(*arguments)[-2:]

    monkeypatch.setattr(gpu_config, "candidates", last_two)
    plan = Plan(
        ("nano",), (16, 32), (1,), repeats=2, rivals=("bf16", "unpack"), peak_side=32, copy_bytes=64
    )
    found = GpuBench(plan, torch.device("cpu"), Counter(), "an interpreter").measure()
    assert [(each.size, each.who) for each in found["gpu"]] == [
        (16, "terdit"), (16, "bf16"), (16, "unpack"), (32, "terdit"), (32, "bf16"),
    ]  # fmt: skip
    for each in found["gpu"]:
        assert each.why_not is None
        assert each.figure.samples == [0.25, 0.25]
    ours, bf16, exact = (each.error for each in found["gpu"][:3])
    assert exact == 0.0
    assert ours is not None
    assert bf16 is not None
    assert 0 < ours < 0.1
    assert 0 < bf16 < 0.1
    assert chosen
    assert found["gpu_peaks"][0].bf16 == 2 * 32**3 / 0.25
    assert found["adaln"][0].packed_bytes == gpu.weight_shape(4 * 6 * 64, 64)[1] * 4 * 6 * 64
    tuned = json.loads((tmp_path / gpu_config.GPU_CACHE).read_text())
    assert {key.split("-")[1] for tiles in tuned.values() for key in tiles} == {
        "plain", "gated", "swiglu"
    }  # fmt: skip


def test_what_takes_too_long_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PRECISIONS", ())
    plan = Plan(("nano",), (32,), (1,), repeats=1, most_seconds=-1, peak_side=32, copy_bytes=64)
    found = GpuBench(plan, torch.device("cpu"), Counter(), "an interpreter").measure()["gpu"]
    reasons = {each.who: each.why_not for each in found}
    assert reasons["bf16"] == reasons["unpack"] == "out of time"
    assert reasons["bf16-compiled"] == "not compiled for this batch"
    assert all(not each.figure.samples for each in found)
