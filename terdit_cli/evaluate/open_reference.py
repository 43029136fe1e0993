"""What `eval-fid` compares with: statistics from a file, or images whose features are made here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terdit_cli.evaluate.feature_shards import FeatureShards
from terdit_cli.evaluate.features import FeatureExtractor
from terdit_cli.evaluate.image_features import (
    Source,
    conversions,
    make_features,
)
from terdit_cli.evaluate.reference_set import (
    Reference,
    is_statistics_file,
    load_reference,
)
from terdit_cli.evaluate.scores import statistics_of
from terdit_cli.evaluate.statistics import spread
from terdit_cli.system.atomic import file_sha256
from terdit_cli.system.job import Job

KEPT_FEATURES = 10_000  # in a reference file: for KID, precision and recall


@dataclass(frozen=True)
class OpenReference:
    """A reference, and the images and features that it comes with."""

    where: str
    sha256: str  # of the file, or of the list of images
    statistics: Reference
    source: Source | None  # the images, in the order of `statistics.features`
    shards: FeatureShards | None

    def facts(self) -> dict[str, Any]:
        """Return what the provenance says of it."""
        return {"reference": self.where, "reference_sha256": self.sha256}

    def require_dim(self, ours: FeatureShards) -> None:
        """Raise UsageError if the features, whose number may be known only now, are not as many."""
        first = ours.rows("pool", [0])
        assert first is not None, "every extractor pools"
        self.statistics.require_dim(first.shape[1], self.where)

    def warnings(self, source: Source, extractor: FeatureExtractor) -> list[str]:
        """Return what makes the comparison with a source doubtful."""
        found = []
        if self.statistics.pipeline is None:
            found.append(
                "the reference does not say which features made it; that they are those of "
                f"{extractor.pipeline} is assumed"
            )
        own = {self.statistics.images_sha256, self.source and self.source.sha256}
        if source.sha256 is not None and source.sha256 in own:
            found.append(
                "the reference was made from the very images that are scored: their distance "
                "says nothing about a model"
            )
        if self.shards is not None:
            found += [f"reference: {text}" for text in conversions(self.shards)]
        if self.source is not None and self.source.skipped:
            found.append(f"reference: {len(self.source.skipped)} unreadable images were skipped")
        return found


def open_reference(
    where: str,
    source: Source | None,
    extractor: FeatureExtractor,
    work: Path,
    job: Job,
) -> OpenReference:
    """Read statistics, or make the features of images.

    Args:
        source: its images; None if it is a file of statistics alone.

    Raises:
        UsageError: statistics of other features. And what reading images raises.
    """
    path = Path(where)
    if not is_statistics_file(path):
        assert source is not None, "what is no file of statistics is images"
        shards = make_features(source, extractor, work / "reference", job)
        made = reference_of(shards, extractor, source, features=None)
        return OpenReference(where, str(source.sha256), made, source, shards)
    loaded = load_reference(path)
    loaded.require_pipeline(extractor.pipeline, where)
    if extractor.dim is not None:
        loaded.require_dim(extractor.dim, where, extractor.spatial_dim)
    if source is None:
        return OpenReference(where, file_sha256(path), loaded, None, None)
    # ADM's files: moments of the whole set, and some of its images for precision and recall.
    shards = make_features(source, extractor, work / "reference", job)
    loaded = dataclasses.replace(loaded, features=_pool(shards))
    return OpenReference(where, file_sha256(path), loaded, source, shards)


def reference_of(
    shards: FeatureShards, extractor: FeatureExtractor, source: Source, features: int | None
) -> Reference:
    """Return the statistics of some shards as a reference.

    Args:
        features: keep at most so many of them, spread evenly; None: all.
    """
    pool = statistics_of(shards, "pool")
    assert pool is not None, "every extractor pools"
    spatial = statistics_of(shards, "spatial")
    return Reference(
        mean=pool.mean,
        covariance=pool.covariance,
        spatial_mean=None if spatial is None else spatial.mean,
        spatial_covariance=None if spatial is None else spatial.covariance,
        features=None if features == 0 else _pool(shards, features),
        count=pool.count,
        pipeline=extractor.pipeline,
        images_sha256=source.sha256,
    )


def _pool(shards: FeatureShards, most: int | None = None) -> NDArray[np.float32]:
    few = most is not None and most < shards.count
    rows = shards.rows("pool", spread(shards.count, most) if few and most else None)
    assert rows is not None, "every extractor pools"
    return rows
