"""The choice of a backend, and every backend against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.ternary import alpha_shape, expand_alphas
from terdit_cli.pack.trits import decode, encode, t2_encode
from terdit_cli.runtime import reference
from terdit_cli.runtime.backends import ABSENT, BACKENDS, choose_backend

CPU = torch.device("cpu")
GRANULARITIES = ("tensor", "row", "group128")
TAILS = [1, 2, 3, 5, 63, 64, 65, 127, 128, 130, 257]
SHAPES = [(m, n, k) for m, n in ((1, 3), (5, 64), (2, 130)) for k in TAILS]
SHAPES += [(m, n, k) for n in TAILS for m, k in ((1, 65), (3, 130))]
SHAPES += [(63, 65, 64), (64, 64, 256), (130, 127, 129)]
FP32_EPS = 2.0**-24


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.NAME)
def backend(request):
    reason = request.param.available(CPU)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("TERDIT_BACKEND", raising=False)


def random_problem(m: int, n: int, k: int, granularity: str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    trits = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    alphas = torch.randn(alpha_shape(n, k, granularity), generator=generator)
    return x, trits, alphas, torch.randn(n, generator=generator)


def exact(x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the float64 product and, for each value, the sum of its terms' sizes."""
    weight = (expand_alphas(alphas, trits.shape[1]).double() * trits).expand(trits.shape)
    y = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size


def assert_close(got: Tensor, x: Tensor, trits: Tensor, alphas: Tensor, bias) -> None:
    y, size = exact(x, trits, alphas, bias)
    assert got.shape == y.shape
    assert got.dtype == x.dtype
    # Summation in any order: at most K + 2 roundings of the terms' total size.
    assert ((got - y).abs() <= (trits.shape[1] + 3) * FP32_EPS * size).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("codec", ["t2", "t5", "int8"])
def test_shapes(backend, codec, granularity):
    for m, n, k in SHAPES:
        x, trits, alphas, bias = random_problem(m, n, k, granularity, seed=m + n + k)
        stored = decode(encode(trits, codec), codec, n, k)
        for offset in (bias, None):
            got = backend.matmul(x, t2_encode(stored), alphas, offset, (n, k), "none")
            assert_close(got, x, trits, alphas, offset)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_int8_activations_equal_the_definition(backend, granularity):
    for m, n, k in SHAPES:
        x, trits, alphas, bias = random_problem(m, n, k, granularity, seed=m + n + k)
        packed = t2_encode(trits)
        got = backend.matmul(x, packed, alphas, bias, (n, k), "int8")
        defined = reference.matmul(x, packed, alphas, bias, (n, k), "int8")
        assert torch.equal(got, defined), (m, n, k)
        # Half a step of each value of x is lost.
        y, size = exact(x, trits, alphas, bias)
        weight = expand_alphas(alphas, k).double().abs() * trits.abs()
        lost = x.double().abs().amax(-1, keepdim=True) / 254 * weight.expand(n, k).sum(1)
        assert ((got - y).abs() <= lost + 1e-5 * size).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("trit", [-1, 0, 1])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_uniform_weights(backend, granularity, trit, sign, activations):
    m, n, k = 3, 70, 133
    x = torch.arange(m * k).remainder(7).sub(3).float().view(m, k)
    trits = torch.full((n, k), trit, dtype=torch.int8)
    alphas = torch.full(alpha_shape(n, k, granularity), 0.5 * sign)
    got = backend.matmul(x, t2_encode(trits), alphas, None, (n, k), activations)
    expected = (0.5 * sign * trit * x.sum(1))[:, None].expand(m, n)
    if activations == "none" or trit * sign == 0:
        assert torch.equal(got, expected)  # small integers and halves: exact in any order
    else:
        assert (got - expected).abs().max() <= 0.5 * k * 3 / 254


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_layouts_of_x(backend, activations):
    x, trits, alphas, bias = random_problem(12, 70, 66, "row")
    call = functools.partial(
        backend.matmul,
        packed=t2_encode(trits),
        alphas=alphas,
        bias=bias,
        shape=(70, 66),
        activations=activations,
    )
    expected = call(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(call(x.view(2, 6, 66)), expected.view(2, 6, 70))
    close(call(x.view(3, 2, 2, 66)), expected.view(3, 2, 2, 70))
    close(call(x[3:4]), expected[3:4])
    close(call(x[5]), expected[5])
    close(call(x.T.contiguous().T), expected)
    close(call(torch.cat([x, x], 1)[:, :66]), expected)
    close(call(x[::2]), expected[::2])
    close(call(x.flip(0)), expected.flip(0))
    assert call(x[:0]).shape == (0, 70)


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_input_is_left_alone(backend, activations):
    x, trits, alphas, bias = random_problem(4, 33, 40, "tensor")
    packed = t2_encode(trits)
    before = [value.clone() for value in (x, packed, alphas, bias)]
    backend.matmul(x, packed, alphas, bias, (33, 40), activations)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, packed, alphas, bias), strict=True))


def test_auto_takes_the_first_available():
    choice = choose_backend("auto", CPU)
    first = next(b for b in BACKENDS if b.available(CPU) is None)
    assert choice.backend is first
    assert choice.reason.startswith(f"backend {first.NAME}")
    for name, reason in ABSENT.items():
        assert f"not {name}: {reason}" in choice.reason


def test_named_backend():
    choice = choose_backend("reference", CPU)
    assert choice.backend is reference
    assert choice.reason == "backend reference (as asked)"


@pytest.mark.parametrize("name", ABSENT)
def test_unavailable_backend_is_never_replaced(name):
    with pytest.raises(EnvironmentProblem, match=f"backend '{name}' cannot run") as error:
        choose_backend(name, CPU)
    assert error.value.exit_code == 4
    assert ABSENT[name] in str(error.value)
    assert "device cpu" in str(error.value)
    assert "Fix: use --backend auto or reference" in str(error.value)


def test_unknown_backend():
    with pytest.raises(
        UsageError, match=r"unknown backend: got 'refrence' \(did you mean"
    ) as error:
        choose_backend("refrence", CPU)
    assert error.value.exit_code == 2
    assert "Fix: set --backend or TERDIT_BACKEND" in str(error.value)


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("TERDIT_BACKEND", "reference")
    assert "as asked" in choose_backend("auto", CPU).reason
    monkeypatch.setenv("TERDIT_BACKEND", "gpu")
    with pytest.raises(EnvironmentProblem):
        choose_backend("auto", CPU)
    assert choose_backend("reference", CPU).backend is reference  # a flag wins
    monkeypatch.setenv("TERDIT_BACKEND", "abacus")
    with pytest.raises(UsageError, match="'abacus'"):
        choose_backend("auto", CPU)
