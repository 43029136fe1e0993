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
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert average.dtype == torch.float32
        assert not average.requires_grad
    assert ema.averages.keys() == expected.keys()
    assert any(name.endswith("alphas") for name in expected)


def test_starts_as_a_copy(tiny_config, random_network):
    network = random_network(tiny_config)
    ema = Ema(network, decay=0.9999, warmup=False)
    for name, mine in network.named_parameters():
        assert torch.equal(mine, ema.averages[name]), name
        assert mine.data_ptr() != ema.averages[name].data_ptr()
        assert mine.requires_grad


def test_averages_are_swapped_in_and_out_again(tiny_config, random_network):
    network = random_network(tiny_config).train()
    ema = Ema(network, decay=0.5, warmup=False)
    masters = {name: p.detach().clone() for name, p in network.named_parameters()}
    averages = {name: torch.randn_like(value) for name, value in masters.items()}
    ema.load(averages)
    with ema.applied_to(network):
        assert not network.training
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, averages[name]), name
    assert network.training
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, masters[name]), name
        assert torch.equal(ema.averages[name], averages[name]), name
