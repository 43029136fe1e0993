"""What eval-fid writes and says besides its numbers: pictures, a page, files for CI, bf16."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from terdit_cli.errors import UsageError
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.evaluate.summary import markdown

Evaluate = Callable[..., EvalResult]
Terdit = Callable[..., Any]

# Tags of HTML and SVG that have no end.
VOID = {"meta", "img", "br", "hr", "link", "input", "col", "path", "circle", "line", "rect", "use"}


class Page(HTMLParser):
    """Checks that what is opened is closed, and counts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.pictures: list[str] = []
        self.elsewhere: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        source = values.get("src") or values.get("href") or ""
        if tag == "img":
            self.pictures.append(source)
        if source and not source.startswith(("data:", "#")):
            self.elsewhere.append(source)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def of_the_model(small_tdt: Path) -> dict[str, Any]:
    return {
        "model": small_tdt, "reference": "embedded:heldout", "n": 80, "steps": 2,
        "backend": "reference", "activations": "fp32",
    }  # fmt: skip


def test_all_files_of_a_model(
    evaluate: Evaluate, of_the_model: dict[str, Any], tmp_path: Path
) -> None:
    names = ("grid.png", "page.html", "junit.xml", "summary.md", "ref.npz", "images", "work")
    paths = {name.partition(".")[0]: tmp_path / "new" / name for name in names}
    made = paths["images"]
    result = evaluate(
        **of_the_model, report=tuple(paths[name] for name in ("grid", "page", "junit", "summary")),
        make_reference=paths["ref"], reference_features=True,
        save_images=made, work=paths["work"], max_fid=1e9, confidence=5,
        per_class="0,Bag",
    )  # fmt: skip
    assert result.passed
    files = sorted(made.glob("[!.]*"))
    assert [path.name for path in files] == [f"{index:06d}.png" for index in range(80)]
    # The features are those of the images that were saved.
    again = evaluate(images=str(made), reference=str(paths["ref"]))
    assert again.distance == pytest.approx(0, abs=1e-6)
    assert again.n_reference == 80
    with Image.open(paths["grid"]) as picture:
        assert picture.width >= 8 * 28
        assert picture.height >= 8 * 28
    first = np.array(Image.open(files[0]))
    assert first.shape == (28, 28, 3)
    page = Page(paths["page"].read_text())
    assert len(page.pictures) > 10
    assert all(source.startswith("data:image/") for source in page.pictures)
    assert page.elsewhere == []
    text = " ".join(page.texts)
    for part in ("fd-grid", "Ankle boot", result.provenance["model_sha256"][:12]):
        assert part in text
    assert ET.parse(paths["junit"]).getroot().tag == "testsuites"
    assert "fd-grid" in paths["summary"].read_text()


def test_saved_images_are_those_of_sample(
    terdit: Terdit, evaluate: Evaluate, of_the_model: dict[str, Any], tmp_path: Path
) -> None:
    """Balanced labels of 10 classes: image 12 is copy 1 of class 2."""
    evaluate(**of_the_model, save_images=tmp_path / "images")
    words = ("--steps", 2, "--backend", "reference", "--activations", "fp32", "-n", 2)
    words += ("--device", "cpu", "--prompt-class", 2, "-o", tmp_path / "two.npz")
    done = terdit("sample", "--model", of_the_model["model"], *words)
    assert done.code == 0, done.err
    with np.load(tmp_path / "two.npz") as arrays:
        for copy in range(2):
            saved = np.array(Image.open(tmp_path / "images" / f"{2 + 10 * copy:06d}.png"))
            # torch's products of other batch sizes may round otherwise: one level of a pixel
            assert np.abs(saved.astype(int) - arrays["arr_0"][copy]).max() <= 1


@pytest.mark.slow
def test_a_folder_of_saved_images_is_of_one_run(
    evaluate: Evaluate, of_the_model: dict[str, Any], tmp_path: Path
) -> None:
    folder, work = tmp_path / "images", tmp_path / "work"
    evaluate(**of_the_model, save_images=folder, work=work)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluate(**of_the_model | {"n": 90}, save_images=folder)  # goes on
    for change, got in (
        ({"seed": 1, "n": 90}, "the images of another run"),
        ({"steps": 3, "n": 90}, "the images of another run"),
        ({}, "000080.png, of a larger -n"),
    ):
        with pytest.raises(UsageError, match=f"for the images holds other files: got {got}"):
            evaluate(**of_the_model | change, save_images=folder)
    others = tmp_path / "others"
    others.mkdir()
    (others / "cat.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"got cat\.png.*Fix: give another folder"):
        evaluate(**of_the_model, save_images=others)
    (others / "cat.png").rename(others / ".terdit.json")
    with pytest.raises(UsageError, match="got the images of another run"):
        evaluate(**of_the_model, save_images=others)
    # Images that are gone are drawn again, though their features are there.
    for index in (7, *range(80, 90)):
        (folder / f"{index:06d}.png").unlink()
    evaluate(**of_the_model, save_images=folder, work=work)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pictures_of_a_set_without_classes(
    folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    Image.new("RGB", (5, 9)).save(folder / "odd.png")
    page, grid = tmp_path / "page.html", tmp_path / "grid.png"
    result = evaluate(images=str(folder), reference="embedded:heldout", report=(page, grid))
    assert result.n == 41
    assert any("2 sizes, 8 x 8 to 5 x 9 pixels" in text for text in result.warnings)
    assert Page(page.read_text()).pictures
    assert grid.exists()


def test_the_page_of_a_reference_without_features(
    folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    stats, page = tmp_path / "stats.npz", tmp_path / "page.html"
    evaluate(images=str(folder), reference=str(folder), make_reference=stats)
    evaluate(images=str(folder), reference=str(stats), report=(page,))
    assert Page(page.read_text()).pictures


def test_distances_of_classes(tmp_path: Path, evaluate: Evaluate) -> None:
    """Class b is shifted by 10 in all 12 features, class a is not."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 200, (40, 8, 8, 3)).astype(np.uint8)
    classes = np.arange(40) % 2
    np.savez(tmp_path / "real.npz", arr_0=pixels, arr_1=classes)
    for index, image in enumerate(pixels):
        path = tmp_path / "fake" / "01"[classes[index]] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image + np.uint8(10 * classes[index])).save(path)
    sides = {"images": str(tmp_path / "fake"), "reference": str(tmp_path / "real.npz")}
    result = evaluate(**sides, per_class="all")
    assert list(result.per_class) == ["0", "1"]
    assert result.per_class["0"] == pytest.approx(0, abs=1e-6)
    assert result.per_class["1"] == pytest.approx(1200, rel=1e-4)
    assert list(evaluate(**sides, per_class="1").per_class) == ["1"]
    assert set(result.recognised) == {"0", "1"}  # 20 reals of each are just enough
    assert result.metrics["accuracy"] == pytest.approx(np.mean(list(result.recognised.values())))


def test_a_probe_recognises_classes_that_differ(evaluate: Evaluate, tmp_path: Path) -> None:
    """Classes of 40, 120 and 200 in the reference; of the images every second 2 looks like a 0."""
    shades, labels = np.array([40, 120, 200]), np.arange(90) % 3
    random = np.random.default_rng(0)

    def images(brightness: NDArray[np.int64]) -> NDArray[np.uint8]:
        noise = random.integers(-10, 11, (90, 8, 8, 3))
        return (brightness[:, None, None, None] + noise).astype(np.uint8)

    np.savez(tmp_path / "real.npz", arr_0=images(shades[labels]), arr_1=labels)
    drawn = np.where((labels == 2) & (np.arange(90) % 2 == 0), 40, shades[labels])
    np.savez(tmp_path / "fake.npz", arr_0=images(drawn), arr_1=labels)
    sides = {"images": str(tmp_path / "fake.npz"), "reference": str(tmp_path / "real.npz")}
    result = evaluate(**sides, per_class="all")
    assert result.recognised == {"0": 1.0, "1": 1.0, "2": 0.5}
    assert result.metrics["accuracy"] == pytest.approx(75 / 90)
    assert result.metrics["accuracy of reals"] == 1
    assert "50.0 %" in markdown(result)
    assert evaluate(**sides, per_class="1").recognised == {}
    np.savez(tmp_path / "few.npz", arr_0=images(shades[labels])[:57], arr_1=labels[:57])
    few = evaluate(**(sides | {"reference": str(tmp_path / "few.npz")}), per_class="all")
    assert few.recognised == {}
    assert "accuracy" not in few.metrics


def test_labels_that_are_numbers_mean_the_model_s_classes(
    evaluate: Evaluate, of_the_model: dict[str, Any], tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 200, (30, 28, 28, 3)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pixels, arr_1=np.arange(30) % 10)
    options = of_the_model | {"reference": str(tmp_path / "real.npz"), "n": 30}
    result = evaluate(**options, per_class="Bag,0")
    assert list(result.per_class) == ["Bag", "T-shirt/top"]


@pytest.mark.slow
def test_interval_and_curve(folder: Path, evaluate: Evaluate) -> None:
    options = {"images": str(folder), "reference": "embedded:heldout", "n": 40}
    plain = evaluate(**options)
    assert plain.intervals == {}
    assert plain.curve == []
    result = evaluate(**options, confidence=20)
    low, high = result.intervals["fd-grid"]
    assert low < result.distance < high
    assert result.curve[-1] == (40, pytest.approx(result.distance, rel=1e-9))
    # 40 images are too few for the law b / n of 12 features: said, and the rest is there.
    assert "fd-grid infinity" not in result.metrics
    assert any("no fd-grid infinity" in text for text in result.warnings)
    larger = evaluate(images="embedded:train", reference="embedded:heldout", n=200, confidence=2)
    assert larger.metrics["fd-grid infinity"] < larger.distance


@pytest.mark.slow
def test_the_effect_of_bf16_is_measured(evaluate: Evaluate, of_the_model: dict[str, Any]) -> None:
    plain = evaluate(**of_the_model)
    assert plain.provenance["precision"] == "fp32"
    assert "bf16" not in plain.provenance
    rough = evaluate(**of_the_model, precision="bf16")
    effect = rough.provenance["bf16"]
    assert rough.provenance["precision"] == "bf16"
    assert effect["n"] == 80
    assert effect["fp32"] == pytest.approx(plain.distance, rel=1e-9)
    assert effect["bf16"] == pytest.approx(rough.distance, rel=1e-9)


def test_the_table(terdit: Terdit, folder: Path, features: str) -> None:
    words = ("--images", folder, "--reference", folder, "--features", features)
    done = terdit("eval-fid", *words, "--confidence", 5, "--max-fid", 1)
    assert done.code == 0, done.err
    for part in ("40 images, reference 40; torchscript grid.pt", "95 %", "fd-grid", "precision"):
        assert part in done.out
    assert "passed --max-fid: fd-grid" in done.out
    assert "FID " not in done.out
    assert done.err.count("warning:") == 2  # of the reference, and too few images to extrapolate
    as_json = json.loads(terdit("eval-fid", *words, "--json").out)
    assert as_json["passed"]
    assert as_json["gates"] == []
