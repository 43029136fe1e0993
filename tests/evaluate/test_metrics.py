"""The metrics against numbers that other people's code computed from the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from terdit_cli.evaluate import metrics
from terdit_cli.evaluate.metrics import (
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TAGS = ("d64", "d256")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[np.float64]]:
    with np.load(GOLDEN / "metrics.npz", allow_pickle=False) as values:
        return {name: values[name].astype(np.float64) for name in values.files}


def gaussian(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.mark.parametrize("tag", TAGS)
def test_frechet_distance_matches_clean_fid(expected: Any, arrays: Any, tag: str) -> None:
    real, fake = arrays[f"{tag}.real"], arrays[f"{tag}.fake"]
    ours = frechet_distance(*gaussian(real), *gaussian(fake))
    assert ours == pytest.approx(expected["fid"][tag]["clean_fid"], rel=1e-9)
    assert ours == pytest.approx(frechet_distance(*gaussian(fake), *gaussian(real)), rel=1e-9)
    assert frechet_distance(*gaussian(real), *gaussian(real)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    """tr (S1 S2)^1/2 is the nuclear norm of A B^T / sqrt((n-1)(m-1)) for centred features A, B."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(30, 200)), 0.3 + 2 * random.normal(size=(25, 200))
    centred = [x - x.mean(axis=0) for x in (a, b)]
    nuclear = np.linalg.norm(centred[0] @ centred[1].T, "nuc") / np.sqrt(29 * 24)
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((x**2).sum() / (len(x) - 1) for x in centred)
    by_hand = gap @ gap + traces - 2 * nuclear
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(by_hand, rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances commute: the distance is |m|^2 + sum (sqrt(a) - sqrt(b))^2."""
    a, b, gap = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 2.0]), np.array([1.0, -2.0, 0.5])
    by_hand = gap @ gap + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = frechet_distance(np.zeros(3), np.diag(a), gap, np.diag(b))
    assert ours == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "shapes"),
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "shapes"),
        ((np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2)), "symmetric"),
        ((np.array([np.nan, 0]), np.eye(2), np.zeros(2), np.eye(2)), "finite"),
        ((np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), np.eye(2)), "finite"),
    ],
)
def test_frechet_distance_refuses(arguments: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        frechet_distance(*arguments)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("seed", "subsets", "size"), [(0, 100, 1000), (123, 20, 300)], ids=["default", "small"]
)
def test_kid_matches_clean_fid(
    expected: Any, arrays: Any, tag: str, seed: int, subsets: int, size: int
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must not move
    ours = kernel_inception_distance(
        arrays[f"{tag}.real"], arrays[f"{tag}.fake"], subsets, size, seed
    )
    name = f"seed{seed}_subsets{subsets}_max{size}"
    assert ours == pytest.approx(expected["kid"][tag][name], rel=1e-9, abs=1e-15)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_match_guided_diffusion(
    expected: Any, arrays: Any, tag: str, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block if tag == "d64" else 300)
    precision, recall = precision_recall(arrays[f"{tag}.real"], arrays[f"{tag}.fake"], k)
    recorded = expected["precision_recall"][tag][f"k{k}"]
    assert (precision, recall) == (recorded["precision"], recorded["recall"])


@pytest.mark.parametrize(
    ("tag", "split"), [("c50", 5000), ("c50", 200), ("c200", 5000), ("c200", 125)]
)
def test_inception_score_matches_guided_diffusion(
    expected: Any, arrays: Any, tag: str, split: int
) -> None:
    ours = inception_score(arrays[f"{tag}.logits"], split)
    assert ours == pytest.approx(expected["inception_score"][tag][f"split{split}"], rel=1e-9)


def test_torch_fidelity_agrees(arrays: Any) -> None:
    """A second witness for FID, from another library's mathematics."""
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    statistics = [
        fidelity.fid_features_to_statistics(torch.from_numpy(arrays[f"d64.{side}"]))
        for side in ("real", "fake")
    ]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)
    value = theirs["frechet_inception_distance"]
    ours = frechet_distance(*gaussian(arrays["d64.real"]), *gaussian(arrays["d64.fake"]))
    assert ours == pytest.approx(value, rel=1e-6)


def test_scores_refuse_too_few_samples() -> None:
    with pytest.raises(ValueError, match="expected"):
        kernel_inception_distance(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="expected"):
        precision_recall(np.zeros((3, 4)), np.zeros((9, 4)), k=3)
    with pytest.raises(ValueError, match="shape"):
        inception_score(np.zeros(5))


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 400), (30, 30)])
def test_frechet_distance_keeps_its_digits_with_fewer_samples_than_features(n: int, m: int) -> None:
    """An empty direction of a covariance must not add the square root of its rounding error."""
    random = np.random.default_rng(3)
    a, b = 50 * random.normal(size=(n, 200)) ** 2, 50 * random.normal(size=(m, 200)) ** 2
    centred = [(x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    traces = sum((x**2).sum() for x in centred)
    by_hand = gap @ gap + traces - 2 * nuclear
    assert frechet_distance(*gaussian(a), *gaussian(b)) == pytest.approx(by_hand, rel=1e-12)
    # All eigenvalues in the range are kept to about 200 * 2^-53 of the trace.
    assert abs(frechet_distance(*gaussian(a), *gaussian(a))) < 1e-12 * traces


def test_inception_score_with_a_class_that_underflows() -> None:
    assert inception_score(np.array([[0.0, -800.0], [0.0, -800.0]])) == 1


def test_kid_refuses_subsets_too_small_for_an_estimate() -> None:
    with pytest.raises(ValueError, match="expected >= 1 of >= 2"):
        kernel_inception_distance(np.eye(4), np.eye(4), max_subset_size=1)
    with pytest.raises(ValueError, match="expected >= 1 of >= 2"):
        kernel_inception_distance(np.eye(4), np.eye(4), num_subsets=0)
