"""The cpu backend: the native library behind the C ABI of native/ternary.h, through ctypes.

One shared library serves every Python and every torch. It is opened on first use, never when
this module is imported; it runs without the GIL. C trusts its callers, so the size, type and device
of every pointer are checked here before a call.

    TERDIT_ISA       the instruction set to use instead of the best
    TERDIT_THREADS   threads, instead of torch.get_num_threads(); `set_threads` takes precedence
    TERDIT_LIBRARY   another build of the library, for bug reports

Shapes: N out features, K in features, G = ceil(K / 128) groups.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import terdit_cli
from terdit_cli.errors import EnvironmentProblem, UsageError, did_you_mean
from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.ternary import GRANULARITIES, alpha_shape
from terdit_cli.pack.trits import t2_shape, t5_length
from terdit_cli.runtime.reference import PRECISIONS, How, Precision

NAME = "cpu"

ABI = 1
MAX_THREADS = 256
LARGEST_K = 65_000  # sums of int16 activations fit int32
FINER_ADALN: tuple[Precision, ...] = ("int8",)
PRECISION_CODES: dict[Precision, int] = {"fp32": 0, "bf16": 1, "int16": 2, "int8": 3}
PEAKS = ("int8", "bf16", "fp32")

_REINSTALL = "pip install --force-reinstall --no-deps terdit"
_threads: int | None = None  # the argument of `set_threads`


def auto_precision() -> Precision:
    """Return the precision for models that were not trained with int8 activations.

    int8, whose images differ little from fp32's (docs/runtime.md); in plain C++, without
    instructions for bytes, fp32 is faster.
    """
    return "fp32" if isa() == "generic" else "int8"


class Matrix(ctypes.Structure):
    """terdit_matrix of native/ternary.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("alphas", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("granularity", ctypes.c_int32),
    )


_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "terdit_isas_usable": (ctypes.c_char_p, ()),
    "terdit_isa": (ctypes.c_char_p, ()),
    "terdit_set_isa": (_INT, (ctypes.c_char_p,)),
    "terdit_linear": (_INT, (_POINTER, _POINTER, _LONG, _INT, _POINTER, _INT)),
    "terdit_modulations": (_INT, (_POINTER, _POINTER, _LONG, _INT, _POINTER, _INT)),
    "terdit_blocks": (_INT, (_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT)),
    "terdit_t5_to_t2": (_INT, (_POINTER, _LONG, _LONG, _POINTER, _INT)),
    "terdit_peak": (ctypes.c_double, (ctypes.c_char_p, ctypes.c_double, _INT)),
    "terdit_arena_bytes": (_LONG, ()),
    "terdit_release": (None, ()),
}


@functools.cache
def _open() -> ctypes.CDLL | str:
    """Open the library once; return it, or the reason why there is none.

    Raises:
        UsageError, EnvironmentProblem: TERDIT_LIBRARY or TERDIT_ISA is not usable.
    """
    named = os.environ.get("TERDIT_LIBRARY")
    package = Path(str(importlib.resources.files("terdit_cli.runtime")))
    path = Path(named) if named else package / "native" / "libterdit.so"
    if not path.is_file():
        if named:
            raise UsageError(
                "no such native library",
                got=named,
                expected="a libterdit.so",
                where="TERDIT_LIBRARY",
                fix="unset TERDIT_LIBRARY",
            )
        return "the native library was not built (no C++ compiler when terdit was installed)"
    try:
        library = ctypes.CDLL(str(path.absolute()))
        abi, version = library.terdit_abi, library.terdit_version
    except (OSError, AttributeError) as error:
        return f"the native library cannot be loaded: {error}; reinstall: {_REINSTALL}"
    version.restype = ctypes.c_char_p
    found = f"terdit {version().decode(errors='replace')}, interface {abi()}"
    wanted = f"terdit {terdit_cli.__version__}, interface {ABI}"
    if found != wanted:
        return f"the native library is of {found}, not of {wanted}; reinstall: {_REINSTALL}"
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if isa_name := os.environ.get("TERDIT_ISA"):
        _set_isa(library, isa_name)
    return library


def _set_isa(library: ctypes.CDLL, name: str) -> None:
    status = library.terdit_set_isa(name.encode())
    if status == 0:
        return
    usable = ["auto", *library.terdit_isas_usable().decode().split()]
    if status == 1:
        raise UsageError(
            "unknown instruction set",
            got=repr(name) + did_you_mean(name, usable),
            expected="one of " + ", ".join(usable),
            where="TERDIT_ISA",
            fix="unset TERDIT_ISA",
        )
    raise EnvironmentProblem(
        "this CPU lacks the instruction set",
        got=name,
        expected="one of " + ", ".join(usable),
        where="TERDIT_ISA",
        fix="unset TERDIT_ISA",
    )


def library() -> ctypes.CDLL:
    """Return the native library.

    Raises:
        EnvironmentProblem: there is none, with the reason. UsageError: as `_open`.
    """
    found = _open()
    if isinstance(found, str):
        raise EnvironmentProblem(
            "backend 'cpu' cannot run", got=found, fix="use --backend auto or reference"
        )
    return found


def available(device: torch.device) -> str | None:
    """Return the reason why this backend cannot run on a device, or None."""
    if device.type != "cpu":
        return f"device {device}"
    found = _open()
    return found if isinstance(found, str) else None


def check_precision(precision: Precision, device: torch.device) -> None:
    """Accept every precision: each instruction set has a way to compute it."""


def network_class() -> type[DiT]:
    """Return the network whose blocks are one native call."""
    from terdit_cli.runtime.fused import FusedDiT  # which calls this module

    return FusedDiT


weight_shape = t2_shape  # the bytes on disk are the bytes that the kernels read


def from_t2(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Return t2 bytes as they are."""
    return packed


def condition_device(device: torch.device) -> torch.device:
    """Return the network's own device."""
    return device


def largest_batch(config: DiTConfig, device: torch.device, precision: Precision) -> int | None:
    """Return None: unknown."""
    return None


def how(device: torch.device) -> How:
    """Return the number of threads and the instruction set."""
    threads, name = thread_count(), isa()
    return How(threads, name, f"{name}, threads {threads}")


def set_isa(name: str) -> None:
    """Use another instruction set ("auto": the best) in this process; raises as TERDIT_ISA."""
    _set_isa(library(), name)


def isa() -> str:
    """Return the instruction set in use."""
    return library().terdit_isa().decode()


def isas_usable() -> list[str]:
    """Return the instruction sets that this CPU can run, best first."""
    return library().terdit_isas_usable().decode().split()


def set_threads(count: int | None) -> None:
    """Set the number of threads of this process, torch's too; None leaves torch's unchanged.

    Raises:
        UsageError: not 1 to 256.
    """
    global _threads
    if count is not None:
        torch.set_num_threads(_checked_threads(count))
    _threads = count


def thread_count() -> int:
    """Return the number of threads of a call: from `set_threads`, TERDIT_THREADS, or torch.

    Raises:
        UsageError: TERDIT_THREADS is no number from 1 to 256.
    """
    if _threads is not None:
        return _threads
    if text := os.environ.get("TERDIT_THREADS"):
        return _checked_threads(int(text) if text.isdecimal() and len(text) < 9 else text)
    return min(torch.get_num_threads(), MAX_THREADS)


def _checked_threads(count: int | str) -> int:
    if isinstance(count, int) and 1 <= count <= MAX_THREADS:
        return count
    raise UsageError(
        "wrong number of threads",
        got=repr(count),
        expected=f"1 to {MAX_THREADS}",
        where="--threads or TERDIT_THREADS",
        fix="--threads 1, or unset TERDIT_THREADS",
    )


def address(
    what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int:
    """Return the address of a tensor that C will read as `dtype` of `shape`, row-major.

    Raises:
        ValueError: it is anything else.
    """
    if (
        tensor.device.type != "cpu"
        or tensor.dtype != dtype
        or tuple(tensor.shape) != shape
        or not tensor.is_contiguous()
        or tensor.data_ptr() % tensor.element_size()
    ):
        layout = "" if tensor.is_contiguous() else "strided "
        raise ValueError(
            f"{what} is {layout}{tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
            f"expected contiguous {dtype} {list(shape)} on cpu"
        )
    return tensor.data_ptr()


def describe_matrix(
    packed: Tensor, alphas: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> Matrix:
    """Describe a packed matrix of shape (N, K) to the library; keeps none of the tensors alive.

    Raises:
        ValueError: tensors of other shapes, types or devices than `reference.matmul` documents.
    """
    rows, columns = shape
    if rows < 1 or not 1 <= columns <= LARGEST_K:
        raise ValueError(f"a matrix [{rows}, {columns}]: expected K from 1 to {LARGEST_K}")
    for code, granularity in enumerate(GRANULARITIES):  # the order of enum terdit_granularity
        if tuple(alphas.shape) == alpha_shape(rows, columns, granularity):
            return Matrix(
                address("packed", packed, t2_shape(rows, columns), torch.uint8),
                address("alphas", alphas, tuple(alphas.shape)),
                None if bias is None else address("bias", bias, (rows,)),
                rows,
                columns,
                code,
            )
    raise ValueError(f"alphas of shape {list(alphas.shape)} for a matrix [{rows}, {columns}]")


def as_floats(x: Tensor) -> Tensor:
    """Return x as contiguous, aligned float32; x itself where it is that already."""
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % x.element_size() else x


def check_status(status: int) -> None:
    """Raise MemoryError if a call of the library reports that memory ran out."""
    if status:
        raise MemoryError("the native library found no memory for its activations")


def _linear(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    precision: Precision,
) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {columns}]")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    matrix = describe_matrix(packed, alphas, bias, (rows, columns))
    values = as_floats(x)
    out = values.new_empty(*x.shape[:-1], rows)
    status = library().terdit_linear(
        ctypes.byref(matrix),
        values.data_ptr(),
        values.numel() // columns,
        PRECISION_CODES[precision],
        out.data_ptr(),
        thread_count(),
    )
    check_status(status)
    return out.to(x.dtype)


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
        "the cpu backend computes no gradients: load the model with backend='reference'"
    )


# terdit::linear, so that torch.compile and export see one operator.
_OPERATORS = torch.library.Library("terdit", "DEF")
_OPERATORS.define(
    "linear(Tensor x, Tensor packed, Tensor alphas, Tensor? bias, SymInt rows, SymInt columns, "
    "str precision) -> Tensor"
)
_OPERATORS.impl("linear", _linear, "CPU")
torch.library.register_fake("terdit::linear", _linear_shape, lib=_OPERATORS)
torch.library.register_autograd("terdit::linear", _no_backward, lib=_OPERATORS)


def matmul(
    x: Tensor,
    packed: Tensor,
    alphas: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    precision: Precision,
) -> Tensor:
    """Compute x [..., K] @ (alpha * trits).T + bias -> [..., N]; see `reference.matmul`.

    int8 and int16 equal the reference bit for bit, fp32 and bf16 to the order of summation.

    Raises:
        ValueError: tensors of other shapes, types or devices than documented.
        EnvironmentProblem: there is no native library.
    """
    return torch.ops.terdit.linear(x, packed, alphas, bias, *shape, precision)


def t5_to_t2(blob: Tensor, rows: int, columns: int) -> Tensor:
    """Repack a t5 blob, uint8 [t5_length(N, K)], as t2, uint8 [ceil(N/64), ceil(K/4), 64].

    Raises:
        ValueError: a blob of another length or type, or a byte that holds no trits.
    """
    out = torch.empty(t2_shape(rows, columns), dtype=torch.uint8)
    source = address("blob", blob, (t5_length(rows, columns),), torch.uint8)
    status = library().terdit_t5_to_t2(source, rows, columns, out.data_ptr(), thread_count())
    if status == 1:
        raise ValueError("the blob holds a byte above 242, which encodes no trits")
    check_status(status)
    return out


def peak(what: str, seconds: float, threads: int) -> float:
    """Measure for about `seconds` the operations per second of a dot instruction from registers.

    Args:
        what: "int8", "bf16" or "fp32". Multiply and add count as two.

    Raises:
        ValueError: another `what`, or a time that is not 0 to 60 seconds.
    """
    if what not in PEAKS or not 0 < seconds <= 60:
        raise ValueError(f"peak of {what!r} for {seconds} s, expected {', '.join(PEAKS)}; 0-60 s")
    return library().terdit_peak(what.encode(), seconds, _checked_threads(threads))


def arena_bytes() -> int:
    """Return the bytes of scratch memory that the library holds."""
    return library().terdit_arena_bytes()


def release() -> None:
    """Return the library's scratch memory to the system."""
    library().terdit_release()
