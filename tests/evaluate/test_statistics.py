"""Streaming statistics against numpy, and the same bits however a stream is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.evaluate.statistics import BLOCK, FeatureStatistics

EPS = np.finfo(np.float64).eps


def fed(data: np.ndarray, sizes: list[int]) -> FeatureStatistics:
    """Return the statistics of data that comes in batches of these sizes, then of the rest."""
    statistics, start = FeatureStatistics(data.shape[1]), 0
    for size in [*sizes, len(data)]:
        statistics.update(data[start : start + size])
        start += size
    return statistics


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 700]),
    sizes=st.lists(st.integers(0, 300), max_size=6),
    dim=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_numpy_s_mean_and_covariance_for_any_batches(
    count: int, sizes: list[int], dim: int, offset: float, seed: int
) -> None:
    data = np.random.default_rng(seed).normal(size=(count, dim)) + offset
    statistics = fed(data, sizes)
    assert statistics.count == count
    # Sums of n numbers of size s: n eps s. A mean's error e shifts the scatter by e times the sum
    # of what was centred, which is of the size of that error too: beside n eps s^2 of the
    # centred numbers (up to 6 of them), n (eps s)^2 with the offset for s.
    scale = offset + 6
    assert np.abs(statistics.mean - data.mean(axis=0)).max() <= count * EPS * scale
    covariance = np.cov(data, rowvar=False).reshape(dim, dim)
    bound = count * EPS * 36 + 2 * (EPS * scale) * 6 + count * (EPS * scale) ** 2
    assert np.abs(statistics.covariance - covariance).max() <= bound
    assert np.array_equal(statistics.covariance, statistics.covariance.T)

    same = fed(data, [])
    assert np.array_equal(statistics.mean, same.mean)
    assert np.array_equal(statistics.covariance, same.covariance)


def test_every_batch_size_gives_the_same_bits() -> None:
    data = np.random.default_rng(0).normal(size=(1000, 37)).astype(np.float32)
    whole = fed(data, [])
    for size in (1, 2, 3, 64, 100, 255, 256, 257, 512, 999):
        statistics = fed(data, [size] * (len(data) // size))
        assert np.array_equal(statistics.mean, whole.mean)
        assert np.array_equal(statistics.covariance, whole.covariance)


def test_reading_between_batches_changes_nothing() -> None:
    data = np.random.default_rng(0).normal(size=(700, 5))
    asked, whole = FeatureStatistics(5), fed(data, [])
    for start in range(0, 700, 70):
        asked.update(data[start : start + 70])
        part = data[: start + 70]
        assert np.allclose(asked.mean, part.mean(axis=0), rtol=0, atol=1e-13)
        assert np.allclose(asked.covariance, np.cov(part, rowvar=False), rtol=0, atol=1e-12)
    assert np.array_equal(asked.mean, whole.mean)
    assert np.array_equal(asked.covariance, whole.covariance)


def test_what_was_returned_does_not_change_with_what_follows() -> None:
    data = np.random.default_rng(0).normal(size=(2 * BLOCK, 3))
    statistics = fed(data[:BLOCK], [])
    mean, covariance = statistics.mean, statistics.covariance
    kept = mean.copy(), covariance.copy()
    given = data.copy()
    statistics.update(data[BLOCK:])
    assert np.array_equal(mean, kept[0])
    assert np.array_equal(covariance, kept[1])
    assert np.array_equal(data, given)


def test_a_stream_sorted_by_class() -> None:
    """The first block says nothing about the others: one far away after one without variance."""
    data = np.concatenate([np.zeros((BLOCK, 4)), np.random.default_rng(0).normal(1e4, 1, (600, 4))])
    expected = np.cov(data, rowvar=False)
    # Relative to its largest entries: n eps.
    bound = len(data) * EPS * np.abs(expected).max()
    assert np.abs(fed(data, [10] * 50).covariance - expected).max() <= bound


def test_constant_features_have_no_variance() -> None:
    statistics = fed(np.full((600, 3), 0.1), [7] * 30)
    # The mean of equal numbers is rounded: each is off by n eps at most.
    assert np.abs(statistics.mean - 0.1).max() < 600 * EPS
    assert np.abs(statistics.covariance).max() < 600 * (600 * EPS) ** 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_type_is_summed_in_float64(dtype: type) -> None:
    data = np.random.default_rng(0).normal(3, 1, size=(500, 4)).astype(dtype)
    statistics = fed(data, [100])
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
    assert np.allclose(
        statistics.covariance, np.cov(data.astype(np.float64), rowvar=False), rtol=1e-12
    )


def test_refuses_other_widths_and_numbers_that_are_not_finite() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \[B, 3\]"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="shape"):
        statistics.update(np.zeros(3))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            statistics.update(np.array([[0, 0, bad]]))
    assert statistics.count == 0
    for _ in range(2):
        with pytest.raises(ValueError, match=f"2 samples, got {statistics.count}"):
            _ = statistics.covariance
        statistics.update(np.ones((1, 3)))
    assert np.array_equal(statistics.covariance, np.zeros((3, 3)))
