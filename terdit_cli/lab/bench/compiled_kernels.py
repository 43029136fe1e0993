"""The kernels compiled ahead for chips that are not here: registers, shared memory, spills.

    python -m terdit_cli.lab.bench.compiled_kernels 90 [all]     one JSON object a kernel

Needs Triton, without its interpreter, and no GPU; `all` compiles every tile of every list.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu import tiles as gpu_config

TARGETS = (80, 90)
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have
EPILOGUES = ("plain", "gated", "swiglu")
PRECISIONS = ("int8", "int16", "bf16", "fp32", "fp8")

# Arguments of linear_kernel that are pointers, with their types where the kind does not decide.
POINTERS = {
    "packed": "*u8", "alphas": "*fp32", "bias": "*fp32", "steps": "*fp32", "gates": "*fp32"
}  # fmt: skip
ITEMS = {"int8": "*i8", "fp8": "*fp8e4nv", "bf16": "*bf16", "fp32": "*fp32"}


def linear_cases(target: int, every: bool) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield name, constants and tile of the products as the step launches them."""
    devices = {
        80: gpu_config.Device("A100", SHARED[80], 108, False),
        90: gpu_config.Device("H100", SHARED[90], 132, True),
    }
    # Of the lists that the quick table leaves out the first tiles are like those it has.
    quick = [
        *((each, False, epilogue) for each in ("int8", "bf16") for epilogue in EPILOGUES),
        ("int16", False, "bias"), ("int16", True, "bias"), ("fp32", False, "plain"),
        ("fp8", False, "gated"), ("int8", True, "swiglu"), ("bf16", True, "gated"),
    ]  # fmt: skip
    cases = itertools.product(PRECISIONS, (False, True), (*EPILOGUES, "bias")) if every else quick
    for precision, grouped, epilogue in cases:
        if (precision == "fp8" and target < 89) or (precision, epilogue) == ("fp32", "swiglu"):
            continue
        kind, planes = gpu.KINDS[precision], 2 if precision == "int16" else 1
        shape = (16, 147456) if epilogue == "bias" else (4096, 4608)
        kept: Any = "plain" if epilogue == "bias" else epilogue
        problem = gpu_config.Problem(kind, grouped, kept, *shape)
        tiles = gpu_config.candidates(problem, devices[target])
        for tile in tiles if every else tiles[:1]:
            yield (
                f"{precision}{'-group' if grouped else ''}-{epilogue}",
                {
                    "KIND": kind, "PLANES": planes, "GROUPED": grouped,
                    "SWIGLU": epilogue == "swiglu",
                    "HAS_STEPS": precision in ("int8", "int16", "fp8"),
                    "HAS_BIAS": epilogue == "bias", "GATED": epilogue == "gated",
                    "EVEN": True, "BN": tile.BN, "BM": tile.BM, "BK": tile.BK,
                },
                (tile, tile.shared_bytes(problem)),
            )  # fmt: skip


def compile_kernel(
    function: Any, types: dict[str, str], constants: dict[str, Any], target: int, **options: Any
) -> dict[str, Any]:
    """Compile one kernel for sm_<target>, all pointers and strides aligned to 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    free = {"M", "tokens"}  # any number
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name not in free and signature[name] != "fp32"
    }
    source = ASTSource(function, signature, values, aligned)
    options = {"enable_fp_fusion": False, **options}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    ptx = made.asm["ptx"]
    inline = re.findall(
        r'elementwise_inline_asm "([^"]+)" \{constraints = "([^"]+)", packed_element = 4',
        made.asm["ttgir"],
    )
    return {
        "registers": registers,
        "shared": made.metadata.shared,
        "spills": stack + local,
        "inline": inline,
        "tensor_cores": [name for name in ("wgmma", "mma.sync") if f"{name}." in ptx],
    }


def table(target: int, every: bool = False) -> Iterator[dict[str, Any]]:
    """Compile every kernel that the step of a published model launches."""
    from terdit_cli.runtime.gpu import triton_kernels as gpu_kernels

    for name, constants, (tile, estimate) in linear_cases(target, every):
        types = {**POINTERS, "x": ITEMS[constants["KIND"]]}
        types["out"] = "*fp32" if constants["GATED"] or "bias" in name else "*bf16"
        types |= dict.fromkeys(
            ("M", "N", "K", "groups", "tokens", "stride_x", "row_bytes", "stride_alpha",
             "stride_gates", "stride_out"), "i32",
        )  # fmt: skip
        used = {"bias": "HAS_BIAS", "steps": "HAS_STEPS", "gates": "GATED"}
        absent = {each: None for each, flag in used.items() if not constants[flag]}
        got = compile_kernel(
            gpu_kernels.linear_kernel, types, {**constants, **absent, "stride_alpha": 1}, target,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile_text = f"{tile.BN}x{tile.BM}x{tile.BK} w{tile.warps} s{tile.stages}"
        yield {"kernel": name, "sm": target, "tile": tile_text, "estimate": estimate, **got}
    integers = ("D", "tokens", "stride_x", "stride_weight", "stride_modulation", "stride_out")
    for norm, kind, block in (
        ("rms", "int8", 2048), ("rms", "float", 4096), ("none", "int8", 4096),
        ("none", "int8", 8192), ("none", "int16", 1024), ("rms", "float", 16384),
        ("rms", "float", 32768), ("layer", "float", 4096), ("rms", "fp8", 4096),
    ):  # fmt: skip
        if kind == "fp8" and target < 89:
            continue
        types = dict.fromkeys((*integers, "period"), "i32") | {"eps": "fp32"}
        types |= dict.fromkeys(("x", "weight", "shift", "scale", "steps"), "*fp32")
        types["x"] = "*bf16" if norm == "none" else "*fp32"
        types["out"] = {"float": "*bf16", "fp8": "*fp8e4nv"}.get(kind, "*i8")
        constants = {
            "NORM": norm, "MODULATE": norm != "none" and block <= 4096, "KIND": kind,
            "LIMIT": 127.0, "FLOOR": 1e-5, "BLOCK": block, "period": 1,
        }  # fmt: skip
        got = compile_kernel(
            gpu_kernels.rows_kernel, types, constants, target,
            num_warps=4 if block <= 4096 else 8, num_stages=1,
        )  # fmt: skip
        yield {"kernel": f"rows-{norm}-{kind}-{block}", "sm": target, **got}
    for normed in (False, True):
        types = {"heads": "*bf16"} | dict.fromkeys(("cosines", "sines"), "*fp32")
        types |= dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), "*fp32")
        types |= dict.fromkeys(("tokens", "stride", "q_width", "k_width", "half"), "i32")
        constants = {"HAS_NORM": normed, "BLOCK": 4096}
        got = compile_kernel(
            gpu_kernels.rotary_kernel, {**types, "eps": "fp32"}, constants, target, num_warps=4
        )
        yield {"kernel": f"rotary-{normed}-4096", "sm": target, **got}


if __name__ == "__main__":
    for line in table(int(sys.argv[1]), every="all" in sys.argv):
        print(json.dumps(line), flush=True)
