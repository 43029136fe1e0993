"""JUnit XML and Markdown: what a CI server and a reviewer read, whatever the texts hold."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.evaluate.result import EvalResult, Gate
from terdit_cli.evaluate.summary import (
    differences,
    flat,
    junit,
    markdown,
    verdict,
    write_junit,
    write_markdown,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "]]><x/>&amp;\"'",
    "a | b || c\\|d",
    "`code` ``two`` `",
    "line\nbreak\r\n\ttab",
    "\0\x1b[31m\ud800\ufffe\u202egnp.exe",
    "*bold* _it_ [link](http://evil) ![i](x) @team #12 <!-- -->",
    "</details></summary>",
    "",
]


def make(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "distance_name": "FID",
        "metrics": {"FID": 10.0, "IS": 100.0, "KID": 0.001, "KID standard error": 0.0002},
        "n": 50000,
        "n_reference": 10000,
        "pipeline": "adm@b31f8cc2",
        "intervals": {"FID": (9.5, 10.5)},
        "gates": [
            Gate("--max-fid", "FID", 10.0, 12.0, "<=", True, "FID 10.00 is within"),
            Gate("--min-is", "IS", 100.0, 120.0, ">=", False, "IS 100.00 is below"),
        ],
        "provenance": {
            "model": "model.tdt",
            "date": "2026-11-23T04:00:00+02:00",
            "seconds": 12.5,
            "versions": {"torch": "2.13.0"},
            "images": None,
        },
        "warnings": ["careful"],
    }
    return EvalResult(**(values | changes))


def hostile(text: str) -> EvalResult:
    return make(
        distance_name=f"fd-{text}",
        metrics={f"fd-{text}": 1.0},
        pipeline=text,
        per_class={text: 3.0},
        gates=[Gate("--max-fid", f"fd-{text}", 1.0, 0.5, "<=", False, f"{text} is above")],
        provenance={"model": text, text: text, "sampler": text, "steps": text},
        warnings=[text],
    )


def check_junit(text: str) -> ET.Element:
    """Check what every reader relies on, and return the suite."""
    root = ET.fromstring(text.encode())
    (suite,) = root
    cases = suite.findall("testcase")
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert [child.tag for child in suite] == [
        "properties", *["testcase"] * len(cases), "system-out",
    ]  # fmt: skip
    failures = suite.findall("testcase/failure")
    for element in (root, suite):
        assert element.get("tests") == str(len(cases))
        assert element.get("failures") == str(len(failures))
        assert element.get("errors") == "0"
        assert float(element.get("time", "")) >= 0
    for case in cases:
        assert case.get("name")
        assert case.get("classname")
        assert float(case.get("time", "")) >= 0
    assert len({case.get("name") for case in cases}) == len(cases)
    return suite


def test_each_gate_is_a_test_case() -> None:
    suite = check_junit(junit(make()))
    first, second = suite.findall("testcase")
    assert first.get("name") == "FID <= 12.00"
    assert first.find("failure") is None
    assert second.get("name") == "IS >= 120.00"
    failure = second.find("failure")
    assert failure is not None
    assert failure.get("message") == "IS 100.00 is below"
    assert failure.text is not None
    assert "FID 10.00, IS 100.00, KID 0.001" in failure.text
    assert suite.get("timestamp") == "2026-11-23T02:00:00"
    assert suite.get("time") == "12.500"


def test_metrics_and_provenance_are_properties() -> None:
    suite = check_junit(junit(make()))
    found = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert found == {
        "FID": "10.0",
        "IS": "100.0",
        "KID": "0.001",
        "KID standard error": "0.0002",
        "FID 95 % low": "9.5",
        "FID 95 % high": "10.5",
        "n": "50000",
        "n_reference": "10000",
        "pipeline": "adm@b31f8cc2",
        "model": "model.tdt",
        "date": "2026-11-23T04:00:00+02:00",
        "seconds": "12.5",
        "versions.torch": "2.13.0",
    }


@pytest.mark.parametrize(("value", "failures"), [(10.0, 0), (math.nan, 1), (math.inf, 1)])
def test_a_run_without_gates_is_one_test_case(value: float, failures: int) -> None:
    suite = check_junit(junit(make(metrics={"FID": value}, gates=[])))
    assert len(suite.findall("testcase")) == 1
    assert len(suite.findall("testcase/failure")) == failures


@pytest.mark.parametrize("text", HOSTILE)
def test_junit_is_well_formed_whatever_it_says(text: str) -> None:
    suite = check_junit(junit(hostile(text)))
    kept = "".join(c for c in text if c.isalnum())
    value = suite.find("properties/property[@name='pipeline']")
    assert value is not None
    assert "".join(c for c in value.get("value", "") if c.isalnum()) == kept.replace("\ud800", "")


@pytest.mark.parametrize("provenance", [{}, {"seconds": "x", "date": "today"}, {"seconds": -1}])
def test_junit_without_time_and_date(provenance: dict[str, Any]) -> None:
    suite = check_junit(junit(make(provenance=provenance)))
    assert suite.get("timestamp") is None
    assert suite.get("time") == "0.000"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def check_tables(text: str) -> None:
    """Check that every table's rows have as many cells as its header."""
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
        elif width is None:
            width = line.count("|")
        else:
            assert line.count("|") == width, line


def test_the_verdict_comes_first() -> None:
    lines = markdown(make()).splitlines()
    assert lines[0] == "## \N{CROSS MARK} FID 10.00: failed 1 of 2 gates"
    assert lines[2] == "`model.tdt`, 50,000 images, 10,000 in the reference, `adm@b31f8cc2`"
    assert cells(lines[4]) == ["verdict", "gate", "condition", "why"]
    assert cells(lines[6])[:3] == ["passed", "`--max-fid`", "`FID <= 12.00`"]
    assert cells(lines[7])[:3] == ["**failed**", "`--min-is`", "`IS >= 120.00`"]


def test_the_metrics_stand_beside_the_earlier_ones() -> None:
    text = markdown(make(), make(metrics={"FID": 8.0, "IS": 100.0}))
    check_tables(text)
    assert "| metric | value | 95 % interval | before | change |" in text
    assert "| `FID` | 10.00 | 9.50 to 10.50 | 8.00 | +25.0 %, worse |" in text
    assert "| `IS` | 100.00 |  | 100.00 | 0 % |" in text
    assert "| `KID` | 0.001 |  |  |  |" in text
    alone = markdown(make())
    check_tables(alone)
    assert "| metric | value | 95 % interval |" in alone


def test_what_else_differs_is_listed() -> None:
    before = make(
        provenance={"model": "old.tdt", "date": "other", "seconds": 1, "config": {"dim": 2}}
    )
    assert differences(make(), before) == [
        ("model", "model.tdt", "old.tdt"),
        ("versions.torch", "2.13.0", "unstated"),
        ("config.dim", "unstated", 2),
    ]
    text = markdown(make(), before)
    assert "| `model` | `model.tdt` | `old.tdt` |" in text
    assert "What else differs" not in markdown(make(), make())


def test_details_can_be_read_as_markdown() -> None:
    text = markdown(make(per_class={f"c{i}": float(i) for i in range(30)}))
    assert text.count("<details>") == text.count("</details>") == 2
    for summary in re.finditer(r"</summary>", text):
        assert text[summary.end() :].startswith("\n\n|")
    assert "the 20 largest of 30" in text
    assert "| `c29` | 29.00 |" in text
    assert "`c9`" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_texts_and_does_not_run_them(text: str) -> None:
    page = markdown(hostile(text), hostile("other"))
    check_tables(page)
    page.encode()  # UTF-8 holds it
    # Outside of code spans there is no HTML but ours, no link and no mention.
    bare = re.sub(r"(?s)(`+)(?!`).*?(?<!`)\1(?!`)", "", page)
    bare = re.sub(r"\\.", "", bare)
    ours = {"details", "/details", "summary", "/summary", "!-- --"}
    assert set(re.findall(r"<([^>]*)>", bare)) <= ours
    assert "](" not in bare
    assert not re.search(r"[@#]\w", bare)
    assert "://" not in bare
    assert page.count("<details>") - text.count("<details>") >= 2


def test_the_number_of_images_stands_beside_their_place() -> None:
    text = markdown(make(provenance={"images": "samples.npz"}))
    assert "| `number of images` | `50000` |" in text
    assert "| `images` | `samples.npz` |" in text


def test_verdicts() -> None:
    good, bad = make().gates
    assert verdict(make()) == "failed 1 of 2 gates"
    assert verdict(make(gates=[good])) == "passed"
    assert verdict(make(gates=[good, good])) == "passed 2 gates"
    assert verdict(make(gates=[bad])) == "failed 1 of 1 gates"
    assert verdict(make(gates=[])) == "no gates"
    assert verdict(make(gates=[], metrics={"FID": math.nan})) == "failed"
    assert list(flat({"a": {"b": {"c": 1}}, "d": None, "e": 0})) == [("a.b.c", 1), ("e", 0)]


def test_classes_without_a_distance_come_first() -> None:
    text = markdown(make(per_class={"a": 1.0, "b": math.nan, "c": 2.0}))
    assert text.index("`b` | not a number") < text.index("`c` | 2.00") < text.index("`a` | 1.00")


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_junit(tmp_path / "a" / "junit.xml", make())
    write_markdown(tmp_path / "a" / "summary.md", make(), make())
    assert (tmp_path / "a" / "junit.xml").read_text(encoding="utf-8") == junit(make())
    assert (tmp_path / "a" / "summary.md").read_text(encoding="utf-8") == markdown(make(), make())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["junit.xml", "summary.md"]
    (tmp_path / "file").write_text("")
    for write in (write_junit, write_markdown):
        with pytest.raises(EnvironmentProblem, match=r"cannot write.*file.*Fix"):
            write(tmp_path / "file" / "x", make())
