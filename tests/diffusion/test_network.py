"""The recorded training loss and sampling runs of a small TerDiT, through the real network."""

from __future__ import annotations

import pytest
import torch

from terdit_cli.diffusion.process import make_schedule
from terdit_cli.model.dit import DiT

RUNS = ("model_p50_cfg4.0", "model_ddim25_cfg1.5")


@pytest.fixture
def network(golden_case):
    case = golden_case("public_a")
    network = DiT(case.config)
    network.load_state_dict(case.part("train"), strict=True)
    return network.eval()


def test_training_loss_and_gradients(golden, network):
    recorded = {
        key.removeprefix("trainloss."): value
        for key, value in golden.tensors.items()
        if key.startswith("trainloss.")
    }
    losses = make_schedule("").training_losses(
        network, *(recorded[key] for key in ("x_start", "t", "y", "noise"))
    )
    # vb divides the output's absolute error of 1e-5 by the posterior's variance at small t.
    for name in ("loss", "mse", "vb"):
        torch.testing.assert_close(losses[name], recorded[name], rtol=1e-4, atol=1e-5)
    losses["loss"].mean().backward()
    gradients = {
        key.removeprefix("grad."): value
        for key, value in recorded.items()
        if key.startswith("grad.")
    }
    parameters = dict(network.named_parameters())
    assert len(gradients) > 40
    largest = max(g.abs().max().item() for g in gradients.values())
    for key, expected in gradients.items():
        excess = (parameters[key].grad - expected).abs() - (1e-5 * largest + 1e-3 * expected.abs())
        assert excess.max().item() <= 0, key


@pytest.mark.parametrize("name", RUNS)
def test_sampling_runs(replay, network, name):
    assert replay(name, network) <= 1
