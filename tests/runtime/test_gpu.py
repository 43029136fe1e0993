"""The GPU kernels against the reference backend, at every edge of their tiles.

Without a GPU they run in Triton's interpreter: indices, masks and integers as on a GPU, but no
inline assembly, and products of bfloat16 in float32. With one, the same table (marker `gpu`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.model.ternary import ACTIVATION_FLOOR, GRANULARITIES, alpha_shape, expand_alphas
from terdit_cli.pack.trits import t2_encode
from terdit_cli.runtime import reference
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import tiles as gpu_config
from terdit_cli.runtime.gpu.tiles import Device, Problem, Tile

SMALL = Tile(64, 16, 32, 4, 2)  # of the interpreter: each edge is met in few operations
GROUPED = Tile(64, 16, 128, 4, 2)
# M, N, K around the edges of a tile, of a group and of a slice of 512.
SHAPES = [(m, 3, 5) for m in (1, 7, 8, 9, 15, 16, 17)]
SHAPES += [(2, n, 5) for n in (1, 63, 64, 65, 130)]
SHAPES += [(2, 3, k) for k in (1, 2, 127, 128, 129, 511, 512, 513, 1030)]
SHAPES += [(17, 65, 513)]
FP32_EPS = 2.0**-24


def problem(m: int, n: int, k: int, granularity: str = "row", seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    trits = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    alphas = torch.randn(alpha_shape(n, k, granularity), generator=generator)
    return x, trits, alphas, torch.randn(n, generator=generator)


def run(
    device: torch.device, x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None,
    precision: Any,
) -> Tensor:  # fmt: skip
    packed = gpu.from_t2(t2_encode(trits), *trits.shape).to(device)
    if precision == "fp8" and device.type == "cpu":
        # The interpreter's conversion to e4m3 is wrong just below powers of two: 31.99 gives 16.
        rows = torch_fp8(x)
        return gpu.multiply(rows, packed, alphas, bias, x.new_empty(len(x), len(trits)))
    on = [None if each is None else each.to(device) for each in (x, alphas, bias)]
    return gpu.matmul(on[0], packed, on[1], on[2], tuple(trits.shape), precision).cpu()


def torch_fp8(x: Tensor) -> gpu.Rows:
    """Quantise rows to e4m3 as gpu/backend.py defines it."""
    limit = x.abs().amax(-1, keepdim=True).clamp_min(ACTIVATION_FLOOR)
    values = (x * (limit.reciprocal() * gpu.FP8_LIMIT)).to(torch.float8_e4m3fn)
    return gpu.Rows(values, (limit / gpu.FP8_LIMIT).flatten(), "fp8")


def defined(
    x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None, precision: Any
) -> Tensor:
    return reference.matmul(x, t2_encode(trits), alphas, bias, tuple(trits.shape), precision)


def exact(x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the float64 product and, for each value, the sum S of its terms' sizes."""
    weight = (expand_alphas(alphas, trits.shape[1]).double() * trits).expand(trits.shape)
    y, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


def assert_within(got: Tensor, values: tuple[Any, ...], precision: str) -> None:
    """Hold the bound of triton_kernels.py: u S for x, (K + 4) 2^-22 S for sums, scale and bias.

    u is 2^-8 in bf16; in fp32 the three tf32 parts keep 22 bits: 2^-21 leaves room for their sums.
    fp8 (e4m3, absmax scaled to 448): 2^-4 of a value, or, below the normal numbers, 2^-10 of a
    step of absmax / 448.
    """
    x, trits, alphas, _ = values
    k = trits.shape[1]
    y, size = exact(*values)
    u = {"fp32": 2.0**-21, "bf16": 2.0**-8, "fp8": 2.0**-4}[precision]
    allowed = (u + (k + 4) * 2.0**-22) * size
    if precision == "fp8":
        step = x.double().abs().amax(-1, keepdim=True) / gpu.FP8_LIMIT
        weight = (expand_alphas(alphas, k).double().abs() * trits.abs()).expand(trits.shape)
        allowed = allowed + 2.0**-10 * step * weight.sum(1)
    assert got.shape == y.shape
    assert ((got.double() - y).abs() <= allowed).all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_integers_equal_the_reference_at_every_edge(kernels_on, granularity, precision):
    for m, n, k in SHAPES:
        values = problem(m, n, k, granularity, seed=m + n + k)
        assert torch.equal(run(kernels_on, *values, precision), defined(*values, precision)), (
            m, n, k,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_floats_are_within_their_bound_at_every_edge(kernels_on, granularity, precision):
    if kernels_on.type == "cuda" and precision == "fp8":
        try:
            gpu.check_precision("fp8", kernels_on)
        except EnvironmentProblem as error:
            pytest.skip(str(error))
    for m, n, k in SHAPES:
        values = problem(m, n, k, granularity, seed=m + n + k)
        assert_within(run(kernels_on, *values, precision), values, precision)


@pytest.mark.parametrize("trit", [-1, 0, 1])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5])
def test_uniform_weights(kernels_on, trit, alpha):
    m, n, k = 3, 66, 133
    x = torch.arange(m * k).remainder(7).sub(3).float().view(m, k)
    trits = torch.full((n, k), trit, dtype=torch.int8)
    for granularity in GRANULARITIES:
        alphas = torch.full(alpha_shape(n, k, granularity), alpha)
        expected = (alpha * trit * x.sum(1))[:, None].expand(m, n)
        for precision in ("bf16", "fp32"):
            got = run(kernels_on, x, trits, alphas, None, precision)
            assert torch.equal(got, expected)  # small integers and halves: exact in any order
        for precision in ("int8", "int16"):
            values = (x, trits, alphas, None)
            assert torch.equal(run(kernels_on, *values, precision), defined(*values, precision))


@pytest.mark.parametrize("kind", ["saturating", "outlier", "ties", "tiny", "zero"])
def test_the_rounding_of_activations_is_the_references(kernels_on, kind):
    x, trits, alphas, bias = problem(5, 9, 260)
    if kind == "saturating":
        x = torch.where(x > 0, 3.7, -3.7)
    elif kind == "outlier":
        x[:, -1] = 1e4
    elif kind == "ties":  # halves of a step
        x = x.mul(20).round().clamp(-126, 126).add(0.5).index_fill(1, torch.tensor([0]), 127.0)
    elif kind == "tiny":  # below the smallest absmax
        x = x * 1e-8
    else:
        x = x * 0
    for precision in ("int8", "int16"):
        values = (x, trits, alphas, bias)
        assert torch.equal(run(kernels_on, *values, precision), defined(*values, precision))


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_nan_and_no_other(kernels_on, precision, bad):
    x, trits, alphas, bias = problem(5, 9, 140, "group128")
    trits[0], alphas[0] = 0, 0  # what is multiplied by zero is NaN all the same
    clean = run(kernels_on, x, trits, alphas, bias, precision)
    for row, column in ((0, 0), (4, 139)):
        spoilt = x.clone()
        spoilt[row, column] = bad
        got = run(kernels_on, spoilt, trits, alphas, bias, precision)
        others = [index for index in range(5) if index != row]
        assert got[row].isnan().all()
        assert torch.equal(got[others], clean[others])


def test_layouts_of_x_and_no_rows(kernels_on):
    x, trits, alphas, bias = problem(6, 9, 66)
    expected = run(kernels_on, x, trits, alphas, bias, "int8")
    assert torch.equal(
        run(kernels_on, x.view(2, 3, 66), trits, alphas, bias, "int8"), expected.view(2, 3, 9)
    )
    assert torch.equal(run(kernels_on, x[5], trits, alphas, bias, "int8"), expected[5])
    for same in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :66], x.flip(0).flip(0)):
        assert torch.equal(run(kernels_on, same, trits, alphas, bias, "int8"), expected)
    assert run(kernels_on, x[:0], trits, alphas, bias, "int8").shape == (0, 9)
    assert run(kernels_on, x.view(2, 3, 66)[:, :0], trits, alphas, None, "bf16").shape == (2, 0, 9)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        got = run(kernels_on, half, trits, alphas, bias, "int8")
        assert got.dtype == dtype
        wide = run(kernels_on, half.float(), trits, alphas, bias, "int8").to(dtype)
        # The interpreter cuts where a GPU rounds half to even: one unit of bfloat16 at most.
        assert (got.float() - wide.float()).abs().max() <= 2.0**-7 * wide.float().abs().max()


def test_t2_bytes_are_taken_as_they_are(kernels_on):
    x, trits, alphas, bias = (each.to(kernels_on) for each in problem(3, 70, 130))
    got = gpu.matmul(x, t2_encode(trits), alphas, bias, (70, 130), "int8")
    packed = gpu.from_t2(t2_encode(trits), 70, 130)
    assert packed.shape == gpu.weight_shape(70, 130) == (70, 128)
    assert torch.equal(got, gpu.matmul(x, packed, alphas, bias, (70, 130), "int8"))


def test_the_order_on_the_device():
    trits = torch.randint(-1, 2, (5, 1030), dtype=torch.int8)
    packed = gpu.from_t2(t2_encode(trits), 5, 1030)
    assert packed.shape == (5, 384)
    for n, k in ((0, 0), (1, 127), (2, 128), (3, 511), (4, 512), (0, 1029)):
        start, rest = divmod(k, 512)
        field = int(packed[n, start * 128 + rest % 128]) >> 2 * (rest // 128) & 3
        assert {0: 0, 1: 1, 3: -1}[field] == trits[n, k]
    assert not packed[:, 256 + 6 :].any()  # k beyond K: trit 0
    assert gpu.from_t2(t2_encode(trits[:, :512]), 5, 512).numel() == 5 * 512 // 4


# Epilogues, by every tile of the lists that the interpreter can afford.


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("granularity", ["row", "group128"])
def test_epilogues(kernels_on, granularity, precision):
    m, n, k, tokens = 18, 66, 140, 6
    x, trits, alphas, _ = problem(m, 2 * n, k, granularity)
    packed = gpu.from_t2(t2_encode(trits), 2 * n, k).to(kernels_on)
    both = defined(x, trits, alphas, None, precision).double()
    rows = gpu.make_rows(x.to(kernels_on), precision)
    alphas = alphas.to(kernels_on)
    tile = GROUPED if granularity == "group128" else SMALL
    out = x.new_empty(m, n, device=kernels_on)
    gpu.multiply(rows, packed, alphas, None, out, swiglu=True, tile=tile)
    expected = torch.nn.functional.silu(both[:, :n]) * both[:, n:]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    gates = torch.randn(m // tokens, 3 * n)
    gate = gates[:, n : 2 * n].to(kernels_on)  # strided, as chunks of the modulations are
    before = torch.randn(m, n)
    out = before.clone().to(kernels_on)
    alphas = alphas[:n].contiguous()
    gpu.multiply(rows, packed[:n], alphas, None, out, gates=gate, tokens=tokens, tile=tile)
    gated = gates[:, n : 2 * n].repeat_interleave(tokens, 0) * both[:, :n]
    torch.testing.assert_close(out.cpu().double(), before + gated, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_tile_gives_the_same_integers(kernels_on):
    values = problem(33, 130, 530)
    x, trits, alphas, bias = (each.to(kernels_on) for each in values)
    packed = gpu.from_t2(t2_encode(trits), 130, 530)
    rows = gpu.make_rows(x, "int8")
    expected = defined(*values, "int8")
    tiles = {
        tile
        for lists in (gpu_config._LARGE, {(1, "few"): gpu_config._FEW})
        for key, each in lists.items()
        if key[0] == 1
        for tile in each
    }
    device = gpu.device_facts(kernels_on)
    fitting = Problem("int8", False, "plain", 33, 130)
    for tile in sorted(tiles):
        if kernels_on.type == "cuda" and tile.shared_bytes(fitting) > device.shared:
            continue
        out = x.new_empty(33, 130)
        gpu.multiply(rows, packed, alphas, bias, out, tile=tile)
        assert torch.equal(out.cpu(), expected), tile


@pytest.mark.parametrize("precision", ["int8", "int16", "fp32"])
def test_rows_normed_and_modulated(kernels_on, precision):
    m, d, tokens = 6, 70, 3
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(m, d, generator=generator), torch.randn(d, generator=generator)
    shift, scale = torch.randn(2, m // tokens, d, generator=generator)
    for norm in ("rms", "layer", "none"):
        if norm == "rms":
            y = torch.nn.functional.rms_norm(x, (d,), weight, 1e-5)
        else:
            y = torch.nn.functional.layer_norm(x, (d,), eps=1e-5) if norm == "layer" else x
        y = y * (1 + scale.repeat_interleave(tokens, 0)) + shift.repeat_interleave(tokens, 0)
        rows = gpu.make_rows(
            x.to(kernels_on), precision, norm=norm,
            weight=weight[None].to(kernels_on) if norm == "rms" else None, eps=1e-5,
            shift=shift.to(kernels_on), scale=scale.to(kernels_on), tokens=tokens,
        )  # fmt: skip
        got = rows.values.cpu().float()
        if precision == "fp32":
            torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
            continue
        if precision == "int16":
            got = got[0::2] * 256 + got[1::2]
        assert rows.steps is not None
        steps = rows.steps.cpu()[:, None]
        # Half a step, and the norm's own roundings.
        assert ((got * steps - y).abs() <= 0.501 * steps + 1e-5 * y.abs()).all()


# The operator.


def test_opcheck(kernels_on):
    x, trits, alphas, bias = problem(3, 5, 7)
    packed = gpu.from_t2(t2_encode(trits), 5, 7)
    for offset in (bias, None):
        values = (x, packed, alphas, offset)
        arguments = [None if each is None else each.to(kernels_on) for each in values]
        torch.library.opcheck(torch.ops.terdit.gpu_linear, (*arguments, 5, 7, "int8"))


@pytest.mark.slow
def test_compiles_as_one_graph(kernels_on):
    torch._dynamo.reset()
    x, trits, alphas, bias = (each.to(kernels_on) for each in problem(3, 5, 7))
    packed = gpu.from_t2(t2_encode(trits), 5, 7)

    def function(x: Tensor) -> Tensor:
        return gpu.matmul(x * 2, packed, alphas, bias, (5, 7), "int8") + 1

    backend = "inductor" if kernels_on.type == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), function(x))


def test_a_gradient_is_refused(kernels_on):
    x, trits, alphas, bias = (each.to(kernels_on) for each in problem(3, 5, 7))
    y = gpu.matmul(x.requires_grad_(), t2_encode(trits), alphas, bias, (5, 7), "int8")
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        y.sum().backward()


def test_wrong_tensors_are_refused(kernels_on):
    x, trits, alphas, bias = (each.to(kernels_on) for each in problem(3, 5, 7))
    packed = gpu.from_t2(t2_encode(trits), 5, 7)
    for change, message in (
        ({"x": x[:, :6]}, r"x has shape \[3, 6\], expected \[..., 7\]"),
        ({"x": x.double()}, "x is torch.float64, expected float32"),
        ({"packed": packed[:4]}, r"packed is torch.uint8 \[4, 128\].*\[5, 128\]"),
        ({"packed": packed.to(torch.int8)}, "packed is torch.int8"),
        ({"alphas": alphas[:4]}, r"alphas is .*\[4\].*expected .*\[1\] or \[5\] or \[5, 1\]"),
        ({"bias": bias[:4]}, r"bias is .*\[4\]"),
        ({"precision": "int4"}, "precision 'int4', expected one of fp32"),
        ({"shape": (5, 70_000), "x": torch.zeros(1, 70_000)}, "expected K from 1 to 65000"),
    ):
        values: dict[str, Any] = {
            "x": x, "packed": packed, "alphas": alphas, "bias": bias, "shape": (5, 7),
            "precision": "int8", **change,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            gpu.matmul(**values)


# Choice: of the backend, and of tiles.


class _Cuda:
    """A CUDA device that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")


def test_reasons_why_not(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (torch.device("cpu"), cuda):
        assert gpu.available(device) == f"device {device}, torch finds no CUDA device"
    _Cuda(monkeypatch, (7, 5))
    assert gpu.available(torch.device("cpu")) == "device cpu"
    reason = gpu.available(cuda)
    assert reason == "Old GPU is of compute capability 7.5, it takes 8.0"
    _Cuda(monkeypatch, (8, 0))
    monkeypatch.setattr(gpu, "_no_triton", lambda: "no Triton")
    assert gpu.available(cuda) == "no Triton"
    with pytest.raises(EnvironmentProblem, match=r"has no fp8: got Old GPU.* 8\.0") as error:
        gpu.check_precision("fp8", cuda)
    assert error.value.exit_code == 4
    assert "Fix: use --activations int8 or bf16" in str(error.value)
    gpu.check_precision("int8", cuda)
    _Cuda(monkeypatch, (8, 9))
    gpu.check_precision("fp8", cuda)


def test_missing_or_old_triton(monkeypatch):
    gpu._no_triton.cache_clear()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu._no_triton() == "Triton is not installed: pip install 'terdit[gpu]'"
    gpu._no_triton.cache_clear()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    old = type("Module", (), {"__version__": "3.1.0"})
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: old)
    assert gpu._no_triton() == "Triton 3.1.0 is too old, it takes 3.6: pip install 'terdit[gpu]'"
    gpu._no_triton.cache_clear()


H100 = Device("H100", 227 << 10, 132, True)
SMALLEST = Device("small", gpu_config.SMALLEST_SHARED, 20, False)


@pytest.mark.parametrize("device", [H100, SMALLEST])
@pytest.mark.parametrize("kind", ["int8", "fp8", "bf16", "fp32"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("epilogue", ["plain", "gated", "swiglu"])
def test_there_is_always_a_tile_that_fits(device, kind, grouped, epilogue):
    if (kind, epilogue) == ("fp32", "swiglu"):
        return  # never fused
    for rows in (1, 16, 17, 512, 4096, 1 << 20):
        for columns in (1, 64, 1536, 147456):
            problem = Problem(kind, grouped, epilogue, rows, columns)
            found = gpu_config.candidates(problem, device)
            assert found
            assert all(tile.shared_bytes(problem) <= device.shared for tile in found)
            assert not grouped or all(tile.BK <= 128 for tile in found)


def test_large_problems_take_large_tiles_and_small_ones_small():
    plain = Problem("int8", False, "plain", 4096, 4608)
    assert gpu_config.candidates(plain, H100)[0] == Tile(128, 256, 64, 8, 3)
    assert gpu_config.candidates(plain._replace(rows=64), H100)[0] == Tile(64, 64, 64, 4, 3)
    assert gpu_config.candidates(plain._replace(rows=4, columns=147456), H100)[0].BM == 16


def test_measured_tiles_are_kept_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path / "cache"))
    problem = Problem("int8", False, "plain", 4096, 4608)
    tiles = gpu_config.candidates(problem, H100)
    assert gpu_config.choose(problem, H100) == tiles[0]
    asked: list[Tile] = []

    def seconds(tile: Tile) -> float:
        asked.append(tile)
        return float("inf") if tile == tiles[0] else 1.0 if tile == tiles[2] else 2.0

    assert gpu_config.tune(problem, H100, seconds) == tiles[2]
    assert asked == tiles
    path = tmp_path / "cache" / "gpu.json"
    assert json.loads(path.read_text()) == {"H100": {"int8-plain-4096-4608": list(tiles[2])}}
    assert gpu_config.choose(problem, H100) == tiles[2]
    assert gpu_config.choose(problem, H100._replace(name="other")) == tiles[0]
    assert gpu_config.tune(problem._replace(rows=64), H100, seconds)
    assert len(json.loads(path.read_text())["H100"]) == 2  # what was there is kept
    for broken in ("", "[]", '{"H100": 3}', '{"H100": {"int8-plain-4096-4608": [1, 2]}}'):
        Path(path).write_text(broken)
        gpu_config._measured.cache_clear()
        assert gpu_config.choose(problem, H100) == tiles[0]
