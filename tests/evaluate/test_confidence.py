"""Intervals and limits of the Frechet distance, against Gaussians whose distances are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from terdit_cli.errors import UsageError
from terdit_cli.evaluate import confidence
from terdit_cli.evaluate.confidence import (
    bootstrap_interval,
    frechet_infinity,
    frechet_over_n,
    normal_interval,
)
from terdit_cli.evaluate.metrics import frechet_distance

Matrix = NDArray[np.float64]


def known(dim: int) -> tuple[Matrix, Matrix, Matrix, Matrix, float]:
    """Return a reference's mean and covariance, a model's mean and deviations, their distance."""
    variances = 3 / np.arange(1, dim + 1)
    deviations = 1.2 * np.sqrt(variances)
    gap = np.full(dim, 0.05)
    distance = float(gap @ gap + ((deviations - np.sqrt(variances)) ** 2).sum())
    return np.zeros(dim), np.diag(variances), gap, deviations, distance


def draw(random: np.random.Generator, n: int, gap: Matrix, deviations: Matrix) -> Matrix:
    return gap + deviations * random.normal(size=(n, len(gap)))


def distance_of(mean: Matrix, covariance: Matrix, samples: Matrix) -> float:
    return frechet_distance(mean, covariance, samples.mean(axis=0), np.cov(samples, rowvar=False))


@pytest.mark.parametrize(("dim", "n"), [(8, 300), (24, 60), (40, 20)])
def test_the_interval_holds_the_expected_distance(dim: int, n: int) -> None:
    """Of 80 intervals 76 should; fewer than 70 is 3 deviations of a binomial away."""
    mean, covariance, gap, deviations, _ = known(dim)
    random = np.random.default_rng(dim)
    found = [distance_of(mean, covariance, draw(random, n, gap, deviations)) for _ in range(400)]
    expected, deviation = np.mean(found), np.std(found)
    held, widths = 0, []
    for seed in range(80):
        samples = draw(random, n, gap, deviations)
        low, high = bootstrap_interval(mean, covariance, samples, replicates=30, seed=seed)
        held += low <= expected <= high
        widths.append((high - low) / 2 / 1.96)
    assert held >= 70
    assert 0.8 * deviation < np.mean(widths) < 1.6 * deviation


def test_the_interval_is_around_the_distance_and_a_function_of_the_seed() -> None:
    mean, covariance, gap, deviations, _ = known(12)
    samples = draw(np.random.default_rng(0), 64, gap, deviations).astype(np.float32)
    low, high = bootstrap_interval(mean, covariance, samples, replicates=10, seed=1)
    distance = distance_of(mean, covariance, samples.astype(np.float64))
    assert (low + high) / 2 == pytest.approx(distance, rel=1e-9)
    assert (low, high) == bootstrap_interval(mean, covariance, samples, replicates=10, seed=1)
    assert (low, high) != bootstrap_interval(mean, covariance, samples, replicates=10, seed=2)


def test_the_interval_never_reaches_below_zero() -> None:
    random = np.random.default_rng(0)
    samples = np.concatenate([random.normal(size=(30, 2)), 9 + random.normal(size=(4, 2))])
    low, high = bootstrap_interval(samples.mean(axis=0), np.cov(samples, rowvar=False), samples)
    assert low == 0
    assert high > 0


def test_both_ways_give_the_same_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """With M / 10 left out, 27 of 30 samples: more than 26 features and fewer than 28."""
    for dim in (26, 27, 28):
        mean, covariance, gap, deviations, _ = known(dim)
        samples = draw(np.random.default_rng(3), 30, gap, deviations)
        order = np.random.default_rng(5).permutation(30)
        expected = distance_of(mean, covariance, samples[order[3:]])
        subsets = confidence._Subsets(mean, covariance, samples)
        # 1e-8: the root of the rounding error of one eigenvalue.
        assert subsets.distance(order[3:]) == pytest.approx(expected, abs=1e-7)
        whole = confidence.FeatureStatistics(dim)
        whole.update(samples)
        rest = confidence._without(whole, samples[order[:3]])
        assert frechet_distance(mean, covariance, *rest) == pytest.approx(expected, abs=1e-7)


def test_mean_and_covariance_without_some_samples() -> None:
    samples = 5 + np.random.default_rng(0).normal(size=(50, 7))
    whole = confidence.FeatureStatistics(7)
    whole.update(samples)
    mean, covariance = confidence._without(whole, samples[13:27])
    rest = np.concatenate([samples[:13], samples[27:]])
    np.testing.assert_allclose(mean, rest.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(rest, rowvar=False), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("n", "first"), [(200, 20), (15, 2), (2, 2)])
def test_the_curve_ends_with_the_distance_of_all(n: int, first: int) -> None:
    mean, covariance, gap, deviations, _ = known(32)
    samples = draw(np.random.default_rng(0), n, gap, deviations)
    curve = frechet_over_n(mean, covariance, samples)
    sizes = [size for size, _ in curve]
    assert sizes[0] == first
    assert sizes[-1] == n
    assert sizes == sorted(set(sizes))
    assert all(type(size) is int and type(value) is float for size, value in curve)
    assert curve[-1][1] == pytest.approx(distance_of(mean, covariance, samples), abs=1e-7)
    assert curve == frechet_over_n(mean, covariance, samples)
    if n == 200:
        # Within subsets of one order: n = 20 < D < 200, and both ways of a distance.
        rows = np.random.default_rng(0).permutation(n)
        for size, value in curve:
            expected = distance_of(mean, covariance, samples[rows[:size]])
            assert value == pytest.approx(expected, abs=1e-7)


def test_the_limit_removes_the_bias() -> None:
    mean, covariance, gap, deviations, true = known(16)
    random = np.random.default_rng(0)
    plain, limits = [], []
    for seed in range(60):
        samples = draw(random, 400, gap, deviations)
        curve = frechet_over_n(mean, covariance, samples, seed=seed)
        plain.append(curve[-1][1])
        limits.append(frechet_infinity(curve, 16))
    error = np.std(limits, ddof=1) / np.sqrt(60)
    assert abs(np.mean(limits) - true) < 4 * error
    assert np.mean(plain) - true > 4 * error


def test_the_limit_of_an_exact_line() -> None:
    curve = [(n, 3 + 50 / n) for n in range(10, 101, 10)]
    assert frechet_infinity(curve, 5) == pytest.approx(3, rel=1e-12)
    # What lies below 2 D samples is not fitted.
    assert frechet_infinity([(2, 1e6), (9, -7.0), *curve], 5) == pytest.approx(3, rel=1e-12)


def test_too_few_samples_name_the_number_that_is_enough() -> None:
    with pytest.raises(UsageError, match=r"got 19, expected at least 20.*-n 20"):
        bootstrap_interval(np.zeros(3), np.eye(3), np.ones((19, 3)))
    curve = [(n, 1.0) for n in range(100, 1001, 100)]
    with pytest.raises(UsageError, match=r"got 1000, expected at least 8192.*2048.*-n 8192"):
        frechet_infinity(curve, 2048)
    with pytest.raises(ValueError, match="replicates"):
        bootstrap_interval(np.zeros(3), np.eye(3), np.ones((20, 3)), replicates=1)


@pytest.mark.parametrize("dim", [3, 40])
def test_degenerate_samples(dim: int) -> None:
    """Equal images and constant features have a distance and an interval of no width."""
    samples = np.ones((24, dim))
    low, high = bootstrap_interval(np.zeros(dim), np.eye(dim), samples, replicates=4)
    assert (low, high) == pytest.approx((2 * dim, 2 * dim), rel=1e-9)
    assert frechet_over_n(np.zeros(dim), np.eye(dim), samples)[0][1] == pytest.approx(2 * dim)
    samples[7, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(np.zeros(dim), np.eye(dim), samples, replicates=4)
    with pytest.raises(ValueError, match="finite"):
        frechet_over_n(np.zeros(dim), np.eye(dim), samples)


def test_normal_interval() -> None:
    assert normal_interval(1.0, 0.1) == pytest.approx((0.80400360, 1.19599640), abs=1e-8)


def test_memory_mapped_samples(tmp_path: Any) -> None:
    mean, covariance, gap, deviations, _ = known(6)
    samples = draw(np.random.default_rng(0), 90, gap, deviations).astype(np.float32)
    np.save(tmp_path / "features.npy", samples)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert bootstrap_interval(mean, covariance, mapped, 5) == bootstrap_interval(
        mean, covariance, samples, 5
    )
    assert frechet_over_n(mean, covariance, mapped) == frechet_over_n(mean, covariance, samples)
