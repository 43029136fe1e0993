"""Nearest reals and coverage against brute force, copies, and sets too small to search."""

from __future__ import annotations

import numpy as np
import pytest

from terdit_cli.evaluate import metrics
from terdit_cli.evaluate.metrics import precision_recall
from terdit_cli.evaluate.neighbours import check_neighbours, cover, nearest

RANDOM = np.random.default_rng(0)


def brute(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(
        queries[:, None].astype(np.float64) - points[None].astype(np.float64), axis=2
    )


@pytest.mark.parametrize(("q", "n", "d", "k"), [(1, 1, 1, 1), (7, 5, 3, 5), (33, 101, 17, 3)])
@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_is_brute_force(
    q: int, n: int, d: int, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block)
    queries = RANDOM.normal(size=(q, d)).astype(np.float32)
    points = RANDOM.normal(size=(n, d)).astype(np.float32)
    found = nearest(queries, points, k)
    every = brute(queries, points)
    assert found.indices.shape == found.distances.shape == (q, k)
    # Both sum D squares in float64, in another order.
    np.testing.assert_allclose(found.distances, np.sort(every, axis=1)[:, :k], rtol=1e-12)
    np.testing.assert_array_equal(found.indices, np.argsort(every, axis=1)[:, :k])


@pytest.mark.parametrize("block", [4, 2048])
def test_a_point_is_not_its_own_neighbour(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ROWS", block)
    points = RANDOM.normal(size=(23, 5))
    own = np.array([0, 7, 22, 3])
    found = nearest(points[own], points, own=own)
    every = brute(points[own], points)
    every[np.arange(4), own] = np.inf
    np.testing.assert_array_equal(found.indices[:, 0], every.argmin(axis=1))


def test_equal_points_are_at_distance_zero() -> None:
    # Far from the origin |x|^2 + |y|^2 - 2 x.y loses everything but the rounding error.
    points = (1e4 + RANDOM.normal(size=(50, 64))).astype(np.float32)
    found = nearest(points[[5, 6]], points)
    np.testing.assert_array_equal(found.indices[:, 0], [5, 6])
    assert (found.distances == 0).all()
    twice = np.concatenate([points, points[:1]])
    again = nearest(twice[[0]], twice, own=np.array([0]))
    assert (int(again.indices[0, 0]), float(again.distances[0, 0])) == (50, 0.0)


def test_what_cannot_be_searched() -> None:
    points = np.zeros((3, 2))
    with pytest.raises(ValueError, match="4 neighbours among 3 points"):
        nearest(points, points, 4)
    with pytest.raises(ValueError, match="3 neighbours among 3 points"):
        nearest(points, points, 3, own=np.arange(3))
    with pytest.raises(ValueError, match="0 neighbours"):
        nearest(points, points, 0)
    with pytest.raises(ValueError, match="expected"):
        nearest(np.zeros((3, 4)), points)
    with pytest.raises(ValueError, match="not finite"):
        nearest(np.full((1, 2), np.nan), points)
    with pytest.raises(ValueError, match="no other"):
        check_neighbours(np.zeros((1, 2)), points)


def test_copies_stand_out() -> None:
    real = RANDOM.normal(size=(400, 16)).astype(np.float32)
    new = RANDOM.normal(size=(300, 16)).astype(np.float32)
    honest = check_neighbours(real, new)
    assert honest.searched == 400
    assert len(honest.distances) == 300
    # 1 % is expected; 300 draws leave it below 5 % but for a chance of 1e-6 (Poisson, mean 3).
    assert honest.share_closer < 0.05
    copied = check_neighbours(real, np.concatenate([new[:200], real[:100]]))
    assert copied.share_closer > 0.3
    assert copied.distances[copied.closest(5)].tolist() == [0.0] * 5
    for position in copied.closest(5):
        fake, original = int(copied.fakes[position]), int(copied.reals[position])
        assert fake - 200 == original


def test_copies_count_where_reals_repeat() -> None:
    real = np.repeat(RANDOM.normal(size=(20, 4)), 2, axis=0)
    check = check_neighbours(real, np.concatenate([real[:5], real[:15] + 1]))
    assert (check.real_distances == 0).all()
    assert check.share_closer == 0.25


def test_a_part_is_drawn_the_same_way_twice() -> None:
    real, fake = RANDOM.normal(size=(90, 3)), RANDOM.normal(size=(80, 3))
    first, second = (check_neighbours(real, fake, most=25) for _ in range(2))
    assert len(first.fakes) == len(first.distances) == len(first.real_distances) == 25
    assert (np.diff(first.fakes) > 0).all()
    np.testing.assert_array_equal(first.fakes, second.fakes)
    # All reals are searched, not the part.
    full = check_neighbours(real, fake)
    np.testing.assert_array_equal(first.distances, full.distances[first.fakes])
    assert not np.array_equal(first.fakes, check_neighbours(real, fake, most=25, seed=1).fakes)


def test_typical_and_closest_positions() -> None:
    real = np.arange(10.0)[:, None] * 100
    fake = real + np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 0])[:, None]
    check = check_neighbours(real, fake)
    assert check.distances[check.closest(3)].tolist() == [0, 1, 2]
    assert check.distances[check.typical(2)].tolist() == [4, 5]
    assert len(check.closest(99)) == len(check.typical(99)) == 10


@pytest.mark.parametrize(("n", "m", "d", "k"), [(40, 60, 8, 3), (30, 20, 100, 1), (9, 9, 1, 2)])
def test_coverage_is_precision_and_recall(n: int, m: int, d: int, k: int) -> None:
    real, fake = RANDOM.normal(size=(n, d)), RANDOM.normal(size=(m, d)) * 1.2
    shown = cover(real, fake, k)
    assert shown.real.shape == (n, 2)
    assert shown.fake.shape == (m, 2)
    means = float(shown.fake_covered.mean()), float(shown.real_covered.mean())
    assert means == pytest.approx(precision_recall(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("d", [6, 300])
def test_the_plane_is_that_of_the_principal_components(d: int) -> None:
    """Both ways to it, fewer points than features and more, against numpy's SVD."""
    real, fake = RANDOM.normal(size=(40, d)), RANDOM.normal(size=(40, d)) + 1
    shown = cover(real, fake)
    both = np.concatenate([real, fake])
    both = both - both.mean(axis=0)
    _, values, axes = np.linalg.svd(both, full_matrices=False)
    expected = both @ axes[:2].T
    plane = np.concatenate([shown.real, shown.fake])
    np.testing.assert_allclose(np.abs(plane), np.abs(expected), atol=1e-8)
    assert shown.variance == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()))
    again = cover(real, fake)
    np.testing.assert_array_equal(shown.fake, again.fake)


def test_the_sets_weigh_the_same_in_the_plane() -> None:
    real = np.zeros((1000, 2))
    real[:, 0] = RANDOM.normal(size=1000) * 1e-3
    fake = np.zeros((10, 2))
    fake[:, 1] = np.linspace(-1, 1, 10)
    shown = cover(real, fake)
    assert np.ptp(shown.fake[:, 0]) == pytest.approx(2.0)


def test_constant_features_have_a_picture() -> None:
    shown = cover(np.ones((5, 3)), np.ones((6, 3)))
    assert np.isfinite(shown.real).all()
    assert shown.variance == 0.0
    assert shown.fake_covered.all()
    with pytest.raises(ValueError, match="expected"):
        cover(np.ones((3, 3)), np.ones((6, 3)), k=3)
