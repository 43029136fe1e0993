"""Other ways to multiply by the same ternary matrix, each at its best settings.

    y = x @ (alpha * trits).T + bias

A rival is a layer made from the trits [N, K], alpha [1] or [N] and a bias; its GEMM is that layer,
its forward the same `DiT` with that layer in place of every ternary matrix. So all rivals, and the
packed model, compute the same function of the same weights: what differs is how.

Shapes: M rows of activations, K in features, N out features.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.model.dit import DiT
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.trits import released_encode

Peak = Literal["fp32", "bf16", "int8"]
Layer = Callable[[Tensor, Tensor, Tensor | None], nn.Module]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """One rival: how to build its layer, and the settings that are best for it."""

    label: str
    peak: Peak  # the arithmetic that bounds it
    layer: Layer
    bytes_per_weight: float
    dtype: torch.dtype = torch.float32  # of activations and of all that is not a large matrix
    compiled: bool = False
    precision: Literal["highest", "medium"] = "highest"

    def gemm(self, trits: Tensor, alpha: Tensor, x: Tensor) -> Callable[[], Tensor]:
        """Return a call that computes y [M, N] from x float32 [M, K], converted beforehand."""
        layer = self.layer(trits, alpha, None).to(self.dtype).eval()
        x = x.to(self.dtype)
        if self.compiled:
            layer.compile(dynamic=False)
        return lambda: self._call(layer, x)

    def network(self, model: ExportedModel, device: torch.device | str = "cpu") -> Network:
        """Return f(x, t, y) with this rival's layers on a device; float32 in and out."""
        network = dense_network(model, self.layer, self.dtype).to(device)
        if self.compiled:
            for block in network.layers:  # alike, so that all share what is compiled for one
                block.compile(dynamic=False)
        return lambda x, t, y: self._call(network, x.to(self.dtype), t, y).float()

    def _call(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        torch.set_float32_matmul_precision(self.precision)
        with torch.inference_mode():
            return run(*inputs)


class UnpackLinear(nn.Module):
    """TerDiT's own way on a CPU: unpack 2 bits to float32 at each call, then multiply.

    Buffer `packed` uint8 [N/4, K]: the layout of the released checkpoints (`pack/trits.py`).
    """

    def __init__(self, trits: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed: Tensor
        self.alpha: Tensor
        self.bias: Tensor | None
        self.register_buffer("packed", released_encode(trits))
        self.register_buffer("alpha", alpha[:, None])
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x float32 [..., K] to [..., N]."""
        quarter, columns = self.packed.shape
        codes = self.packed.new_empty(4, quarter, columns)
        for index, shift in enumerate((6, 4, 2, 0)):
            torch.bitwise_and(self.packed >> shift, 3, out=codes[index])
        weight = self.alpha * (codes.view(4 * quarter, columns).float() - 1)
        return F.linear(x, weight, self.bias)


class IntegerLinear(nn.Module):
    """Per-row int8 activations and `torch._int_mm`; compiled, the quantisation is one pass."""

    CUDA_ROWS = 32  # cuBLAS takes no fewer than 17

    def __init__(self, trits: Tensor, alpha: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.alpha: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", trits.T.contiguous())
        self.register_buffer("alpha", alpha)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N] in the dtype of x."""
        rows = x.flatten(0, -2).float()
        step = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-5) / 127
        integers = (rows / step).round().to(torch.int8)
        if rows.is_cuda and len(rows) < self.CUDA_ROWS:
            integers = F.pad(integers, (0, 0, 0, self.CUDA_ROWS - len(rows)))
        sums = torch._int_mm(integers, self.weight)[: len(rows)]
        y = sums.float() * (step * self.alpha)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def dense_layer(trits: Tensor, alpha: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear in float32 with the weight alpha * trits."""
    with torch.device("meta"):
        linear = nn.Linear(trits.shape[1], trits.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(trits.float().mul_(alpha[:, None]), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def bf16_layer(trits: Tensor, alpha: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return an nn.Linear in bfloat16."""
    return dense_layer(trits, alpha, bias).bfloat16()


def ao_layer(trits: Tensor, alpha: Tensor, bias: Tensor | None) -> nn.Module:
    """Return torch.ao's dynamic int8 layer on oneDNN (activations per tensor)."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        holder = nn.Sequential(dense_layer(trits, alpha, bias))
        return quantize_dynamic(holder, {nn.Linear}, dtype=torch.qint8)[0]


RIVALS: dict[str, Rival] = {
    "fp32": Rival("torch fp32", "fp32", dense_layer, 4),
    "fp32-medium": Rival('torch fp32 "medium"', "fp32", dense_layer, 4, precision="medium"),
    "bf16": Rival("torch bf16", "bf16", bf16_layer, 2, torch.bfloat16),
    "bf16-compiled": Rival(
        "torch bf16 compiled", "bf16", bf16_layer, 2, torch.bfloat16, compiled=True
    ),
    "int8-ao": Rival("torch.ao dynamic int8", "int8", ao_layer, 2.5),
    "int8-mm": Rival(
        "torch._int_mm, compiled", "int8", IntegerLinear, 1, torch.bfloat16, compiled=True
    ),
    "unpack": Rival("upstream: unpack, fp32", "fp32", UnpackLinear, 0.25),
}
GGML = "ggml"  # named with its library, only in the GEMM table
GGML_LABEL = "ggml TQ2_0"


def arithmetic(name: str) -> Peak:
    """Return the arithmetic whose peak bounds a rival."""
    return "int8" if name == GGML else RIVALS[name].peak


def dense_network(model: ExportedModel, layer: Layer, dtype: torch.dtype) -> DiT:
    """Build the DiT of an exported model with `layer` for each ternary matrix.

    One matrix at a time is in float32, so the peak of memory is that of the finished network.
    The rivals know no scales per group.

    Raises:
        EnvironmentProblem: the model has scales of another granularity.
    """
    granularity = model.info.ternary.granularity
    if granularity == "group128":
        raise EnvironmentProblem(
            "no rival for these scales", got=granularity, expected="tensor or row"
        )
    with torch.device("meta"):
        network = DiT(model.info.config, lambda *shape, bias: nn.Identity())
    biases = {f"{name}.bias" for name in model.ternary_names()}
    rest = [name for name in model.rest_names() if name not in biases]
    state = {name: model.rest(name).to(dtype) for name in rest}
    network.load_state_dict(state, strict=True, assign=True)
    network.to(dtype)  # the embedding of positions, which no file holds
    for name in model.ternary_names():
        bias = model.rest(f"{name}.bias").float() if f"{name}.bias" in model.rest_names() else None
        built = layer(model.trits(name), model.alphas(name), bias)
        network.set_submodule(name, built if dtype == torch.float32 else built.to(dtype))
    return network.eval().requires_grad_(False)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class GgmlGemm:
    """y = x @ W.T by ggml: W in its ternary type TQ2_0 (blocks of 256 with an fp16 scale).

    The library is the user's: libggml-cpu*.so of any build that exports ggml's C API, with
    libggml-base.so beside it. The declarations follow ggml.h and ggml-cpu.h.
    """

    F32, TQ2_0 = 0, 35
    BLOCK = 256
    SPARE_BYTES = 64 << 20  # the graph and the work buffer (activations as Q8_K)

    def __init__(self, library: Path, trits: Tensor, alpha: Tensor, x: Tensor, threads: int):
        base, cpu = open_ggml(library)
        (rows, columns), m = trits.shape, x.shape[0]
        if columns % self.BLOCK:
            raise EnvironmentProblem(
                "TQ2_0 cannot hold this matrix", got=f"K = {columns}", expected="a multiple of 256"
            )
        pointer, integer = ctypes.c_void_p, ctypes.c_int64

        def declare(function: str, result: type | None, *arguments: type) -> Callable[..., int]:
            found = getattr(base, function)
            found.restype, found.argtypes = result, arguments
            return found

        declare("ggml_type_name", ctypes.c_char_p, ctypes.c_int)
        if base.ggml_type_name(self.TQ2_0) != b"tq2_0":
            raise EnvironmentProblem("this ggml has no TQ2_0", where=library)
        declare("ggml_init", pointer, _InitParams)
        declare("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, integer, integer)
        declare("ggml_get_data", pointer, pointer)
        declare("ggml_mul_mat", pointer, pointer, pointer, pointer)
        declare("ggml_new_graph", pointer, pointer)
        declare("ggml_build_forward_expand", None, pointer, pointer)
        declare("ggml_free", None, pointer)
        declare(
            "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer,
            integer, integer, integer, pointer,
        )  # fmt: skip
        self._compute = cpu.ggml_graph_compute_with_ctx
        self._compute.restype = ctypes.c_int
        self._compute.argtypes = (pointer, pointer, ctypes.c_int)
        size = 4 * (m * columns + m * rows) + rows * columns + self.SPARE_BYTES
        self._free = base.ggml_free
        self._context = base.ggml_init(_InitParams(size, None, False))
        weight = base.ggml_new_tensor_2d(self._context, self.TQ2_0, columns, rows)
        inputs = base.ggml_new_tensor_2d(self._context, self.F32, columns, m)
        dense = (trits.float() * alpha).contiguous()
        base.ggml_quantize_chunk(
            self.TQ2_0, dense.data_ptr(), base.ggml_get_data(weight), 0, rows, columns, None
        )
        ctypes.memmove(base.ggml_get_data(inputs), x.contiguous().data_ptr(), 4 * x.numel())
        product = base.ggml_mul_mat(self._context, weight, inputs)
        self._graph = base.ggml_new_graph(self._context)
        base.ggml_build_forward_expand(self._graph, product)
        values = (ctypes.c_float * (m * rows)).from_address(base.ggml_get_data(product))
        self._y = torch.frombuffer(values, dtype=torch.float32).view(m, rows)
        self._threads = threads

    def __call__(self) -> Tensor:
        """Compute y float32 [M, N]; the tensor is overwritten by the next call."""
        status = self._compute(self._context, self._graph, self._threads)
        if status != 0:
            raise EnvironmentProblem("ggml could not compute", got=f"status {status}")
        return self._y

    def close(self) -> None:
        """Free ggml's memory; the object cannot be used after it."""
        self._free(self._context)


def open_ggml(library: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Open ggml's base and CPU libraries.

    Raises:
        EnvironmentProblem: no such library, or one without ggml's C API.
    """
    library = library.absolute()  # a bare name would be looked for elsewhere
    base = library.with_name("libggml-base.so")
    try:
        opened = ctypes.CDLL(str(base), ctypes.RTLD_GLOBAL), ctypes.CDLL(str(library))
        _ = opened[0].ggml_mul_mat, opened[1].ggml_graph_compute_with_ctx
    except (OSError, AttributeError) as error:
        raise EnvironmentProblem(
            "ggml cannot be used",
            got=error,
            expected="libggml-cpu*.so of a shared build, libggml-base.so beside it",
            where=library,
            fix="build ggml with -DBUILD_SHARED_LIBS=ON and name its libggml-cpu.so with --ggml",
        ) from error
    return opened
