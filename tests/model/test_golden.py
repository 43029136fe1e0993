"""The network, its gradients and its functions against recordings of the original code."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from terdit_cli.diffusion.sampler import forward_with_cfg
from terdit_cli.model.dit import DiT, DiTConfig, apply_rope, rope_table, timestep_embedding
from terdit_cli.model.ternary import TernaryLinear, ternarize
from terdit_cli.pack.trits import released_encode

FP32_EPS = 2.0**-24
OUTPUT_TOLERANCE = 1e-5
WIDE_TOLERANCE = 1e-4
CASES = ("public_a", "public_b")


@pytest.fixture(scope="module")
def network_of(golden_case):
    """Return network_of(case): the training network with the recorded masters, in eval mode."""

    def build(name: str) -> DiT:
        case = golden_case(name)
        network = DiT(case.config)
        network.load_state_dict(case.part("train"), strict=True)
        return network.eval()

    return build


@pytest.mark.parametrize("name", CASES)
def test_output_loss_and_gradients(golden_case, network_of, name):
    case, network = golden_case(name), network_of(name)
    inputs = case.part("in")
    out = network(inputs["x"], inputs["t"], inputs["y"])
    for recorded in ("train", "packed"):
        error = (out - case.tensors[f"out.{recorded}"]).abs().max().item()
        assert error <= OUTPUT_TOLERANCE
    loss = out.square().mean()
    assert loss.item() == pytest.approx(case.facts["loss"], rel=1e-5)
    loss.backward()

    recorded = case.part("grad")
    parameters = dict(network.named_parameters())
    assert recorded.keys() <= parameters.keys()
    assert name == "public_b" or recorded.keys() == parameters.keys()
    largest = max(g.abs().max().item() for g in recorded.values())
    for key, expected in recorded.items():
        got = parameters[key].grad
        excess = (got - expected).abs() - (1e-5 * largest + 1e-3 * expected.abs())
        assert excess.max().item() <= 0, key


@pytest.mark.parametrize(
    ("name", "scale"), [("public_a", 1.5), ("public_a", 4.0), ("public_b", 4.0)]
)
def test_guided_output(golden_case, network_of, name, scale):
    case = golden_case(name)
    with torch.inference_mode():
        got = forward_with_cfg(
            network_of(name), *(case.tensors[f"cfg.{key}"] for key in "xty"), cfg_scale=scale
        )
    # eps = without + scale * (with - without): errors of both halves are amplified.
    tolerance = (2 * scale - 1) * OUTPUT_TOLERANCE
    assert (got - case.tensors[f"cfg.out_{scale}"]).abs().max().item() <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_parameter_counts(golden_case, network_of, name):
    case, network = golden_case(name), network_of(name)
    assert sum(p.numel() for p in network.parameters()) == case.facts["params_train"]
    ternary = [m for m in network.modules() if isinstance(m, TernaryLinear)]
    assert sum(m.weight.numel() for m in ternary) == case.facts["ternary_weights"]
    rest = case.facts["params_train"] - case.facts["ternary_weights"]
    assert rest == case.facts["upstream_parameter_count_packed"]


@pytest.mark.parametrize("name", ["outlier", "rand0", "rand1", "rand2", "ties", "tiny", "zeros"])
def test_codes_are_the_recorded_ones(golden_units, name):
    got = ternarize(golden_units[f"tern.{name}.w"])
    assert got.dtype == torch.float32
    assert torch.equal(got, golden_units[f"tern.{name}.q"])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_codes_in_low_precision(golden_units, name, dtype):
    weight = golden_units[f"tern_lowp.{name}.w"]
    assert weight.dtype == dtype
    assert torch.equal(weight, golden_units["tern_lowp.w_fp32"].to(dtype))
    assert torch.equal(ternarize(weight).float(), golden_units[f"tern_lowp.{name}.q"])


@pytest.mark.parametrize("index", range(3))
def test_straight_through_gradients(golden_units, index):
    unit = {key: golden_units[f"ste.{index}.{key}"] for key in ("w", "alpha", "g_effective_weight")}
    rows, columns = unit["w"].shape
    layer = TernaryLinear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(unit["w"])
        layer.alphas.copy_(unit["alpha"])
    effective = layer(torch.eye(columns)).T  # the effective weight itself
    effective.backward(unit["g_effective_weight"])
    torch.testing.assert_close(
        layer.weight.grad, golden_units[f"ste.{index}.grad_w"], rtol=4 * FP32_EPS, atol=0
    )
    terms = unit["g_effective_weight"].abs().sum().item()
    expected = golden_units[f"ste.{index}.grad_alpha"]
    assert (layer.alphas.grad - expected).abs().item() <= 8 * FP32_EPS * terms


def test_timestep_embedding(golden_units):
    # exp() may differ by an ulp between machines: angles up to 999 move by 999 * 2^-24 each.
    got = timestep_embedding(golden_units["temb.t"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, golden_units["temb.out256"], rtol=0, atol=2 * 999 * FP32_EPS)


@pytest.mark.parametrize("width", [16, 20, 48])
def test_rotary_embedding(golden_units, width):
    unit = {key: golden_units[f"rope{width}.{key}"] for key in ("cos", "sin", "q", "k")}
    cos, sin = rope_table(width, 64)
    # The frequency and the angle (up to 63) are rounded, each to half an ulp or one.
    angle_error = 63 * 4 * FP32_EPS
    for got, expected in ((cos, unit["cos"]), (sin, unit["sin"])):
        torch.testing.assert_close(got, expected, rtol=0, atol=angle_error)
    for name in "qk":
        x = unit[name]
        got = apply_rope(x, cos, sin)
        expected = golden_units[f"rope{width}.{name}_out"]
        tolerance = 2 * x.abs().max().item() * (angle_error + 4 * FP32_EPS)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    bf16 = apply_rope(unit["q"].bfloat16(), cos, sin)
    assert bf16.dtype == torch.bfloat16


def test_patchify_and_unpatchify(golden_units):
    config = DiTConfig(input_size=8, dim=8, n_layers=1, n_heads=2, num_classes=2)
    network = DiT(config)
    assert torch.equal(
        network.patchify(golden_units["patchify.x"]), golden_units["patchify.tokens"]
    )
    tokens, x = golden_units["unpatchify.tokens"], golden_units["unpatchify.x"]
    assert torch.equal(network.unpatchify(tokens), x)


def _splitmix_values(
    key: str, shape: tuple[int, ...], seed: int, scale: float, offset: float
) -> Tensor:
    """Return the documented pseudo-random tensor of a key."""
    with np.errstate(over="ignore"):
        z = np.arange(math.prod(shape), dtype=np.uint64)
        z = z + np.uint64((zlib.crc32(key.encode()) << 20) + seed)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    values = offset + scale * (((z >> np.uint64(52)).astype(np.float64) + 0.5) / 4096 - 0.5)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def _scale_and_offset(key: str, shape: tuple[int, ...], ternary: bool) -> tuple[float, float]:
    if key.endswith(".alphas"):
        return 0.01, 0.04
    if ternary:
        return 0.2, 0.0
    if key.endswith(("norm.weight", "adaLN_modulation.2.weight")):
        return 0.5, 1.0
    if len(shape) == 1:
        return 0.4, 0.0
    return (1.0, 0.0) if key.startswith("y_embedder.") else (2 / math.sqrt(shape[1]), 0.0)


def test_wide_model(golden_case):
    """dim 1152 > 1024: the conditioning is narrower than the tokens."""
    case = golden_case("public_wide")
    seed = case.facts["seed"]
    with torch.device("meta"):
        network = DiT(case.config)
    matrices = {
        f"{name}.weight" for name, m in network.named_modules() if isinstance(m, TernaryLinear)
    }
    state = {
        key: _splitmix_values(
            key, value.shape, seed, *_scale_and_offset(key, value.shape, key in matrices)
        )
        for key, value in network.state_dict().items()
    }
    assert sum(value.numel() for value in state.values()) == case.facts["params_train"]
    network.load_state_dict(state, strict=True, assign=True)
    network.eval()

    x, t, y = (case.tensors[f"in.{key}"] for key in "xty")
    assert torch.equal(_splitmix_values("input.x", x.shape, seed, 3.0, 0.0), x)
    first = state["layers.0.attention.wq.weight"]
    assert torch.equal(first[:2, :8], case.tensors["sample.wq0"])
    for key, crc in case.facts["packed_crc32"].items():
        packed = released_encode(ternarize(state[key]).to(torch.int8))
        assert zlib.crc32(packed.numpy().tobytes()) == crc, key

    with torch.inference_mode():
        out = network(x, t, y)
        call = case.facts["cfg_call"]
        t_cfg = torch.full((len(x),), call["t"])
        guided = forward_with_cfg(network, x, t_cfg, torch.tensor(call["y"]), call["cfg_scale"])
    assert (out - case.tensors["out.packed"]).abs().max().item() <= WIDE_TOLERANCE
    error = (guided - case.tensors["cfg.out_4.0"]).abs().max().item()
    assert error <= (2 * call["cfg_scale"] - 1) * WIDE_TOLERANCE
