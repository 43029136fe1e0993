"""The HTML page: nothing from outside, nothing unescaped, and it renders in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.evaluate.gate import apply_limits, make_limits
from terdit_cli.evaluate.neighbours import check_neighbours, cover
from terdit_cli.evaluate.plots import curve_plot, precision_recall_plot
from terdit_cli.evaluate.report import (
    Neighbours,
    Pair,
    classes_to_show,
    samples_of_class,
    write_report,
)
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.report.figures import HEIGHT, WIDTH, Plot
from terdit_cli.report.markdown import clean

RANDOM = np.random.default_rng(0)
HOSTILE = "</style><script>alert(1)</script>\"'&amp; \0\ud800\u202e`|${x}<!--"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"br", "img", "link", "meta"}


def image(size: int = 28) -> np.ndarray:
    return RANDOM.integers(0, 256, (size, size, 3), dtype=np.uint8)


def make(**changes: Any) -> EvalResult:
    name = changes.get("distance_name", "FID")
    values: dict[str, Any] = {
        "distance_name": name,
        "metrics": {
            name: 11.63, "sFID": 6.4, "IS": 4.5, "precision": 0.73, "recall": 0.58,
            "KID": 0.004, "KID standard error": 0.0002, f"{name} infinity": 11.2,
        },
        "n": 50000,
        "n_reference": 10000,
        "pipeline": "adm@b31f8cc2 tf-bilinear 299",
        "intervals": {name: (11.4, 11.9)},
        "per_class": {f"class {index}": 20.0 + index for index in range(10)},
        "curve": [(5000, 15.3), (10000, 13.2), (20000, 12.2), (50000, 11.6)],
        "provenance": {
            "model": "runs/model.tdt", "model_sha256": "a" * 64, "config": {"dim": 384},
            "sampler": "ddpm", "steps": 250, "cfg_scale": 1.5, "seed": 0,
            "date": "2026-11-23T04:00:00+00:00", "command": ["terdit", "eval-fid", "-n", "50000"],
        },
        "warnings": ["a warning"],
    }  # fmt: skip
    return EvalResult(**(values | changes))


def full(path: Path, result: EvalResult, text: str = "class", size: int = 28) -> Path:
    """Write a page with every section, `text` wherever a text can come from outside."""
    real = RANDOM.normal(size=(60, 8))
    fake = RANDOM.normal(size=(50, 8))
    check = check_neighbours(real, fake)
    pairs = [Pair(image(size), image(size), 1.5, text, text), Pair(image(size), None, 0.0)]
    images = {f"{text} {index}": [image(size) for _ in range(10)] for index in range(4)}
    gated = apply_limits(result, make_limits(max_distance=11.5, min_score=4.0))
    neighbours = Neighbours(check, pairs, pairs)
    write_report(path, gated, images, neighbours, cover(real, fake), make())
    return path


class Page(HTMLParser):
    """A page's elements, checked for balance while they are read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_page(page: Page) -> None:
    """Check what holds of every page."""
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for attributes in page.all("img"):
        assert attributes["alt"]
        assert int(attributes["width"] or 0) > 0
        assert int(attributes["height"] or 0) > 0
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("style", "srcset")
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert str(value).startswith("data:" if name != "href" else ("data:", "#"))
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden")
               for attributes in page.all("svg"))  # fmt: skip
    headings = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert headings[0] == 1
    assert headings.count(1) == 1


def test_the_page_has_every_section(tmp_path: Path) -> None:
    page = read(full(tmp_path / "report.html", make()))
    check_page(page)
    text = " ".join(" ".join(page.text).split())
    for words in (
        "runs/model.tdt", "Failed 1 of 2 gates", "11.63", "95 %: 11.40 to 11.90",
        "FID 11.63 is above the limit of 11.50", "IS 4.50 is not below", "a warning", "Samples",
        "FID over the number of images", "Precision and recall", "Feature space",
        "Memorisation check", "The closest of all", "distance 0 (a copy)", "FID by class",
        "Provenance", "a" * 64, "Configuration of the network", "standard error 0.0002",
        "terdit eval-fid -n 50000", "before 11.63, 0 %",
    ):  # fmt: skip
        assert words in text, words
    assert len(list(page.all("img"))) == 40 + 6


def test_the_policy_allows_the_page_s_own_style_only(tmp_path: Path) -> None:
    source = full(tmp_path / "report.html", make()).read_text(encoding="utf-8")
    (style,) = re.findall(r"(?s)<style>(.*?)</style>", source)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = (
        attributes["content"]
        for attributes in Page(source).all("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    provenance = {
        "model": HOSTILE, HOSTILE: HOSTILE, "config": {HOSTILE: HOSTILE}, "command": HOSTILE,
        "sampler": HOSTILE, "date": HOSTILE, "activations": HOSTILE,
    }  # fmt: skip
    result = make(
        distance_name=f"fd-{HOSTILE}",
        pipeline=HOSTILE,
        provenance=provenance,
        warnings=[HOSTILE],
        per_class={HOSTILE: 1.0, f"{HOSTILE} 1": 2.0},
    )
    path = full(tmp_path / "report.html", result, HOSTILE)
    page = read(path)
    check_page(page)
    source = path.read_text(encoding="utf-8")
    assert "<script" not in source
    assert source.count("</style>") == 1
    assert not re.search("[\0\ud800\u202e]", source)
    assert clean(HOSTILE) in "".join(page.text)
    assert any(clean(HOSTILE) in (attributes["alt"] or "") for attributes in page.all("img"))


def test_a_small_result_gives_a_small_page(tmp_path: Path) -> None:
    result = EvalResult("fd-lite0", {"fd-lite0": 0.4123}, 500, None, "lite0")
    write_report(tmp_path / "a.html", result)
    page = read(tmp_path / "a.html")
    check_page(page)
    text = " ".join(page.text)
    assert "No gates" in text
    assert "0.4123" in text
    for absent in ("Samples", "Gates", "Fidelity", "Nearest", "by class"):
        assert absent not in text
    write_report(tmp_path / "b.html", result, {"": [image(), image()], "none": []})
    page = read(tmp_path / "b.html")
    assert [attributes["alt"] for attributes in page.all("img")] == ["sample, 1", "sample, 2"]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    nan, infinity = math.nan, math.inf
    result = make(
        metrics={"FID": nan, "IS": -infinity, "precision": nan, "recall": 0.5, "KID": infinity},
        curve=[(10, nan), (20, infinity), (30, 1.0), (40, 2.0)],
        per_class={"a": nan, "b": 1.0, "c": infinity},
        intervals={"FID": (nan, infinity)},
    )
    path = full(tmp_path / "report.html", result)
    page = read(path)
    check_page(page)
    text = " ".join(page.text)
    assert "Failed 2 of 2 gates" in text
    assert "FID is not a number, which passes no gate" in text
    plots = re.findall(r"(?s)<svg.*?</svg>", path.read_text(encoding="utf-8"))
    assert len(plots) > 5
    for plot in plots:
        values = [value for e in ET.fromstring(plot).iter() for value in e.attrib.values()]
        assert not any(re.search(r"\bnan\b|\binf", value) for value in values)


def test_many_classes_are_spread(tmp_path: Path) -> None:
    names = [f"c{index}" for index in range(1000)]
    assert classes_to_show(names) == [f"c{index}" for index in range(0, 1000, 50)]
    assert classes_to_show(names[:3]) == names[:3]
    assert [samples_of_class(count) for count in (0, 1, 5, 10, 20, 1000)] == [
        40,
        40,
        40,
        20,
        10,
        10,
    ]
    result = make(per_class={name: float(index) for index, name in enumerate(names)})
    write_report(tmp_path / "r.html", result, {name: [image(8)] * 30 for name in names})
    page = read(tmp_path / "r.html")
    check_page(page)
    assert len(list(page.all("img"))) == 20 * 10
    text = " ".join(page.text)
    assert "20 of 1,000 classes" in text
    assert "The 10 largest and the 10 smallest of 1,000" in text
    assert len(list(page.all("dt"))) == 20


@pytest.mark.parametrize("size", [64, 256])
def test_the_size_is_bounded(tmp_path: Path, size: int) -> None:
    """Noise, which compresses worst: the most classes and samples, in PNG and in JPEG."""
    images = {str(index): [image(size) for _ in range(10)] for index in range(20)}
    pairs = [Pair(image(size), image(size), 1.0)] * 20
    check = check_neighbours(RANDOM.normal(size=(3000, 4)), RANDOM.normal(size=(3000, 4)))
    shown = cover(RANDOM.normal(size=(3000, 4)), RANDOM.normal(size=(3000, 4)), most=500)
    path = tmp_path / "report.html"
    provenance = {"command": "x" * 1_000_000}
    neighbours = Neighbours(check, pairs, pairs)
    write_report(path, make(provenance=provenance), images, neighbours, shown)
    assert path.stat().st_size < 5e6


def circles(plot: Plot | None) -> dict[str, tuple[float, float]]:
    """Return the places of a plot's markers by what they say."""
    assert plot is not None
    found = {}
    for node in ET.fromstring(plot.drawing).iter("use"):
        if (text := node.findtext("title")) is not None:
            found[text] = float(node.get("x", "")), float(node.get("y", ""))
    return found


def test_curves() -> None:
    assert curve_plot("FID", [], math.nan, None) is None
    assert curve_plot("FID", [(10, 1.0), (20, math.nan)], 1.0, None) is None
    assert curve_plot("FID", [(10, 1.0), (10, 1.1)], 1.0, None) is None
    # A constant curve, one point twice, no extrapolation, a limit far outside: all drawn.
    for curve, infinity, limit in (
        ([(10, 1.0), (20, 1.0)], 1.0, 1.0),
        ([(10, 0.0), (20, 0.0), (20, 0.0)], math.nan, 1e9),
        ([(2, 1e-9), (50_000, 3e-9)], math.nan, None),
        ([(100, 1e9), (200, 5e8)], -1e9, 5e8),
    ):
        found = circles(curve_plot("FID", curve, infinity, limit))
        for x, y in found.values():
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
        assert any("extrapolated" in text for text in found) == math.isfinite(infinity)


def test_the_line_goes_through_the_points_it_was_fitted_to() -> None:
    curve = [(n, 5 + 1000 / n) for n in (100, 200, 400, 1000)]
    plot = curve_plot("FID", curve, 5.0, None)
    assert plot is not None
    (fit,) = (e for e in ET.fromstring(plot.drawing).iter("path") if e.get("stroke-dasharray"))
    x1, y1, x2, y2 = map(float, re.findall(r"[0-9.]+", fit.get("d", "")))
    for x, y in circles(plot).values():
        assert y == pytest.approx(y1 + (y2 - y1) / (x2 - x1) * (x - x1), abs=0.2)


def test_precision_and_recall_are_where_they_are_said_to_be() -> None:
    places = circles(precision_recall_plot((1.0, 0.0), (0.0, 1.0)))
    new = places["precision 1.000, recall 0.000"]
    old = places["before: precision 0.000, recall 1.000"]
    assert new[0] < old[0]
    assert new[1] < old[1]  # up is smaller
    assert old[0] - new[0] == pytest.approx(old[1] - new[1])  # the square is one
    assert precision_recall_plot((math.nan, 0.5), None) is None


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot write.*file.*Fix"):
        write_report(tmp_path / "file" / "r.html", make())


PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const widths = %s, found = [];
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const images = [...page.images];
    found.push({
      width, scroll: root.scrollWidth, height: root.scrollHeight,
      images: images.length, broken: images.filter(i => !i.naturalWidth).length,
      wide: [...page.querySelectorAll("main *")].filter(
        e => e.getBoundingClientRect().right > width + 1 && !e.closest(".scroll, svg")
      ).map(e => e.className || e.tagName),
      card: getComputedStyle(page.querySelector(".card")).borderTopLeftRadius,
      requests: frame.contentWindow.performance.getEntriesByType("resource")
        .map(e => e.name).filter(name => !name.startsWith("data:")),
    });
    if (found.length === widths.length) document.body.textContent = JSON.stringify(found);
  };
  frame.src = "report.html";
  document.body.append(frame);
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
@pytest.mark.parametrize("text", ["class", "W" * 300])
def test_a_browser_renders_it(tmp_path: Path, text: str) -> None:
    result = make(provenance={**make().provenance, "model": text, text: text}, pipeline=text)
    full(tmp_path / "report.html", result, text)
    widths = [320, 390, 800, 1200]
    (tmp_path / "probe.html").write_text(PROBE % widths)
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
            "--enable-logging=stderr", "--window-size=1300,900",
            "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line] == []
    body = re.search(r"(?s)<body>(.*)</body>", done.stdout.decode())
    assert body is not None
    found = {entry["width"]: entry for entry in json.loads(html.unescape(body[1]))}
    assert sorted(found) == widths
    for width, entry in found.items():
        assert entry["scroll"] <= width, entry
        assert entry["wide"] == []
        assert (entry["images"], entry["broken"]) == (46, 0)
        assert entry["card"] == "12px"  # the style sheet was let in
        assert entry["requests"] == []
    assert found[390]["height"] > found[1200]["height"] > 1500
