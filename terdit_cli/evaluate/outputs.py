"""What an evaluation leaves behind: the grid, summaries for CI, the HTML page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from terdit_cli.class_names import shown_names
from terdit_cli.evaluate.feature_shards import FeatureShards
from terdit_cli.evaluate.image_features import Source
from terdit_cli.evaluate.neighbours import NeighbourCheck, check_neighbours, cover
from terdit_cli.evaluate.report import (
    MOST_PAIRS,
    Neighbours,
    Pair,
    classes_to_show,
    samples_of_class,
    write_report,
)
from terdit_cli.evaluate.request import NEIGHBOURS, EvalOptions
from terdit_cli.evaluate.result import EvalResult
from terdit_cli.report.grid import draw_grid, save_png

GRID_IMAGES = 64
_LOOKED_THROUGH = 100_000  # images among which those of the page's classes are looked for

Image = NDArray[np.uint8]
Samples = NDArray[np.float32]


def pictures_to_keep(source: Source, options: EvalOptions) -> frozenset[int]:
    """Return the numbers of the images that the grid and the page will show.

    None of a set: its images can be read again.
    """
    if source.sha256 is not None:
        return frozenset()
    wanted = set(range(min(source.count, GRID_IMAGES))) if options.reports(".png") else set()
    if options.reports(".html"):
        wanted |= {image for images in _by_class(source).values() for image in images}
    return frozenset(wanted)


class Pictures:
    """Images by number: those kept beside their features, others made or read again."""

    def __init__(self, source: Source, shards: FeatureShards | None = None) -> None:
        self.source = source
        self._kept = shards.pictures() if shards is not None else {}

    def __getitem__(self, image: int) -> Image:
        if image not in self._kept:
            self._kept[image] = next(self.source.batches(range(image, image + 1)))[0][0]
        return self._kept[image]

    def name(self, image: int) -> str:
        names = shown_names(self.source.class_names)
        return f"{image}: {names[self.source.class_id(image)]}" if names else str(image)


def _by_class(source: Source) -> dict[str, list[int]]:
    """Return the first images of each class that the page shows; one class "" without classes."""
    names = shown_names(source.class_names)
    shown = classes_to_show(names) if names else [""]
    most = samples_of_class(len(shown))
    found: dict[str, list[int]] = {name: [] for name in shown}
    missing = len(shown)
    for image in range(min(source.count, _LOOKED_THROUGH)):
        images = found.get(names[source.class_id(image)] if names else "")
        if images is None or len(images) == most:
            continue
        images.append(image)
        missing -= len(images) == most
        if not missing:
            break
    return found


def write_grid(path: Path, pictures: Pictures) -> None:
    """Write the first images, with their classes where they have any.

    A grid has cells of one size: of a set of many sizes it shows those of the first image's.
    """
    source = pictures.source
    first = [pictures[image] for image in range(min(source.count, GRID_IMAGES))]
    alike = [image for image, pixels in enumerate(first) if pixels.shape == first[0].shape]
    names = shown_names(source.class_names)
    labels = [names[source.class_id(image)] for image in alike] if names else None
    save_png(draw_grid(np.stack([first[image] for image in alike]), labels), path)


def write_page(
    path: Path,
    result: EvalResult,
    baseline: EvalResult | None,
    shards: FeatureShards,
    pictures: Pictures,
    reals: Samples | None,
    real_pictures: Pictures | None,
) -> None:
    """Write the HTML page.

    Args:
        reals: features of the reference, [M, D], if there are any.
        real_pictures: what they are features of, in the same order, where these are at hand.
    """
    images_by_class = {
        name: [pictures[image] for image in images]
        for name, images in _by_class(pictures.source).items()
    }
    neighbours = coverage = None
    if reals is not None and len(reals) >= 2:
        fakes = shards.rows("pool")
        assert fakes is not None, "every extractor pools"
        neighbours = _neighbours(check_neighbours(reals, fakes), pictures, real_pictures)
        if min(len(reals), len(fakes)) > NEIGHBOURS:
            coverage = cover(reals, fakes, NEIGHBOURS)
    write_report(path, result, images_by_class, neighbours, coverage, baseline)


def _neighbours(
    check: NeighbourCheck, pictures: Pictures, real_pictures: Pictures | None
) -> Neighbours:
    def pair(position: int) -> Pair:
        fake, real = int(check.fakes[position]), int(check.reals[position])
        return Pair(
            sample=pictures[fake],
            real=None if real_pictures is None else real_pictures[real],
            distance=float(check.distances[position]),
            sample_name=pictures.name(fake),
            real_name=f"real {real}" if real_pictures is None else real_pictures.name(real),
        )

    return Neighbours(
        check,
        [pair(position) for position in check.closest(MOST_PAIRS)],
        [pair(position) for position in check.typical(MOST_PAIRS)],
    )
