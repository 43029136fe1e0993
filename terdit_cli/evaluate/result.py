"""What an evaluation found, as an object and as JSON that any parser reads.

One JSON object serves two ends: the output of `eval-fid --json`, and the REF.json that
`--max-regression` compares with. JSON has no number for "not a number" and the infinities: they
are written as the strings "NaN", "Infinity" and "-Infinity", which no comparison in another
program mistakes for a small number, as it would `null`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np

from terdit_cli.errors import InputFileError

KIND = "terdit eval-fid"
VERSION = 1
LARGEST_FILE = 16 << 20  # bytes of a result; one of 1,000 classes has about 100 kB
HIGHER_IS_BETTER = frozenset({"IS", "precision", "recall", "accuracy"})
_SHARES = ("precision", "recall", "accuracy", "accuracy of reals")
_NOT_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Relation = Literal["<=", ">="]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Gate:
    """One condition on one metric, and whether it holds."""

    name: str  # the option that asked for it: "--max-fid"
    metric: str  # key of EvalResult.metrics
    value: float
    limit: float
    relation: Relation
    passed: bool
    reason: str  # one sentence with the numbers

    @property
    def condition(self) -> str:
        """Return "FID <= 10"."""
        return f"{self.metric} {self.relation} {format_value(self.metric, self.limit)}"


@dataclass(frozen=True)
class EvalResult:
    """The metrics of one evaluation under their right names, and all that is needed to repeat it.

    `provenance` holds JSON types, or what `to_dict` turns into them (paths, NumPy scalars).
    """

    distance_name: str  # "FID", or "fd-<extractor>"; the primary metric, which the gates compare
    metrics: dict[str, float]
    n: int  # images
    n_reference: int | None  # images; None: the reference does not say
    pipeline: str
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    per_class: dict[str, float] = field(default_factory=dict)  # class name -> distance
    recognised: dict[str, float] = field(default_factory=dict)  # class name -> share of its images
    curve: list[tuple[int, float]] = field(default_factory=list)  # (n, distance)
    gates: list[Gate] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def distance(self) -> float:
        """Return the primary distance."""
        return self.metrics[self.distance_name]

    @property
    def passed(self) -> bool:
        """Return whether every gate holds; a distance that is no number never passes."""
        return math.isfinite(self.distance) and all(gate.passed for gate in self.gates)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types only, without numbers that JSON does not have."""
        values = {"kind": KIND, "version": VERSION, **dataclasses.asdict(self)}
        return _plain({**values, "passed": self.passed})


def save_result(result: EvalResult) -> str:
    """Return the JSON text of a result, which `load_result` reads."""
    return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"


def load_result(path: Path) -> EvalResult:
    """Read what `eval-fid --json` wrote.

    Raises:
        InputFileError: missing, too large, damaged, of another program or of a newer version.
    """

    def refuse(got: object, expected: object = "the output of terdit eval-fid --json") -> NoReturn:
        raise InputFileError(
            "cannot read the result of an evaluation",
            got=got,
            expected=expected,
            where=path,
            fix="write one with terdit eval-fid ... --json > REF.json",
        )

    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            refuse("a larger file", f"at most {LARGEST_FILE} bytes")
        values = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_unique)
    except OSError as error:
        refuse(error.strerror or error)
    except (ValueError, RecursionError) as error:
        refuse(f"{type(error).__name__}: {error}"[:200])
    if not isinstance(values, dict) or values.get("kind") != KIND:
        refuse("JSON of another kind", f'an object with "kind": "{KIND}"')
    if values.get("version") != VERSION:
        refuse(f"version {values.get('version')!r}", f"version {VERSION} of the format")
    try:
        return _from_dict(values)
    except (TypeError, ValueError) as error:
        refuse(str(error)[:300])


def format_value(metric: str, value: float) -> str:
    """Return a number as it is shown: shares to three places, others to two or four digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'-' if value < 0 else ''}infinity"
    if metric in _SHARES:
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"


def share(value: float) -> str:
    """Return "97.5 %"."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "not a number"


def format_interval(metric: str, interval: tuple[float, float]) -> str:
    """Return "9.81 to 10.2"."""
    low, high = interval
    return f"{format_value(metric, low)} to {format_value(metric, high)}"


def relative_change(new: float, old: float) -> float | None:
    """Return (new - old) / |old|, or None where that says nothing."""
    if not (math.isfinite(new) and math.isfinite(old)) or old == 0:
        return None
    return (new - old) / abs(old)


def is_worse(metric: str, new: float, old: float) -> bool:
    """Return whether a metric moved the wrong way."""
    return new < old if metric in HIGHER_IS_BETTER else new > old


def _plain(value: Any) -> Any:
    """Return JSON types; numbers that JSON lacks become strings, and so does all else."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return values


def _from_dict(values: dict[str, Any]) -> EvalResult:
    """Check every type; raises ValueError that names the field."""
    known = {item.name for item in dataclasses.fields(EvalResult)}
    values = {"recognised": {}, **values}  # the one field that earlier results lack
    for name in (*known, *values):
        if name not in values:
            raise ValueError(f"no field {name!r}")
        if name not in known | {"kind", "version", "passed"}:
            raise ValueError(f"an unknown field {name!r}")
    n_reference = values["n_reference"]
    result = EvalResult(
        distance_name=_text(values["distance_name"], "distance_name"),
        metrics=_table(values["metrics"], "metrics", _number),
        n=_count(values["n"], "n"),
        n_reference=None if n_reference is None else _count(n_reference, "n_reference"),
        pipeline=_text(values["pipeline"], "pipeline"),
        intervals=_table(values["intervals"], "intervals", _interval),
        per_class=_table(values["per_class"], "per_class", _number),
        recognised=_table(values["recognised"], "recognised", _number),
        curve=[_point(item) for item in _list(values["curve"], "curve")],
        gates=[_gate(item) for item in _list(values["gates"], "gates")],
        provenance=_table(values["provenance"], "provenance", lambda value, _: value),
        warnings=[_text(item, "warnings") for item in _list(values["warnings"], "warnings")],
    )
    if result.distance_name not in result.metrics:
        raise ValueError(f"no {result.distance_name!r} in metrics")
    return result


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not a text")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, str) and value in _NOT_NUMBERS:
        return _NOT_NUMBERS[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):  # 1e999 reads as infinity
        raise ValueError(f"{name} is a number beyond float64")
    return number


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a number of images")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _table(value: Any, name: str, item: Callable[[Any, str], Item]) -> dict[str, Item]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return {key: item(entry, f"{name}.{key}") for key, entry in value.items()}


def _interval(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} is not a pair of numbers")
    return _number(value[0], name), _number(value[1], name)


def _point(value: Any) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("curve holds something that is not [n, distance]")
    return _count(value[0], "curve"), _number(value[1], "curve")


def _gate(value: Any) -> Gate:
    fields = {item.name for item in dataclasses.fields(Gate)}
    if not isinstance(value, dict) or set(value) != fields:
        raise ValueError(f"gates holds something that is not {sorted(fields)}")
    if value["relation"] not in ("<=", ">=") or not isinstance(value["passed"], bool):
        raise ValueError("gates holds a wrong relation or verdict")
    return Gate(
        name=_text(value["name"], "gates.name"),
        metric=_text(value["metric"], "gates.metric"),
        value=_number(value["value"], "gates.value"),
        limit=_number(value["limit"], "gates.limit"),
        relation=value["relation"],
        passed=value["passed"],
        reason=_text(value["reason"], "gates.reason"),
    )
