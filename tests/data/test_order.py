"""The sample order: every image once an epoch, the same for any number of ranks, no state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.data.order import (
    batch_indices,
    batch_positions,
    flip_mask,
    permutation,
    stream_seed,
)
from terdit_cli.errors import UsageError

sizes = st.integers(1, 41)
seeds = st.integers(0, 2**63 - 1)


@given(n=sizes, batch=st.integers(1, 97), seed=seeds, epochs=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_every_epoch_shows_every_image_once(n: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-n * epochs // batch)
    stream = np.concatenate([batch_indices(n, seed, step, batch) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(
    n=sizes, share=st.integers(1, 9), world=st.integers(1, 8), seed=seeds, step=st.integers(0, 999)
)
@settings(max_examples=80, deadline=None)
def test_ranks_share_the_global_batch(n: int, share: int, world: int, seed: int, step: int) -> None:
    batch = share * world
    whole = batch_indices(n, seed, step, batch)
    flips = flip_mask(seed, step, batch)
    assert whole.shape == flips.shape == (batch,)
    assert whole.dtype == np.int64
    assert flips.dtype == np.bool_
    for rank in range(world):
        assert np.array_equal(batch_indices(n, seed, step, batch, rank, world), whole[rank::world])
        assert np.array_equal(flip_mask(seed, step, batch, rank, world), flips[rank::world])


@given(step=st.integers(0, 10**9), share=st.integers(1, 9), world=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_positions_are_arithmetic(step: int, share: int, world: int) -> None:
    batch = share * world
    parts = [batch_positions(step, batch, rank, world) for rank in range(world)]
    union = sorted(np.concatenate(parts).tolist())
    assert union == list(range(step * batch, (step + 1) * batch))


def test_order_has_no_memory() -> None:
    first = [batch_indices(17, 3, step, 6) for step in range(12)]
    permutation.cache_clear()
    again = [batch_indices(17, 3, step, 6) for step in reversed(range(12))]
    for one, other in zip(first, reversed(again), strict=True):
        assert np.array_equal(one, other)


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = [permutation(50, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_seeds_of_streams_are_fixed() -> None:
    # SHA-256 of "order:7:2" begins with these bytes (computed with coreutils' sha256sum).
    assert stream_seed("order", 7, 2) == int("de2d0676fe70995b", 16) >> 1
    assert stream_seed("order", 7, 2) != stream_seed("flip", 7, 2)
    assert stream_seed("order", 1, 11) != stream_seed("order", 11, 1)


def test_flip_probability() -> None:
    assert not flip_mask(0, 0, 1000, probability=0.0).any()
    assert flip_mask(0, 0, 1000, probability=1.0).all()
    share = np.mean([flip_mask(0, step, 1000).mean() for step in range(20)])
    assert abs(share - 0.5) < 5 * 0.5 / 20_000**0.5  # five standard deviations
    assert not np.array_equal(flip_mask(0, 0, 1000), flip_mask(0, 1, 1000))
    assert not np.array_equal(flip_mask(0, 0, 1000), flip_mask(1, 0, 1000))


@pytest.mark.parametrize(("batch", "world", "fix"), [(10, 4, 8), (3, 4, 4), (0, 1, 1)])
def test_batch_that_does_not_divide(batch: int, world: int, fix: int) -> None:
    with pytest.raises(UsageError) as caught:
        batch_indices(100, 0, 0, batch, 0, world)
    message = str(caught.value)
    assert f"global_batch_size {batch} for {world} processes" in message
    assert f"Fix: set global_batch_size to {fix}" in message


@pytest.mark.parametrize("arguments", [(0, 0, 0, 4), (9, 0, -1, 4), (9, 0, 0, 4, 2, 2)])
def test_programming_errors(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        batch_indices(*arguments)


def test_cached_permutation_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 0, 0)[0] = 1
