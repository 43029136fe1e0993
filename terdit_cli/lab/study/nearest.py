"""The training images nearest to generated ones, pixel by pixel, among all: copies can be seen.

Distances are root mean squares of the difference of two images, in levels of 0 to 255. Where the
recipe mirrors images, their mirror images are searched as well.

Shapes: N images of H x W x 3, M training images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from terdit_cli.data.image_sources import has_held_out
from terdit_cli.evaluate.statistics import spread
from terdit_cli.lab.study.measure import HELD_OUT, open_split
from terdit_cli.recipe import Recipe

_CHUNK = 4096  # training images at a time

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class NearestImages:
    """What lies nearest to N generated images, and to as many that no model has seen."""

    images: Images  # [N, H, W, 3], of the training set
    distances: NDArray[np.float64]  # [N]
    held_out: NDArray[np.float64] | None  # [N]; None where the source has none
    searched: int  # M


def find_nearest(recipe: Recipe, images: Images) -> NearestImages:
    """Search the recipe's training images.

    Args:
        images: generated ones, [N, H, W, 3].

    Raises:
        What opening the recipe's images raises.
    """
    training = open_split(recipe, recipe.data.split)
    others = None
    if has_held_out(recipe.data.source):
        held_out = open_split(recipe, HELD_OUT)
        chosen = spread(len(held_out), min(len(images), len(held_out)))
        others = np.stack([held_out.read(index) for index in chosen])
    queries = images if others is None else np.concatenate([images, others])
    best = np.full(len(queries), np.inf)
    nearest = np.zeros_like(queries)
    for start in range(0, len(training), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(training)))
        found = np.stack([training.read(index) for index in rows])
        for part in (found, found[:, :, ::-1]) if recipe.data.flip else (found,):
            squares = _squares(queries, part)
            column = squares.argmin(axis=1)
            value = squares[np.arange(len(queries)), column]
            closer = value < best
            best[closer] = value[closer]
            nearest[closer] = part[column[closer]]
    roots = np.sqrt(best)
    count = len(images)
    unseen = None if others is None else roots[count:]
    return NearestImages(nearest[:count], roots[:count], unseen, len(training))


def _squares(queries: Images, images: Images) -> NDArray[np.float64]:
    """Return mean squared differences [N, M], exact: whole numbers below 2^53 until the mean."""
    ours, theirs = (part.reshape(len(part), -1).astype(np.float64) for part in (queries, images))
    sums = np.square(ours).sum(1)[:, None] + np.square(theirs).sum(1) - 2 * ours @ theirs.T
    mean: NDArray[np.float64] = sums / ours.shape[1]
    return mean
