"""Quality gates: is the distance small enough, is the score high enough, did it get worse.

    --max-fid X              distance <= X              the primary distance, whatever its name
    --min-is X               IS >= X
    --max-regression REF     distance <= d * (1 + t)    d of REF.json, t of --tolerance

A value that is not finite never passes. Only the primary distance is compared with REF.json: the
other metrics are shown beside theirs, but a gate on each of them would fail by chance alone.

The comparison is refused unless everything that decides what is measured agrees (`ALIKE` and
every field of the network's configuration). Two things may differ. What the gate is there to
judge: weights, activations, backend, machine, versions. And the seed, with a warning: runs of one
seed start from the same noises, so that most of the noise of sampling cancels; with another seed
the change includes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terdit_cli.errors import GateFailed, InputFileError, UsageError
from terdit_cli.evaluate.result import (
    EvalResult,
    Gate,
    Relation,
    format_interval,
    format_value,
    load_result,
)

ALIKE = (
    "reference_sha256", "precision", "sampler", "steps", "cfg_scale", "cfg_channels",
    "eps_scale", "labels", "image_size", "vae",
)  # fmt: skip
DEFAULT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Baseline:
    """An earlier result to compare with."""

    result: EvalResult
    path: Path
    tolerance: float = DEFAULT_TOLERANCE  # relative


@dataclass(frozen=True)
class Limits:
    """The gates that were asked for."""

    max_distance: float | None = None
    min_score: float | None = None
    baseline: Baseline | None = None


def make_limits(
    max_distance: float | None = None,
    min_score: float | None = None,
    baseline: Path | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Limits:
    """Check the values of `--max-fid --min-is --max-regression --tolerance` and read REF.json.

    Raises:
        UsageError: a value that is negative or not finite.
        InputFileError: a REF.json that cannot be read, or whose distance is not a number.
    """
    values = {"--max-fid": max_distance, "--min-is": min_score, "--tolerance": tolerance}
    for option, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(
                f"wrong {option}", got=value, expected="a number from 0 up", fix=f"set {option}"
            )
    if baseline is None:
        return Limits(max_distance, min_score)
    earlier = load_result(baseline)
    if not math.isfinite(earlier.distance):
        raise InputFileError(
            "nothing to compare with",
            got=f"{earlier.distance_name} {earlier.distance}",
            expected="a number",
            where=baseline,
            fix="make another REF.json with a run that succeeds",
        )
    return Limits(max_distance, min_score, Baseline(earlier, baseline, tolerance))


def check_limits(
    limits: Limits,
    *,
    pipeline: str,
    n: int,
    n_reference: int | None,
    provenance: Mapping[str, Any],
    has_score: bool,
) -> list[str]:
    """Refuse, before anything is sampled, gates that this run could not answer.

    Args:
        provenance: what the result's will hold of `ALIKE`, "config" and "seed".
        has_score: whether the pipeline gives logits, and so an Inception Score.

    Returns:
        Warnings.

    Raises:
        UsageError: --min-is without an Inception Score; a REF.json of an unlike run, with each
            field that differs and both its values.
    """
    if limits.min_score is not None and not has_score:
        raise UsageError(
            "no Inception Score for --min-is",
            got="an extractor without a classifier",
            expected="a pipeline with one",
            where=pipeline,
            fix="use --features adm, or leave --min-is out",
        )
    if limits.baseline is None:
        return []
    theirs, path = limits.baseline.result, limits.baseline.path
    before = _facts(theirs.pipeline, theirs.n, theirs.n_reference, theirs.provenance)
    now = _facts(pipeline, n, n_reference, provenance)
    unlike = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    if unlike:
        facts = (f"{name} {_say(now.get(name))} not {_say(before.get(name))}" for name in unlike)
        raise UsageError(
            "cannot compare unlike runs",
            got="; ".join(facts),
            expected="the same in both",
            where=f"--max-regression {path}",
            fix="repeat the run with the settings of that file, or make a new one with --json",
        )
    warnings = []
    seeds = provenance.get("seed"), theirs.provenance.get("seed")
    if seeds[0] != seeds[1]:
        warnings.append(
            f"the seed is {_say(seeds[0])}, that of {path} {_say(seeds[1])}: the change includes "
            "the noise of sampling"
        )
    if now.get("reference_sha256") is None:
        warnings.append(
            f"neither this run nor {path} says the hash of its reference: that they are the same "
            "is assumed"
        )
    return warnings


def apply_limits(result: EvalResult, limits: Limits) -> EvalResult:
    """Return the result with a verdict for each gate, after `check_limits` for what it says now.

    Raises:
        UsageError: see `check_limits`.
    """
    warnings = check_limits(
        limits,
        pipeline=result.pipeline,
        n=result.n,
        n_reference=result.n_reference,
        provenance=result.provenance,
        has_score="IS" in result.metrics,
    )
    name, gates = result.distance_name, []
    if limits.max_distance is not None:
        gates.append(_gate(result, "--max-fid", name, "<=", limits.max_distance))
    if limits.min_score is not None:
        gates.append(_gate(result, "--min-is", "IS", ">=", limits.min_score))
    if limits.baseline is not None:
        earlier, tolerance = limits.baseline.result.distance, limits.baseline.tolerance
        origin = f"{format_value(name, earlier)} + {100 * tolerance:g} %"
        limit = earlier * (1 + tolerance)
        gates.append(_gate(result, "--max-regression", name, "<=", limit, origin))
    fresh = [text for text in warnings if text not in result.warnings]
    return dataclasses.replace(result, gates=gates, warnings=[*result.warnings, *fresh])


def failure(result: EvalResult, where: object) -> GateFailed | None:
    """Return the error of a result that did not pass, for the command to raise, or None."""
    if result.passed:
        return None
    failed = [gate for gate in result.gates if not gate.passed]
    if not failed:
        return GateFailed(
            f"{result.distance_name} is not a number",
            got=result.distance,
            expected="a finite distance",
            where=where,
            fix="look at the images: a model that gives NaN gives no distance",
        )
    several = f"{len(failed)} of {len(result.gates)} quality gates"
    return GateFailed(
        (several if len(result.gates) > 1 else "the quality gate") + " failed",
        got=" and ".join(f"{gate.metric} {_exact(gate.value)}" for gate in failed),
        expected=" and ".join(
            f"{gate.relation} {_exact(gate.limit)} ({gate.name})" for gate in failed
        ),
        where=where,
        fix="compare the images with those of an earlier model (--report page.html), or set "
        "another limit",
    )


def _gate(
    result: EvalResult, name: str, metric: str, relation: Relation, limit: float, origin: str = ""
) -> Gate:
    value = result.metrics[metric]
    within = value <= limit if relation == "<=" else value >= limit
    passed = math.isfinite(value) and within
    # Where rounding would say "10 is above 10", all digits are shown.
    show = format_value(metric, value), format_value(metric, limit)
    if show[0] == show[1] and value != limit:
        show = _exact(value), _exact(limit)
    side = ("within", "above") if relation == "<=" else ("not below", "below")
    if not math.isfinite(value):
        reason = f"{metric} is {show[0]}, which passes no gate"
    else:
        reason = f"{metric} {show[0]} is {side[not passed]} the limit of {show[1]}"
    reason += f" ({origin})" if origin else ""
    interval = result.intervals.get(metric)
    if interval is not None and interval[0] <= limit <= interval[1]:
        reason += (
            f"; the limit lies inside the 95 % interval ({format_interval(metric, interval)}), "
            "so other images could decide otherwise"
        )
    return Gate(name, metric, value, limit, relation, passed, reason)


def _facts(
    pipeline: str, n: int, n_reference: int | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return, flat, all that two runs must have in common."""
    facts = {"pipeline": pipeline, "n": n, "n_reference": n_reference}
    facts |= {name: provenance.get(name) for name in ALIKE}
    if facts["sampler"] is not None and facts["eps_scale"] is None:
        facts["eps_scale"] = 1.0  # a result from before there was the option
    config = provenance.get("config")
    if isinstance(config, Mapping):
        facts |= {f"config.{key}": _json(value) for key, value in config.items()}
    elif config is not None:
        facts["config"] = config
    return facts


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _say(value: Any) -> str:
    return "unstated" if value is None else str(value)


def _exact(value: float) -> str:
    return f"{value:.10g}"
