"""The network against a second implementation, and its options."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.errors import UsageError
from terdit_cli.model.dit import (
    SIZES,
    DiT,
    DiTConfig,
    FinalLayer,
    RMSNorm,
    attend,
    build_config,
    size_config,
)
from terdit_cli.model.ternary import TernaryConfig, TernaryLinear
from tests.model.reference_dit import reference_dit

FULL_PRECISION = TernaryConfig(enabled=False)


@st.composite
def configs(draw) -> DiTConfig:
    n_heads = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([k for k in range(1, n_heads + 1) if n_heads % k == 0]))
    patch_size = draw(st.sampled_from([1, 2, 3]))
    dim = n_heads * 2 * draw(st.integers(1, 5))
    return DiTConfig(
        input_size=patch_size * draw(st.integers(1, 3)),
        patch_size=patch_size,
        in_channels=draw(st.integers(1, 4)),
        dim=dim,
        n_layers=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=kv_heads,
        multiple_of=draw(st.sampled_from([1, 7, 32])),
        ffn_dim_multiplier=draw(st.sampled_from([None, 0.7, 1.3])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        class_dropout_prob=draw(st.sampled_from([0.0, 0.1])),
        num_classes=draw(st.integers(1, 6)),
        learn_sigma=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        adaln_norm=draw(st.booleans()),
        pos_embed=dim % 4 == 0 and draw(st.booleans()),
    )


@settings(max_examples=40)
@given(config=configs(), ternary=st.booleans(), seed=st.integers(0, 999))
def test_equals_the_second_witness(random_network, random_inputs, config, ternary, seed):
    chosen = TernaryConfig() if ternary else FULL_PRECISION
    network = random_network(config, chosen, seed).eval()
    x, t, y = random_inputs(config, seed=seed)
    with torch.inference_mode():
        got = network(x, t, y)
    expected = reference_dit(network.state_dict(), config, x, t, y)
    assert got.shape == (2, config.out_channels, config.input_size, config.input_size)
    # float32 against float64: the largest error source is the timestep angle (6e-5 rad at 999).
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= 1e-3 * scale
    assert (got - expected).abs().mean().item() <= 1e-4 * scale


def test_contract_details(tiny_config, random_network, random_inputs):
    network = random_network(tiny_config).eval()
    x, t, y = random_inputs(tiny_config, batch=3)
    with torch.inference_mode():
        out = network(x, t, y)
        assert torch.equal(network(x, t.float(), y), out)  # t may be float
        one = network(x[1:2], t[1:2], y[1:2])
    torch.testing.assert_close(one[0], out[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x has shape .*expected"):
        network(x[:, :2], t, y)
    with pytest.raises(ValueError, match=r"x has shape .*expected"):
        network(x[..., :2], t, y)


def test_initialisation_is_upstreams():
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, dim=64, n_layers=2, n_heads=4, num_classes=50, qk_norm=True)
    network = DiT(config)
    zero = [network.final_layer.linear.weight, network.final_layer.adaLN_modulation[1].weight]
    zero += [block.adaLN_modulation[1].weight for block in network.layers]
    assert all(not w.any() for w in zero)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name or name.endswith("adaLN_modulation.2.weight"):
            assert (parameter == 1).all(), name
    for module in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in network.layers:
        w = block.attention.wq.weight
        bound = math.sqrt(6 / (w.shape[0] + w.shape[1]))
        assert 0.98 * bound < w.abs().max().item() <= bound
    alphas = torch.cat([m.alphas for m in network.modules() if isinstance(m, TernaryLinear)])
    assert alphas.std() > 0.5
    assert (alphas < 0).any()  # a standard normal has both signs
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 50])
    assert not network(x, t, y).any()  # zero output at the start


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_null_class_is_the_last_row(tiny_config, probability):
    config = dataclasses.replace(tiny_config, class_dropout_prob=probability, num_classes=7)
    embedder = DiT(config).y_embedder.train()
    table = embedder.embedding_table.weight
    assert len(table) == (8 if probability else 7)
    assert config.null_class == (7 if probability else None)
    y = torch.arange(len(table))
    assert torch.equal(embedder(y), table)  # labels are dropped by who draws them: train/rng.py


@pytest.mark.parametrize("ternary", [TernaryConfig(), TernaryConfig(activations="int8")])
def test_activation_checkpointing_changes_nothing(
    tiny_config, random_network, random_inputs, ternary
):
    config = dataclasses.replace(tiny_config, class_dropout_prob=0.5)
    x, t, y = random_inputs(config, batch=6)
    results = []
    for checkpointing in (False, True):
        network = random_network(config, ternary).train()
        network.activation_checkpointing = checkpointing
        torch.manual_seed(5)
        loss = network(x, t, y).square().mean()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in network.named_parameters()}))
    (plain, gradients), (checkpointed, recomputed) = results
    assert torch.equal(plain, checkpointed)
    assert all(torch.equal(g, recomputed[name]) for name, g in gradients.items())


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_bfloat16_autocast(tiny_config, random_network, random_inputs, activations):
    network = random_network(tiny_config, TernaryConfig(activations=activations)).eval()
    x, t, y = random_inputs(tiny_config, batch=4)
    exact = network(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(x, t, y)
        loss = got.float().square().mean()
    loss.backward()
    # bfloat16 has 8 bits; tens of roundings on the way, of which few add up.
    assert (got.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    for parameter in network.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [2, 16, 49])
def test_bfloat16_attention_of_few_tokens_equals_torch_s(kv_heads, tokens):
    """Written out there; torch's own in float32 is the measure for both, gradients included."""
    torch.manual_seed(0)
    heads = [torch.randn(2, n, tokens, 32, dtype=torch.bfloat16) for n in (4, kv_heads, kv_heads)]
    upstream = torch.randn(2, 4, tokens, 32, dtype=torch.bfloat16)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (part.to(dtype).requires_grad_() for part in heads)
        out = attend(q, k, v, grouped=kv_heads != 4)
        out.backward(upstream.to(dtype))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for exact, got in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        # Five roundings to 8 bits on the way, of values that are sums of up to 4 * 49 terms.
        assert (got.float() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_rms_norm_formula():
    norm = RMSNorm(6, eps=1e-2)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    x = torch.randn(3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-7)
    assert norm(x.bfloat16()).dtype == torch.float32


def test_final_layer_is_full_precision(tiny_config):
    for ternary in (TernaryConfig(), FULL_PRECISION):
        network = DiT(tiny_config, ternary.linear())
        outside = [network.x_embedder, network.t_embedder, network.y_embedder, network.final_layer]
        assert not any(isinstance(m, TernaryLinear) for part in outside for m in part.modules())
        inside = [m for m in network.layers.modules() if isinstance(m, TernaryLinear)]
        assert len(inside) == (8 * tiny_config.n_layers if ternary.enabled else 0)
    assert isinstance(network.final_layer, FinalLayer)


BAD_FIELDS = {
    "input_size": [0, -4, 33],
    "patch_size": [0, 5],
    "in_channels": [0],
    "dim": [0, 100, 96],  # 100 is no multiple of 32 heads; 96 gives heads of odd width 3
    "n_layers": [0],
    "n_heads": [0, 33],
    "n_kv_heads": [3, 64],
    "multiple_of": [0],
    "num_classes": [0],
    "class_dropout_prob": [-0.1, 1.0, float("nan")],
    "ffn_dim_multiplier": [0.0, -1.0, float("inf"), float("nan")],
    "norm_eps": [-1e-5, float("nan"), float("inf")],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_FIELDS.items() for value in values]
)
def test_impossible_configurations_are_named(name, value):
    with pytest.raises(UsageError) as error:
        DiTConfig(**{name: value})
    message = str(error.value)
    blamed = {"n_heads": "dim" if value > 0 else "n_heads", "patch_size": "input_size"}
    field = name if value == 0 else blamed.get(name, name)
    assert f"cannot be built: {field}" in message
    assert f"Fix: change model.{field}" in message
    assert str(value) in message
    assert "expected" in message


def test_zero_kv_heads_are_refused():
    with pytest.raises(UsageError, match=r"n_kv_heads: got 0.*Fix: change model.n_kv_heads"):
        DiTConfig(n_kv_heads=0)


def test_sizes():
    for name in SIZES:
        config = build_config(name)
        assert (config.dim, config.n_layers, config.n_heads) == SIZES[name]
    assert build_config("600m").ffn_width == 4096
    assert build_config("4.2b").ffn_width == 8192
    assert build_config("600m", n_layers=3).n_layers == 3
    with pytest.raises(UsageError, match=r"'600n' \(did you mean '600m'\?\).*Fix: set model.size"):
        size_config("600n")
    with pytest.raises(UsageError, match=r"'qk_nrom' \(did you mean 'qk_norm'\?\)"):
        build_config("nano", qk_nrom=True)


def test_meta_device_has_a_real_rope_table(tiny_config):
    with torch.device("meta"):
        network = DiT(tiny_config)
    real = DiT(tiny_config)
    assert torch.equal(network.rope_cos, real.rope_cos)
    assert torch.equal(network.rope_sin, real.rope_sin)
    assert "rope_cos" not in network.state_dict()
