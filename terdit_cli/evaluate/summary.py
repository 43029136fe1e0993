"""A result for machines and reviewers of a pull request: JUnit XML, and a summary in Markdown.

JUnit: one suite, one test case for each gate (for a run without gates one, which fails if the
distance is not a number), metrics and provenance as properties. The order of the children
(properties, test cases, output) is the one that the strictest reader, Jenkins, asks for.

Markdown: what GitHub and GitLab render. Text from outside stands in code spans, where neither
Markdown, HTML nor a mention of somebody (@name) has an effect. Both files replace what was there;
for GitHub's summary append the file: `cat summary.md >> $GITHUB_STEP_SUMMARY`.
"""

from __future__ import annotations

import datetime
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from terdit_cli.evaluate.result import (
    EvalResult,
    format_interval,
    format_value,
    is_worse,
    relative_change,
    share,
)
from terdit_cli.report.markdown import clean, code, details, prose, table
from terdit_cli.system.atomic import write_whole

SUITE = "terdit eval-fid"
MOST_CLASSES = 20  # rows of distances by class: the largest


def write_junit(path: Path, result: EvalResult) -> None:
    """Write the verdicts as JUnit XML.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    write_whole(path, junit(result))


def write_markdown(path: Path, result: EvalResult, baseline: EvalResult | None = None) -> None:
    """Write the summary, with the metrics of `baseline` beside the result's.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    write_whole(path, markdown(result, baseline))


def junit(result: EvalResult) -> str:
    """Return JUnit XML."""
    seconds = result.provenance.get("seconds")
    is_time = isinstance(seconds, int | float) and 0 <= seconds < float("inf")
    time = f"{seconds if is_time else 0:.3f}"
    # (test, message of a failure or None, all that is to say)
    cases = [
        (gate.condition, None if gate.passed else gate.reason, gate.reason) for gate in result.gates
    ]
    if not cases:
        shown = f"{result.distance_name} {format_value(result.distance_name, result.distance)}"
        name = f"{result.distance_name} is a number"
        cases = [(name, None if result.passed else shown, shown)]
    failures = sum(message is not None for _, message, _ in cases)
    counts = {
        "tests": str(len(cases)),
        "failures": str(failures),
        "errors": "0",
        "skipped": "0",
        "time": time,
    }
    suites = ET.Element("testsuites", {"name": SUITE, **counts})
    suite = ET.SubElement(suites, "testsuite", {"name": SUITE, **counts})
    if (stamp := _timestamp(result.provenance.get("date"))) is not None:
        suite.set("timestamp", stamp)
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(result):
        ET.SubElement(properties, "property", {"name": clean(key), "value": clean(value)})
    for index, (name, message, text) in enumerate(cases):
        attributes = {"classname": SUITE, "name": clean(name), "time": time if not index else "0"}
        case = ET.SubElement(suite, "testcase", attributes)
        if message is not None:
            kind = {"message": clean(message), "type": "QualityGate"}
            ET.SubElement(case, "failure", kind).text = clean(f"{text}\n{_summary_line(result)}")
    output = ET.SubElement(suite, "system-out")
    output.text = clean("\n".join([_summary_line(result), *result.warnings]))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, "unicode") + "\n"


def _timestamp(date: Any) -> str | None:
    """Return UTC without a zone, as the schema of JUnit files has it."""
    try:
        moment = datetime.datetime.fromisoformat(str(date))
    except ValueError:
        return None
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="seconds")


def _properties(result: EvalResult) -> Iterator[tuple[str, Any]]:
    yield from result.metrics.items()
    for name, (low, high) in result.intervals.items():
        yield f"{name} 95 % low", low
        yield f"{name} 95 % high", high
    yield "n", result.n
    yield "n_reference", result.n_reference if result.n_reference is not None else "unstated"
    yield "pipeline", result.pipeline
    yield from flat(result.provenance)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of nested tables as ("versions.torch", "2.13.0")."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _summary_line(result: EvalResult) -> str:
    shown = (f"{name} {format_value(name, value)}" for name, value in result.metrics.items())
    return f"{', '.join(shown)} ({result.n} images; {result.pipeline})"


def markdown(result: EvalResult, baseline: EvalResult | None = None) -> str:
    """Return the summary of a result: verdicts, metrics, what differs, provenance."""
    source = code(result.provenance.get("model") or result.provenance.get("images") or "images")
    facts = [source, *map(prose, described(result)), code(result.pipeline)]
    blocks = [f"## {_headline(result)}", ", ".join(facts)]
    if result.gates:
        rows = [
            (
                "passed" if gate.passed else "**failed**",
                code(gate.name),
                code(gate.condition),
                prose(gate.reason),
            )
            for gate in result.gates
        ]
        blocks.append(table(("verdict", "gate", "condition", "why"), rows))
    if result.warnings:
        lines = (f"> - {prose(text)}" for text in result.warnings)
        blocks.append("> **Warnings**\n" + "\n".join(lines))
    blocks.append(_metrics_table(result, baseline))
    if baseline is not None and (changed := differences(result, baseline)):
        others = [(code(key), code(new), code(old)) for key, new, old in changed]
        blocks.append(details("What else differs", table(("", "now", "before"), others)))
    if result.per_class:
        name = result.distance_name
        largest = sorted(result.per_class.items(), key=_by_distance)[:MOST_CLASSES]
        found = result.recognised
        classes = [
            (code(key), format_value(name, value), *([share(found[key])] if found else ()))
            for key, value in largest
        ]
        header = ("class", code(name), *(["recognised"] if found else ()))
        title = f"Distance by class: the {len(classes)} largest of {len(result.per_class)}"
        blocks.append(details(title, table(header, classes)))
    origins = [(code(key), code(value)) for key, value in origin(result).items()]
    blocks.append(details("Provenance", table(("", ""), origins)))
    return "\n\n".join(blocks) + "\n"


def origin(result: EvalResult) -> dict[str, Any]:
    """Return how a result came about, as flat facts."""
    return {
        "number of images": result.n,
        "images of the reference": result.n_reference or "unstated",
        "pipeline": result.pipeline,
        **dict(flat(result.to_dict()["provenance"])),
    }


def differences(result: EvalResult, baseline: EvalResult) -> list[tuple[str, Any, Any]]:
    """Return (key, now, before) for each fact of the provenance that two results do not share."""
    now, before = dict(flat(result.to_dict()["provenance"])), dict(flat(baseline.provenance))
    own = {"command", "date", "seconds"}  # of each run its own
    return [
        (key, now.get(key, "unstated"), before.get(key, "unstated"))
        for key in {**now, **before}
        if now.get(key) != before.get(key) and key not in own
    ]


def verdict(result: EvalResult) -> str:
    """Return "passed", "failed 1 of 2 gates" or "no gates"."""
    failed = sum(not gate.passed for gate in result.gates)
    if not result.gates:
        return "no gates" if result.passed else "failed"
    if result.passed:
        return "passed" if len(result.gates) == 1 else f"passed {len(result.gates)} gates"
    # A distance that is not a number fails a run whose gates are all on other metrics.
    return f"failed {failed} of {len(result.gates)} gates" if failed else "failed"


def _headline(result: EvalResult) -> str:
    mark = "\N{WHITE HEAVY CHECK MARK}" if result.passed else "\N{CROSS MARK}"
    value = format_value(result.distance_name, result.distance)
    name = code(result.distance_name) if result.distance_name != "FID" else "FID"
    return f"{mark} {name} {value}: {verdict(result)}"


def described(result: EvalResult) -> list[str]:
    """Return what was scored and how, in a few words each."""
    facts = result.provenance
    parts = [f"{result.n:,} images"]
    if result.n_reference is not None:
        parts.append(f"{result.n_reference:,} in the reference")
    if facts.get("sampler") is not None:
        parts.append(f"{facts['sampler']}, {facts.get('steps')} steps")
        parts.append(f"cfg {facts.get('cfg_scale')}")
        if facts.get("eps_scale", 1) != 1:
            parts.append(f"eps scale {facts['eps_scale']}")
    if facts.get("activations") is not None:
        parts.append(f"activations {facts['activations']}")
    return parts


def _metrics_table(result: EvalResult, baseline: EvalResult | None) -> str:
    header = ["metric", "value", "95 % interval"]
    header += ["before", "change"] if baseline is not None else []
    rows = []
    for name, value in result.metrics.items():
        interval = result.intervals.get(name)
        row = [code(name), format_value(name, value)]
        row.append(format_interval(name, interval) if interval is not None else "")
        if baseline is not None:
            old = baseline.metrics.get(name)
            row.append("" if old is None else format_value(name, old))
            row.append("" if old is None else describe_change(name, value, old))
        rows.append(row)
    return table(header, rows)


def describe_change(metric: str, new: float, old: float) -> str:
    """Return "+3.2 %, worse", "0 %" or "" where a share of the old value says nothing."""
    change = relative_change(new, old)
    if change is None:
        return ""
    if new == old:
        return "0 %"
    if metric.endswith("standard error"):
        return f"{100 * change:+.1f} %"
    return f"{100 * change:+.1f} %, {'worse' if is_worse(metric, new, old) else 'better'}"


def _by_distance(item: tuple[str, float]) -> tuple[bool, float]:
    """Sort what is not a number first, then the largest."""
    return (item[1] == item[1], -item[1])
