"""What a block is said to be made of is what the network builds; operations as torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from terdit_cli.model.dit import DiT, DiTConfig, build_config
from terdit_cli.model.layout import block_layout, matrix_names, training_flops
from terdit_cli.model.ternary import TernaryLinear

CONFIGS = {
    "plain": DiTConfig(input_size=8, dim=64, n_layers=3, n_heads=4, multiple_of=32, num_classes=9),
    "grey pixels, no sigma": DiTConfig(
        input_size=28, patch_size=7, in_channels=1, dim=48, n_layers=2, n_heads=2, multiple_of=16,
        num_classes=9, learn_sigma=False, qk_norm=True,
    ),
    "grouped heads, wide": DiTConfig(
        input_size=16, dim=96, n_layers=2, n_heads=6, n_kv_heads=2, multiple_of=8,
        ffn_dim_multiplier=1.5, num_classes=9, adaln_norm=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_what_the_network_builds(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        network = DiT(config)
    layers = {
        path: (layer.out_features, layer.in_features, layer.bias is not None)
        for path, layer in network.named_modules()
        if isinstance(layer, TernaryLinear)
    }
    assert sorted(layers) == sorted(matrix_names(config))
    layout = block_layout(config)
    for index in range(config.n_layers):
        for matrix in layout.matrices:
            found = layers[f"layers.{index}.{matrix.name}"]
            assert found == (matrix.rows, matrix.columns, matrix.bias)
    known = {norm.name: norm.width for norm in layout.norms}
    matrices = tuple(f"{matrix.name}." for matrix in layout.matrices)
    norms = {
        key: len(value)
        for key, value in network.layers[0].state_dict().items()
        if not key.startswith(matrices)
    }
    assert norms.items() <= known.items()


def counted(config: DiTConfig, images: int) -> int:
    """Operations of a forward and backward pass, as torch counts those it runs."""
    with torch.device("meta"):
        network = DiT(config, torch.nn.Linear)
        network.rope_cos, network.rope_sin = (
            network.rope_cos.to("meta"),
            network.rope_sin.to("meta"),
        )
        x = torch.empty(images, config.in_channels, config.input_size, config.input_size)
        t = torch.empty(images, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        network(x, t, t).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    config = CONFIGS[name]
    ours = training_flops(config)
    # Ours includes gradients of the patches and of timesteps' features, which nothing needs.
    first = 2 * config.tokens * config.dim * config.patch_size**2 * config.in_channels
    features = 2 * 256 * config.conditioning_width
    assert counted(config, 3) == 3 * (ours - first - features)


def test_the_published_model() -> None:
    # 4.2 billion weights, 6 operations each, of which adaLN's act once an image, not on tokens.
    config = build_config("4.2b", input_size=32, in_channels=4, num_classes=1000, qk_norm=True)
    every_token = 32 * (4 * 3072**2 + 3 * 3072 * 8192)
    attention = 3 * 32 * 4 * 256**2 * 3072
    assert training_flops(config) == pytest.approx(6 * 256 * every_token + attention, rel=0.01)
