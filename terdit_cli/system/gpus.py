"""GPUs by name: memory, operations and bytes per second, from their makers' data sheets.

Peaks are dense, without sparsity, with float32 (or int32) accumulation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from terdit_cli.errors import UsageError, did_you_mean

GIGA, TERA = 10**9, 10**12
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: bytes of memory, operations per second of each kind, bytes per second."""

    title: str
    memory: int
    bf16: float
    int8: float
    fp8: float | None  # None: it has no such arithmetic
    bandwidth: float


def _sheet(
    title: str, gigabytes: int, bf16: float, int8: float, fp8: float | None, bandwidth: float
) -> Gpu:
    """Return a GPU from tera-operations and terabytes per second."""
    return Gpu(
        title, gigabytes * GIGA, bf16 * TERA, int8 * TERA, fp8 and fp8 * TERA, bandwidth * TERA
    )


GPUS: dict[str, Gpu] = {
    "b200": _sheet("B200", 180, 2250, 4500, 4500, 7.7),
    "h200": _sheet("H200 SXM", 141, 989, 1979, 1979, 4.8),
    "h100": _sheet("H100 SXM", 80, 989, 1979, 1979, 3.35),
    "h100-pcie": _sheet("H100 PCIe", 80, 756, 1513, 1513, 2.0),
    "a100": _sheet("A100 SXM 80 GB", 80, 312, 624, None, 2.04),
    "a100-40": _sheet("A100 SXM 40 GB", 40, 312, 624, None, 1.555),
    "l40s": _sheet("L40S", 48, 362, 733, 733, 0.864),
    "l4": _sheet("L4", 24, 121, 242, 242, 0.3),
    "mi300x": _sheet("MI300X", 192, 1307, 2615, 2615, 5.3),
    "5090": _sheet("GeForce RTX 5090", 32, 209.5, 838, 419, 1.792),
    "4090": _sheet("GeForce RTX 4090", 24, 165.2, 660.6, 330.3, 1.008),
    "3090": _sheet("GeForce RTX 3090", 24, 71, 284, None, 0.936),
}

# Names of the devices in CUDA, for the MFU of a run; the first match counts.
_DEVICE_NAMES = {
    r"\bH100 PCIe": "h100-pcie",
    r"\bH100\b(?! NVL)": "h100",
    r"\bG?H200\b(?! NVL)": "h200",
    r"\bB200\b": "b200",
    r"A100.*40GB": "a100-40",
    r"A100": "a100",
    r"L40S": "l40s",
    r"\bL4\b": "l4",
    r"MI300X": "mi300x",
    r"RTX 5090(?! (D|Laptop))": "5090",
    r"RTX 4090(?! (D|Laptop))": "4090",
    r"RTX 3090(?! Ti)": "3090",
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU with a name such as "h100" or "RTX 4090".

    Raises:
        UsageError: it is not known.
    """
    word = _word(name)
    if word not in GPUS:
        raise UsageError(
            "unknown --gpu",
            got=repr(name) + did_you_mean(word, GPUS),
            expected="one of " + ", ".join(GPUS),
            fix="--gpu h100",
        )
    return GPUS[word]


def find_memory(text: str) -> tuple[int, float | None]:
    """Return bytes of memory and bfloat16 operations per second of a GPU, by name or by size.

    For a size such as "80GB" the speed is unknown: None.

    Raises:
        UsageError: neither.
    """
    word = _word(text)
    if word in GPUS:
        return GPUS[word].memory, GPUS[word].bf16
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MIB|GIB)", word.upper())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            "wrong --gpu-memory",
            got=repr(text) + did_you_mean(word, GPUS),
            expected="a size such as 80GB or one of " + ", ".join(GPUS),
        )
    return int(float(match[1]) * UNITS[match[2]]), None


def device_peak(device_name: str) -> float | None:
    """Return the bfloat16 operations per second of a CUDA device by its name; None if unknown."""
    for pattern, name in _DEVICE_NAMES.items():
        if re.search(pattern, device_name):
            return GPUS[name].bf16
    return None


def _word(text: str) -> str:
    return re.sub(r"^rtx[ -]?", "", text.strip().lower())
