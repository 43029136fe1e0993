"""Results as JSON: every number survives, every other file is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terdit_cli.errors import InputFileError
from terdit_cli.evaluate import result as results
from terdit_cli.evaluate.result import EvalResult, Gate, format_value, load_result, save_result


def make(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "distance_name": "FID",
        "metrics": {"FID": 11.625, "IS": 4.5, "precision": 0.7},
        "n": 50000,
        "n_reference": 10000,
        "pipeline": "adm@b31f8cc2",
        "intervals": {"FID": (11.5, 11.75)},
        "per_class": {"b": 3.5, "a": 2.5},
        "recognised": {"b": 0.5, "a": 1.0},
        "curve": [(1000, 15.0), (2000, 13.0)],
        "gates": [Gate("--max-fid", "FID", 11.625, 12.0, "<=", True, "within")],
        "provenance": {"config": {"dim": 384}, "seed": 0, "cfg_scale": 1.5},
        "warnings": ["careful"],
    }
    return EvalResult(**(values | changes))


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def written(path: Path, result: EvalResult) -> Path:
    path.write_text(save_result(result))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert load_result(written(tmp_path / "r.json", make())) == make()
    empty = make(
        n_reference=None, intervals={}, per_class={}, curve=[], gates=[], provenance={}, warnings=[]
    )
    assert load_result(written(tmp_path / "e.json", empty)) == empty


def test_a_result_from_before_probes_is_read(tmp_path: Path) -> None:
    values = make(recognised={}).to_dict()
    del values["recognised"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(values))
    assert load_result(path) == make(recognised={})


def test_the_json_says_whether_it_passed_and_keeps_the_order() -> None:
    values = strict(save_result(make()))
    assert values["passed"] is True
    assert list(values["metrics"]) == ["FID", "IS", "precision"]
    assert list(values["per_class"]) == ["b", "a"]
    assert values["intervals"] == {"FID": [11.5, 11.75]}
    assert set(values) == {item.name for item in dataclasses.fields(EvalResult)} | {
        "kind", "version", "passed",
    }  # fmt: skip


def test_numbers_that_json_lacks_survive_as_texts(tmp_path: Path) -> None:
    odd = make(
        metrics={"FID": math.inf, "IS": math.nan, "sFID": -math.inf},
        intervals={"FID": (math.nan, math.inf)},
        curve=[(10, math.nan)],
    )
    values = strict(save_result(odd))
    assert values["metrics"] == {"FID": "Infinity", "IS": "NaN", "sFID": "-Infinity"}
    assert values["passed"] is False
    loaded = load_result(written(tmp_path / "odd.json", odd))
    assert loaded.metrics["FID"] == math.inf
    assert loaded.metrics["sFID"] == -math.inf
    assert math.isnan(loaded.metrics["IS"])
    assert math.isnan(loaded.curve[0][1])


def test_provenance_becomes_json_types() -> None:
    provenance = {
        "model": Path("a/b.tdt"),
        "step": np.int64(7),
        "loss": np.float32(0.5),
        "bad": np.float64(math.nan),
        "flag": np.bool_(True),
        "nested": {"shape": (1, 2), 3: None},
        "name": "\udcff" + "\0",  # a path that is not UTF-8
    }
    values = strict(save_result(make(provenance=provenance)))["provenance"]
    assert values == {
        "model": "a/b.tdt",
        "step": 7,
        "loss": 0.5,
        "bad": "NaN",
        "flag": True,
        "nested": {"shape": [1, 2], "3": None},
        "name": "\udcff\0",
    }


def test_a_distance_that_is_no_number_never_passes() -> None:
    assert make(gates=[]).passed
    assert make().passed
    assert not make(gates=[dataclasses.replace(make().gates[0], passed=False)]).passed
    for value in (math.nan, math.inf, -math.inf):
        assert not make(metrics={"FID": value}, gates=[]).passed


def edited(**changes: Any) -> str:
    return json.dumps(make().to_dict() | changes)


def without(name: str) -> str:
    values = make().to_dict()
    del values[name]
    return json.dumps(values)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe\x00", "Unicode"),
        (b"PK\x03\x04", "JSONDecodeError"),
        (b"[1, 2]", "another kind"),
        (b'{"FID": 10}', "another kind"),
        (b'{"distance_name": "FID", "distance": 10.0}', "another kind"),
        (b'{"kind": "terdit eval-fid", "version": 1, "n": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "ValueError"),
        (edited(version=2), "version 2, expected version 1"),
        (edited(version="1"), "version '1'"),
        (edited(extra=1), "unknown field 'extra'"),
        (without("metrics"), "no field 'metrics'"),
        (edited(metrics=[1]), "metrics is not an object"),
        (edited(metrics={"FID": True}), "metrics.FID is True, not a number"),
        (edited(metrics={"FID": "10"}), "metrics.FID is '10', not a number"),
        (edited(metrics={"FID": None}), "metrics.FID is None"),
        (edited(metrics={"IS": 3}), "no 'FID' in metrics"),
        (edited(metrics={"FID": 10**400}), "beyond float64"),
        (edited(n=0), "n is 0, not a number of images"),
        (edited(n=2.0), "n is 2.0"),
        (edited(n=True), "n is True"),
        (edited(n_reference=-1), "n_reference is -1"),
        (edited(pipeline=None), "pipeline is None, not a text"),
        (edited(intervals={"FID": [1]}), "intervals.FID is not a pair"),
        (edited(curve=[[1, 2, 3]]), "curve holds something"),
        (edited(curve=[[1.5, 2]]), "curve is 1.5"),
        (edited(gates=[{"name": "x"}]), "gates holds something"),
        (edited(gates={}), "gates is not a list"),
        (edited(provenance="x"), "provenance is not an object"),
        (edited(warnings=[1]), "warnings is 1, not a text"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    tmp_path: Path, content: bytes | str, reason: str
) -> None:
    path = tmp_path / "REF.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputFileError) as caught:
        load_result(path)
    message = str(caught.value)
    assert reason in message
    assert str(path) in message
    assert "Fix: write one with terdit eval-fid ... --json" in message
    assert len(message) < 1000


@pytest.mark.parametrize("change", [{"relation": "<"}, {"passed": 1}, {"value": "x"}, {"name": 3}])
def test_damaged_gates_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    gate = dataclasses.asdict(make().gates[0]) | change
    path = tmp_path / "REF.json"
    path.write_text(edited(gates=[gate]))
    with pytest.raises(InputFileError, match=r"gates"):
        load_result(path)


def test_a_number_beyond_float64_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "REF.json"
    path.write_text(save_result(make()).replace("11.625", "1e999"))
    with pytest.raises(InputFileError, match="beyond float64"):
        load_result(path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"No such file.*none\.json"):
        load_result(tmp_path / "none.json")
    with pytest.raises(InputFileError, match="directory"):
        load_result(tmp_path)


def test_a_file_too_large_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LARGEST_FILE", 100)
    path = tmp_path / "REF.json"
    path.write_text(save_result(make()))
    with pytest.raises(InputFileError, match="a larger file, expected at most 100 bytes"):
        load_result(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    text = save_result(make()).rstrip()
    path = tmp_path / "REF.json"
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(InputFileError):
            load_result(path)


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("FID", 11.625, "11.62"),
        ("FID", 10, "10.00"),
        ("IS", 263.914, "263.91"),
        ("FID", 12345678.9, "12,345,678.90"),
        ("fd-x", 0.41234, "0.4123"),
        ("KID", -0.000123456, "-0.0001235"),
        ("FID", 0.0, "0"),
        ("precision", 0.7, "0.700"),
        ("FID", math.nan, "not a number"),
        ("FID", math.inf, "infinity"),
        ("FID", -math.inf, "-infinity"),
    ],
)
def test_numbers_as_they_are_shown(metric: str, value: float, text: str) -> None:
    assert format_value(metric, value) == text


def test_changes() -> None:
    assert results.relative_change(11.0, 10.0) == pytest.approx(0.1)
    assert results.relative_change(-0.5, -1.0) == pytest.approx(0.5)
    assert results.relative_change(1.0, 0.0) is None
    assert results.relative_change(math.nan, 1.0) is None
    assert results.is_worse("FID", 2, 1)
    assert not results.is_worse("IS", 2, 1)
    assert results.is_worse("recall", 1, 2)
    assert make().gates[0].condition == "FID <= 12.00"
