"""Noise depends on (seed, image index, draw) and on nothing else."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from terdit_cli.diffusion.noise import ImageNoise, unit_normals
from terdit_cli.errors import UsageError

SHAPE = (3, 5, 7)  # 105 numbers: odd


def philox4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Return the four 64-bit words of one block: Salmon et al. 2011, ten rounds, in plain ints."""
    mask = 2**64 - 1
    c, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & mask, (p0 >> 64) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


def test_numbers_are_those_of_the_definition():
    digest = hashlib.sha256(b"terdit noise 1:12:34:5").digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    count = math.prod(SHAPE)
    pairs = (count + 1) // 2
    words = [word for block in range(1, 28) for word in philox4x64(key, block)][: 2 * pairs]
    expected = []
    for trig in (math.cos, math.sin):
        for u, v in zip(words[:pairs], words[pairs:], strict=True):
            radius = math.sqrt(-2 * math.log(((u >> 11) + 1) / 2**53))
            expected.append(radius * trig(2 * math.pi * (v >> 11) / 2**53))
    got = ImageNoise(12, [34], SHAPE)(5).flatten().double()
    torch.testing.assert_close(
        got, torch.tensor(expected[:count], dtype=torch.float64), rtol=2**-23, atol=1e-12
    )


def test_a_row_does_not_depend_on_its_batch():
    whole = ImageNoise(7, range(6), SHAPE)
    parts = [ImageNoise(7, batch, SHAPE) for batch in ([4], [1, 0], [5, 3, 2])]
    draws = [ImageNoise.initial, lambda noise: noise(0), lambda noise: noise(249)]
    for draw in draws:
        rows = {
            index: row
            for part in parts
            for index, row in zip(part.indices, draw(part), strict=True)
        }
        assert torch.equal(torch.stack([rows[i] for i in range(6)]), draw(whole))


def test_a_draw_does_not_depend_on_earlier_draws():
    fresh, used = ImageNoise(0, [3], SHAPE), ImageNoise(0, [3], SHAPE)
    used.initial()
    used(9)
    torch.manual_seed(1)
    assert torch.equal(used(4), fresh(4))
    assert torch.equal(used(4), fresh(4))


def test_everything_in_the_key_matters():
    cases = [(0, 0), (1, 0), (2**32, 0), (2**64 + 1, 0), (10**40, 0), (0, 1), (0, 2**32), (1, 11)]
    draws = [d for s, i in cases for n in [ImageNoise(s, [i], SHAPE)] for d in (n.initial(), n(0))]
    draws += [ImageNoise(11, [1], SHAPE)(k) for k in (0, 1, 10)]
    flat = torch.stack(draws).flatten(1)
    closeness = torch.corrcoef(flat) - torch.eye(len(flat))
    assert closeness.abs().max() < 5 / math.sqrt(flat.shape[1])  # 5 sigma of chance


def test_shape_type_and_empty_batch():
    noise = ImageNoise(0, [0, 1], SHAPE)
    assert noise(0).shape == (2, *SHAPE)
    assert noise.initial().dtype == torch.float32
    assert ImageNoise(0, [], SHAPE)(0).shape == (0, *SHAPE)


def test_numbers_are_unit_normal():
    n = 200_000
    x = torch.from_numpy(unit_normals("any", n))
    # Standard errors of the first four moments of n unit normals, five of each.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 5 * math.sqrt(variance / n)
    assert abs((x[: n // 2] * x[n // 2 :]).mean().item()) < 5 / math.sqrt(n / 2)
    for level in (-2.0, -0.5, 0.3, 1.7):
        share = 0.5 * (1 + math.erf(level / math.sqrt(2)))
        error = math.sqrt(share * (1 - share) / n)
        assert abs((x < level).double().mean().item() - share) < 5 * error


def test_negative_seed():
    with pytest.raises(UsageError, match=r"got -3, expected .* \(--seed\)\. Fix: --seed 0"):
        ImageNoise(-3, [0], SHAPE)


def test_negative_index_and_step():
    with pytest.raises(ValueError, match="-1"):
        ImageNoise(0, [2, -1], SHAPE)
    with pytest.raises(ValueError, match="-2"):
        ImageNoise(0, [0], SHAPE)(-2)
