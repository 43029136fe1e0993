"""TernaryLinear: every option against formulas written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from terdit_cli.model.ternary import (
    TernaryConfig,
    TernaryLinear,
    absmean_alphas,
    expand_alphas,
    least_squares_alphas,
    quantise_activations,
    ternarize,
    ternary_linear,
)

GRANULARITIES = ("tensor", "row", "group128")
EXACT = {"rtol": 1e-5, "atol": 1e-6}
SCALES = (("learned", "scaled"), ("learned", "identity"), ("absmean", "scaled"))  # and STE
OPTIONS = list(itertools.product(GRANULARITIES, SCALES, ("none", "int8")))


def units(granularity: str, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """The part of the matrix behind each scale, in the order of `alphas.flatten()`."""
    if granularity == "tensor":
        return [(slice(None), slice(None))]
    if granularity == "row":
        return [(slice(r, r + 1), slice(None)) for r in range(rows)]
    starts = range(0, columns, 128)
    return [(slice(r, r + 1), slice(s, s + 128)) for r in range(rows) for s in starts]


def make_layer(rows: int, columns: int, seed: int = 0, **options) -> TernaryLinear:
    torch.manual_seed(seed)
    layer = TernaryLinear(columns, rows, **options)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize(("granularity", "scale_and_ste", "activations"), OPTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 300), (1, 128), (3, 129), (7, 1)])
def test_forward_and_gradients(granularity, scale_and_ste, activations, rows, columns):
    scale, ste = scale_and_ste
    options = {"granularity": granularity, "activations": activations}
    layer = make_layer(rows, columns, scale=scale, ste=ste, **options)
    parts = units(granularity, rows, columns)
    shapes = {"tensor": (1,), "row": (rows,), "group128": (rows, -(-columns // 128))}
    weight = layer.weight.detach()
    gamma = weight.abs().mean()
    trits = (weight / (gamma + 1e-6)).round().clamp(-1, 1)
    if scale == "learned":
        assert layer.alphas.shape == shapes[granularity]
        alphas = layer.alphas.detach()
    else:
        assert layer.alphas is None
        assert "alphas" not in dict(layer.named_parameters())
        alphas = torch.stack([weight[part].abs().mean() for part in parts])
        alphas = alphas.reshape(shapes[granularity])
    spread = torch.empty(rows, columns)
    for alpha, part in zip(alphas.flatten(), parts, strict=True):
        spread[part] = alpha
    assert torch.equal(expand_alphas(alphas, columns).expand(rows, columns), spread)

    x = torch.randn(2, 3, columns, requires_grad=True)
    out = layer(x)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    seen = x.detach()
    if activations == "int8":
        step = seen.abs().amax(-1, keepdim=True) / 127
        seen = (seen / step).round() * step
    expected = seen @ (spread * trits).T + layer.bias.detach()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)

    g = torch.einsum("bti,btj->ij", upstream, seen)  # dL / d effective weight
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(x.grad, upstream @ (spread * trits), **tolerance)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)), **tolerance)
    if scale == "learned":
        factor = spread if ste == "scaled" else spread.sign()
        torch.testing.assert_close(layer.weight.grad, factor * g, **tolerance)
        own = torch.stack([(g * trits)[part].sum() for part in parts])
        torch.testing.assert_close(
            layer.alphas.grad, own.reshape(alphas.shape), rtol=1e-4, atol=1e-3
        )
    else:
        torch.testing.assert_close(layer.weight.grad, g, **tolerance)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 4),
    granularity=st.sampled_from(GRANULARITIES),
    bias=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_int8_equals_integer_arithmetic(rows, columns, tokens, granularity, bias, seed):
    """The documented order of float32 operations around an exact integer sum, in numpy."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, columns)) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
    trits = rng.integers(-1, 2, (rows, columns)).astype(np.int64)
    shape = {"tensor": (1,), "row": (rows,), "group128": (rows, -(-columns // 128))}[granularity]
    alphas = rng.standard_normal(shape).astype(np.float32)
    offset = rng.standard_normal(rows).astype(np.float32) if bias else None

    f32 = np.float32
    limit = np.maximum(np.abs(x).max(-1, keepdims=True), f32(1e-5))
    u = np.rint(x * (f32(127) / limit)).astype(np.int64)
    assert np.abs(u).max() <= 127
    step = limit / f32(127)
    if granularity == "group128":
        y = np.zeros((tokens, rows), f32)
        for group in range(shape[1]):
            k = slice(128 * group, 128 * group + 128)
            y = y + (u[:, k] @ trits[:, k].T).astype(f32) * alphas[:, group]
        y = y * step
    else:
        y = (u @ trits.T).astype(f32) * step * alphas
    y = y if offset is None else y + offset
    assert y.dtype == f32

    got = ternary_linear(
        torch.from_numpy(x),
        torch.from_numpy(trits).float(),
        torch.from_numpy(alphas),
        None if offset is None else torch.from_numpy(offset),
        "int8",
    )
    assert torch.equal(got, torch.from_numpy(y))


@pytest.mark.parametrize("exponent", range(-40, 39, 3))
def test_quantised_activations(exponent):
    torch.manual_seed(exponent)
    x = torch.randn(64, 33).mul(10.0**exponent).clamp(-3e38, 3e38)
    u, step = quantise_activations(x)
    assert torch.equal(u, u.round())
    assert u.abs().max() <= 127
    assert step.shape == (64, 1)
    largest = x.abs().amax(-1)
    exact = largest > 1e-5
    assert (u.abs().amax(-1)[exact] == 127).all()  # the largest value is 127 exactly
    error = (u.double() * step.double() - x.double()).abs()
    assert (error <= step.double() * 0.5001).all()


def test_quantised_zero_rows_and_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    u, step = quantise_activations(x)
    assert not u.any()
    assert (step > 0).all()
    x = torch.tensor([[1.0, -2.0, 0.5, 127.0]], requires_grad=True)
    u, _ = quantise_activations(x)
    assert u.tolist() == [[1.0, -2.0, 0.0, 127.0]]  # 0.5 rounds to even
    u.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # straight through: d u / d x = 127 / absmax


def test_ternarize_rounds_half_to_even():
    # |W| has mean 1 up to 1e-6: 0.5 and 1.5 are no exact ties, so use the scale that makes them.
    w = torch.tensor([[1.0, -1.0, 1.5, 0.5, 0.4, -1.6]])
    assert ternarize(w).tolist() == [[1.0, -1.0, 1.0, 0.0, 0.0, -1.0]]
    assert not ternarize(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_alpha_initialisation(granularity):
    layer = make_layer(4, 200, alpha_init="absmean", granularity=granularity)
    layer.reset_alphas()
    weight = layer.weight.detach()
    trits = ternarize(weight)
    for alpha, part in zip(layer.alphas.flatten(), units(granularity, 4, 200), strict=True):
        kept = weight[part].abs()[trits[part] != 0]
        assert alpha.item() == pytest.approx(kept.mean().item(), rel=1e-5)

    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_alphas()
    assert torch.equal(layer.alphas, torch.full_like(layer.alphas, 0.02))
    layer(torch.randn(2, 200)).sum().backward()
    assert layer.weight.grad.any()  # zero masters can start to move

    torch.manual_seed(3)
    many = TernaryLinear(64, 2000, granularity="row", alpha_init="randn").alphas
    assert many.mean().abs() < 0.15
    assert many.std().item() == pytest.approx(1.0, abs=0.1)


def test_scales_of_zero_groups():
    weight = torch.zeros(2, 130)
    weight[0, :128] = 3.0
    assert absmean_alphas(weight, "group128").tolist() == [
        [3.0, pytest.approx(1e-5)],
        [pytest.approx(1e-5), pytest.approx(1e-5)],
    ]
    assert least_squares_alphas(weight, ternarize(weight), "group128").tolist() == [[3, 0], [0, 0]]


@pytest.mark.parametrize("scale", ["learned", "absmean"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_export_reproduces_the_forward(granularity, scale):
    layer = make_layer(9, 131, granularity=granularity, scale=scale)
    trits, alphas = layer.export()
    assert trits.dtype == torch.int8
    x = torch.randn(4, 131)
    expected = F.linear(x, expand_alphas(alphas, 131) * trits, layer.bias)
    assert torch.equal(layer(x), expected)
    assert "TernaryLinear(in_features=131, out_features=9" in repr(layer)


def test_bfloat16_autocast_uses_float32_codes():
    layer = make_layer(40, 64)
    trits, alphas = layer.export()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        effective = layer(torch.eye(64)) - layer.bias.bfloat16()
    assert layer.weight.dtype == torch.float32
    got = (layer(torch.eye(64)) - layer.bias).T.sign()
    assert torch.equal(got, trits.float() * alphas.sign())
    assert effective.isfinite().all()


def test_configuration_builds_layers():
    assert TernaryConfig(enabled=False).linear() is nn.Linear
    layer = TernaryConfig(granularity="row", activations="int8", scale="absmean").linear()(8, 3)
    assert isinstance(layer, TernaryLinear)
    assert layer.alphas is None
    assert (layer.granularity, layer.activations) == ("row", "int8")
    bare = TernaryConfig().linear()(8, 3, bias=False)
    assert bare.bias is None
    assert set(bare.state_dict()) == {"weight", "alphas"}


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_scale_of_zero_gives_no_gradient_but_its_own(activations):
    """Its sign is 0, and nothing is divided by it."""
    layer = make_layer(3, 20, granularity="row", ste="identity", activations=activations)
    with torch.no_grad():
        layer.alphas[1] = 0.0
    layer(torch.randn(4, 20)).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert not layer.weight.grad[1].any()
    assert layer.weight.grad[[0, 2]].any()
    assert layer.alphas.grad.all()


@pytest.mark.slow
@pytest.mark.parametrize("ste", ["scaled", "identity"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_a_compiled_layer_trains_as_a_plain_one(granularity, ste):
    """torch.compile has read beyond the scales of groups; 300 inputs have two and a bit."""
    torch.manual_seed(0)
    layer = TernaryLinear(300, 24, alpha_init="absmean", granularity=granularity, ste=ste)
    x = torch.randn(5, 300)
    results = []
    for module in (layer, torch.compile(layer)):
        layer.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), layer.weight.grad.clone(), layer.alphas.grad.clone()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
