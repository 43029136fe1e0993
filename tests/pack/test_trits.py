"""The codecs: round trips, layouts bit by bit, recorded bytes, values that are no trits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from terdit_cli.pack.trits import (
    CODECS,
    released_decode,
    released_encode,
    t2_decode,
    t2_encode,
    t5_decode,
    t5_encode,
)

LONGEST = 1030


def random_trits(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("as_column", [False, True])
def test_round_trip_of_every_length(codec, as_column):
    line = random_trits(1, LONGEST)[0]
    for length in range(1, LONGEST + 1):
        trits = line[:length, None] if as_column else line[None, :length]
        packed = CODECS[codec].encode(trits)
        assert tuple(packed.shape) == CODECS[codec].shape(*trits.shape)
        assert codec == "int8" or (packed.dtype == torch.uint8 and packed.numel() % 64 == 0)
        assert torch.equal(CODECS[codec].decode(packed, *trits.shape), trits)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    codec=st.sampled_from(sorted(CODECS)),
    seed=st.integers(0, 9999),
)
def test_round_trip_of_any_shape(rows, columns, codec, seed):
    trits = random_trits(rows, columns, seed)
    packed = CODECS[codec].encode(trits)
    assert tuple(packed.shape) == CODECS[codec].shape(rows, columns)
    assert not CODECS[codec].has_invalid_codes(packed)
    got = CODECS[codec].decode(packed, rows, columns)
    assert got.dtype == torch.int8
    assert got.is_contiguous()
    assert torch.equal(got, trits)


def slow_t2(trits: Tensor) -> list[int]:
    """The t2 bytes, one trit at a time."""
    rows, columns = trits.shape
    panels, vectors = -(-rows // 64), -(-columns // 4)
    blob = [0] * (panels * vectors * 64)
    for n in range(panels * 64):
        for k in range(vectors * 4):
            code = int(trits[n, k]) + 1 if n < rows and k < columns else 1
            byte = ((n // 64) * vectors + k // 4) * 64 + (n % 16) * 4 + k % 4
            blob[byte] |= code << 2 * ((n % 64) // 16)
    return blob


def slow_t5(trits: Tensor) -> list[int]:
    """The t5 bytes, one trit at a time."""
    codes = [int(trit) + 1 for trit in trits.flatten()]
    codes += [1] * (-len(codes) % 5)
    blob = [
        sum(code * 3**digit for digit, code in enumerate(codes[i : i + 5]))
        for i in range(0, len(codes), 5)
    ]
    return blob + [121] * (-len(blob) % 64)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (16, 4), (17, 3), (64, 8), (65, 9), (130, 7), (2, 321)]
)
def test_layouts_byte_by_byte(shape):
    trits = random_trits(*shape, seed=sum(shape))
    assert t2_encode(trits).flatten().tolist() == slow_t2(trits)
    assert t5_encode(trits).tolist() == slow_t5(trits)


def test_known_bytes():
    trits = torch.tensor([[1, 0, -1, -1, 1]], dtype=torch.int8)  # codes 2 1 0 0 2
    assert t5_encode(trits)[0] == 2 + 1 * 3 + 0 * 9 + 0 * 27 + 2 * 81
    vector = t2_encode(trits)[0, 0].tolist()
    filler = 0b01010101  # four codes of 1
    assert vector[:4] == [0b01010110, 0b01010101, 0b01010100, 0b01010100]
    assert set(vector[4:]) == {filler}
    assert t2_encode(trits)[0, 1, :4].tolist() == [0b01010110, filler, filler, filler]


def test_every_byte_of_t5():
    packed = torch.arange(243, dtype=torch.uint8)
    trits = t5_decode(packed, 243, 5)
    assert torch.equal(t5_encode(trits)[:243], packed)
    assert len({tuple(row) for row in trits.tolist()}) == 243


@pytest.mark.parametrize("codec", ["t2", "t5"])
def test_invalid_codes_are_found(codec):
    for value in range(256):
        digits = [value >> shift & 3 for shift in (0, 2, 4, 6)]
        invalid = 3 in digits if codec == "t2" else value > 242
        packed = (
            torch.full((64,), 121, dtype=torch.uint8)
            if codec == "t5"
            else torch.zeros(64, dtype=torch.uint8)
        )
        packed[17] = value
        assert CODECS[codec].has_invalid_codes(packed) == invalid, value


def test_invalid_int8_codes():
    for value in range(-128, 128):
        packed = torch.tensor([[0, value]], dtype=torch.int8)
        assert CODECS["int8"].has_invalid_codes(packed) == (abs(value) > 1)


def test_released_layout(golden_units):
    codes = golden_units["pack.codes"]
    trits = codes.to(torch.int8) - 1
    assert torch.equal(released_encode(trits), golden_units["pack.packed"])
    assert torch.equal(released_decode(golden_units["pack.packed"]), trits)
    unpacked = released_decode(golden_units["pack.all_bytes"])  # code 3 included
    assert torch.equal((unpacked + 1).to(torch.uint8), golden_units["pack.all_bytes_unpacked"])
    with pytest.raises(ValueError, match="6 rows cannot be packed"):
        released_encode(random_trits(6, 2))


def test_released_layout_of_a_model(golden_case):
    case = golden_case("public_b")
    masters = case.part("train")
    for key, packed in case.part("packed").items():
        trits = released_decode(packed)
        weight = masters[key]
        gamma = weight.abs().mean()
        assert torch.equal(trits.float(), (weight / (gamma + 1e-6)).round().clamp(-1, 1))
        assert torch.equal(released_encode(trits), packed)


def test_t2_decodes_views_of_a_file():
    trits = random_trits(70, 10)
    raw = bytearray(t2_encode(trits).numpy().tobytes())
    mapped = torch.frombuffer(raw, dtype=torch.uint8).view(2, 3, 64)
    assert torch.equal(t2_decode(mapped, 70, 10), trits)
