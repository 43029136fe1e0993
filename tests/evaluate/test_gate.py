"""Gates: what passes, what fails, and what must not be compared at all."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from terdit_cli.errors import GateFailed, InputFileError, UsageError
from terdit_cli.evaluate.gate import Limits, apply_limits, check_limits, failure, make_limits
from terdit_cli.evaluate.result import EvalResult, save_result

PROVENANCE: dict[str, Any] = {
    "model": "model.tdt",
    "model_sha256": "a" * 64,
    "config": {"dim": 384, "n_layers": 12, "multiple_of": [1, 2]},
    "sampler": "ddpm",
    "steps": 250,
    "cfg_scale": 1.5,
    "cfg_channels": "3",
    "eps_scale": 1.0,
    "labels": "balanced",
    "image_size": 256,
    "seed": 0,
    "activations": "fp32",
    "backend": "reference",
    "reference_sha256": "b" * 64,
    "machine": "here",
}


def make(distance: float = 10.0, **changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "distance_name": "FID",
        "metrics": {"FID": distance, "IS": 100.0},
        "n": 1000,
        "n_reference": 5000,
        "pipeline": "adm@b31f8cc2",
        "provenance": PROVENANCE,
    }
    return EvalResult(**(values | changes))


def baseline(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "REF.json"
    path.write_text(save_result(make(**changes)))
    return path


def verdict(result: EvalResult, limits: Limits) -> tuple[bool, str]:
    (gate,) = apply_limits(result, limits).gates
    return gate.passed, gate.reason


def test_the_largest_distance() -> None:
    limits = make_limits(max_distance=10.0)
    assert verdict(make(9.9), limits) == (True, "FID 9.90 is within the limit of 10.00")
    assert verdict(make(10.0), limits)[0]
    assert verdict(make(10.5), limits) == (False, "FID 10.50 is above the limit of 10.00")
    # Rounding must not make a sentence that contradicts itself.
    passed, reason = verdict(make(10.000001), limits)
    assert not passed
    assert "10.000001 is above the limit of 10" in reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float, tmp_path: Path) -> None:
    limits = make_limits(max_distance=1e300, min_score=0.0, baseline=baseline(tmp_path))
    result = apply_limits(make(metrics={"FID": value, "IS": value}), limits)
    assert [gate.passed for gate in result.gates] == [False] * 3
    assert all("passes no gate" in gate.reason for gate in result.gates)
    error = failure(result, "model.tdt")
    assert error is not None
    assert "3 of 3 quality gates failed" in str(error)


def test_the_smallest_score() -> None:
    limits = make_limits(min_score=100.0)
    assert verdict(make(), limits) == (True, "IS 100.00 is not below the limit of 100.00")
    assert not verdict(make(metrics={"FID": 1.0, "IS": 99.0}), limits)[0]


def test_a_score_that_the_pipeline_does_not_have() -> None:
    limits = make_limits(min_score=50.0)
    with pytest.raises(UsageError) as caught:
        apply_limits(make(metrics={"FID": 1.0}), limits)
    message = str(caught.value)
    assert "no Inception Score for --min-is" in message
    assert "adm@b31f8cc2" in message
    assert "Fix: use --features adm" in message


def test_a_regression_is_relative(tmp_path: Path) -> None:
    limits = make_limits(baseline=baseline(tmp_path), tolerance=0.05)
    assert verdict(make(10.5), limits)[0]  # 10 * 1.05 exactly
    assert verdict(make(0.0), limits)[0]
    passed, reason = verdict(make(10.6), limits)
    assert not passed
    assert reason == "FID 10.60 is above the limit of 10.50 (10.00 + 5 %)"
    strict = make_limits(baseline=baseline(tmp_path), tolerance=0.0)
    assert verdict(make(10.0), strict)[0]
    assert not verdict(make(math.nextafter(10.0, 11.0)), strict)[0]


def test_other_metrics_do_not_gate(tmp_path: Path) -> None:
    limits = make_limits(baseline=baseline(tmp_path))
    assert apply_limits(make(metrics={"FID": 10.0, "IS": 1.0}), limits).passed


def test_several_gates_in_order(tmp_path: Path) -> None:
    limits = make_limits(12.0, 120.0, baseline(tmp_path))
    result = apply_limits(make(11.0), limits)
    assert [(gate.name, gate.passed) for gate in result.gates] == [
        ("--max-fid", True),
        ("--min-is", False),
        ("--max-regression", False),
    ]
    error = failure(result, "model.tdt")
    assert isinstance(error, GateFailed)
    assert error.exit_code == 5
    assert str(error) == (
        "2 of 3 quality gates failed: got IS 100 and FID 11, expected >= 120 (--min-is) and "
        "<= 10.5 (--max-regression) (model.tdt). Fix: compare the images with those of an "
        "earlier model (--report page.html), or set another limit."
    )


def test_nothing_asked_nothing_gated() -> None:
    result = apply_limits(make(), make_limits())
    assert result == make()
    assert failure(result, "x") is None
    error = failure(make(math.nan), "model.tdt")
    assert error is not None
    assert "FID is not a number: got nan" in str(error)
    assert "model.tdt" in str(error)


def test_a_limit_inside_the_interval_is_said() -> None:
    result = make(intervals={"FID": (9.5, 10.5)})
    assert (
        "the limit lies inside the 95 % interval (9.50 to 10.50)"
        in (verdict(result, make_limits(max_distance=10.2))[1])
    )
    assert "interval" not in verdict(result, make_limits(max_distance=11.0))[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pipeline": "clean@1"}, "pipeline adm@b31f8cc2 not clean@1"),
        ({"n": 999}, "n 1000 not 999"),
        ({"n_reference": None}, "n_reference 5000 not unstated"),
    ],
)
def test_unlike_runs_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = baseline(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        apply_limits(make(), make_limits(baseline=path))
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert f"got {named}, expected the same in both" in message
    assert f"--max-regression {path}" in message
    assert "Fix: repeat the run with the settings of that file" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference_sha256", "c" * 64),
        ("sampler", "ddim"),
        ("steps", 50),
        ("cfg_scale", 4.0),
        ("cfg_channels", "all"),
        ("eps_scale", 0.998),
        ("labels", "uniform"),
        ("image_size", 512),
        ("sampler", None),
    ],
)
def test_unlike_settings_are_refused(tmp_path: Path, name: str, value: object) -> None:
    path = baseline(tmp_path, provenance=PROVENANCE | {name: value})
    with pytest.raises(UsageError) as caught:
        apply_limits(make(), make_limits(baseline=path))
    then = "unstated" if value is None else value
    assert f"got {name} {PROVENANCE[name]} not {then}, expected" in str(caught.value)


def test_a_result_from_before_eps_scale_has_none(tmp_path: Path) -> None:
    before = {key: value for key, value in PROVENANCE.items() if key != "eps_scale"}
    limits = make_limits(baseline=baseline(tmp_path, provenance=before))
    assert apply_limits(make(), limits).passed
    with pytest.raises(UsageError, match=r"got eps_scale 0\.99 not 1\.0, expected"):
        apply_limits(make(provenance=PROVENANCE | {"eps_scale": 0.99}), limits)


def test_every_field_that_differs_is_named(tmp_path: Path) -> None:
    config = {"dim": 768, "n_layers": 12, "qk_norm": True, "multiple_of": [1, 2]}
    path = baseline(tmp_path, n=50, provenance=PROVENANCE | {"config": config, "steps": 20})
    with pytest.raises(UsageError) as caught:
        apply_limits(make(), make_limits(baseline=path))
    assert (
        "n 1000 not 50; steps 250 not 20; config.dim 384 not 768; config.qk_norm unstated not True"
        in str(caught.value)
    )
    assert "n_layers" not in str(caught.value)


def test_what_the_gate_is_to_judge_may_differ(tmp_path: Path) -> None:
    other = {"model_sha256": "d" * 64, "activations": "int8", "backend": "cpu", "machine": "there"}
    path = baseline(tmp_path, provenance=PROVENANCE | other)
    result = apply_limits(make(), make_limits(baseline=path))
    assert result.passed
    assert result.warnings == []


def test_another_seed_is_warned_about_once(tmp_path: Path) -> None:
    path = baseline(tmp_path, provenance=PROVENANCE | {"seed": 7})
    limits = make_limits(baseline=path)
    result = apply_limits(make(warnings=["first"]), limits)
    assert result.passed
    assert len(result.warnings) == 2
    assert f"the seed is 0, that of {path} 7" in result.warnings[1]
    assert apply_limits(result, limits).warnings == result.warnings


def test_references_of_unknown_origin_are_warned_about(tmp_path: Path) -> None:
    unknown = {key: value for key, value in PROVENANCE.items() if key != "reference_sha256"}
    limits = make_limits(baseline=baseline(tmp_path, provenance=unknown))
    (warning,) = apply_limits(make(provenance=unknown), limits).warnings
    assert "neither this run nor" in warning
    with pytest.raises(UsageError, match="reference_sha256"):
        apply_limits(make(), limits)


def test_images_without_a_model_compare_with_such(tmp_path: Path) -> None:
    images = {"images": "samples.npz", "reference_sha256": "b" * 64}
    limits = make_limits(baseline=baseline(tmp_path, provenance=images))
    assert apply_limits(make(provenance=images), limits).passed
    with pytest.raises(UsageError, match="sampler ddpm not unstated; steps 250 not unstated"):
        apply_limits(make(), limits)


def test_tuples_are_what_json_made_of_them(tmp_path: Path) -> None:
    limits = make_limits(baseline=baseline(tmp_path))
    config = PROVENANCE["config"] | {"multiple_of": (1, 2)}
    assert apply_limits(make(provenance=PROVENANCE | {"config": config}), limits).passed


def test_unlike_runs_are_refused_before_sampling(tmp_path: Path) -> None:
    limits = make_limits(min_score=3.0, baseline=baseline(tmp_path))
    known: dict[str, Any] = {
        "pipeline": "adm@b31f8cc2",
        "n": 1000,
        "n_reference": 5000,
        "provenance": PROVENANCE,
        "has_score": True,
    }
    assert check_limits(limits, **known) == []
    with pytest.raises(UsageError, match="n 10 not 1000"):
        check_limits(limits, **(known | {"n": 10}))
    with pytest.raises(UsageError, match="--min-is"):
        check_limits(limits, **(known | {"has_score": False}))


@pytest.mark.parametrize(
    ("arguments", "option", "value"),
    [
        ({"max_distance": math.nan}, "--max-fid", "nan"),
        ({"max_distance": -1.0}, "--max-fid", "-1.0"),
        ({"min_score": math.inf}, "--min-is", "inf"),
        ({"tolerance": -0.1}, "--tolerance", "-0.1"),
        ({"tolerance": math.nan}, "--tolerance", "nan"),
    ],
)
def test_limits_that_are_no_limits(arguments: dict[str, float], option: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_limits(**arguments)  # type: ignore[arg-type]
    assert f"wrong {option}: got {value}, expected a number from 0 up" in str(caught.value)
    assert f"Fix: set {option}" in str(caught.value)


def test_a_baseline_without_a_number(tmp_path: Path) -> None:
    path = baseline(tmp_path, distance=math.nan)
    with pytest.raises(InputFileError) as caught:
        make_limits(baseline=path)
    assert "got FID nan, expected a number" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Fix: make another REF.json" in str(caught.value)


def test_a_result_with_gates_is_a_baseline(tmp_path: Path) -> None:
    gated = apply_limits(make(), make_limits(max_distance=20.0))
    path = tmp_path / "REF.json"
    path.write_text(save_result(gated))
    limits = make_limits(baseline=path)
    assert limits.baseline is not None
    assert limits.baseline.result == gated
    assert dataclasses.replace(limits.baseline.result, gates=[]) == make()
