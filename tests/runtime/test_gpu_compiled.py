"""The kernels compiled ahead for chips that are not here: they compile, and no register spills."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from typing import Any

import pytest

from terdit_cli.lab.bench.compiled_kernels import SHARED, TARGETS


@pytest.fixture(scope="module", params=TARGETS)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The table of one chip, made in a process where kernels are compiled, not interpreted."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "terdit_cli.lab.bench.compiled_kernels", str(request.param)],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_no_register_spills(rows):
    assert len(rows) > 20
    assert [row for row in rows if row["spills"]] == []


@pytest.mark.slow
def test_shared_memory_fits_and_is_what_the_choice_of_tiles_assumes(rows):
    for row in rows:
        assert row["shared"] <= SHARED[row["sm"]], row
        if "estimate" in row:  # besides: barriers, and the output's change of layout
            assert row["shared"] <= row["estimate"] + 1024 or row["shared"] <= 99 << 10, row


def emulate(text: str, word: int, outputs: int) -> list[int]:
    """Run the few PTX instructions of the unpacking on one 32-bit register."""
    registers = {f"${outputs}": word}
    value = lambda name: registers[name] if name in registers else int(name, 0)  # noqa: E731
    for line in text.strip(" {}").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operation, target, *operands = words
        first, *rest = map(value, operands)
        if operation == "shl.b32":
            made = first << rest[0]
        elif operation == "and.b32":
            made = first & rest[0]
        elif operation == "mov.b32":
            made = first
        else:
            assert operation == "prmt.b32", operation
            both = first | rest[0] << 32
            picks = [rest[1] >> 4 * place & 7 for place in range(4)]
            made = sum((both >> 8 * pick & 255) << 8 * place for place, pick in enumerate(picks))
        registers[target] = made & 0xFFFFFFFF
    return [registers[f"${index}"] for index in range(outputs)]


def test_the_inline_assembly_unpacks_every_byte(rows):
    """What the interpreter cannot run: each field of each byte as +-64 (int8) or +-2 (floats)."""
    found = {(text, constraints) for row in rows for text, constraints in row["inline"]}
    formats = {1: ("b", 64), 2: ("e", 2), 4: ("f", 2)}  # by registers made of four bytes
    seen = set()
    for text, constraints in found:
        outputs = constraints.count("=r")
        code, size = formats[outputs]
        shift = re.search(r"shl.b32 t, \$\d, (\d)", text)
        field = (6 - int(shift[1])) // 2 if shift else 3
        seen.add((outputs, field))
        for byte in range(256):
            four = [byte, byte ^ 0xFF, byte ^ 0x55, byte ^ 0xAA]
            made = struct.pack(
                f"<{outputs}I", *emulate(text, int.from_bytes(four, "little"), outputs)
            )
            if code == "e":  # bfloat16: the upper half of a float32
                made = b"".join(b"\0\0" + made[2 * i : 2 * i + 2] for i in range(4))
                code_read = "f"
            else:
                code_read = code
            trits = [{0: 0, 1: 1, 2: 0, 3: -1}[each >> 2 * field & 3] for each in four]
            valid = [each >> 2 * field & 3 != 2 for each in four]  # 10 is no trit
            got = struct.unpack(f"<4{code_read}", made)
            for value, trit, is_trit in zip(got, trits, valid, strict=True):
                assert not is_trit or value == size * trit, (text, four)
    assert seen == {(outputs, field) for outputs in (1, 2, 4) for field in range(4)}


def test_products_run_on_tensor_cores(rows):
    for row in rows:
        if "tile" in row:
            assert row["tensor_cores"] == (["wgmma"] if row["sm"] == 90 else ["mma.sync"]), row
