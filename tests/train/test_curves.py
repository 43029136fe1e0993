"""Curves of several runs: panels that have values, names that tell apart, bad input."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.train.curves import draw_curves, draw_loss, plot_runs


def write_run(folder: Path, steps: int, flips: bool = True, **more: Any) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(10, 10 * steps + 1, 10):
        line: dict[str, Any] = {"step": step, "loss": 1 / step, "mse": 1 / step, "vb": 0.0,
                                "lr": 1e-3, "grad_norm": 0.1, "images_per_second": 5.0}  # fmt: skip
        if flips:
            line |= {
                "flipped": {"all": 0.1 / step, "wq": 0.1},
                "zero": {"all": 0.3 + 0.01 * math.sin(step)},
                "loss_by_quarter": {"1": 2 / step, "4": None},
            }
        lines.append(line | more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


@pytest.mark.slow
def test_several_runs_on_one_png(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", 30),
        write_run(tmp_path / "b$x_1$", 20, flips=False),
        write_run(tmp_path / "c", 1),
    ]
    out = plot_runs([*runs[:2], runs[2] / "metrics.jsonl"], tmp_path / "deep" / "curves.png")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000


def test_an_svg_shows_the_names_of_the_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 3) for name in ("a", "b$x_1$")]
    root = ET.fromstring(plot_runs(runs, tmp_path / "curves.svg").read_text(encoding="utf-8"))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a", "b$x_1$", "speed, images/s"} <= set(texts)


def test_a_page_holds_everything(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>&", 5)
    page = plot_runs([run], tmp_path / "curves.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert '<td class="number">50</td>' in page
    assert "http://" not in page


def test_only_panels_with_values(tmp_path: Path) -> None:
    line = {"step": 1, "loss": 0.5, "lr": None, "grad_norm": 0.1}
    assert titles(draw_curves({"a": [line]})) == [
        "loss (mse + vb)",
        "gradient norm before clipping (L2)",
    ]
    assert titles(draw_curves({"a": [{"step": 1}]})) == []


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", 2) for name in ("one", "two")]
    page = plot_runs(runs, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "one/run" in page
    assert "two/run" in page
    with pytest.raises(UsageError, match="given twice"):
        plot_runs([runs[0], runs[0]], tmp_path / "c.html")


@pytest.mark.parametrize("losses", [[], [1.0], [None], [1.0, None, 0.5]])
def test_the_curve_of_one_run_is_drawn_from_any_number_of_lines(
    tmp_path: Path, losses: list[float | None]
) -> None:
    entries = [
        {"step": step, "loss": loss, "mse": 0.5, "lr": 1e-4} for step, loss in enumerate(losses)
    ]
    draw_loss(entries, "a $title_ with ^ signs", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1160, 640 + 48)


def test_bad_input(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 2)
    with pytest.raises(UsageError, match=r"got curves\.jpg, expected \.png, \.svg or \.html"):
        plot_runs([run], tmp_path / "curves.jpg")
    with pytest.raises(UsageError, match="no run to plot"):
        plot_runs([], tmp_path / "curves.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="nothing to plot") as caught:
        plot_runs([run, tmp_path / "empty"], tmp_path / "curves.png")
    assert str(tmp_path / "empty" / "metrics.jsonl") in str(caught.value)
    with pytest.raises(EnvironmentProblem, match="cannot write"):
        plot_runs([run], run / "metrics.jsonl" / "curves.png")
