"""`terdit bench` from the command line: what it prints, writes and refuses."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.lab.bench import activation_error as bench_images
from terdit_cli.lab.bench import cpu_networks as network
from terdit_cli.lab.bench import gemm, results, settings, worker
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.runtime import cpu

Terdit = Callable[..., Any]
QUICK = ("--threads", 1)
FULL = (*QUICK, "--full")


class InProcess:
    """A worker in this process: a second torch would take longer than all the rest."""

    def __init__(self, threads: int, environment: dict[str, str] | None = None) -> None:
        self.worker = worker.Worker(threads)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def ask(self, task: str, **job: Any) -> dict[str, Any]:
        answer = self.worker.answer(task, **json.loads(json.dumps(job)))
        return json.loads(json.dumps(answer))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, no waiting, no processes."""
    shapes = ((3, 16, 20), (5, 100, 64), (16, 256, 68), (7, 130, 128))
    monkeypatch.setattr(results, "GEMM_SHAPES", shapes)
    monkeypatch.setattr(results, "SMALL_SHAPE", (2, 24, 96))
    monkeypatch.setattr(worker, "SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(settings, "REPEATS", 3)
    monkeypatch.setenv("TERDIT_BACKEND", "reference")
    for module in (gemm, network):
        monkeypatch.setattr(module, "Process", InProcess)
    for module in (network, worker):
        monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)


def test_matrix_products_as_json(terdit: Terdit) -> None:
    done = terdit("bench", "nano", "--what", "gemm", "--rivals", "bf16,unpack", "--json", *FULL)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["model"] == "nano"
    assert found["command"].startswith("terdit bench nano --what gemm")
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["forward"] == found["sample"] == []
    # Five shapes; four activations, one group scale, two rivals.
    assert len(found["gemm"]) == 5 * 7
    for row in found["gemm"]:
        samples = sorted(row["figure"]["samples"])
        assert len(samples) == 3
        assert row["ms"] == pytest.approx(1e3 * samples[1])
        assert (row["ms_min"], row["ms_max"]) == pytest.approx((1e3 * samples[0], 1e3 * samples[2]))
        operations = 2 * row["m"] * row["k"] * row["n"]
        assert row["gops"] == pytest.approx(operations / samples[1] / 1e9)
        assert row["error"] is not None
    errors = {(row["who"], row["activations"]): row["error"] for row in found["gemm"][:7]}
    assert errors["terdit", "fp32"] < 1e-6 < errors["terdit", "int16"] < errors["terdit", "int8"]
    met = {goal["text"]: goal["met"] for goal in found["goals"]}
    assert met["GEMM int16: relative error"] is True
    assert met["GEMM int8 against ggml TQ2_0"] is None


@pytest.mark.slow
def test_networks_on_a_page(terdit: Terdit, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "bench.md"
    done = terdit(
        "bench", "nano", "--size", "32,48", "--images", 2, "--rivals",
        "fp32,unpack", "--activations", "int8,fp32", "--out", page, *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    text = page.read_text()
    assert "| terdit int8 | 4 x 4 | 1 | reference | " in text
    assert "| terdit fp32 | 4 x 4 | 1 | reference | " in text
    assert "| terdit int8 | 4 x 9 | 1 | reference | " in text  # further sizes: the first only
    assert "| terdit fp32 | 4 x 9 |" not in text
    assert "| upstream: unpack, fp32 | 4 x 4 | 1 | torch | " in text
    exact = re.search(r"\| terdit fp32 \| 4 x 4 .* (\S+) \|\n", text)
    rounded = re.search(r"\| terdit int8 \| 4 x 4 .* (\S+) \|\n", text)
    assert exact is not None
    assert rounded is not None
    assert float(exact[1]) < 1e-5 < float(rounded[1])
    assert "The whole network" in done.out
    assert "MiB" in done.out
    assert list(page.parent.iterdir()) == [page]


def test_a_model_file_is_measured_as_it_is(terdit: Terdit, small_tdt: Path) -> None:
    done = terdit(
        "bench", small_tdt, "--rivals", "none", "--activations", "fp32",
        "--json", *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["forward"]
    assert row["tokens"] == 16
    assert row["resident"] > 0
    assert row["images_per_second"] == pytest.approx(1e3 / (20 * row["ms"]))


def test_what_does_not_fit_in_memory_is_not_run(
    terdit: Terdit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "available_bytes", lambda: 700_000_000)
    words = ("--size", 32, "--activations", "fp32", "--rivals", "fp32")
    done = terdit("bench", "nano", *words, "--json", *QUICK)
    assert done.code == 0, done.err
    ours, rival = json.loads(done.out)["forward"]
    assert ours["why_not"] is None
    assert rival["why_not"] == "needs 0.4 GB of memory, 0.3 GB are free"
    assert rival["figure"]["samples"] == []
    assert "ms" not in rival


@pytest.mark.slow
def test_whole_processes(terdit: Terdit) -> None:
    words = ("--activations", "fp32", "--rivals", "none", "--size", 32)
    done = terdit("bench", "nano", *words, "--json", *FULL)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["sample"]
    assert [(row["codec"], row["backend"], row["steps"]) for row in rows] == [
        ("t2", "reference", 20),
        ("t5", "reference", 20),
    ]
    assert all(row["seconds"] > 0 and row["peak_resident"] > 50 << 20 for row in rows)


def test_shares_of_measured_peaks(terdit: Terdit, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.available(torch.device("cpu")) is not None:
        pytest.skip("no native library")
    monkeypatch.setattr(worker, "PEAK_SECONDS", 0.001)
    monkeypatch.delenv("TERDIT_ISA", raising=False)
    words = ("--what", "gemm", "--activations", "int8,fp32", "--rivals", "fp32", "--json")
    monkeypatch.setenv("TERDIT_BACKEND", "cpu")
    done = terdit("bench", "nano", *words, "--threads", 1)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {"int8", "bf16", "fp32"} < set(found["peaks"][0])
    assert found["peaks"][0]["isa"] == cpu.isa()
    for row in found["gemm"]:  # what a share is: tests/lab/bench/test_goals.py
        assert row["isa"] == cpu.isa()
        assert row["share"] is None or row["share"] >= 0
    assert any(row["share"] for row in found["gemm"]) == (cpu.isa() != "generic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "gem"], "wrong --what: got 'gem' (did you mean 'gemm'?)"),
        (["--activations", "int8,int4"], "wrong --activations: got 'int4'"),
        (["--rivals", "bf61"], "wrong --rivals: got 'bf61' (did you mean 'bf16'?)"),
        (["--threads", "0"], "wrong --threads: got 0, expected 1 to"),
        (["--threads", "two"], "wrong --threads: got 'two', expected numbers"),
        (["--threads", "100000"], "wrong --threads: got 100000"),
        (["--images", "0"], "wrong --images: got 0"),
        (["--device", "cuda", "--what", "gemm"], "on a GPU whole networks are measured"),
        (["--what", "limits", "--rivals", "bf16"], "--rivals would have no effect here"),
        (["--what", "gemm", "--size", "256"], "--size would have no effect here"),
        (["--images", "1,8"], "on a CPU one model runs at one batch"),
        (["--what", "forward"], "--what forward has another spelling. Fix: --what network"),
        (["optim.lr=1"], "only a recipe has keys to override: got optim.lr=1"),
        (["--size", "100"], "wrong --size: got 100, expected a multiple of 16"),
        (["--size", "-16"], "wrong --size: got '-16'"),
        (["--size", "99999"], "wrong --size: got 99999, expected 16 to 1024"),
        (["--out", "page.html"], "unknown kind of page: got .html, expected .md (page.html)"),
    ],
)
def test_wrong_options(terdit: Terdit, words: list[str], message: str) -> None:
    done = terdit("bench", "nano", *words)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


def test_wrong_models(terdit: Terdit, tmp_path: Path, small_tdt: Path) -> None:
    missing = tmp_path / "none.tdt"
    done = terdit("bench", missing)
    assert (done.code, done.out) == (3, "")
    assert f"no such model: got '{missing}'" in done.err
    done = terdit("bench", small_tdt, "--size", "256")
    assert done.code == 2
    assert f"a model file has its own image size: got --size for {small_tdt}" in done.err
    done = terdit("bench", "660m", "--size", "256")
    assert done.code == 2
    assert "did you mean '600m'?" in done.err


def test_a_model_trained_with_int8_runs_as_trained(terdit: Terdit, tmp_path: Path) -> None:
    model, path = RandomModel("nano", input_size=4, seed=0), tmp_path / "int8.tdt"
    object.__setattr__(model.info.ternary, "activations", "int8")
    write_tdt(model, path, "t2", "fp32")
    done = terdit("bench", path, "--rivals", "none", "--json", *QUICK)
    assert done.code == 0, done.err
    assert [row["activations"] for row in json.loads(done.out)["forward"]] == ["int8"]
    done = terdit("bench", path, "--activations", "fp32", *QUICK)
    assert done.code == 2
    assert "trained with int8 activations" in done.err


def test_a_wrong_ggml(terdit: Terdit, tmp_path: Path) -> None:
    library = tmp_path / "libggml-cpu.so"
    done = terdit("bench", "nano", "--rivals", f"none,{library}")
    assert (done.code, done.out) == (4, "")
    assert f"({library}). Fix: build ggml" in done.err


@pytest.mark.slow
@pytest.mark.skipif(cpu.available(torch.device("cpu")) is not None, reason="no native library")
def test_images_of_other_activations(
    terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_images, "IMAGES", 3)
    monkeypatch.setattr(bench_images, "SAMPLER", SamplerConfig("dpmpp-2m", 2, cfg_scale=2.0))
    model = tmp_path / "m.tdt"
    write_tdt(RandomModel("nano", 8, 0), model, "t2", "fp32")
    page = tmp_path / "page.md"
    monkeypatch.delenv("TERDIT_BACKEND")
    done = terdit("bench", model, "--what", "images", "--json", *FULL, "-o", page)
    assert done.code == 0, done.err
    rows = {row["activations"]: row for row in json.loads(done.out)["images"]}
    assert set(rows) == {"int8", "int16", "bf16"}
    for row in rows.values():
        assert row["images"] == 3
        assert row["worst_psnr"] is None or row["worst_psnr"] <= row["psnr"]
        assert 0 <= row["equal"] <= 1
    assert rows["int16"]["equal"] >= rows["int8"]["equal"]
    assert "Images beside those of fp32" in page.read_text()


def test_images_of_random_weights_say_nothing(terdit: Terdit) -> None:
    done = terdit("bench", "nano", "--what", "images")
    assert done.code == 2
    assert "images are compared of trained models" in done.err
    assert "terdit bench model.tdt --what images" in done.err


@pytest.mark.slow
def test_training_steps(
    terdit: Terdit, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of both networks, eager and compiled; the baseline has no ternary weight."""
    words = ("model.n_layers=1", "train.global_batch_size=4", "train.micro_batch_size=4")
    monkeypatch.setattr(settings, "REPEATS", 2)
    # Graphs are as users have them; C++ of each takes ten seconds.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    done = terdit("bench", small_recipe, *words, "--json", *FULL)
    values = json.loads(done.out)
    eager, compiled = values["training"]
    assert (eager["compiled"], compiled["compiled"]) == (False, True)
    for row in (eager, compiled):
        assert (row["images"], row["parameters"]) == (4, 36_618)
        assert len(row["ternary"]["samples"]) == len(row["full"]["samples"]) == 2
        assert all(seconds > 0 for seconds in row["ternary"]["samples"])
    assert [goal["met"] is None for goal in values["goals"]] == [False]


def test_a_recipe_has_training_steps_only(terdit: Terdit, small_recipe: Path) -> None:
    done = terdit("bench", small_recipe, "--what", "gemm")
    assert done.code == 2
    assert f"--what is for models: got --what gemm of {small_recipe}" in done.err


def test_a_packaged_model_by_its_name_with_all_rivals(terdit: Terdit) -> None:
    """Its embedding of positions is in no file: it once kept the bfloat16 rivals from running."""
    rivals = "bf16,int8-ao,unpack,fp32"
    done = terdit("bench", "fashion-mnist", "--rivals", rivals, "--json", *QUICK)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["forward"]
    assert [row["who"] for row in rows] == ["terdit", *rivals.split(",")]
    for row in rows:
        assert row["why_not"] is None
        assert row["error"] < 0.1


def test_a_first_look_fits_a_terminal(terdit: Terdit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "available_bytes", lambda: 700_000_000)
    done = terdit("bench", "nano", "--size", 32, "--rivals", "fp32,bf16", *QUICK)
    assert done.code == 0, done.err
    assert "torch bf16, 2 x 4, not run: needs 0.4 GB" in done.out
    for line in done.out.splitlines():
        assert len(line.rstrip()) <= 80 or "not run" in line
