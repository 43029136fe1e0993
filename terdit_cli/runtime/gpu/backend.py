"""The gpu backend: Triton kernels that multiply with 2-bit codes at tensor-core speed.

    fp32    x in three tf32 products         int8, int16  as the reference, bit for bit
    bf16    x rounded to bfloat16            fp8          u = e4m3(x * (1 / absmax * 448)) per row

Products are summed in float32 (fp32, bf16, fp8; in fp8 with the fewer bits that Hopper's tensor
cores keep) or int32. On the device the codes are in another order than t2 (`from_t2`;
triton_kernels.py says why), with as many bytes: nothing larger is ever in global memory. Triton is
imported on first use, never when this module is imported.

Shapes: M rows, N out features, K in features, G = ceil(K / 128) groups, S = ceil(K / 512).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import ACTIVATION_FLOOR
from terdit_cli.pack.trits import t2_decode, t2_shape
from terdit_cli.runtime import reference
from terdit_cli.runtime.gpu import tiles as gpu_config
from terdit_cli.runtime.gpu.tiles import SLICE, Device, Epilogue, Problem, Tile
from terdit_cli.runtime.reference import INT16_LIMIT, How, Precision
from terdit_cli.system.gpu_memory import free_bytes

NAME = "gpu"
PRECISIONS: tuple[Precision, ...] = (*reference.PRECISIONS, "fp8")

LARGEST_K = 65_000  # sums of int16 activations fit int32
FINER_ADALN: tuple[Precision, ...] = ("int8", "fp8", "bf16")
OLDEST = (8, 0)  # compute capability with bfloat16
OLDEST_FP8 = (8, 9)
OLDEST_TRITON = (3, 6)
FP8_LIMIT = 448.0  # the largest e4m3
QK_NORM_EPS = 1e-5  # of nn.LayerNorm

KINDS: dict[str, str] = {
    "fp32": "fp32", "bf16": "bf16", "int16": "int8", "int8": "int8", "fp8": "fp8"
}  # fmt: skip
_LIMITS: dict[str, float] = {"int8": 127.0, "int16": INT16_LIMIT, "fp8": FP8_LIMIT}


def auto_precision() -> Precision:
    """Return int8: the products are those of the cpu backend, whose images were compared."""
    return "int8"


@functools.cache
def kernels() -> Any:
    """Return the module of the kernels, importing Triton."""
    return importlib.import_module("terdit_cli.runtime.gpu.triton_kernels")


@functools.cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'terdit[gpu]'"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {version} is too old, it takes {oldest}: pip install 'terdit[gpu]'"
    return None


def available(device: torch.device) -> str | None:
    """Return the reason why this backend cannot run on a device, or None."""
    if not torch.cuda.is_available():
        return f"device {device}, torch finds no CUDA device"
    if device.type != "cuda":
        return f"device {device}"
    if torch.version.hip is not None:
        return "it is made for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} is of compute capability {_dotted(capability)}, it takes {_dotted(OLDEST)}"
    return _no_triton()


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that a device supports a precision.

    Raises:
        EnvironmentProblem: fp8 on a GPU without it.
    """
    if precision != "fp8" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_FP8:
        raise EnvironmentProblem(
            "this GPU has no fp8",
            got=f"{torch.cuda.get_device_name(device)}, compute capability {_dotted(capability)}",
            expected=f"compute capability {_dotted(OLDEST_FP8)} or newer",
            fix="use --activations int8 or bf16",
        )


def network_class() -> type[DiT]:
    """Return the network whose whole forward pass is a graph of kernel launches."""
    from terdit_cli.runtime.gpu.graph_step import GpuDiT  # which calls this module

    return GpuDiT


t5_to_t2 = reference.t5_to_t2


def condition_device(device: torch.device) -> torch.device:
    """Return the CPU: the step caches modulations by the values of t and y."""
    return torch.device("cpu")


def largest_batch(config: DiTConfig, device: torch.device, precision: Precision) -> int | None:
    """Return how many rows of a batch the free memory of the GPU holds."""
    from terdit_cli.runtime.gpu import graph_step

    return graph_step.largest_batch(config, free_bytes(device), precision)


def how(device: torch.device) -> How:
    """Return torch's number of threads, and the GPU by name."""
    return How(torch.get_num_threads(), None, torch.cuda.get_device_name(device))


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def weight_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return the shape of the codes of a matrix [rows, columns] on the device."""
    return rows, -(-columns // (4 * SLICE)) * SLICE


def from_t2(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Reorder t2 bytes, uint8 [ceil(N/64), ceil(K/4), 64], as the kernels read them.

    Returns uint8 [N, 128 S]: byte (n, 128 s + i) holds the trits of row n at k = 512 s + 128 j + i
    in bits 2j and 2j+1 as two's complement. Temporary memory: 3 bytes per weight of this matrix.
    """
    trits = t2_decode(packed, rows, columns)
    width = weight_shape(rows, columns)[1]
    fields = F.pad(trits, (0, 4 * width - columns)).view(torch.uint8) & 3
    first, second, third, fourth = fields.view(rows, -1, 4, SLICE).unbind(2)
    return (first | second << 2 | third << 4 | fourth << 6).reshape(rows, width)


class Rows(NamedTuple):
    """Activations in the form that the products read."""

    values: Tensor  # [M, K]; int16: [2M, K]
    steps: Tensor | None  # float32 [M] of quantised ones
    precision: Precision


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one, where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def make_rows(
    x: Tensor,
    precision: Precision,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    eps: float = 0.0,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    tokens: int = 1,
) -> Rows:
    """Normalise, modulate and quantise rows in one pass.

    Args:
        x: float [M, K], rows contiguous.
        precision: what the product that follows takes.
        norm: "none", "rms" or "layer" (no weight).
        weight: float32 [P, K] of "rms"; row r takes r % P.
        shift, scale: float32 [M / tokens, K], strided alike, or None.
    """
    count, width = x.shape
    if norm == "none" and shift is None and precision in ("fp32", "bf16"):
        return Rows(x.to(torch.float32 if precision == "fp32" else torch.bfloat16), None, precision)
    kind = precision if precision in _LIMITS else "float"
    planes = 2 if precision == "int16" else 1
    dtypes = {"int8": torch.int8, "int16": torch.int8, "fp8": torch.float8_e4m3fn}
    dtypes |= {"bf16": torch.bfloat16, "fp32": torch.float32}
    values = x.new_empty((planes * count, width), dtype=dtypes[precision])
    steps = x.new_empty(count, dtype=torch.float32) if kind != "float" else None
    if not count:
        return Rows(values, steps, precision)
    block = max(16, 1 << (width - 1).bit_length())
    with on(x.device):
        kernels().rows_kernel[(count,)](
            x, weight, shift, scale, values, steps,
            width, tokens, x.stride(0), 0 if weight is None else weight.stride(0),
            0 if shift is None else shift.stride(0), values.stride(0),
            1 if weight is None else len(weight), eps,
            NORM=norm, MODULATE=shift is not None, KIND=kind, LIMIT=_LIMITS.get(kind, 0.0),
            FLOOR=ACTIVATION_FLOOR, BLOCK=block,
            num_warps=4 if block <= 4096 else 8, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Rows(values, steps, precision)


@functools.cache
def device_facts(device: torch.device) -> Device:
    """Return the facts that the choice of tiles depends on."""
    if device.type != "cuda":
        return Device("interpreter", gpu_config.SMALLEST_SHARED, 1 << 30, False)
    facts = torch.cuda.get_device_properties(device)
    return Device(
        f"{facts.name}, triton {importlib.import_module('triton').__version__}",
        getattr(facts, "shared_memory_per_block_optin", gpu_config.SMALLEST_SHARED),
        facts.multi_processor_count,
        facts.major == 9,
    )


def problem_of(rows: Rows, alphas: Tensor, columns: int, epilogue: Epilogue) -> Problem:
    """Return the key by which the tile of a product with `columns` outputs is chosen."""
    return Problem(KINDS[rows.precision], alphas.dim() == 2, epilogue, len(rows.values), columns)


def multiply(
    rows: Rows,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    gates: Tensor | None = None,
    tokens: int = 1,
    swiglu: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Write the product into out [M, N] (any float dtype, rows contiguous) and return it.

    Args:
        packed: uint8 [N, 128 S]; with swiglu [2N, 128 S]: rows of w1, then of w3.
        alphas: float32 [1], [N] or [N, G]; with swiglu of 2N rows.
        bias: float32 [N] or None.
        gates: float32 [M / tokens, N]: out += gates * product, instead of out = product.
        swiglu: out = silu(first product) * second.
        tile: instead of the one chosen by shape.
    """
    count, columns = out.shape
    if not count:
        return out
    planes = 2 if rows.precision == "int16" else 1
    width = rows.values.shape[1]
    if tile is None:
        epilogue: Epilogue = "swiglu" if swiglu else "plain" if gates is None else "gated"
        problem = problem_of(rows, alphas, columns, epilogue)
        tile = gpu_config.choose(problem, device_facts(out.device))
    grid = -(-columns // tile.BN) * -(-count * planes // tile.BM)
    with on(out.device):
        kernels().linear_kernel[(grid,)](
            rows.values, packed, alphas, bias, rows.steps, gates, out,
            count, columns, width, alphas.shape[-1], tokens, rows.values.stride(0),
            packed.stride(0), 0 if len(alphas) == 1 else 1,
            0 if gates is None else gates.stride(0), out.stride(0),
            KIND=KINDS[rows.precision], PLANES=planes, GROUPED=alphas.dim() == 2, SWIGLU=swiglu,
            HAS_STEPS=rows.steps is not None, HAS_BIAS=bias is not None,
            GATED=gates is not None, EVEN=width == 4 * packed.shape[1],
            BN=tile.BN, BM=tile.BM, BK=tile.BK,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def rotate(
    heads: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q_width: int,
    k_width: int,
    q_norm: tuple[Tensor, Tensor] | None,
    k_norm: tuple[Tensor, Tensor] | None,
) -> None:
    """Normalise (where there are norms, with eps 1e-5) and rotate q and k of heads in place.

    Args:
        heads: float [M, q_width + 2 k_width], rows contiguous: q, k, v.
        cosines, sines: float32 [T, half a head's width]; row m is token m % T.
        q_norm, k_norm: weight and bias of the LayerNorm over all heads at once, or None.
    """
    if not len(heads):
        return
    q_weight, q_bias = q_norm or (None, None)
    k_weight, k_bias = k_norm or (None, None)
    tokens, half = cosines.shape
    block = max(16, 1 << (max(q_width, k_width) - 1).bit_length())
    with on(heads.device):
        kernels().rotary_kernel[(len(heads), 2)](
            heads, cosines, sines, q_weight, q_bias, k_weight, k_bias,
            tokens, heads.stride(0), q_width, k_width, half, QK_NORM_EPS,
            HAS_NORM=q_norm is not None, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _linear(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    precision: Precision,
) -> Tensor:
    _check(x, packed, alphas, bias, rows, columns, precision)
    flat = x.reshape(-1, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    out = x.new_empty(len(flat), rows)
    multiply(make_rows(flat, precision), packed, alphas, bias, out)
    return out.view(*x.shape[:-1], rows)


def _check(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    precision: Precision,
) -> None:
    """Refuse tensors that the kernels would read wrongly or beyond their end."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if rows < 1 or not 1 <= columns <= LARGEST_K:
        raise ValueError(f"a matrix [{rows}, {columns}]: expected K from 1 to {LARGEST_K}")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {columns}]")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    if x.device.type != "cuda" and not kernels().INTERPRETED:
        raise ValueError(f"x is on {x.device}, expected a CUDA device")
    allowed = ((1,), (rows,), (rows, -(-columns // SLICE)))
    tensors = [
        ("packed", packed, torch.uint8, (weight_shape(rows, columns),)),
        ("alphas", alphas, torch.float32, allowed),
    ]
    if bias is not None:
        tensors.append(("bias", bias, torch.float32, ((rows,),)))
    for name, tensor, dtype, shapes in tensors:
        fits = tuple(tensor.shape) in shapes and tensor.dtype == dtype and tensor.is_contiguous()
        if not fits or tensor.device != x.device:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"expected contiguous {dtype} {wanted} on {x.device}"
            )


def _linear_shape(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    precision: Precision,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _no_backward(ctx: Any, gradient: Tensor) -> Tensor:
    raise NotImplementedError(
        "the gpu backend computes no gradients: load the model with backend='reference'"
    )


# terdit::gpu_linear, so that torch.compile and export see one operator. On the CPU it exists
# for Triton's interpreter only.
_OPERATORS = torch.library.Library("terdit", "FRAGMENT")
_OPERATORS.define(
    "gpu_linear(Tensor x, Tensor packed, Tensor alphas, Tensor? bias, SymInt rows, "
    "SymInt columns, str precision) -> Tensor"
)
_OPERATORS.impl("gpu_linear", _linear, "CUDA")
_OPERATORS.impl("gpu_linear", _linear, "CPU")
torch.library.register_fake("terdit::gpu_linear", _linear_shape, lib=_OPERATORS)
torch.library.register_autograd("terdit::gpu_linear", _no_backward, lib=_OPERATORS)


def matmul(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    precision: Precision,
) -> Tensor:
    """Compute x [..., K] @ (alpha * trits).T + bias -> [..., N]; see `reference.matmul`.

    Args:
        packed: as returned by `from_t2`; t2 bytes work too, and are reordered in each call.

    Raises:
        ValueError: tensors of other shapes, types or devices than documented.
    """
    if packed.dim() == 3 and tuple(packed.shape) == t2_shape(*shape):
        packed = from_t2(packed, *shape)
    return torch.ops.terdit.gpu_linear(x, packed, alphas, bias, *shape, precision)
