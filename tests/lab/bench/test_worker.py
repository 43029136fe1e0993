"""The two ends of a benchmark process."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from terdit_cli.errors import TerditError
from terdit_cli.lab.bench import rivals, worker
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.worker import Process, Worker, resident_bytes
from terdit_cli.model.layout import block_weights, forward_operations
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.tdt import write_tdt


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "nano.tdt"
    write_tdt(RandomModel("nano", input_size=4, seed=3), path, "t2", "fp32")
    return path


def load(one: Worker, who: str, path: Path, input_size: int = 4) -> dict[str, object]:
    return one.answer(
        "load", who=who, model=str(path), input_size=input_size, batch=2, backend="reference",
        activations="fp32", seed=0,
    )  # fmt: skip


def test_a_random_model_is_whole_and_repeatable(nano: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tdt"
    write_tdt(RandomModel("nano", input_size=4, seed=3), again, "t2", "fp32")
    assert again.read_bytes() == nano.read_bytes()
    other = RandomModel("nano", input_size=4, seed=4)
    model = RandomModel("nano", input_size=4, seed=3)
    name = model.ternary_names()[0]
    assert not torch.equal(model.trits(name), other.trits(name))
    assert set(model.trits(name).unique().tolist()) == {-1, 0, 1}


def test_work_is_counted_from_the_matrices() -> None:
    model = RandomModel("nano", input_size=4, seed=0)
    tokens = model.info.config.tokens
    expected = 0.0
    for name in model.ternary_names():
        n, k = model.matrix_shape(name)
        rows = 3 if "adaLN" in name else 3 * tokens
        expected += 2.0 * rows * k * n
    assert forward_operations(model.info.config, batch=3) == expected
    assert model.info.config.n_layers * sum(block_weights(model.info.config)) == count_weights(
        model
    )


def test_networks_run_at_another_resolution_and_agree(nano: Path, tmp_path: Path) -> None:
    outputs = []
    for who in ("terdit", "fp32"):
        one = Worker(threads=1)
        assert "backend" in load(one, who, nano, input_size=8)
        assert one.answer("run")["seconds"] > 0
        memory = one.answer("finish", output=str(tmp_path / "y.npy"))
        assert 0 < memory["resident"] <= memory["peak_resident"]
        outputs.append(np.load(tmp_path / "y.npy"))
    assert outputs[0].shape == (2, 6, 8, 8)
    # The same float32 products by the same library, summed alike: 64 values, 4 blocks.
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_gemm_answers_for_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SETTLE_SECONDS", 0.0)

    def broken(*arguments: object) -> torch.nn.Module:
        raise RuntimeError("no such kernel\non this machine")

    monkeypatch.setitem(rivals.RIVALS, "bf16", rivals.Rival("torch bf16", "bf16", broken, 2))
    ways = [
        ("terdit", "fp32", "tensor"), ("terdit", "int8", "group128"), ("unpack", "fp32", "tensor"),
        ("bf16", "bf16", "tensor"),
    ]  # fmt: skip
    answer = Worker(threads=1).answer(
        "gemm", shape=(5, 130, 68), ways=ways, backend="reference", repeats=3, seed=0, ggml=""
    )
    rows = {row["who"] + row["granularity"]: row for row in answer["rows"]}
    broken_row = rows.pop("bf16tensor")
    assert set(rows) == {"terdittensor", "terditgroup128", "unpacktensor"}
    assert all(len(row["samples"]) == 3 for row in rows.values())
    assert all(min(row["samples"]) > 0 for row in rows.values())
    assert rows["terdittensor"]["error"] < 1e-6
    assert 1e-4 < rows["terditgroup128"]["error"] < 0.02
    assert broken_row["why_not"] == "RuntimeError: no such kernel"
    assert broken_row["samples"] == []


def test_a_rival_that_cannot_load_says_why(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> torch.nn.Module:
        raise MemoryError

    monkeypatch.setitem(rivals.RIVALS, "fp32", rivals.Rival("torch fp32", "fp32", broken, 4))
    assert load(Worker(1), "fp32", nano) == {"why_not": "MemoryError: no message"}


def test_serve_passes_errors_with_their_exit_code(tmp_path: Path) -> None:
    job = {
        "task": "load", "who": "terdit", "model": str(tmp_path / "none.tdt"), "input_size": 4,
        "batch": 2, "backend": "reference", "activations": "fp32", "seed": 0,
    }  # fmt: skip
    out = io.StringIO()
    worker.serve(io.StringIO(json.dumps(job) + "\n"), out, Worker(1))
    answer = json.loads(out.getvalue())
    assert answer["exit_code"] == 3
    assert "none.tdt" in answer["error"]


@pytest.mark.slow
def test_a_process_answers_fails_and_dies(tmp_path: Path) -> None:
    with Process(threads=1) as process:
        assert set(process.ask("peak", what="int8")) == {"peak", "isa"}
        with pytest.raises(TerditError, match=r"none\.tdt") as caught:
            process.ask(
                "load", who="terdit", model=str(tmp_path / "none.tdt"), input_size=4, batch=2,
                backend="reference", activations="fp32", seed=0,
            )  # fmt: skip
        assert caught.value.exit_code == 3
        answer = process.ask("no such task")
        assert answer == {"why_not": "its process ended with 1: KeyError: 'no such task'"}
        assert process.ask("run") == answer


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the system does not say")
def test_memory_of_this_and_of_no_process() -> None:
    resident, peak = resident_bytes(str(os.getpid()))
    assert resident is not None
    assert peak is not None
    assert 10 << 20 < resident <= peak
    assert resident_bytes("no such process") == (None, None)
