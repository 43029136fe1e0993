"""Rivals compute the same function: only then is it fair to time them."""

from __future__ import annotations

import ctypes.util
import shutil
from pathlib import Path

import pytest
import torch

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.lab.bench.random_model import RandomModel
from terdit_cli.lab.bench.rivals import RIVALS, GgmlGemm, arithmetic, dense_network, open_ggml

# Those that need no compiler. The bound of each is of its rounding: float32 sums of K terms err
# below sqrt(K) * 2^-24 of the size of y; bf16 rounds inputs, weights and output to 2^-9 each, so
# 3 * 2^-9; int8 steps are absmax / 127, an error of at most half a step a term: with absmax about
# 4 deviations of a normal row (per tensor 5, and weights rounded to 1/128 too) 4 / 254 < 2^-5.
EAGER = {
    "fp32": 1e-6,
    "fp32-medium": 3 * 2.0**-9,  # may use bf16 where the CPU is fast at it
    "bf16": 3 * 2.0**-9,
    "int8-ao": 2.0**-5,
    "unpack": 1e-6,
}


def problem(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * k * n)
    trits = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
    return trits, torch.tensor([0.037]), torch.randn(m, k, generator=generator)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("shape", [(1, 16, 4), (7, 100, 68), (33, 256, 64)])
def test_gemm_equals_float64(name: str, shape: tuple[int, int, int]) -> None:
    trits, alpha, x = problem(*shape)
    expected = x.double() @ (trits.double() * alpha.double()).T
    y = RIVALS[name].gemm(trits, alpha, x)().double()
    assert y.shape == expected.shape
    assert (y - expected).norm() / expected.norm() < EAGER[name]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("name", "bound"), [("bf16-compiled", 3 * 2.0**-9), ("int8-mm", 2.0**-6)])
def test_compiled_gemm_equals_float64(name: str, bound: float) -> None:
    trits, alpha, x = problem(33, 64, 48)
    expected = x.double() @ (trits.double() * alpha.double()).T
    y = RIVALS[name].gemm(trits, alpha, x)().double()
    assert (y - expected).norm() / expected.norm() < bound


def test_integer_rival_uncompiled() -> None:
    trits, alpha, x = problem(20, 64, 48)
    expected = x.double() @ (trits.double() * alpha.double()).T
    y = RIVALS["int8-mm"].layer(trits, alpha, None)(x).double()
    assert (y - expected).norm() / expected.norm() < 2.0**-6


def test_unpacking_gives_the_dense_weight_exactly() -> None:
    trits, alpha, _ = problem(1, 24, 64)
    identity = torch.eye(24)
    unpacked = RIVALS["unpack"].layer(trits, alpha, None)
    assert torch.equal(unpacked(identity), (trits.float() * alpha).T)


def test_biases_are_added() -> None:
    trits, alpha, _ = problem(1, 64, 64)
    bias = torch.arange(64.0)
    for name in ("fp32", "unpack", "int8-mm", "int8-ao"):
        y = RIVALS[name].layer(trits, alpha, bias)(torch.zeros(20, 64))
        assert torch.allclose(y, bias.expand(20, 64)), name


@pytest.mark.parametrize("name", ["unpack", "bf16", "int8-ao"])
def test_networks_agree(name: str) -> None:
    model = RandomModel("nano", input_size=4, seed=0)
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([500, 3]),
              torch.tensor([7, 1000]))  # fmt: skip
    exact = RIVALS["fp32"].network(model)(*inputs)
    found = RIVALS[name].network(model)(*inputs)
    assert found.dtype == torch.float32
    # 32 matrices in a row: rounding of single products adds up, but not beyond a tenth.
    assert (found - exact).norm() / exact.norm() < (1e-5 if name == "unpack" else 0.1)


@pytest.mark.parametrize("name", [*EAGER, "int8-mm"])
def test_a_scale_a_row(name: str) -> None:
    trits, _, x = problem(20, 64, 48)
    alphas = torch.linspace(-0.1, 0.2, 48)
    bias = torch.linspace(-1, 1, 48)
    expected = x.double() @ (trits.double() * alphas.double()[:, None]).T + bias
    rival = RIVALS[name]
    y = rival.layer(trits, alphas, bias).to(rival.dtype)(x.to(rival.dtype)).double()
    bound = EAGER.get(name, 2.0**-5)
    assert (y - expected).norm() < bound * expected.norm()


def test_scales_of_groups_have_no_rivals() -> None:
    model = RandomModel("nano", input_size=4, seed=0)
    object.__setattr__(model.info.ternary, "granularity", "group128")
    with pytest.raises(EnvironmentProblem, match="no rival for these scales: got group128"):
        dense_network(model, RIVALS["fp32"].layer, torch.float32)


def test_arithmetic_of_every_rival() -> None:
    assert {arithmetic(name) for name in [*RIVALS, "ggml"]} == {"fp32", "bf16", "int8"}


def test_a_missing_ggml_is_explained(tmp_path: Path) -> None:
    library = tmp_path / "libggml-cpu.so"
    with pytest.raises(EnvironmentProblem, match=r"ggml cannot be used") as caught:
        open_ggml(library)
    assert str(library) in str(caught.value)
    assert "Fix: build ggml" in str(caught.value)


def test_another_library_is_no_ggml(tmp_path: Path) -> None:
    c_library = ctypes.util.find_library("m")
    assert c_library is not None
    base = ctypes.CDLL(c_library)._name
    found = next(path for folder in ("/lib", "/usr/lib", "/lib64") for path in
                 Path(folder).rglob(base))  # fmt: skip
    (tmp_path / "libggml-base.so").symlink_to(found)
    (tmp_path / "libggml-cpu.so").symlink_to(found)
    with pytest.raises(EnvironmentProblem, match="ggml_mul_mat"):
        open_ggml(tmp_path / "libggml-cpu.so")


def test_ggml_refuses_a_matrix_of_broken_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("terdit_cli.lab.bench.rivals.open_ggml", lambda library: (None, None))
    with pytest.raises(EnvironmentProblem, match="K = 100, expected a multiple of 256"):
        GgmlGemm(Path("x.so"), *problem(2, 100, 64), threads=1)
