"""Labelled grids and PNG files with text chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.report.grid import draw_grid, save_png


def pictures(count: int, height: int = 28, width: int = 28) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(28, 28, 4), (32, 32, 3), (96, 96, 1), (130, 100, 1), (7, 9, 14)],
)
def test_cells_grow_by_a_whole_factor(height: int, width: int, factor: int) -> None:
    images = pictures(3, height, width)
    sheet = np.asarray(draw_grid(images, columns=3))
    left = 6
    for image in images:
        cell = sheet[6 : 6 + height * factor, left : left + width * factor]
        assert np.array_equal(cell, image.repeat(factor, axis=0).repeat(factor, axis=1))
        left += width * factor + 6
    assert sheet.shape == (12 + height * factor, left, 3)


@pytest.mark.parametrize(
    ("count", "columns", "rows_columns"),
    [(1, None, (1, 1)), (7, None, (3, 3)), (9, None, (3, 3)), (10, 10, (1, 10)), (3, 8, (1, 3))],
)
def test_layout(count: int, columns: int | None, rows_columns: tuple[int, int]) -> None:
    sheet = draw_grid(pictures(count, 96, 96), columns=columns)
    assert sheet.size == (6 + rows_columns[1] * 102, 6 + rows_columns[0] * 102)


def test_captions_and_title_are_drawn_outside_the_images() -> None:
    images = np.zeros((2, 96, 96, 3), np.uint8)
    plain = np.asarray(draw_grid(images, columns=2))
    labelled = np.asarray(draw_grid(images, ["cat", "dog" * 90], "title " * 90, columns=2))
    assert labelled.shape[1] == plain.shape[1]
    assert labelled.shape[0] > plain.shape[0] + 24
    black_rows = (labelled[:, 6:102] == 0).all(axis=(1, 2))
    assert black_rows.sum() == 96  # no text over the image
    top = int(np.flatnonzero(black_rows)[0])
    assert labelled[:top].min() < 100  # ink above: the title
    below = labelled[top + 96 :]
    assert below[:, 6:102].min() < 100
    assert below[:, 108:204].min() < 100
    assert (below[:, 102:108] == 255).all()  # a long caption is cut to its cell
    assert (labelled[:, -6:] == 255).all()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (4, 4, 3), (2, 4, 4, 1)])
def test_programming_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        draw_grid(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        draw_grid(pictures(2), ["a"])


def test_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    text = {"seed": "0", "class": "T-shirt/top", "title": "Gru\u00df \u4e2d"}
    sheet = draw_grid(pictures(4), list("abcd"))
    path = tmp_path / "new" / "grid.png"
    save_png(sheet, path, text)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(sheet))
        assert image.text == text  # type: ignore[attr-defined]
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


def test_png_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.mkdir()
    with pytest.raises(EnvironmentProblem) as caught:
        save_png(draw_grid(pictures(1)), path)
    assert str(path) in str(caught.value)
    assert "Fix: name a file in it" in str(caught.value)
    assert list(tmp_path.rglob("*")) == [path]
