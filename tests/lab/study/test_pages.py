"""The pages of invented findings: complete, recomputed here, safe, the same every time."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from terdit_cli.errors import InputFileError
from terdit_cli.lab.study import study_page
from terdit_cli.lab.study.collect import Findings, collect
from terdit_cli.lab.study.records import Folder, Training, model_asked, save
from terdit_cli.lab.study.spec import Study, load_study
from terdit_cli.report.figures import SERIES

Invent = Callable[[Study, Folder], None]


@pytest.fixture
def folder(tmp_path: Path, study: Study, invent: Invent) -> Folder:
    found = Folder(tmp_path / "runs" / study.name)
    invent(study, found)
    return found


def pages(
    study: Study, folder: Folder, out: Path, drawn: bool = False
) -> tuple[Findings, str, str]:
    """Return what was found, both Markdown files and the page; with figures only if `drawn`."""
    found = collect(study, folder)
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            for name in ("bars", "curves", "loss_against_distance", "sizes", "trits"):
                patch.setattr(study_page, name, lambda _: [])
        study_page.write_pages(out, [found])
    text = out.read_text() + out.with_name(f"{out.stem}-tables.md").read_text()
    return found, text, out.with_suffix(".html").read_text()


def figure(html: str, name: str) -> tuple[ET.Element, list[tuple[str, str, str]]]:
    """Return a figure of a page, and the colour, label and value of each of its marked points."""
    (drawing,) = re.findall(f'<svg class="figure"[^>]*aria-label="{name}:.*?</svg>', html)
    root, found = ET.fromstring(drawing), []
    for group in root.iter("g"):
        for title in (use.findtext("title") for use in group.findall("use")):
            if title is not None:
                label, _, value = title.rpartition(": ")
                found.append((group.get("fill", ""), label, value))
    return root, found


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_that_was_found_is_shown(study: Study, folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "results.md"
    found, text, html = pages(study, folder, out, drawn=True)
    assert found.missing == 0
    for variant in study.variants:
        assert variant.question in text
        assert variant.label in html
    for heading in ("At the last step", "Side by side", "What it costs", "copy its training"):
        assert heading in html
    figures = re.findall(r"\((results/[^)]+)\)", text)
    assert len(figures) == len(set(figures)) >= 6
    assert html.count('<svg class="figure"') >= 12
    assert {path.name for path in (out.parent / "results").iterdir()} == {
        name.partition("/")[2] for name in figures
    }
    for name in figures:
        assert (tmp_path / "docs" / name).stat().st_size > 0
    near = "ternary: median 30.5, least 12.5 (held-out images: 29.5, 13.5), 3 images among 1,000"
    assert near in text
    assert "terdit of ternary" in text  # a command
    assert "2026-01-01" in text


def test_the_headline_is_the_mean_of_the_ratios_seed_by_seed(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    ratios = []
    for seed in (0, 1):
        ours, theirs = (
            json.loads(
                folder.place(study.variant(name), seed).score(40, 2.0, 40).read_text()
            )["evaluation"]["metrics"]["fd-efficientnet-lite0"]
            for name in ("ternary", "baseline")
        )  # fmt: skip
        ratios.append(ours / theirs)
    ratio = found.ratio("ternary", 2.0)
    assert ratio is not None
    assert ratio.mean == pytest.approx(sum(ratios) / 2)
    assert f"CFG scale 2 {ratio.mean:.3f}" in found.verdict
    assert "met" in found.verdict
    row = next(line for line in text.splitlines() if line.startswith("| **ternary**"))
    distance = found.distance("ternary", 2.0)  # of the first table
    assert distance is not None
    assert f"| **{distance.mean:.1f} ({distance.spread})** | **{ratio.mean:.3f}** |" in row


def test_the_headline_may_have_more_images_than_the_rest(
    study: Study, tmp_path: Path, invent: Invent
) -> None:
    values = study.model_dump()
    values["headline"]["n"] = 90
    study, folder = Study.model_validate(values), Folder(tmp_path / "runs" / study.name)
    assert study.images_at(study.variant("ternary"), 40) == (20, 40, 90)
    assert study.images_at(study.variant("no-norm"), 40) == (20, 40)
    invent(study, folder)
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    many, few = found.ratio("ternary", 2.0, 90), found.ratio("ternary", 2.0)
    assert many is not None
    assert few is not None
    assert few.mean == pytest.approx(many.mean)  # the invented bias is the same for both
    ours = found.distance("ternary", 2.0, 90)
    assert ours is not None
    assert ours.mean < found.distance("ternary", 2.0).mean  # type: ignore[union-attr]
    assert "of 90 images" in found.verdict
    assert "The headline's pair with 90 images" in text
    assert found.missing == 0


def test_other_pairs_have_their_own_ratio_and_goal(
    study: Study, tmp_path: Path, invent: Invent
) -> None:
    values = study.model_dump()
    values["headline"]["n"] = 90
    values["also"] = [
        {"ternary": "no-norm", "baseline": "ternary", "again": "baseline", "goal": 0.5}
    ]
    study, folder = Study.model_validate(values), Folder(tmp_path / "runs" / study.name)
    assert study.images_at(study.variant("no-norm"), 40) == (20, 40, 90)
    invent(study, folder)
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    ratio = found.ratio("no-norm", 2.0, 90, "ternary")
    assert ratio is not None
    first, second = found.verdict.split(". fd")
    assert "ternary : baseline (goal at most 1.1)" in first
    assert "no-norm : ternary (goal at most 0.5)" in second
    assert f"CFG scale 2 {ratio.mean:.3f}" in second
    assert second.endswith(", not met")
    row = next(line for line in text.splitlines() if "no-norm : ternary, CFG scale 2" in line)
    assert f"| {ratio.mean:.3f} |" in row
    longer = found.ratio("no-norm", 2.0, 40, "baseline")
    assert longer is not None
    row = next(line for line in text.splitlines() if "no-norm : baseline, CFG scale 2" in line)
    assert f"| {longer.mean:.3f} |" in row
    _, few, _, many = re.split("### At the last step|The pairs with 90 images", text)
    label = study.variant("no-norm").label
    for part, baseline in ((few, "baseline"), (many, "ternary")):  # of the headline; its own
        shown = found.ratio("no-norm", 2.0, 90 if baseline == "ternary" else None, baseline)
        assert shown is not None
        guided = part[part.index("| CFG scale 2 |") :]
        row = next(line for line in guided.splitlines() if line.startswith(f"| **{label}** |"))
        assert f"| **{shown.mean:.3f}** |" in row
    assert found.missing == 0


def test_a_variant_initialised_from_another_names_it(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    _, text, _ = pages(with_warm(study), folder, tmp_path / "r.md")
    row = next(line for line in text.splitlines() if line.startswith("| initialised from it |"))
    label = study.variant("baseline").label
    assert f"train.init_from=ckpt.pt of {label}" in row
    assert row.endswith("| 40 + 40 |")


@pytest.mark.parametrize("option", ["train.init_from", "distill.teacher"])
def test_the_command_of_a_variant_after_another_names_its_checkpoint(
    study: Study, tmp_path: Path, invent: Invent, option: str
) -> None:
    changed, folder = with_warm(study, option), Folder(tmp_path / "runs")
    invent(changed, folder)
    path = folder.place(changed.variant("warm"), 0).training
    record = json.loads(path.read_text())
    record["command"] = f"terdit train x.yaml {option}=runs/baseline.pt name=small-warm"
    path.write_text(json.dumps(record))
    _, text, _ = pages(changed, folder, tmp_path / "r.md")
    line = next(line for line in text.splitlines() if f"name={changed.name}-warm" in line)
    assert f"{option}=runs/baseline.pt" in line
    assert "$after" not in line


def with_warm(study: Study, option: str = "train.init_from", **headline: str) -> Study:
    values = study.model_dump()
    warm = {
        "name": "warm",
        "label": "initialised from it",
        "question": "Does it help?",
        "after": "baseline",
    }
    values["variants"] += ({**warm, "overrides": (f"{option}=$after",)},)
    values["headline"] |= headline
    return Study.model_validate(values)


def test_a_ratio_at_unequal_steps_is_not_simply_met(
    study: Study, tmp_path: Path, invent: Invent
) -> None:
    again = with_warm(study, ternary="warm", again="ternary")
    folder = Folder(tmp_path / "runs" / study.name)
    invent(again, folder)
    found, text, html = pages(again, folder, tmp_path / "r.md", drawn=True)
    assert "CFG scale 2 1.020, met in 80 steps in all : 40" in found.verdict
    assert "goal at most 1.1, met in 80 steps in all : 40" in text
    assert "chip good" not in html
    row = next(line for line in text.splitlines() if "baseline as long, CFG scale 2" in line)
    assert f"| {1.02 / 1.06:.3f} |" in row
    assert "| **12.0s + 12.0s** |" in text  # the time of both trainings
    root, _ = figure(html, "small--distance-0-cfg-2")
    assert "80" in [text.text for text in root.iter("text")]  # where the baseline's ended


@pytest.mark.slow
def test_a_line_joins_the_ends_of_trainings(study: Study, tmp_path: Path, invent: Invent) -> None:
    values = with_warm(study).model_dump()
    values["lines"] = ({"title": "Ends", "variants": (("baseline", "warm"), "ternary")},)
    joined, folder = Study.model_validate(values), Folder(tmp_path / "runs" / study.name)
    invent(joined, folder)
    _, text, html = pages(joined, folder, tmp_path / "r.md", drawn=True)
    assert "**Ends, CFG scale 2.**" in text
    _, found = figure(html, "small--distance-0-cfg-2")
    points = [(label, value.partition(" at ")[2]) for _, label, value in found]
    baseline, ternary = study.variant("baseline").label, study.variant("ternary").label
    halfway = [(ternary, f"{step:.1f}") for step in study.steps_of(study.variant("ternary"))]
    assert points == [(baseline, "40.0"), (baseline, "80.0"), *halfway]
    assert (tmp_path / "r" / "small--distance-0-cfg-2.svg").exists()


def test_the_warning_of_one_seed_is_of_what_is_there(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    assert "One seed of 2 of 5 variants: no" in pages(study, folder, tmp_path / "r.md")[1]
    shutil.rmtree(folder.path / "ternary" / "seed-1")
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    assert "One seed of 3 of 5 variants: no" in text
    baseline = found.distance("baseline", 2.0)
    assert baseline is not None
    card = next(line for line in text.splitlines() if "ternary : baseline, CFG scale 2" in line)
    assert f" : {baseline.values[0]:.1f}; one seed" in card  # not the mean of both


def test_what_needs_a_failed_training_is_not_waited_for(
    study: Study, tmp_path: Path, invent: Invent
) -> None:
    study, folder = with_warm(study), Folder(tmp_path / "runs" / study.name)
    invent(study, folder)
    for seed in (0, 1):
        for name in ("baseline", "ptq", "warm"):
            shutil.rmtree(folder.place(study.variant(name), seed).folder)
        place = folder.place(study.variant("baseline"), seed)
        asked = model_asked(study, study.variant("baseline"), seed)
        failed = {"command": "c", "machine": "m", "date": "d", "seconds": 0, "failed": "diverged"}
        save(place.training, Training(asked=asked, steps=40, **failed))
    assert collect(study, folder).missing == 0


def test_what_was_measured_in_another_way_is_left_out(
    study_file: Path, study: Study, folder: Folder
) -> None:
    for model in collect(study, folder).models:
        assert model.footprint is not None
        assert model.losses.keys() & {40}
        assert model.grids.keys() == {1.0, 2.0}
    changes = {"loss_n: 64": "loss_n: 32", "grid: 2": "grid: 1"}
    text = study_file.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    study_file.write_text(text.replace("sampling_steps: 3", "sampling_steps: 4"))
    for model in collect(load_study(study_file), folder).models:
        assert model.footprint is None
        assert not {**model.losses, **model.grids, **model.scores}


def test_the_page_asks_for_nothing_and_is_well_formed(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    _, _, html = pages(study, folder, tmp_path / "r.md", drawn=True)
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert not tags.names & {"script", "iframe", "object"}
    assert all(address.startswith(("data:", "#")) for address in tags.addresses)
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"sha256-{digest}" in html
    assert " style=" not in html


@pytest.mark.slow
def test_the_same_findings_give_the_same_pages(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    first, second = (pages(study, folder, tmp_path / n / "r.md", True)[1:] for n in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("changed", [{"machine": "another"}, {"parameters": 9_500_001}])
def test_a_latency_that_is_not_known(
    study: Study, folder: Folder, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """It is another model's of the same network, with that one's machine; else it is left out."""
    path = folder.place(study.variant("no-norm"), 0).footprint
    known, changed = "parameters" not in changed, changed | {"latency": []}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    _, text, html = pages(study, folder, tmp_path / "r.md", drawn=True)
    label = study.variant("no-norm").label
    row = next(
        line for line in text.splitlines()
        if line.startswith((f"| {label} |", f"| **{label}** |")) and "threads 2" in line
    )  # fmt: skip
    cells = [cell.strip(" *") for cell in row.split("|")]
    assert cells[3] == ("22 (21 to 24)" if known else "")
    assert cells[5] == "300.0 MB"
    assert cells[7] == "a processor, 2 CPUs, Linux"
    for what, shown in (("bytes", True), ("latency", known)):
        assert (label in {point[1] for point in figure(html, f"small--{what}")[1]}) == shown


def test_latencies_of_a_study_are_of_one_machine(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    """The one that timed most: a time of another says nothing beside them."""
    path = folder.place(study.variant("no-norm"), 0).footprint
    record = json.loads(path.read_text()) | {"latency": [0.001] * 3, "machine": "another"}
    path.write_text(json.dumps(record))
    found = collect(study, folder)
    costs = [model.footprint for model in found.models if model.footprint is not None]
    timed = [found.timed(cost) for cost in costs]
    assert {cost.machine for cost in timed if cost is not None} == {"a processor, 2 CPUs, Linux"}
    path.write_text(json.dumps(record | {"parameters": 1}))
    (cost,) = (m.footprint for m in collect(study, folder).models_of("no-norm") if m.footprint)
    assert collect(study, folder).timed(cost) is None


def test_figures_of_all_variants_show_kinds(study: Study, folder: Folder, tmp_path: Path) -> None:
    _, _, html = pages(study, folder, tmp_path / "r.md", drawn=True)
    root, found = figure(html, "small--bytes")
    assert {label: colour for colour, label, _ in found} == {
        "full precision": SERIES[1],
        "ternary": SERIES[0],
        "no norm after adaLN": SERIES[0],
        "PTQ, per row": SERIES[2],
        "packed int8": SERIES[0],  # of a variant trained as ternary
    }
    kinds = ["full precision", "ternary (QAT)", "ternary (PTQ)"]
    assert [text.text for text in root.iter("text") if text.text in kinds] == kinds


def test_a_half_done_study_says_what_is_missing(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    shutil.rmtree(folder.path / "ternary" / "seed-1")
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    assert found.missing == 4  # at the last step, for a curve is of the first seed
    assert "4 scores are missing" in text
    ratio = found.ratio("ternary", 1.0)
    assert ratio is not None
    assert list(ratio.values) == [0]


def test_an_empty_study_has_a_page(study: Study, tmp_path: Path) -> None:
    found, text, _ = pages(study, Folder(tmp_path / "nothing"), tmp_path / "r.md")
    assert "Nothing is scored yet" in text
    assert found.verdict == "no pair of scores yet"


def test_a_failed_training_is_told_and_not_waited_for(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    variant = study.variant("no-norm")
    place = folder.place(variant, 0)
    shutil.rmtree(place.folder)
    failed = Training(
        asked=model_asked(study, variant, 0), command="c", machine="m", date="d", seconds=0,
        steps=40, failed="training diverged",
    )  # fmt: skip
    save(place.training, failed)
    found, text, _ = pages(study, folder, tmp_path / "r.md")
    assert found.missing == 0
    assert "no norm after adaLN, seed 0: training diverged" in text


def test_scores_of_another_evaluation_are_left_out(
    study_file: Path, study: Study, folder: Folder, tmp_path: Path
) -> None:
    study_file.write_text(study_file.read_text().replace("sampling_steps: 3", "sampling_steps: 4"))
    found, _, _ = pages(load_study(study_file), folder, tmp_path / "r.md")
    assert found.verdict == "no pair of scores yet"


def test_models_of_other_settings_are_named(
    study_file: Path, study: Study, folder: Folder, tmp_path: Path
) -> None:
    found, text, _ = pages(load_study(study_file, ["optim.lr=1"]), folder, tmp_path / "r.md")
    assert "ternary, seed 0 was made with other settings" in text
    assert "recipe.optim.lr" in text
    assert found.missing == 0


def test_text_from_the_study_is_no_markup(study_file: Path, tmp_path: Path, invent: Invent) -> None:
    bad = '"<b>|</style><script>x"'
    study_file.write_text(study_file.read_text().replace("label: ternary,", f"label: {bad},"))
    study = load_study(study_file)
    folder = Folder(tmp_path / "runs")
    invent(study, folder)
    _, text, html = pages(study, folder, tmp_path / "r.md")
    assert "<script>" not in html
    assert "<script>" not in text
    assert "\\|" in text


def test_pictures_of_variants_that_are_gone_are_removed(
    study: Study, folder: Folder, tmp_path: Path
) -> None:
    pages(study, folder, tmp_path / "r.md")
    old, other = tmp_path / "r" / "small--old.svg", tmp_path / "r" / "mine.svg"
    old.write_text("x")
    other.write_text("x")
    pages(study, folder, tmp_path / "r.md")
    assert not old.exists()
    assert other.exists()


def test_damaged_images_are_named(study: Study, folder: Folder) -> None:
    path = folder.place(study.variant("ternary"), 0).grid(2.0)
    np.savez(path, other=np.zeros(1))
    with pytest.raises(InputFileError, match="not the images of a study"):
        collect(study, folder)
