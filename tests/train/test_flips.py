"""Flips: the packed record against plain comparison, shares by layer type, sharded layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import TernaryLinear, ternarize
from terdit_cli.train.flips import KINDS, FlipMeter, count_flips, kind_of, pack_trits, record_bytes

CONFIG = DiTConfig(input_size=4, dim=16, n_layers=2, n_heads=2, multiple_of=8, num_classes=3)


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), max_size=70))
def test_the_record_counts_what_differs(pairs: list[tuple[int, int]]) -> None:
    before, now = (torch.tensor([p[i] for p in pairs], dtype=torch.int8) for i in (0, 1))
    records = pack_trits(before), pack_trits(now)
    assert [len(record) for record in records] == [record_bytes(len(pairs))] * 2
    assert count_flips(*records) == (before != now).sum()


@pytest.fixture
def network() -> DiT:
    torch.manual_seed(0)
    network = DiT(CONFIG)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, TernaryLinear):
                module.weight.normal_()
    return network


def test_shares_by_layer_type(network: DiT) -> None:
    shares = FlipMeter(network).measure()
    assert list(shares) == ["flipped", "minus", "zero", "plus"]
    for what in shares:
        assert list(shares[what]) == ["all", *KINDS]
    assert set(shares["flipped"].values()) == {0.0}
    codes = torch.cat([ternarize(b.attention.wq.weight).flatten() for b in network.layers])
    assert shares["zero"]["wq"] == pytest.approx((codes == 0).float().mean().item())
    assert shares["minus"]["wq"] == pytest.approx((codes == -1).float().mean().item())
    for kind in ("all", *KINDS):
        assert sum(shares[what][kind] for what in ("minus", "zero", "plus")) == pytest.approx(1)


def test_flips_are_those_since_the_last_look(network: DiT) -> None:
    meter = FlipMeter(network)
    weight = network.layers[1].feed_forward.w2.weight
    before = ternarize(weight.detach()).clone()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape) * 0.3)
    flipped = (ternarize(weight.detach()) != before).sum().item()
    assert flipped > 0
    shares = meter.measure()["flipped"]
    assert shares["w2"] == pytest.approx(flipped / (2 * weight.numel()))
    total = sum(m.weight.numel() for m in network.modules() if isinstance(m, TernaryLinear))
    assert shares["all"] == pytest.approx(flipped / total)
    assert shares["wq"] == 0
    assert meter.measure()["flipped"]["w2"] == 0  # nothing since then


def test_a_full_precision_network_has_nothing_to_show() -> None:
    assert FlipMeter(DiT(CONFIG, nn.Linear)).measure() == {}


def test_every_ternary_layer_has_a_known_type(network: DiT) -> None:
    names = [name for name, m in network.named_modules() if isinstance(m, TernaryLinear)]
    assert {kind_of(name) for name in names} == set(KINDS)
