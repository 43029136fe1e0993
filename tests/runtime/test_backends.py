"""The choice of a backend and its activations, and every backend on every ISA against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.ternary import (
    ACTIVATION_FLOOR,
    GRANULARITIES,
    alpha_shape,
    expand_alphas,
    ternary_linear,
)
from terdit_cli.pack.trits import CODECS, t2_encode
from terdit_cli.runtime import cpu, reference
from terdit_cli.runtime.backends import BACKENDS, choose_backend, resolve_activations
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.reference import PRECISIONS

CPU = torch.device("cpu")
INTEGERS = {"int8": 127.0, "int16": 32512.0}
TAILS = [1, 2, 3, 5, 63, 64, 65, 127, 128, 130, 257]
SHAPES = [(m, n, k) for m, n in ((1, 3), (5, 64), (2, 130)) for k in TAILS]
SHAPES += [(m, n, k) for n in TAILS for m, k in ((1, 65), (3, 130))]
SHAPES += [(63, 65, 64), (64, 64, 256), (130, 127, 129), (8, 70, 1030)]
FP32_EPS = 2.0**-24

WHY_NOT = cpu.available(CPU)
ISAS = [] if WHY_NOT else cpu.isas_usable()
RUNNERS = [("reference", ""), *(("cpu", name) for name in ISAS or [""])]

Matmul = Callable[..., Tensor]


@pytest.fixture(params=RUNNERS, ids=lambda runner: "-".join(filter(None, runner)))
def matmul(request: pytest.FixtureRequest) -> Iterator[Matmul]:
    """The product of each backend, the native one on each instruction set."""
    backend, isa = request.param
    if backend == "reference":
        yield reference.matmul
        return
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    before = cpu.isa()
    cpu.set_isa(isa)
    yield cpu.matmul
    cpu.set_isa(before)


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


def assert_close(got: Tensor, x: Tensor, trits: Tensor, alphas: Tensor, bias, precision) -> None:
    """Bound the error by half a step of each activation and by float32's roundings.

    Those are the K - 1 of a sum in any order, and those of scale, step, bias and their inverses:
    each at most eps of the terms' total size. Products with trits are exact.
    """
    k = trits.shape[1]
    if precision == "bf16":
        x = x.bfloat16().float()
    y, size = exact(x, trits, alphas, bias)
    assert got.shape == y.shape
    assert got.dtype == x.dtype
    allowed = (k + 6) * FP32_EPS * size
    if precision in INTEGERS:
        weight = (expand_alphas(alphas, k).double().abs() * trits.abs()).expand(trits.shape).sum(1)
        step = x.double().abs().amax(-1, keepdim=True) / INTEGERS[precision]
        allowed = allowed + (0.5 + 1e-5) * step * weight
    assert ((got - y).abs() <= allowed).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_against_float64(matmul, precision, granularity):
    for m, n, k in SHAPES:
        x, trits, alphas, bias = random_problem(m, n, k, granularity, seed=m + n + k)
        for offset in (bias, None):
            got = matmul(x, t2_encode(trits), alphas, offset, (n, k), precision)
            assert_close(got, x, trits, alphas, offset, precision)


@pytest.mark.parametrize("codec", ["t2", "t5", "int8"])
def test_the_codec_on_disk_makes_no_difference(codec):
    for m, n, k in SHAPES:
        x, trits, alphas, bias = random_problem(m, n, k, "row", seed=m + n + k)
        stored = CODECS[codec].decode(CODECS[codec].encode(trits), n, k)
        got = reference.matmul(x, t2_encode(stored), alphas, bias, (n, k), "fp32")
        assert torch.equal(got, ternary_linear(x, trits.float(), alphas, bias, "none"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_reference_is_what_training_does(granularity):
    for m, n, k in SHAPES:
        x, trits, alphas, bias = random_problem(m, n, k, granularity, seed=m + n + k)
        for trained, precision in (("none", "fp32"), ("int8", "int8")):
            got = reference.matmul(x, t2_encode(trits), alphas, bias, (n, k), precision)
            assert torch.equal(got, ternary_linear(x, trits.float(), alphas, bias, trained))
    with pytest.raises(ValueError, match="precision 'none', expected one of fp32, bf16"):
        reference.matmul(x, t2_encode(trits), alphas, bias, (n, k), "none")


SIZES = [1, 2, 3, 4, 15, 16, 63, 64, 65, 100, 255, 256, 1030]


def make_x(kind: str, m: int, k: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(m, k, generator=generator)
    if kind == "saturating":  # every value at +-limit
        return torch.where(x > 0, 3.7, -3.7)
    if kind == "outlier":
        x[:, -1] = 1e4
    if kind == "ties":  # halves of a step
        return x.mul(20).round().clamp(-126, 126).add(0.5).index_fill(1, torch.tensor([0]), 127.0)
    if kind == "tiny":  # below the smallest absmax
        return x * 1e-3 * ACTIVATION_FLOOR
    return x


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@settings(max_examples=300)
@given(
    m=st.integers(1, 70),
    n=st.sampled_from(SIZES),
    k=st.sampled_from(SIZES),
    x_kind=st.sampled_from(["random", "saturating", "outlier", "ties", "tiny"]),
    trit=st.sampled_from([-1, 0, 1, None]),
    alpha=st.sampled_from([-0.7, 0.0, None]),
    granularity=st.sampled_from(GRANULARITIES),
    precision=st.sampled_from(list(INTEGERS)),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9999),
)
def test_integers_equal_the_reference(
    m, n, k, x_kind, trit, alpha, granularity, precision, with_bias, threads, seed
):
    _, trits, alphas, bias = random_problem(m, n, k, granularity, seed)
    x = make_x(x_kind, m, k, torch.Generator().manual_seed(seed))
    trits = trits if trit is None else torch.full_like(trits, trit)
    alphas = alphas if alpha is None else torch.full_like(alphas, alpha)
    arguments = (x, t2_encode(trits), alphas, bias if with_bias else None, (n, k), precision)
    expected = reference.matmul(*arguments)
    before = cpu.isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERDIT_THREADS", str(threads))
        for isa in ISAS:
            cpu.set_isa(isa)
            assert torch.equal(cpu.matmul(*arguments), expected), isa
    cpu.set_isa(before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("trit", [-1, 0, 1])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_uniform_weights(matmul, granularity, trit, sign, precision):
    m, n, k = 3, 70, 133
    x = torch.arange(m * k).remainder(7).sub(3).float().view(m, k)
    trits = torch.full((n, k), trit, dtype=torch.int8)
    alphas = torch.full(alpha_shape(n, k, granularity), 0.5 * sign)
    got = matmul(x, t2_encode(trits), alphas, None, (n, k), precision)
    expected = (0.5 * sign * trit * x.sum(1))[:, None].expand(m, n)
    if precision not in INTEGERS or trit * sign == 0:
        assert torch.equal(got, expected)  # small integers and halves: exact in any order
    else:
        limit = INTEGERS[precision]
        assert (got - expected).abs().max() <= 0.5 * k * 3 / (2 * limit) * (1 + 1e-5)


@pytest.mark.parametrize("precision", list(INTEGERS))
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(matmul, precision, granularity, bad):
    for m, n, k in ((1, 3, 1), (3, 5, 7), (7, 70, 65), (13, 64, 300)):
        x, trits, alphas, bias = random_problem(m, n, k, granularity)
        trits[0], alphas[0] = 0, 0  # what is multiplied by zero is NaN all the same
        call = functools.partial(
            matmul, packed=t2_encode(trits), alphas=alphas, bias=bias, shape=(n, k),
            precision=precision,
        )  # fmt: skip
        clean = call(x)
        for row, column in ((0, 0), (m - 1, k - 1), (m // 2, k // 2)):
            spoilt = x.clone()
            spoilt[row, column] = bad
            got = call(spoilt)
            assert got[row].isnan().all()
            others = [index for index in range(m) if index != row]
            assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layouts_of_x(matmul, precision):
    x, trits, alphas, bias = random_problem(12, 70, 66, "row")
    call = functools.partial(
        matmul,
        packed=t2_encode(trits),
        alphas=alphas,
        bias=bias,
        shape=(70, 66),
        precision=precision,
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
    close(call(x[:1].expand(4, 66)), expected[:1].expand(4, 70))
    assert call(x[:0]).shape == (0, 70)
    assert call(x.view(2, 6, 66)[:, :0]).shape == (2, 0, 70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_input_is_computed_in_float32(matmul, dtype, precision):
    x, trits, alphas, bias = random_problem(9, 70, 66, "group128")
    packed = t2_encode(trits)
    half = matmul(x.to(dtype), packed, alphas, bias, (70, 66), precision)
    wide = matmul(x.to(dtype).float(), packed, alphas, bias, (70, 66), precision)
    assert half.dtype == dtype
    assert torch.equal(half, wide.to(dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_input_is_left_alone(matmul, precision):
    x, trits, alphas, bias = random_problem(4, 33, 40, "tensor")
    packed = t2_encode(trits)
    before = [value.clone() for value in (x, packed, alphas, bias)]
    matmul(x, packed, alphas, bias, (33, 40), precision)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, packed, alphas, bias), strict=True))


def test_auto_takes_the_first_available():
    choice = choose_backend("auto", CPU)
    first = next(b for b in BACKENDS if b.available(CPU) is None)
    assert choice.backend is first
    assert choice.reason.startswith(f"backend {first.NAME}")
    assert "not gpu: device cpu" in choice.reason


def test_the_cpu_backend_is_for_the_cpu():
    choice = choose_backend("auto", torch.device("meta"))
    assert choice.backend is reference
    assert "not cpu: device meta" in choice.reason
    with pytest.raises(EnvironmentProblem, match=r"'cpu' cannot run: got device meta"):
        choose_backend("cpu", torch.device("meta"))


def test_named_backend():
    choice = choose_backend("reference", CPU)
    assert choice.backend is reference
    assert choice.reason == "backend reference (as asked)"


def test_unavailable_backend_is_never_replaced():
    with pytest.raises(EnvironmentProblem, match="backend 'gpu' cannot run") as error:
        choose_backend("gpu", CPU)
    assert error.value.exit_code == 4
    assert "got device cpu" in str(error.value)
    assert str(error.value).endswith("Fix: use --backend auto.")


def test_a_backend_of_another_device_is_told_where_it_runs(monkeypatch):
    monkeypatch.setattr(gpu, "available", lambda device: None if device.type == "cuda" else "no")
    with pytest.raises(EnvironmentProblem, match=r"'gpu' cannot run: got no \(device cpu\)") as e:
        choose_backend("gpu", CPU)
    assert str(e.value).endswith("Fix: use --backend auto or --device cuda.")


def test_unknown_backend():
    with pytest.raises(
        UsageError, match=r"unknown backend: got 'refrence' \(did you mean"
    ) as error:
        choose_backend("refrence", CPU)
    assert error.value.exit_code == 2
    assert str(error.value).endswith("Fix: --backend auto.")


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("TERDIT_BACKEND", "reference")
    assert "as asked" in choose_backend("auto", CPU).reason
    monkeypatch.setenv("TERDIT_BACKEND", "gpu")
    with pytest.raises(EnvironmentProblem, match=r"TERDIT_BACKEND\)\. Fix: unset TERDIT_BACKEND"):
        choose_backend("auto", CPU)
    assert choose_backend("reference", CPU).backend is reference  # a flag wins
    monkeypatch.setenv("TERDIT_BACKEND", "abacus")
    with pytest.raises(UsageError, match=r"'abacus'.*Fix: unset TERDIT_BACKEND"):
        choose_backend("auto", CPU)
    monkeypatch.setenv("TERDIT_BACKEND", "")
    assert "as asked" not in choose_backend("auto", CPU).reason


def test_a_named_backend_asks_no_other(monkeypatch):
    """An instruction set that this CPU lacks is no matter to the reference."""

    def fail(device):
        raise EnvironmentProblem("this CPU lacks the instruction set")

    monkeypatch.setattr(cpu, "available", fail)
    assert choose_backend("reference", CPU).backend is reference


def test_activations_of_a_model_trained_without():
    assert resolve_activations("auto", "none", reference) == "fp32"
    assert resolve_activations("auto", "none", gpu) == "int8"
    for precision in PRECISIONS:
        assert resolve_activations(precision, "none", cpu) == precision


@pytest.mark.parametrize(("isa", "expected"), [("generic", "fp32"), ("avx2", "int8")])
def test_auto_is_what_is_fast_on_this_cpu(monkeypatch, isa, expected):
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    assert resolve_activations("auto", "none", cpu) == expected


def test_activations_that_a_backend_lacks():
    assert resolve_activations("fp8", "none", gpu) == "fp8"
    for backend in (cpu, reference):
        with pytest.raises(UsageError, match=f"the {backend.NAME} backend has no fp8") as error:
            resolve_activations("fp8", "none", backend)
        assert error.value.exit_code == 2
        assert "got --activations fp8, expected auto, fp32, bf16, int16, int8" in str(error.value)
        assert "Fix: --activations auto" in str(error.value)


def test_activations_of_a_model_trained_with_int8():
    for backend in BACKENDS:
        assert resolve_activations("auto", "int8", backend) == "int8"
        assert resolve_activations("int8", "int8", backend) == "int8"
        with pytest.raises(UsageError, match=r"got --activations fp32, expected auto or int8"):
            resolve_activations("fp32", "int8", backend)


def test_unknown_activations():
    with pytest.raises(UsageError, match=r"got 'int9' \(did you mean 'int.*one of auto, fp32"):
        resolve_activations("int9", "none", reference)
