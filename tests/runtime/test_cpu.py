"""The native library's door: finding it, its settings, its checks, and torch's view of it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import terdit_cli
from terdit_cli.errors import EnvironmentProblem, UsageError
from terdit_cli.model.ternary import GRANULARITIES, alpha_shape
from terdit_cli.pack.trits import t2_encode, t5_encode
from terdit_cli.runtime import cpu, fused, reference
from terdit_cli.runtime.backends import choose_backend
from terdit_cli.runtime.packed import PackedTernaryLinear
from terdit_cli.runtime.reference import PRECISIONS

CPU = torch.device("cpu")
NATIVE = Path(cpu.__file__).parent / "native"


def problem(m: int = 5, n: int = 70, k: int = 133, granularity: str = "row") -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(m + n + k)
    trits = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
    alphas = torch.randn(alpha_shape(n, k, granularity), generator=generator)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    return x, t2_encode(trits), alphas, bias, (n, k)


# Finding and opening the library.


def compiled(folder: Path, code: str, *flags: str) -> Path:
    """Compile C to a program or library; skip where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no cc")
    source, output = folder / "made.c", folder / "made"
    source.write_text(code)
    subprocess.run([compiler, *flags, source, "-o", output], check=True, capture_output=True)
    return output


@pytest.mark.parametrize(("version", "abi"), [("0.0.9", 1), ("current", 7)])
def test_a_library_of_another_version_is_refused(reopened, tmp_path, version, abi):
    version = terdit_cli.__version__ if version == "current" else version
    code = f'int terdit_abi(void) {{ return {abi}; }}\nconst char *terdit_version(void) {{ return "'
    path = compiled(tmp_path, code + f'{version}"; }}\n', "-shared", "-fPIC")
    reopened.setenv("TERDIT_LIBRARY", str(path))
    reason = cpu.available(CPU)
    assert (
        f"is of terdit {version}, interface {abi}, not of terdit {terdit_cli.__version__}"
        in str(reason)
    )
    assert "reinstall: pip install --force-reinstall --no-deps terdit" in str(reason)
    with pytest.raises(EnvironmentProblem, match="backend 'cpu' cannot run") as error:
        choose_backend("cpu", CPU)
    assert str(reason) in str(error.value)
    with pytest.raises(EnvironmentProblem, match="cannot run"):
        cpu.matmul(*problem(), "int8")
    choice = choose_backend("auto", CPU)
    assert choice.backend is reference
    assert str(reason) in choice.reason


def test_what_is_no_library(reopened, tmp_path):
    path = tmp_path / "libterdit.so"
    path.write_bytes(b"not an ELF file")
    reopened.setenv("TERDIT_LIBRARY", str(path))
    assert "cannot be loaded" in str(cpu.available(CPU))
    cpu._open.cache_clear()
    foreign = compiled(tmp_path, "int unrelated(void) { return 0; }\n", "-shared", "-fPIC")
    reopened.setenv("TERDIT_LIBRARY", str(foreign))
    assert "cannot be loaded" in str(cpu.available(CPU))
    assert "terdit_abi" in str(cpu.available(CPU))


def test_a_named_library_must_be_there(reopened):
    reopened.setenv("TERDIT_LIBRARY", "nowhere/libterdit.so")
    with pytest.raises(UsageError, match=r"got nowhere/libterdit\.so.*Fix: unset TERDIT_LIBRARY"):
        cpu.available(CPU)


def test_without_a_library(reopened, tmp_path):
    reopened.setattr("importlib.resources.files", lambda package: tmp_path)
    assert "was not built (no C++ compiler when terdit was installed)" in str(cpu.available(CPU))
    choice = choose_backend("auto", CPU)
    assert choice.backend is reference
    assert "not cpu: the native library was not built" in choice.reason


def test_the_structures_are_those_of_the_header(tmp_path):
    """Sizes and the last members' offsets as C sees them."""
    code = """
#include <stdio.h>
#include <stddef.h>
#include "ternary.h"
int main(void) {
    printf("%zu %zu %zu %zu %zu %zu %d %d", sizeof(terdit_matrix), sizeof(terdit_block),
           sizeof(terdit_model), offsetof(terdit_matrix, granularity),
           offsetof(terdit_block, attention_norm), offsetof(terdit_model, attention), TERDIT_ABI,
           TERDIT_MAX_THREADS);
    return 0;
}
"""
    program = compiled(tmp_path, code, f"-I{NATIVE}")
    found = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert list(map(int, found.split())) == [
        ctypes.sizeof(cpu.Matrix),
        ctypes.sizeof(fused._Block),
        ctypes.sizeof(fused._Model),
        cpu.Matrix.granularity.offset,
        fused._Block.norms.offset,
        fused._Model.attention.offset,
        cpu.ABI,
        cpu.MAX_THREADS,
    ]


# Instruction sets and threads.


def test_terdit_isa_chooses(reopened, native):
    for name in cpu.isas_usable():
        cpu._open.cache_clear()
        reopened.setenv("TERDIT_ISA", name)
        assert cpu.available(CPU) is None
        assert cpu.isa() == name


def test_an_unknown_isa_is_a_usage_error(reopened, native):
    reopened.setenv("TERDIT_ISA", "avx521")
    with pytest.raises(UsageError, match=r"unknown instruction set: got 'avx521'") as error:
        choose_backend("auto", CPU)
    assert error.value.exit_code == 2
    assert "generic" in str(error.value)
    assert "Fix: unset TERDIT_ISA" in str(error.value)


def test_an_isa_that_the_cpu_lacks_is_an_environment_problem():
    class OldCpu:
        def terdit_set_isa(self, name: bytes) -> int:
            return 2

        def terdit_isas_usable(self) -> bytes:
            return b"avx2 generic"

    message = r"lacks the instruction set: got avx512, expected one of auto, avx2, generic"
    with pytest.raises(EnvironmentProblem, match=message) as error:
        cpu._set_isa(OldCpu(), "avx512")
    assert error.value.exit_code == 4
    assert "Fix: unset TERDIT_ISA" in str(error.value)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leave this process's threads as they were."""
    before = torch.get_num_threads()
    yield
    cpu.set_threads(None)
    torch.set_num_threads(before)


def test_who_decides_on_threads(threads, monkeypatch):
    assert cpu.thread_count() == torch.get_num_threads()
    monkeypatch.setenv("TERDIT_THREADS", "3")
    assert cpu.thread_count() == 3
    cpu.set_threads(2)
    assert cpu.thread_count() == torch.get_num_threads() == 2
    cpu.set_threads(None)
    assert cpu.thread_count() == 3


@pytest.mark.parametrize("text", ["0", "-1", "257", "two", "1.5", "9" * 5000])
def test_wrong_threads_in_the_environment(monkeypatch, text):
    monkeypatch.setenv("TERDIT_THREADS", text)
    with pytest.raises(UsageError, match=r"wrong number of threads: got .* expected 1 to 256") as e:
        cpu.thread_count()
    assert text in str(e.value)
    assert "(--threads or TERDIT_THREADS)" in str(e.value)
    assert "Fix: --threads 1, or unset TERDIT_THREADS" in str(e.value)


@pytest.mark.parametrize("count", [0, -1, 257])
def test_wrong_threads(threads, count):
    with pytest.raises(UsageError, match=rf"got {count}, expected 1 to 256 \(--threads or T"):
        cpu.set_threads(count)
    assert cpu.thread_count() == torch.get_num_threads()


# What guards C code.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 132)}, r"x has shape \[5, 132\], expected \[\.\.\., 133\]"),
        ({"x": torch.tensor(1.0)}, r"x has shape \[\]"),
        ({"x": torch.zeros(5, 133, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(5, 133, dtype=torch.int8)}, "x is torch.int8"),
        ({"packed": torch.zeros(1, 34, 64, dtype=torch.uint8)}, r"packed is .*\[1, 34, 64\]"),
        ({"packed": torch.zeros(2, 34, 64, dtype=torch.int8)}, "packed is torch.int8"),
        ({"packed": torch.zeros(2, 64, 34, dtype=torch.uint8).mT}, "packed is strided"),
        ({"alphas": torch.zeros(69)}, r"alphas of shape \[69\] for a matrix \[70, 133\]"),
        ({"alphas": torch.zeros(70, 3)}, r"alphas of shape \[70, 3\]"),
        ({"alphas": torch.zeros(2, 70).T}, "alphas"),
        ({"alphas": torch.zeros(70, dtype=torch.float64)}, "alphas is torch.float64"),
        ({"alphas": torch.zeros(())}, "alphas of shape"),
        ({"bias": torch.zeros(71)}, r"bias is torch.float32 \[71\]"),
        ({"bias": torch.zeros(140)[::2]}, "bias is strided"),
        ({"bias": torch.zeros(70, dtype=torch.bfloat16)}, "bias is torch.bfloat16"),
        ({"shape": (71, 133)}, "packed is|alphas of shape"),
        ({"shape": (0, 133)}, r"a matrix \[0, 133\]"),
        ({"shape": (70, 70_000), "x": torch.zeros(1, 70_000)}, "expected K from 1 to 65000"),
        ({"precision": "int4"}, "precision 'int4', expected one of fp32, bf16, int16, int8"),
    ],
)
def test_wrong_tensors_never_reach_the_library(native, change, message):
    names = ("x", "packed", "alphas", "bias", "shape", "precision")
    arguments = dict(zip(names, (*problem(), "int8"), strict=True))
    with pytest.raises(ValueError, match=message):
        cpu.matmul(**(arguments | change))


def test_misaligned_memory(native):
    x, packed, alphas, bias, shape = problem()
    expected = cpu.matmul(x, packed, alphas, bias, shape, "int8")

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        memory = bytearray(1) + bytearray(tensor.numpy().tobytes())
        return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)

    assert torch.equal(cpu.matmul(shifted(x), packed, alphas, bias, shape, "int8"), expected)
    assert torch.equal(cpu.matmul(x, shifted(packed), alphas, bias, shape, "int8"), expected)
    with pytest.raises(ValueError, match="alphas is"):
        cpu.matmul(x, packed, shifted(alphas), bias, shape, "int8")


@pytest.mark.parametrize("rows", [1, 4, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 64, 129])
def test_t5_to_t2(native, rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    trits = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(cpu.t5_to_t2(t5_encode(trits), rows, columns), t2_encode(trits))


def test_t5_blobs_that_are_wrong(native):
    blob = t5_encode(torch.zeros(30, 40, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"blob is torch\.uint8 \[255\]"):
        cpu.t5_to_t2(blob[:-1], 30, 40)
    with pytest.raises(ValueError, match=r"blob is torch\.int8"):
        cpu.t5_to_t2(blob.view(torch.int8), 30, 40)
    blob[100] = 243
    with pytest.raises(ValueError, match="above 242"):
        cpu.t5_to_t2(blob, 30, 40)


def test_memory_is_given_back(native):
    cpu.matmul(*problem(), "int8")
    assert cpu.arena_bytes() > 0
    cpu.release()
    assert cpu.arena_bytes() == 0
    x, packed, alphas, bias, shape = problem()
    expected = reference.matmul(x, packed, alphas, bias, shape, "int8")
    assert torch.equal(cpu.matmul(x, packed, alphas, bias, shape, "int8"), expected)


def test_peak(isa):
    for what in cpu.PEAKS:
        assert cpu.peak(what, 0.002, 1) > 1e6
    for what, seconds in (("int4", 0.1), ("int8", 0.0), ("int8", float("nan")), ("int8", 1e9)):
        with pytest.raises(ValueError, match="peak of"):
            cpu.peak(what, seconds, 1)
    with pytest.raises(UsageError, match="wrong number of threads: got 0"):
        cpu.peak("int8", 0.1, 0)


# torch's view.


@pytest.mark.parametrize("precision", PRECISIONS)
def test_opcheck(native, precision):
    for granularity in GRANULARITIES:
        x, packed, alphas, bias, shape = problem(granularity=granularity)
        for value, offset in ((x.view(5, 1, 133), bias), (x[:0], None), (x.bfloat16(), None)):
            arguments = (value, packed, alphas, offset, *shape, precision)
            torch.library.opcheck(torch.ops.terdit.linear.default, arguments)


def layer(backend: Any, precision: str) -> PackedTernaryLinear:
    _, packed, alphas, bias, (n, k) = problem()
    made = PackedTernaryLinear(k, n, backend=backend, granularity="row", precision=precision)
    made.load_state_dict({"weight": packed, "alphas": alphas, "bias": bias})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(native, precision, dynamic):
    torch._dynamo.reset()
    made = layer(cpu, precision)
    compiled_layer = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (5, 6, 7):
        x = problem(m)[0]
        assert torch.equal(compiled_layer(x), made(x))


def test_exports(native):
    made = layer(cpu, "int8")
    x = problem()[0]
    exported = torch.export.export(made, (x,))
    assert torch.equal(exported.module()(x), made(x))


def test_a_gradient_is_refused_not_wrong(native):
    x = problem()[0].requires_grad_()
    out = layer(cpu, "fp32")(x)
    with pytest.raises(NotImplementedError, match="load the model with backend='reference'"):
        out.sum().backward()
    layer(reference, "fp32")(x).sum().backward()
    assert x.grad is not None


# Processes and threads.


def in_a_fork(work: Callable[[], bytes]) -> bytes:
    """Return what `work` gives in a forked child, without exec."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return data


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("count", ["1", "3"])
def test_a_fork_after_use_computes_the_same(native, monkeypatch, count):
    monkeypatch.setenv("TERDIT_THREADS", count)
    arguments = (*problem(30, 300, 200), "int8")
    expected = cpu.matmul(*arguments)
    for _ in range(3):
        assert in_a_fork(lambda: cpu.matmul(*arguments).numpy().tobytes()) == (
            expected.numpy().tobytes()
        )
    assert torch.equal(cpu.matmul(*arguments), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit it")
def test_memory_that_the_library_does_not_find() -> None:
    """It returns a status; the process and the library go on."""
    code = """
import resource, torch
from pathlib import Path
from terdit_cli.pack.trits import t2_encode
from terdit_cli.runtime import cpu
packed = t2_encode(torch.ones(64, 1024, dtype=torch.int8))
x, alphas = torch.ones(1 << 16, 1024), torch.ones(1)
cpu.matmul(x[:64], packed, alphas, None, (64, 1024), "int16")
cpu.release()
room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (80 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    cpu.matmul(x, packed, alphas, None, (64, 1024), "int16")
except MemoryError as error:
    print(error)
print(float(cpu.matmul(x[:64], packed, alphas, None, (64, 1024), "int16")[0, 0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "the native library found no memory for its activations\n"
    assert done.stdout == f"{said}1024.0\n", done.stderr
    assert done.returncode == 0
