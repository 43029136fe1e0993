"""Checkpoints as exported models: exact after QAT, optimal after full-precision training."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terdit_cli.errors import InputFileError
from terdit_cli.model.ckpt import Checkpoint, load_ckpt
from terdit_cli.model.dit import DiT
from terdit_cli.model.layout import matrix_names
from terdit_cli.model.ternary import TernaryConfig, TernaryLinear, expand_alphas
from terdit_cli.pack.exported import count_weights
from terdit_cli.pack.read_checkpoint import CheckpointExport, fit_trits
from terdit_cli.pack.tdt import write_tdt

FULL_PRECISION = TernaryConfig(enabled=False)


def least_error(weights: torch.Tensor) -> float:
    """The least squared error over all 3^n codes, each with its best alpha >= 0 or < 0."""
    best = float(weights.square().sum())  # all codes 0
    for codes in itertools.product((-1.0, 0.0, 1.0), repeat=len(weights)):
        trits = torch.tensor(codes, dtype=torch.float64)
        if trits.any():
            alpha = (weights * trits).sum() / trits.square().sum()
            best = min(best, float((weights - alpha * trits).square().sum()))
    return best


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=6),
    granularity=st.sampled_from(["tensor", "row", "group128"]),
)
def test_fit_is_optimal(values, granularity):
    weight = torch.tensor([values])
    trits, alphas = fit_trits(weight, granularity)
    assert trits.dtype == torch.int8
    error = (weight.double() - expand_alphas(alphas, len(values)).double() * trits).square().sum()
    size = float(weight.double().square().sum())
    # alpha is rounded to float32: its error enters squared, next to the optimum linearly.
    assert float(error) <= least_error(weight[0].double()) + 1e-6 * size
    assert (alphas >= 0).all()


@pytest.mark.parametrize("granularity", ["row", "group128"])
def test_fit_treats_each_scale_alone(granularity):
    torch.manual_seed(0)
    weight = torch.randn(3, 260)
    trits, alphas = fit_trits(weight, granularity)
    step = 260 if granularity == "row" else 128
    flat = iter(alphas.flatten())
    for row in range(3):
        for start in range(0, 260, step):
            part = weight[row : row + 1, start : start + step]
            own_trits, own_alphas = fit_trits(part, "tensor")
            assert torch.equal(own_trits, trits[row : row + 1, start : start + step])
            assert own_alphas.item() == pytest.approx(next(flat).item(), rel=1e-6)


def test_fit_of_a_large_matrix_beats_the_threshold_rule():
    torch.manual_seed(1)
    weight = torch.randn(40, 50)
    trits, alphas = fit_trits(weight, "tensor")
    fitted = (weight - alphas * trits).norm() / weight.norm()
    gamma = weight.abs().mean()
    rounded = (weight / gamma).round().clamp(-1, 1)
    ruled = (weight - rounded * weight.abs()[rounded != 0].mean()).norm() / weight.norm()
    assert fitted <= ruled
    assert fitted == pytest.approx(0.4355, abs=0.02)  # gaussian: sqrt(1 - 0.8103) = 0.4355
    assert not fit_trits(torch.zeros(4, 4), "tensor")[1].any()


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("scale", ["learned", "absmean"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_trained_checkpoints_export_exactly(
    tmp_path, tiny_config, make_ckpt, random_network, weights, scale, granularity
):
    ternary = TernaryConfig(scale=scale, granularity=granularity)
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config, ternary, seed=3)
    network = random_network(tiny_config, ternary, seed=3 if weights == "raw" else 4)
    with CheckpointExport(load_ckpt(path), weights) as model:
        assert not model.fitted
        assert model.info.weights == weights
        assert model.ternary_names() == matrix_names(tiny_config)
        matrices = {n: m for n, m in network.named_modules() if isinstance(m, TernaryLinear)}
        assert set(model.ternary_names()) == set(matrices)
        for name, layer in matrices.items():
            trits, alphas = layer.export()
            assert torch.equal(model.trits(name), trits)
            assert torch.equal(model.alphas(name), alphas)
            assert model.matrix_shape(name) == tuple(trits.shape)
            error = model.matrix_error(name)
            effective = expand_alphas(alphas, trits.shape[1]) * trits
            relative = (layer.weight - effective).norm() / layer.weight.norm()
            assert error.relative_error == pytest.approx(relative.item(), rel=1e-5)
            assert -1 <= error.cosine <= 1
        state = network.state_dict()
        assert all(torch.equal(model.rest(key), state[key]) for key in model.rest_names())
        left = {key for key in state if key.rpartition(".")[0] not in matrices}
        biases = {key for key in state if key.endswith("adaLN_modulation.1.bias")}
        assert set(model.rest_names()) == left | biases
        assert count_weights(model) == sum(m.weight.numel() for m in matrices.values())
        assert set(model.ternary_names()) == set(matrices)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_full_precision_checkpoints_are_fitted(tmp_path, tiny_config, make_ckpt, granularity):
    path = make_ckpt(tmp_path / "ckpt.pt", tiny_config, FULL_PRECISION)
    model = CheckpointExport(load_ckpt(path), "ema", granularity)
    assert model.fitted
    assert model.info.ternary.enabled
    assert model.info.ternary.granularity == granularity
    for name in model.ternary_names():
        trits, alphas = fit_trits(model.master(name), granularity)
        assert torch.equal(model.trits(name), trits)
        assert torch.equal(model.alphas(name), alphas)
        error = model.matrix_error(name)
        assert 0.1 < error.relative_error < 0.6
        # A least-squares fit leaves a right angle between the fit and its error.
        assert error.relative_error**2 + error.cosine**2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers.1.attention.wo.weight", None, "got no layers.1.attention.wo.weight"),
        ("layers.1.attention.wo.weight", torch.zeros(3, 2), r"of shape \[3, 2\], expected shape"),
        ("layers.1.attention.wo.alphas", None, "got no layers.1.attention.wo.alphas"),
        ("layers.1.attention.wo.alphas", torch.ones(20), r"of shape \[20\], expected shape \[1\]"),
        ("x_embedder.bias", None, "got no x_embedder.bias"),
        ("extra", torch.ones(1), "got extra of shape .*expected no such tensor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("enabled", [True, False])
def test_checkpoint_that_is_not_its_network(
    tmp_path, tiny_config, make_ckpt, key, value, message, enabled
):
    """Missing scales, too: others in their place would be another model."""
    if not enabled and "alphas" in key:
        return
    ternary = TernaryConfig(enabled=enabled)
    opened = load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config, ternary))
    state = {name: tensor for name, tensor in opened.ema.items() if name != key}
    state |= {} if value is None else {key: value}
    broken = Checkpoint(opened.path, opened.info, opened.recipe, opened.model, state)
    with pytest.raises(InputFileError, match=rf"{message}.*ckpt.pt"):
        CheckpointExport(broken, "ema")


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("part", ["w1.weight", "w1.alphas", "x_embedder.bias"])
def test_values_that_are_not_finite(tmp_path, tiny_config, make_ckpt, enabled, bad, part):
    """A master that is not would become a matrix of zeros without a word."""
    if not enabled and "alphas" in part:
        return
    ternary = TernaryConfig(enabled=enabled)
    opened = load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config, ternary))
    key = part if part in opened.ema else f"layers.0.feed_forward.{part}"
    state = dict(opened.ema) | {key: opened.ema[key].clone()}
    state[key].view(-1)[0] = bad
    broken = Checkpoint(opened.path, opened.info, opened.recipe, opened.model, state)
    with pytest.raises(InputFileError, match=rf"values that are not finite: got {key} .*ckpt.pt"):
        write_tdt(CheckpointExport(broken, "ema"), tmp_path / "m.tdt", "t2", "fp32")
    assert not (tmp_path / "m.tdt").exists()


@pytest.mark.parametrize(
    ("part", "value", "rest", "match"),
    [
        (
            "w1.weight",
            torch.tensor(1e39, dtype=torch.float64),
            "fp32",
            "values that are not finite",
        ),
        (
            "w1.alphas",
            torch.tensor(1e300, dtype=torch.float64),
            "fp32",
            "values that are not finite",
        ),
        ("x_embedder.bias", torch.tensor(3.4e38), "bf16", "x_embedder.bias, .* torch.bfloat16"),
    ],
)
def test_values_that_do_not_fit(tmp_path, tiny_config, make_ckpt, part, value, rest, match):
    """Finite in the checkpoint, infinite in the file's dtype."""
    opened = load_ckpt(make_ckpt(tmp_path / "ckpt.pt", tiny_config))
    key = part if part in opened.ema else f"layers.0.feed_forward.{part}"
    state = dict(opened.ema) | {key: opened.ema[key].to(value.dtype, copy=True)}
    state[key].view(-1)[0] = value
    large = Checkpoint(opened.path, opened.info, opened.recipe, opened.model, state)
    with pytest.raises(InputFileError, match=match):
        write_tdt(CheckpointExport(large, "ema"), tmp_path / "m.tdt", "t2", rest)
    assert not (tmp_path / "m.tdt").exists()


def test_names_are_those_of_the_network(tiny_config):
    network = DiT(tiny_config)
    ternary = [n for n, m in network.named_modules() if isinstance(m, TernaryLinear)]
    assert sorted(ternary) == sorted(matrix_names(tiny_config))
