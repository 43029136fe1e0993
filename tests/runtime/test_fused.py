"""The fused step: it agrees with the composable network, from any thread, process and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from terdit_cli.errors import InputFileError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.pack.tdt import write_tdt
from terdit_cli.runtime import cpu, fused, reference
from terdit_cli.runtime.fused import FusedDiT
from terdit_cli.runtime.load import load
from terdit_cli.runtime.packed import PackedTernaryLinear, packed_network
from terdit_cli.runtime.reference import PRECISIONS, Precision

CPU = torch.device("cpu")
BASE = DiTConfig(
    input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=2, n_heads=4, multiple_of=24,
    num_classes=5,
)  # fmt: skip
SHAPES = {
    "plain": BASE,
    "grouped heads": dataclasses.replace(BASE, n_kv_heads=2),
    "one kv head, odd sizes": dataclasses.replace(BASE, dim=60, n_heads=6, n_kv_heads=1),
    "positions": dataclasses.replace(BASE, pos_embed=True),
    "q/k norm": dataclasses.replace(BASE, qk_norm=True),
    "no norm after adaLN": dataclasses.replace(BASE, adaln_norm=False),
    "q/k norm, grouped, no norm after adaLN": dataclasses.replace(
        BASE, qk_norm=True, n_kv_heads=2, adaln_norm=False
    ),
    "one token": dataclasses.replace(BASE, input_size=2),
    "81 tokens": dataclasses.replace(BASE, input_size=9, patch_size=1),
    "patches of 7": dataclasses.replace(BASE, input_size=14, patch_size=7, in_channels=1),
    "head width 2": dataclasses.replace(BASE, dim=8, n_heads=4),
    "groups of 128 and a tail": dataclasses.replace(BASE, dim=140, n_heads=2, multiple_of=133),
    "larger norm_eps": dataclasses.replace(BASE, norm_eps=1e-2, qk_norm=True),
}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def make(tmp_path, make_ckpt) -> Callable[..., FusedDiT]:
    """Return make(config, precision, ternary): a packed network on the cpu backend."""

    def build(
        config: DiTConfig, precision: Precision = "fp32", ternary: TernaryConfig | None = None
    ) -> FusedDiT:
        export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", config, ternary)))
        network = packed_network(export, cpu, CPU, precision)
        assert isinstance(network, FusedDiT)
        return network

    return build


@pytest.fixture
def tdt(tmp_path, make_ckpt) -> Path:
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", BASE)))
    path = tmp_path / "m.tdt"
    write_tdt(export, path, "t2", "fp32")
    return path


@contextlib.contextmanager
def composable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedDiT, "run_blocks", DiT.run_blocks)
        yield


def float_tolerance(config: DiTConfig) -> float:
    """Bound the relative difference of two orders of float32 summation.

    A block chains 8 sums (adaLN and its norm; norm, q k v, scores, values, output; norm, w1, w2)
    of at most `widest` terms; each may differ by widest * eps of the largest value.
    """
    widest = max(6 * config.dim, config.ffn_width, config.tokens)
    return 8 * config.n_layers * widest * 2.0**-24


@torch.inference_mode()
def assert_agree(network: FusedDiT, exact: DiT, inputs: tuple[Tensor, ...]) -> None:
    """Compare the fused step with the composable network at the same activations.

    fp32 and bf16 differ by float32 rounding; a value near the middle of two bfloat16 or integer
    steps may fall to either. Such a flip moves it by one step, where quantisation itself moves
    every value by 0.29 steps in the mean: as long as under a twelfth of the values flip, the
    difference is smaller than what quantisation costs against fp32.
    """
    got = network(*inputs)
    with composable():
        expected = network(*inputs)
    size = expected.abs().max()
    allowed = float_tolerance(network.config) * size
    assert got.isfinite().all()
    layer = network.get_submodule("layers.0.attention.wq")
    if layer.precision == "fp32":
        assert (got - expected).abs().max() <= allowed
    else:
        cost = (expected - exact(*inputs)).norm()
        # In int8 the fused step quantises queries, keys and values too: three more inputs of
        # products beside the four of a block, so less than as much again if errors add up.
        most = 2 * cost if layer.precision == "int8" else cost
        assert (got - expected).norm() <= most + allowed * got.numel() ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(make, random_inputs, name, precision):
    config = SHAPES[name]
    network, exact = make(config, precision), make(config, "fp32")
    for batch in (1, 2, 5):
        assert_agree(network, exact, random_inputs(config, batch))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("granularity", ["row", "group128"])
def test_granularities(make, random_inputs, granularity, precision):
    ternary = TernaryConfig(granularity=granularity)
    config = SHAPES["groups of 128 and a tail"]
    network, exact = make(config, precision, ternary), make(config, "fp32", ternary)
    assert_agree(network, exact, random_inputs(config, 3))


def test_every_isa(make, random_inputs, isa):
    for name in ("one kv head, odd sizes", "81 tokens", "q/k norm"):
        exact = make(SHAPES[name], "fp32")
        for precision in PRECISIONS:
            assert_agree(make(SHAPES[name], precision), exact, random_inputs(SHAPES[name], 2))


@pytest.mark.slow
def test_the_recorded_outputs_of_the_original(released_folder, golden_case):
    tensors = golden_case("public_a").tensors
    network = load(released_folder, activations="fp32", n_heads=4).network
    assert isinstance(network, FusedDiT)
    with torch.inference_mode():
        out = network(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    assert (out - tensors["out.packed"]).abs().max() <= 1e-5


def test_adaln_is_nearly_exact_unless_trained_with_int8(make):
    for ternary, expected in (
        (TernaryConfig(), "int16"),
        (TernaryConfig(activations="int8"), "int8"),
    ):
        network = make(BASE, "int8", ternary)
        layers = {
            name: module.precision
            for name, module in network.named_modules()
            if isinstance(module, PackedTernaryLinear)
        }
        assert len(layers) == 8 * BASE.n_layers
        for name, precision in layers.items():
            assert precision == (expected if "adaLN" in name else "int8"), name


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_composable_integers_equal_the_reference(make, tmp_path, random_inputs, precision):
    """Both run torch around the same exact sums, so the whole networks agree bit for bit."""
    network = make(SHAPES["q/k norm"], precision)
    export = CheckpointExport(load_ckpt(tmp_path / "ckpt.pt"))
    defined = packed_network(export, reference, CPU, precision)
    assert type(defined) is DiT
    inputs = random_inputs(BASE, 3)
    with torch.inference_mode(), composable():
        assert torch.equal(network(*inputs), defined(*inputs))


# What it leaves alone, and what it refuses.


def test_the_callers_tensors_are_left_alone(make, random_inputs):
    network, inputs = make(BASE, "int8"), random_inputs(BASE, 3)
    before = [value.clone() for value in inputs]
    with torch.inference_mode():
        first = network(*inputs)
        kept = first.clone()
        network(*random_inputs(BASE, 3, seed=1))
        assert torch.equal(first, kept)
        assert torch.equal(network(*inputs), first)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_no_images(make):
    out = make(BASE)(torch.zeros(0, 3, 8, 8), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 6, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(make, random_inputs, dtype):
    network = make(BASE).to(dtype)
    x, t, y = random_inputs(BASE)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"{dtype}.*expected .*float32"):
        network(x.to(dtype), t, y)
    network.float()
    with torch.inference_mode():
        assert network(x, t, y).isfinite().all()


def test_matrices_of_several_kinds_are_refused(make, random_inputs):
    network = make(BASE, "int8")
    network.get_submodule("layers.1.feed_forward.w2").precision = "int16"
    with torch.inference_mode(), pytest.raises(ValueError, match="different scale granularities"):
        network(*random_inputs(BASE))


def test_hidden_of_another_shape_is_refused(make):
    network = make(BASE)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"hidden is .*\[2, 15, 32\].*\[2, 16, 32\]"):
            network.run_blocks(torch.zeros(2, 15, 32), torch.zeros(2, 32))
        with pytest.raises(ValueError, match=r"c is .*\[1, 32\].*\[2, 32\]"):
            network.run_blocks(torch.zeros(2, 16, 32), torch.zeros(1, 32))


def test_a_gradient_is_refused(make, random_inputs):
    x, t, y = random_inputs(BASE)
    network = make(BASE)
    assert network(x, t, y).isfinite().all()  # no gradient is asked for
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        network(x.requires_grad_(), t, y)


@pytest.mark.slow
def test_compiles_as_one_graph(make, random_inputs):
    torch._dynamo.reset()
    network, inputs = make(BASE, "fp32"), random_inputs(BASE)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        expected = network(*inputs)
        found = compiled(*inputs)
    assert (found - expected).abs().max() <= float_tolerance(BASE) * expected.abs().max()


# Tensors that move or change after the library was told of them.


def changes() -> dict[str, Callable[[FusedDiT], Any]]:
    def layer(network: FusedDiT) -> Any:
        return network.get_submodule("layers.1.feed_forward.w2")

    def adaln(network: FusedDiT) -> Any:
        return network.get_submodule("layers.0.adaLN_modulation.1")

    return {
        "in place": lambda n: layer(n).alphas.mul_(3),
        "in place, of what the cache was made from": lambda n: adaln(n).alphas.mul_(3),
        "replaced buffer": lambda n: setattr(layer(n), "alphas", layer(n).alphas * 3),
        "replaced data": lambda n: setattr(layer(n).alphas, "data", layer(n).alphas.data * 3),
        "replaced parameter": lambda n: setattr(
            n.layers[0].ffn_norm, "weight",
            torch.nn.Parameter(n.layers[0].ffn_norm.weight * 3, requires_grad=False),
        ),
        "loaded": lambda n: n.load_state_dict(
            {k: v * 3 if k.endswith("alphas") else v for k, v in n.state_dict().items()}
        ),
        "moved there and back": lambda n: n.double().float(),
    }  # fmt: skip


@pytest.mark.parametrize("change", changes())
def test_changed_tensors_are_seen(make, random_inputs, change):
    network, inputs = make(BASE, "fp32"), random_inputs(BASE)
    with torch.no_grad():
        before = network(*inputs)
        changes()[change](network)
        after = network(*inputs)
        with composable():
            expected = network(*inputs)
    assert (after - expected).abs().max() <= float_tolerance(BASE) * expected.abs().max()
    if change != "moved there and back":
        assert (after - before).abs().max() > 0.01 * expected.abs().max()


class Counting:
    """The library, with the rows that modulations were computed for."""

    def __init__(self) -> None:
        self.library, self.rows = cpu.library(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def terdit_modulations(self, model: Any, c: Any, rows: int, *rest: Any) -> int:
        self.rows += rows
        return self.library.terdit_modulations(model, c, rows, *rest)


def test_modulations_are_computed_once(make, random_inputs, monkeypatch):
    network = make(BASE, "int8")
    counting = Counting()
    monkeypatch.setattr(cpu, "library", lambda: counting)
    x = torch.randn(6, 3, 8, 8)
    y = torch.tensor([1, 2, 1, 5, 5, 5])
    with torch.inference_mode():
        for t in (900, 500, 100):  # three classes, three steps
            network(x, torch.full((6,), t), y)
        assert counting.rows == 9
        again = [network(x, torch.full((6,), t), y) for t in (900, 500, 100)]
        assert counting.rows == 9
        row = network._native.modulations(torch.zeros(1, 32))[0].nbytes
        monkeypatch.setattr(fused, "CACHE_BYTES", 4 * row + row // 2)
        fresh = [network(x, torch.full((6,), t), y) for t in (901, 501, 101)]
        assert len(network._native.cache) == 4
        counting.rows = 0
        network(x, torch.full((6,), 101), y)  # the latest three are still there
        assert counting.rows == 0
        monkeypatch.setattr(fused, "CACHE_BYTES", 0)
        assert all(
            torch.equal(network(x, torch.full((6,), t), y), kept)
            for t, kept in zip((900, 500, 100, 901, 501, 101), again + fresh, strict=True)
        )
        assert not network._native.cache


# Threads and processes.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neither_threads_nor_neighbours_change_an_image(make, monkeypatch, isa, precision):
    for name in ("one kv head, odd sizes", "81 tokens"):
        config = SHAPES[name]
        network = make(config, precision)
        hidden = torch.randn(5, config.tokens, config.dim)
        c = torch.randn(5, config.conditioning_width)
        expected = network.run_blocks(hidden.clone(), c)
        for threads in ("2", "3"):
            monkeypatch.setenv("TERDIT_THREADS", threads)
            monkeypatch.setattr(network, "_native", None)
            assert torch.equal(network.run_blocks(hidden.clone(), c), expected)
            alone = [network.run_blocks(hidden[i : i + 1].clone(), c[i : i + 1]) for i in range(5)]
            assert torch.equal(torch.cat(alone), expected)


@pytest.mark.slow
def test_four_threads_at_once(make, random_inputs, monkeypatch):
    monkeypatch.setenv("TERDIT_THREADS", "2")
    network = make(BASE, "int8")
    inputs = [random_inputs(BASE, 1 + seed % 3, seed) for seed in range(24)]
    with torch.inference_mode():
        expected = [network(*each) for each in inputs]
    network._native = None

    def run(index: int) -> bool:
        with torch.inference_mode():
            return torch.equal(network(*inputs[index]), expected[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, list(range(24)) * 4))


def _in_a_child(network: DiT, inputs: tuple[Tensor, ...], sending: Any) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        sending.send_bytes(network(*inputs).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_after_use(make, random_inputs, monkeypatch):
    monkeypatch.setenv("TERDIT_THREADS", "2")
    network, inputs = make(BASE, "int8"), random_inputs(BASE)
    with torch.inference_mode():
        expected = network(*inputs).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    children = []
    for _ in range(3):
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_in_a_child, args=(network, inputs, sending))
        child.start()
        children.append((child, receiving))
    for child, receiving in children:
        assert receiving.poll(30)
        assert receiving.recv_bytes() == expected
        child.join(30)
        assert child.exitcode == 0


# The mapped file.


def test_a_file_changed_in_place_is_noticed(tdt, random_inputs):
    for backend in ("cpu", "reference"):
        network = load(tdt, backend=backend).network
        inputs = random_inputs(BASE)
        with torch.inference_mode():
            network(*inputs)
            stamp = tdt.stat()
            with tdt.open("ab") as file:
                file.write(b"more")
            with pytest.raises(InputFileError, match="changed while it was in use") as error:
                network(*inputs)
            assert error.value.exit_code == 3
            assert f"got {stamp.st_size + 4} bytes" in str(error.value)
            assert str(tdt) in str(error.value)
            assert "Fix: load it again; replace a model by renaming" in str(error.value)
            os.truncate(tdt, stamp.st_size)
            os.utime(tdt, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            network(*inputs)  # as it was
            os.utime(tdt, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
            with pytest.raises(InputFileError, match="changed while it was in use"):
                network(*inputs)
            os.utime(tdt, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "trained", "released"])
def test_a_truncated_file_ends_in_an_error_not_a_signal(tdt, released_folder, kind):
    """The child would die of SIGBUS if it looked at the missing pages first."""
    model, path, words = tdt, tdt, 'backend="cpu"'
    if kind == "trained":
        model, path, words = tdt.parent, tdt.parent / "ckpt.pt", ""
    elif kind == "released":
        model, words = tdt.parent / "released", "n_heads=4"
        shutil.copytree(released_folder, model)
        path = next(model.glob("*_ternary.*.pth"))
    code = f"""
import os, torch
from terdit_cli.errors import InputFileError
from terdit_cli.runtime.load import load
network = load({str(model)!r}, {words}).network
os.truncate({str(path)!r}, 0)
try:
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
except InputFileError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "changed while it was in use: got 0 bytes" in done.stdout


def test_a_file_that_is_replaced_or_gone_is_harmless(tdt, random_inputs, monkeypatch):
    monkeypatch.chdir(tdt.parent)
    network = load(tdt.name).network
    inputs = random_inputs(BASE)
    with torch.inference_mode():
        expected = network(*inputs)
        monkeypatch.chdir("/")
        other = tdt.with_name("other.tdt")
        other.write_bytes(b"something else")
        other.replace(tdt)
        assert torch.equal(network(*inputs), expected)
        tdt.unlink()
        assert torch.equal(network(*inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("alpha_init", ["randn", "absmean"])
def test_loading_stays_light(alpha_init, tmp_path, make_ckpt):
    """torch._dynamo and sympy take 70 MB and a second, and nothing here needs them."""
    ternary = TernaryConfig(alpha_init=alpha_init, granularity="row")
    export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", BASE, ternary)))
    write_tdt(export, tmp_path / "m.tdt", "t2", "fp32")
    code = f"""
import sys
from terdit_cli.runtime.load import load
import torch
network = load({str(tmp_path / "m.tdt")!r}).network
with torch.inference_mode():
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
print(sorted({{"torch._dynamo", "sympy", "diffusers"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
