"""The moving average of weights, step by step."""

from __future__ import annotations

import pytest
import torch

from terdit_cli.model.ema import Ema


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_the_formula(tiny_config, random_network, warmup):
    network = random_network(tiny_config)
    ema = Ema(network, decay=0.9, warmup=warmup)
    expected = {name: p.detach().double().clone() for name, p in network.named_parameters()}
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, parameter in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    assert not ema.model.training
    assert any(name.endswith("alphas") for name in expected)


def test_starts_as_a_copy(tiny_config, random_network):
    network = random_network(tiny_config)
    ema = Ema(network, decay=0.9999, warmup=False)
    for (name, mine), theirs in zip(
        network.named_parameters(), ema.model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr()
        assert mine.requires_grad
