"""The section on metrics: what others compute of the same features, costs, goals, tables."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.lab.bench import metrics_bench as metrics
from terdit_cli.lab.bench.bench_page import page, tables
from terdit_cli.lab.bench.goals import goals
from terdit_cli.lab.bench.results import AgreementRow, Figure, ScoreRow
from terdit_cli.lab.bench.settings import Options
from terdit_cli.lab.bench.worker import Worker, serve

Make = dict[str, Callable[..., Any]]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:cleanfid.fid"),
    pytest.mark.filterwarnings("ignore:Matrix is singular"),
]
GOLDEN = Path(__file__).parents[2] / "golden" / "metrics.json"
SCORES = ("statistics", "distance", "precision, recall", "KID")


class FakeProcess:
    """A process whose scores are known."""

    asked: list[dict[str, Any]]
    broken = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def ask(self, task: str, **job: Any) -> dict[str, Any]:
        assert task == "score"
        self.asked.append(job)
        if self.broken:
            return {"why_not": "its process was ended by SIGKILL (out of memory?)"}
        theirs = [8.0, 9.0] if job["name"] == "distance" else []
        return {
            "seconds": [3.0, 1.0, 1.0] if theirs else [2.0],
            "clean_fid_seconds": theirs,
            "difference": 2e-9 if theirs else None,
            "resident": 100 << 20,
            "peak_resident": 350 << 20,
        }

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    monkeypatch.setattr(metrics, "Process", FakeProcess)
    monkeypatch.setattr(FakeProcess, "asked", [], raising=False)
    monkeypatch.setattr(FakeProcess, "broken", False)
    return FakeProcess


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_timed_and_checked(name: str) -> None:
    found = metrics.score(name, n=1200, dim=8, seed=0, runs=2)
    assert all(seconds > 0 for seconds in found["seconds"])
    if name == "distance" and metrics.clean_fid_distance():
        assert len(found["clean_fid_seconds"]) == 2
        assert len(found["seconds"]) == 3
        assert found["difference"] < 1e-9
    elif name != "distance":
        assert found["clean_fid_seconds"] == []
        assert found["difference"] is None
    if found["resident"] is not None:
        assert found["peak_resident"] >= found["resident"] - (1 << 20)
    json.dumps(found)


def test_features_are_those_of_seed_and_side() -> None:
    first, again = (np.concatenate(list(metrics._batches(1500, 6, 3, 0))) for _ in range(2))
    assert first.shape == (1500, 6)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert (first >= 0).all()
    assert (first.std(axis=0) > 0).all()
    other = np.concatenate(list(metrics._batches(1500, 6, 3, 1)))
    assert not np.array_equal(first, other)


def test_a_worker_answers_the_task() -> None:
    job = {"task": "score", "name": "KID", "n": 40, "dim": 3, "seed": 0, "runs": 1}
    out = io.StringIO()
    serve(io.StringIO(json.dumps(job) + "\n"), out, Worker(1))
    assert json.loads(out.getvalue())["seconds"]


@pytest.mark.slow
def test_every_recorded_value_is_met(process: type[FakeProcess], tmp_path: Path) -> None:
    cases = json.loads(GOLDEN.read_text())
    for settings in cases["kid"].values():
        settings.pop("seed0_subsets100_max1000")  # seconds each
    recorded = tmp_path / "metrics.json"
    recorded.write_text(json.dumps(cases))
    recorded.with_suffix(".npz").write_bytes(GOLDEN.with_suffix(".npz").read_bytes())
    options = Options(subject=str(recorded), threads=(1,), full=True)
    agreement, scores = metrics.measure(options).values()
    assert {row.metric for row in agreement} == {"FID", "KID", "precision", "recall", "IS"}
    assert len(agreement) == 2 + 2 + 8 + 4
    for row in agreement:
        assert row.recorded is not None
        assert row.ours == pytest.approx(row.recorded, rel=1e-9, abs=1e-15)
        if importlib.util.find_spec("torch_fidelity"):
            # Its precision and recall are float32 averages.
            assert row.torch_fidelity == pytest.approx(row.ours, rel=1e-7, abs=1e-12)
        if metrics.clean_fid_distance() and row.metric in ("FID", "KID"):
            assert row.clean_fid == pytest.approx(row.ours, rel=1e-9, abs=1e-12)
    assert [row.name for row in scores] == list(SCORES)
    assert [job["n"] for job in process.asked] == [50_000, 50_000, 10_000, 50_000]
    assert {job["runs"] for job in process.asked} == {3}


def test_without_a_recording_the_witnesses_are_left(process: type[FakeProcess]) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must not move
    agreement = metrics.measure(Options(subject="metrics"))["agreement"]
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert {row.metric for row in agreement} == {"FID", "KID", "precision", "recall", "IS"}
    for row in agreement:
        assert row.recorded is None
        if importlib.util.find_spec("torch_fidelity"):
            # d256 has fewer samples than features: others take roots of rounding errors.
            assert row.torch_fidelity == pytest.approx(row.ours, rel=1e-6, abs=1e-5)


def test_what_is_not_installed_is_left_out(
    process: type[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "witness", lambda name: None)
    agreement = metrics.measure(Options(subject="metrics"))["agreement"]
    assert agreement
    assert all(row.clean_fid is None and row.torch_fidelity is None for row in agreement)
    assert metrics.score("distance", 50, 4, 0, 3)["clean_fid_seconds"] == []


def test_a_process_that_fails_is_named(process: type[FakeProcess]) -> None:
    process.broken = True
    with pytest.raises(EnvironmentProblem, match="SIGKILL"):
        metrics.measure(Options(subject="metrics", full=True))


@pytest.mark.parametrize("damage", ["missing", "no npz", "no array", "no metric", "kid", "pickle"])
def test_a_recording_that_cannot_be_read_is_named(
    damage: str, tmp_path: Path, process: type[FakeProcess]
) -> None:
    path = tmp_path / "odd.json"
    cases: dict[str, Any] = {
        "fid": {"a": {}}, "kid": {}, "precision_recall": {}, "inception_score": {},
    }  # fmt: skip
    arrays: dict[str, Any] = {"a.real": np.eye(4), "a.fake": np.eye(4)}
    if damage == "no array":
        del arrays["a.fake"]
    if damage == "no metric":
        del cases["kid"]
    if damage == "kid":
        cases["kid"] = {"a": {"seed": 1}}
    if damage == "pickle":
        arrays["a.fake"] = np.array([{}], dtype=object)
    if damage != "missing":
        path.write_text(json.dumps(cases))
    if damage != "no npz":
        np.savez(path.with_suffix(".npz"), **arrays)
    with pytest.raises(InputFileError, match="unknown KID case" if damage == "kid" else "odd.json"):
        metrics.measure(Options(subject=str(path)))


def test_metrics_are_no_model() -> None:
    with pytest.raises(UsageError, match=r"--what gemm of a.json.*leave --what out"):
        Options(subject="a.json", what="gemm")


def rows() -> dict[str, Any]:
    return {
        "model": "metrics",
        "command": "terdit bench --what metrics",
        "peaks": [],
        "agreement": [
            AgreementRow("FID", "d64", 0.5, 0.5 + 1e-12, 0.5, None),
            AgreementRow("KID", "d64", 0.25, 0.25, None, 0.25),
        ],
        "scores": [
            ScoreRow("distance", 50_000, 2048, 1, Figure([3.0, 1.0, 1.0]), Figure([8.0, 9.0]),
                     2e-9, 100 << 20, 350 << 20),
            ScoreRow("KID", 50_000, 2048, 1, Figure([2.0]), Figure([]), None, None, None),
        ],
    }  # fmt: skip


def test_goals_of_the_metrics(make: Make) -> None:
    faster, apart, recorded = goals(make["result"](**rows()))
    assert faster.found == pytest.approx((8.5, 8.0, 9.0, 8.0))
    assert faster.met
    assert apart.found is not None
    assert apart.found[0] == 2e-9
    assert apart.met
    assert recorded.found is not None
    assert recorded.found[0] == pytest.approx(2e-12, rel=1e-3)
    assert recorded.met
    others = goals(make["result"](**rows() | {"agreement": [], "scores": rows()["scores"][1:]}))
    assert all(goal.met is None for goal in others)


def test_tables_and_page(make: Make) -> None:
    result = make["result"](**rows())
    found = tables(result)
    assert [table.title for table in found] == [
        "Goals",
        "Metrics of the same features",
        "What metrics cost, synthetic features",
    ]
    for table in found:
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    text = page(result)
    assert text.startswith("# terdit bench: metrics\n")
    assert "GOPS" not in text
    assert re.search(r"\| FID \| d64 \| 0\.5 \| 0\.5 \| 1\.0e-12 \| 0\.5 \| 0\.0e\+00 \|", text)
    assert "| distance | 50000 x 2048 | 1 | 1.00 | 1.00 .. 3.00 | 350 MiB | 250 MiB |" in text
    assert "| 8.50 | 8.5 | 2.0e-09 |" in text
    assert text.isascii()
