"""One self-contained HTML page of an evaluation: numbers, verdicts, samples, pictures, origin.

The page asks for nothing: images are data URIs, pictures are inline SVG, there is no script, and
its own Content-Security-Policy forbids all else (the style sheet is allowed by its hash). It
follows the reader's light or dark theme, and has a size for phones and one for paper.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from terdit_cli.evaluate.markup import Image, Markup, element, join, whole_page
from terdit_cli.evaluate.neighbours import Coverage
from terdit_cli.evaluate.panels import (
    Neighbours,
    distances_by_class,
    nearest_reals,
    pictures,
    samples,
)
from terdit_cli.evaluate.result import EvalResult, Gate, format_interval, format_value
from terdit_cli.evaluate.summary import describe_change, differences, flat, verdict
from terdit_cli.system.atomic import atomic_path

_LONGEST_TEXT = 4000  # characters of one value of the provenance

_SIGNS = {"<=": "\N{LESS-THAN OR EQUAL TO}", ">=": "\N{GREATER-THAN OR EQUAL TO}"}
_MEANINGS = {
    "sFID": "spatial features; lower is better",
    "IS": "Inception Score; higher is better",
    "precision": "samples that look real; higher is better",
    "recall": "reals that samples reach; higher is better",
    "KID": "kernel distance; lower is better",
}


def write_report(
    path: Path,
    result: EvalResult,
    images_by_class: Mapping[str, Sequence[Image]] | None = None,
    neighbours: Neighbours | None = None,
    coverage: Coverage | None = None,
    baseline: EvalResult | None = None,
) -> None:
    """Write the page.

    Args:
        images_by_class: samples, uint8 [H, W, 3]; one class named "" where they have none. What is
            beyond `classes_to_show` and `samples_of_class` is left out.
        baseline: an earlier result, shown beside this one.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    text = page(result, images_by_class or {}, neighbours, coverage, baseline)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def page(
    result: EvalResult,
    images_by_class: Mapping[str, Sequence[Image]],
    neighbours: Neighbours | None,
    coverage: Coverage | None,
    baseline: EvalResult | None,
) -> str:
    """Return the page."""
    style = importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8")
    headline = f"{result.distance_name} {format_value(result.distance_name, result.distance)}"
    title = f"{headline}, {verdict(result)}: {_source(result)}"
    main = element(
        "main",
        _head(result),
        _cards(result, baseline),
        _gates(result),
        _warnings(result),
        samples(result, images_by_class),
        pictures(result, coverage, baseline),
        nearest_reals(neighbours),
        distances_by_class(result),
        _origin(result, baseline),
        element("footer", f"terdit eval-fid, {result.provenance.get('date', 'no date')}"),
    )
    return whole_page(title, style, main)


def _source(result: EvalResult) -> str:
    facts = result.provenance
    return str(facts.get("model") or facts.get("images") or "images")


def _head(result: EvalResult) -> Markup:
    facts = result.provenance
    items = [f"{result.n:,} images"]
    if result.n_reference is not None:
        items.append(f"{result.n_reference:,} in the reference")
    if facts.get("sampler") is not None:
        items.append(f"{facts['sampler']}, {facts.get('steps')} steps")
        items.append(f"cfg {facts.get('cfg_scale')}")
        if facts.get("eps_scale", 1) != 1:
            items.append(f"eps scale {facts['eps_scale']}")
    if facts.get("activations") is not None:
        items.append(f"activations {facts['activations']}")
    items.append(result.pipeline)
    kind = "" if result.passed and not result.gates else "good" if result.passed else "bad"
    badge = element("span", verdict(result).capitalize(), class_=f"badge {kind}".strip())
    title = element(
        "div",
        element("p", "terdit eval-fid", class_="eyebrow"),
        element("h1", _source(result)),
        element("ul", *(element("li", item) for item in items), class_="facts"),
    )
    return element("header", title, badge, class_="head")


def _cards(result: EvalResult, baseline: EvalResult | None) -> Markup:
    cards = []
    for name, value in result.metrics.items():
        if name == "KID standard error":  # part of the card of KID
            continue
        notes: list[object] = []
        if (interval := result.intervals.get(name)) is not None:
            notes.append(element("span", f"95 %: {format_interval(name, interval)}"))
        if name == "KID" and (error := result.metrics.get("KID standard error")) is not None:
            notes.append(f"standard error {format_value(name, error)}")
        if baseline is not None and (old := baseline.metrics.get(name)) is not None:
            notes.append(_before(name, value, old))
        notes.append(_meaning(result, name))
        chips = [_chip(gate) for gate in result.gates if gate.metric == name]
        first = " first" if name == result.distance_name else ""
        cards.append(
            element(
                "article",
                element("h3", name),
                element("p", format_value(name, value), class_="value"),
                *(element("p", note, class_="note") for note in notes),
                *chips,
                class_=f"card{first}",
            )
        )
    return element("div", *cards, class_="cards")


def _before(name: str, new: float, old: float) -> Markup:
    change = describe_change(name, new, old)
    kind = "bad" if change.endswith("worse") else "good" if change.endswith("better") else None
    words = element("span", change, class_=kind) if change else None
    return join(f"before {format_value(name, old)}", ", " if words else None, words)


def _meaning(result: EvalResult, name: str) -> str:
    if name == result.distance_name:
        return "distance to the reference; lower is better"
    if name == f"{result.distance_name} infinity":
        return "extrapolated to infinitely many images"
    return _MEANINGS.get(name, "")


def _chip(gate: Gate) -> Markup:
    word = "passed" if gate.passed else "failed"
    limit = f"{_SIGNS[gate.relation]} {format_value(gate.metric, gate.limit)}"
    return element("span", f"{limit} {word}", class_=f"chip {'good' if gate.passed else 'bad'}")


def _gates(result: EvalResult) -> Markup | None:
    if not result.gates:
        return None
    items = []
    for gate in sorted(result.gates, key=lambda gate: gate.passed):
        kind = "good" if gate.passed else "bad"
        chip = element("span", "passed" if gate.passed else "failed", class_=f"chip {kind}")
        limit = format_value(gate.metric, gate.limit)
        condition = f": {gate.metric} {_SIGNS[gate.relation]} {limit}"
        origin = element("p", element("code", gate.name), condition, class_="note")
        items.append(element("li", chip, element("p", gate.reason), origin))
    return element("section", element("h2", "Gates"), element("ul", *items, class_="gates"))


def _warnings(result: EvalResult) -> Markup | None:
    if not result.warnings:
        return None
    items = (element("li", text) for text in result.warnings)
    return element("div", element("ul", *items), class_="warnings", role="note")


def _origin(result: EvalResult, baseline: EvalResult | None) -> Markup:
    facts = result.to_dict()["provenance"]
    command, config = facts.pop("command", None), facts.pop("config", None)
    reference = "unstated" if result.n_reference is None else f"{result.n_reference:,}"
    rows: list[tuple[str, Any]] = [
        ("number of images", f"{result.n:,}"),
        ("images of the reference", reference),
        ("pipeline", result.pipeline),
        *flat(facts),
    ]
    parts = [element("h2", "Provenance"), element("div", _table(rows), class_="panel scroll")]
    if isinstance(config, Mapping):
        table = element("div", _table(list(flat(config))), class_="panel scroll")
        title = element("summary", "Configuration of the network")
        parts.append(element("details", title, table))
    if baseline is not None and (changed := differences(result, baseline)):
        head = element("tr", element("th"), element("th", "now"), element("th", "before"))
        body = (_row(*facts) for facts in changed)
        table = element("table", element("thead", head), element("tbody", *body))
        parts.append(element("h3", "What differs from the earlier run", class_="pairs-name"))
        parts.append(element("div", table, class_="panel scroll"))
    if command is not None:
        words = command if isinstance(command, str) else " ".join(map(str, command))
        parts.append(element("pre", element("code", _cut(words))))
    return element("section", *parts)


def _table(rows: Iterable[tuple[str, Any]]) -> Markup:
    return element("table", element("tbody", *(_row(*row) for row in rows)))


def _row(key: str, *values: Any) -> Markup:
    kind = "hash" if "sha256" in key else None
    cells = (element("td", _cut(value), class_=kind) for value in values)
    return element("tr", element("th", key), *cells)


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "..."
