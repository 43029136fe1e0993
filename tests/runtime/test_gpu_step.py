"""The fused step of the GPU backend: the recorded outputs, and the composable network's.

Without a GPU in Triton's interpreter, on CPU tensors and without graphs; with one (marker `gpu`)
compiled, by CUDA graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import TernaryConfig
from terdit_cli.pack.read_checkpoint import CheckpointExport
from terdit_cli.runtime import reference
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import graph_step as gpu_step
from terdit_cli.runtime.gpu.graph_step import GpuDiT
from terdit_cli.runtime.packed import PackedTernaryLinear, packed_network

CPU = torch.device("cpu")
# One image of one or four tokens: the interpreter takes milliseconds a row.
BASE = DiTConfig(
    input_size=4, patch_size=2, in_channels=3, dim=24, n_layers=2, n_heads=2, multiple_of=20,
    num_classes=5,
)  # fmt: skip
SHAPES = {
    "plain": BASE,
    "positions": dataclasses.replace(BASE, pos_embed=True),
    "q/k norm, one kv head": dataclasses.replace(BASE, qk_norm=True, n_kv_heads=1),
    "no norm after adaLN, odd sizes": dataclasses.replace(
        BASE, dim=28, n_heads=14, adaln_norm=False, n_layers=1
    ),
    "groups and a tail": dataclasses.replace(
        BASE, dim=140, n_heads=2, multiple_of=133, n_layers=1, input_size=2
    ),
}


@pytest.fixture
def make(tmp_path, make_ckpt, kernels_on) -> Callable[..., tuple[GpuDiT, DiT]]:
    """Return make(config, precision, ternary): the fused network and the reference's."""

    def build(
        config: DiTConfig, precision: Any = "fp32", ternary: TernaryConfig | None = None
    ) -> tuple[GpuDiT, DiT]:
        export = CheckpointExport(load_ckpt(make_ckpt(tmp_path / "ckpt.pt", config, ternary)))
        network = packed_network(export, gpu, kernels_on, precision)
        assert isinstance(network, GpuDiT)
        return network, packed_network(export, reference, CPU, "fp32")

    return build


@torch.inference_mode()
def run(network: DiT, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run a network on its own device."""
    device = next(network.parameters()).device
    return network(*(value.to(device) for value in inputs)).cpu()


def relative_error(network: DiT, exact: DiT, inputs: tuple[Tensor, ...]) -> float:
    expected = run(exact, inputs)
    return float((run(network, inputs) - expected).norm() / expected.norm())


# Of a whole network: each of its 7 products a block adds an error of about the rounding of its
# input (bf16 2^-9 in the mean, and again where its output is rounded; int8 0.29 / 127 times the
# ratio of largest to mean; fp8 2^-5), and they add up like independent ones; three times that.
ALLOWED = {"fp32": 1e-5, "int16": 0.03, "bf16": 0.05, "int8": 0.15, "fp8": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_recorded_outputs_of_the_original(released_folder, golden_case, kernels_on, precision):
    tensors = golden_case("public_a").tensors
    with ModelFile.open(released_folder).exported("ema", n_heads=4) as model:
        network = packed_network(model, gpu, kernels_on, precision)
    out = run(network, tuple(tensors[f"in.{name}"] for name in "xty"))
    error = (out - tensors["out.packed"]).abs().max()
    # fp32 as the other backends; on a GPU its products keep 22 bits of x instead of 24.
    allowed = 1e-5 if kernels_on.type == "cpu" else 3e-5
    assert error <= (allowed if precision == "fp32" else 0.05 * tensors["out.packed"].abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(make, random_inputs, name):
    network, exact = make(SHAPES[name])
    assert relative_error(network, exact, random_inputs(SHAPES[name], 2)) <= ALLOWED["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int16", "bf16", "int8", "fp8"])
def test_precisions(make, random_inputs, precision):
    try:
        network, exact = make(SHAPES["q/k norm, one kv head"], precision)
    except EnvironmentProblem as error:
        pytest.skip(str(error))
    layers = {name: m for name, m in network.named_modules() if isinstance(m, PackedTernaryLinear)}
    assert {m.precision for name, m in layers.items() if "adaLN" not in name} == {precision}
    assert {m.precision for name, m in layers.items() if "adaLN" in name} == {"int16"}
    inputs = random_inputs(SHAPES["q/k norm, one kv head"], 1)
    assert relative_error(network, exact, inputs) <= ALLOWED[precision]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["row", "group128"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_granularities(make, random_inputs, granularity, precision):
    config = SHAPES["groups and a tail"]
    network, exact = make(config, precision, TernaryConfig(granularity=granularity))
    assert relative_error(network, exact, random_inputs(config, 2)) <= ALLOWED[precision]


@pytest.mark.slow
def test_composable_and_fused_agree(make, random_inputs, monkeypatch):
    network, _ = make(BASE, "fp32")
    inputs = random_inputs(BASE, 1)
    fused = run(network, inputs)
    monkeypatch.setattr(GpuDiT, "forward", DiT.forward)
    composed = run(network, inputs)
    assert (fused - composed).norm() <= ALLOWED["fp32"] * composed.norm()


@pytest.mark.slow
def test_compiles_as_one_graph(make, random_inputs, kernels_on):
    torch._dynamo.reset()
    network, _ = make(dataclasses.replace(BASE, n_layers=1))
    inputs = tuple(value.to(kernels_on) for value in random_inputs(BASE, 1))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found, expected = compiled(*inputs), network(*inputs)
    assert (found - expected).norm() <= ALLOWED["fp32"] * expected.norm()


def test_packed_bytes_only_and_shared_by_modules_and_step(make, random_inputs):
    network, _ = make(BASE, "int8")
    run(network, random_inputs(BASE, 1))
    step = network._step
    assert step is not None
    attention = network.get_submodule("layers.1.attention")
    start = step.layers[1].qkv.packed.data_ptr()
    assert attention.wq.weight.data_ptr() == start
    assert attention.wk.weight.data_ptr() == start + attention.wq.weight.numel()
    layers = [m for m in network.modules() if isinstance(m, PackedTernaryLinear)]
    assert len(layers) == 8 * BASE.n_layers
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.shape == gpu.weight_shape(*layer.shape)


@pytest.mark.slow
def test_modulations_are_kept_by_values_that_the_cpu_knows(make, random_inputs, monkeypatch):
    network, _ = make(dataclasses.replace(BASE, n_layers=1), "int8")
    x = random_inputs(BASE, 3)[0].to(next(network.parameters()).device)
    computed: list[int] = []
    plain = gpu_step.Step.modulations

    def counting(step: gpu_step.Step, c: Tensor) -> Tensor:
        computed.append(len(c))
        return plain(step, c)

    monkeypatch.setattr(gpu_step.Step, "modulations", counting)
    y = torch.tensor([1, 5, 5])
    with torch.inference_mode():
        first = network(x, torch.full((3,), 900), y)
        assert computed == [2]
        assert torch.equal(network(x, torch.full((3,), 900), y), first)
        assert computed == [2]
        row = network._step.cache[900, 1].nbytes
        monkeypatch.setattr(gpu_step, "CACHE_BYTES", 2 * row + row // 2)
        network(x[:1], torch.full((1,), 100), y[:1])
        assert computed == [2, 1]
        assert list(network._step.cache) == [(900, 5), (100, 1)]


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_changed_tensors_are_seen(make, random_inputs, change):
    config = dataclasses.replace(BASE, n_layers=1)
    network, exact = make(config)
    inputs = random_inputs(config, 1)
    before = run(network, inputs)
    for each in (network, exact):
        layer: Any = each.get_submodule("layers.0.feed_forward.w2")
        if change == "in place":
            layer.alphas.mul_(3)
        elif change == "replaced":
            layer.alphas = layer.alphas * 3
        else:
            state = each.state_dict()
            each.load_state_dict({k: v * 3 if "w2.alphas" in k else v for k, v in state.items()})
    assert relative_error(network, exact, inputs) <= ALLOWED["fp32"]
    assert (run(network, inputs) - before).norm() > 0.01 * before.norm()


def test_what_is_refused_and_no_images(make, random_inputs, kernels_on):
    network, _ = make(BASE)
    x, t, y = (value.to(kernels_on) for value in random_inputs(BASE, 2))
    assert network(x[:0], t[:0], y[:0]).shape == (0, 6, 4, 4)
    with pytest.raises(
        ValueError, match=r"x is torch.float32 \(2, 3, 4, 3\).*\(B, \*\(3, 4, 4\)\)"
    ):
        network(x[..., :3], t, y)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        network(x.bfloat16(), t, y)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        network(x.requires_grad_(), t, y)
    layer: Any = network.get_submodule("layers.1.feed_forward.w2")
    layer.precision = "int8"
    with pytest.raises(ValueError, match="different precisions"):
        network(x.detach(), t, y)


def test_memory_of_a_step():
    config = DiTConfig(dim=3072, n_layers=32, n_heads=32, qk_norm=True)
    one = gpu_step.step_bytes(config, 1, "int8")
    assert gpu_step.step_bytes(config, 8, "int8") == 8 * one
    assert one > 256 * (4 * 3072 + 3 * 8192)  # the residual stream and w2's input
    # A captured step is of a bucket, and beside it that of the last, smaller batch.
    assert gpu_step.sampling_bytes(config, 9, "int8") == gpu_step.sampling_bytes(config, 16, "int8")
    assert gpu_step.sampling_bytes(config, 100, "int8") >= 164 * one
    # 4.2b with guidance inside 2.5 GB beside 2-bit codes and the float32 rest
    assert 1_099_187_328 + gpu_step.sampling_bytes(config, 2, "int8") < 2_500_000_000


@pytest.mark.parametrize("free", [0, 2 * 10**8, 3 * 10**8, 10**9, 2 * 10**9, 10**10, 7 * 10**10])
def test_the_largest_batch_fits_and_one_more_does_not(free):
    config = DiTConfig(dim=3072, n_layers=32, n_heads=32, qk_norm=True)
    for precision in gpu.PRECISIONS:
        batch = gpu_step.largest_batch(config, free, precision)
        assert batch == 0 or gpu_step.sampling_bytes(config, batch, precision) <= free
        assert gpu_step.sampling_bytes(config, batch + 1, precision) > free


def test_a_step_runs_with_its_device_as_the_current_one(make, random_inputs, monkeypatch):
    """Streams and graphs are of the current device, which need not be that of x."""
    network, _ = make(dataclasses.replace(BASE, n_layers=1), "int8")
    entered: list[torch.device] = []
    plain, on = gpu_step.Step.run, gpu.on

    def running(step: gpu_step.Step, *inputs: Tensor) -> Tensor:
        assert entered == [inputs[0].device]
        return plain(step, *inputs)

    def entering(device: torch.device) -> Any:
        entered.append(device)
        return on(device)

    monkeypatch.setattr(gpu_step.Step, "run", running)
    monkeypatch.setattr(gpu, "on", entering)
    run(network, random_inputs(BASE, 1))
    assert entered[1:]


@pytest.mark.slow
def test_how_a_graph_is_captured(make, random_inputs, monkeypatch):
    """On a stream of the step's own GPU, beside threads that take memory, for any later caller."""
    network, _ = make(dataclasses.replace(BASE, n_layers=1), "int8")
    inputs = random_inputs(BASE, 1)
    run(network, inputs)
    step: Any = network._step
    captures: list[dict[str, Any]] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    class Graph:
        def pool(self) -> str:
            return "a pool"

    def graph(made: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Any:
        captures.append({"pool": pool, "stream": stream, "mode": capture_error_mode})
        return contextlib.nullcontext()

    for name, fake in (("Stream", Stream), ("CUDAGraph", Graph), ("graph", graph),
                       ("current_stream", Stream), ("stream", contextlib.nullcontext)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    x, t, y = inputs
    with torch.inference_mode():
        for _ in range(2):
            captured = step._capture(2, (x, t.float(), y))
    for place, value in zip(captured.inputs, (x, t.float(), y), strict=True):
        assert not place.is_inference()
        place[:1].copy_(value)  # as a caller outside inference mode does
    assert [each["mode"] for each in captures] == ["thread_local"] * 2
    assert [each["pool"] for each in captures] == [None, "a pool"]
    assert captures[0]["stream"] is captures[1]["stream"]
    assert isinstance(captures[0]["stream"], Stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_graphs_serve_all_batches(make, random_inputs, precision):
    network, _ = make(BASE, precision)
    for batch in (3, 4, 1, 3):
        inputs = random_inputs(BASE, batch)
        captured = run(network, inputs)
        step: Any = network._step
        on = [value.cuda() for value in inputs]
        with torch.no_grad():
            plain = step.forward(on[0], on[1].float(), on[2], None).cpu()
        torch.testing.assert_close(captured, plain, rtol=1e-2, atol=1e-2)
    assert {key[0] for key in step.graphs} == {1, 4}
