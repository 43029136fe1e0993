"""The search for the nearest training images: exact, mirrored, among all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from terdit_cli.data.images import open_images
from terdit_cli.lab.study import nearest
from terdit_cli.lab.study.nearest import find_nearest
from terdit_cli.recipe import load_recipe

RECIPE = """\
name: small
model: {size: nano, n_layers: 1, dim: 16, n_heads: 2, patch_size: 7, num_classes: 10}
data: {source: embedded, split: train, image_size: 28, channels: 1, flip: FLIP}
train: {steps: 1, global_batch_size: 1, micro_batch_size: 1, precision: fp32}
"""


@pytest.mark.slow
@pytest.mark.parametrize("flip", [False, True])
def test_the_nearest_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool) -> None:
    """Against the definition, with chunks that do not divide the set."""
    monkeypatch.setattr(nearest, "_CHUNK", 77)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FLIP", str(flip).lower()))
    recipe = load_recipe(tmp_path / "r.yaml")
    source = open_images("embedded", None, 28, split="train")
    known = np.stack([source.read(index) for index in range(len(source))])
    noise = np.random.default_rng(0).integers(-9, 10, (3, 28, 28, 3))
    drawn = np.clip(known[[5, 80, len(known) - 1]].astype(int) + noise, 0, 255).astype(np.uint8)
    drawn[1] = drawn[1, :, ::-1]  # a copy in the mirror
    found = find_nearest(recipe, drawn)
    assert found.searched == len(source)
    pool = np.concatenate([known, known[:, :, ::-1]]) if flip else known
    for query, image, distance in zip(drawn, found.images, found.distances, strict=True):
        roots = np.sqrt(np.square(pool.astype(float) - query).mean(axis=(1, 2, 3)))
        assert distance == pytest.approx(roots.min(), rel=1e-12)
        np.testing.assert_array_equal(image, pool[roots.argmin()])
    np.testing.assert_array_equal(found.images[0], known[5])
    assert (found.distances[1] < 9) == flip
    assert found.held_out is not None
    assert len(found.held_out) == 3
    assert found.held_out.min() > 0
