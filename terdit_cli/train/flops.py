"""Operations of training, counted on paper, and what a GPU can do of them in a second.

    forward = 2 * T * (matrices of the blocks, of the patch embedding and of the last layer)
            + 4 * T^2 * D * n_layers                     (q k^T and the weighted sum of v)
            + 2 * (matrices that act on the conditioning, once an image)
    training = 3 * forward                               (the backward pass has two products)
    MFU      = training operations a second / peak

One multiplication with its addition counts as two operations. Recomputed activations do not
count: MFU is about useful work (PaLM, arXiv 2204.02311, appendix B). Nor does the quantiser,
whose cost is O(weights) a step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.model.dit import TIMESTEP_WIDTH, DiTConfig

BACKWARD_AND_FORWARD = 3
GIGA, TERA = 10**9, 10**12
UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes of memory and, where known, dense bfloat16 operations a second."""

    memory: int
    peak: float | None = None


# Makers' data sheets: dense, without sparsity, with float32 accumulation.
GPUS: dict[str, Gpu] = {
    "b200": Gpu(180 * GIGA, 2250 * TERA),
    "h200": Gpu(141 * GIGA, 989 * TERA),
    "h100": Gpu(80 * GIGA, 989 * TERA),
    "h100-pcie": Gpu(80 * GIGA, 756 * TERA),
    "a100": Gpu(80 * GIGA, 312 * TERA),
    "a100-40": Gpu(40 * GIGA, 312 * TERA),
    "l40s": Gpu(48 * GIGA, 362 * TERA),
    "mi300x": Gpu(192 * GIGA, 1307 * TERA),
    "5090": Gpu(32 * GIGA, 209.5 * TERA),
    "4090": Gpu(24 * GIGA, 165.2 * TERA),
    "3090": Gpu(24 * GIGA, 71 * TERA),
}

# What CUDA calls the devices, for the MFU of a run; first match counts.
_DEVICE_NAMES = {
    r"\bH100 PCIe": "h100-pcie",
    r"\bH100\b(?! NVL)": "h100",
    r"\bG?H200\b(?! NVL)": "h200",
    r"\bB200\b": "b200",
    r"A100.*40GB": "a100-40",
    r"A100": "a100",
    r"L40S": "l40s",
    r"MI300X": "mi300x",
    r"RTX 5090(?! (D|Laptop))": "5090",
    r"RTX 4090(?! (D|Laptop))": "4090",
    r"RTX 3090(?! Ti)": "3090",
}


def find_gpu(text: str) -> Gpu:
    """Return the GPU of a name such as "h100", or one of a memory size such as "80GB".

    Raises:
        UsageError: neither.
    """
    word = text.strip().lower()
    if word in GPUS:
        return GPUS[word]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MIB|GIB)", word.upper())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            "not the memory of a GPU",
            got=repr(text) + did_you_mean(word, GPUS),
            expected="a size such as 80GB or one of " + ", ".join(GPUS),
        )
    return Gpu(int(float(match[1]) * UNITS[match[2]]))


def device_peak(device_name: str) -> float | None:
    """Return the bfloat16 operations a second of a CUDA device by its name; None if unknown."""
    for pattern, name in _DEVICE_NAMES.items():
        if re.search(pattern, device_name):
            return GPUS[name].peak
    return None


def training_flops(config: DiTConfig) -> int:
    """Return the operations of training on one image (forward and backward)."""
    dim, width, tokens = config.dim, config.conditioning_width, config.tokens
    of_tokens, of_images = (config.n_layers * weights for weights in config.block_weights)
    patch = config.patch_size**2
    a_token = of_tokens + dim * patch * (config.in_channels + config.out_channels)
    an_image = of_images + width * (2 * dim + TIMESTEP_WIDTH + width)
    attention = 2 * tokens**2 * dim * config.n_layers
    return BACKWARD_AND_FORWARD * 2 * (tokens * a_token + an_image + attention)
