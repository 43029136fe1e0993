"""What a block is made of: its large matrices, its norms, and the operations they cost.

`dit.py` builds the modules; all other code that needs them reads them here: packing and its checks,
the runtimes, the planner, the roofline. A new kind of block is an entry of `LAYOUTS`.

    forward  = 2 T (matrices that see each token, patch embedding, last layer)
             + 4 T^2 D L                                 (q k^T and the weighted sum of v)
             + 2 (matrices that act on the conditioning, once per image)
    training = 3 forward                                 (the backward pass has two products)
    MFU      = training operations per second / peak

One multiplication with its addition counts as two operations. Recomputed activations do not count:
MFU is about useful work (PaLM, arXiv 2204.02311, appendix B). The quantiser does not count either:
its cost is O(weights) per step.

Shapes: T tokens, D dim, A width of the conditioning, K k/v width, F feed-forward width, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from terdit_cli.model.dit import TIMESTEP_WIDTH, DiTConfig

BACKWARD_AND_FORWARD = 3

# Names that the readers of upstream's checkpoints and the initialisation use.
KEY_MATRIX, GATE_MATRIX, ADALN = "attention.wk", "feed_forward.w1", "adaLN_modulation.1"
Q_NORM, ADALN_NORM = "attention.q_norm.weight", "adaLN_modulation.2.weight"


class Matrix(NamedTuple):
    """A large, ternary matrix [rows, columns] of a block, by its module's name."""

    name: str
    rows: int
    columns: int
    source: str  # matrices of one source have the same input
    per_token: bool = True  # else once per image: it acts on the conditioning
    bias: bool = False


class Norm(NamedTuple):
    """A norm's weight or bias [width] of a block, by its key in the state dict."""

    name: str
    width: int


class BlockLayout(NamedTuple):
    """The matrices and norms of one block, in the order of the state dict and the native library.

    The norms are all that this kind of block can have; options of the model leave some out.
    """

    matrices: tuple[Matrix, ...]
    norms: tuple[Norm, ...]

    @property
    def groups(self) -> list[list[Matrix]]:
        """The matrices that see each token, those with the same input together."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            if matrix.per_token:
                found.setdefault(matrix.source, []).append(matrix)
        return list(found.values())


def _terdit(config: DiTConfig) -> BlockLayout:
    dim, kv, ffn = config.dim, config.kv_heads * config.head_dim, config.ffn_width
    return BlockLayout(
        (
            Matrix("attention.wq", dim, dim, "attention"),
            Matrix(KEY_MATRIX, kv, dim, "attention"),
            Matrix("attention.wv", kv, dim, "attention"),
            Matrix("attention.wo", dim, dim, "heads"),
            Matrix(GATE_MATRIX, ffn, dim, "feed-forward"),
            Matrix("feed_forward.w2", dim, ffn, "gated"),
            Matrix("feed_forward.w3", ffn, dim, "feed-forward"),
            Matrix(ADALN, 6 * dim, config.conditioning_width, "conditioning", False, True),
        ),
        (
            Norm("attention_norm.weight", dim),
            Norm("ffn_norm.weight", dim),
            Norm(ADALN_NORM, 6 * dim),
            Norm(Q_NORM, dim),
            Norm("attention.q_norm.bias", dim),
            Norm("attention.k_norm.weight", kv),
            Norm("attention.k_norm.bias", kv),
        ),
    )


LAYOUTS: dict[str, Callable[[DiTConfig], BlockLayout]] = {"terdit": _terdit}


@functools.cache
def block_layout(config: DiTConfig) -> BlockLayout:
    """Return what each block of a network is made of."""
    return LAYOUTS["terdit"](config)


def matrix_names(config: DiTConfig) -> list[str]:
    """Return the module paths of all ternary matrices ("layers.0.attention.wq", ...)."""
    names = [matrix.name for matrix in block_layout(config).matrices]
    return [f"layers.{index}.{name}" for index in range(config.n_layers) for name in names]


def block_weights(config: DiTConfig) -> tuple[int, int]:
    """Return the numbers of weights of a block's matrices applied per token, and per image."""
    sizes = [(m.per_token, m.rows * m.columns) for m in block_layout(config).matrices]
    return sum(n for each, n in sizes if each), sum(n for each, n in sizes if not each)


def forward_operations(config: DiTConfig, batch: int) -> float:
    """Return the operations of the ternary matrices in a forward pass of `batch` rows."""
    per_token, per_image = block_weights(config)
    return 2.0 * batch * config.n_layers * (config.tokens * per_token + per_image)


def forward_bytes(config: DiTConfig, batch: int) -> int:
    """Return about how many bytes of activations a forward of `batch` rows holds at once."""
    kv = config.kv_heads * config.head_dim
    widest = max(config.dim + 2 * kv, config.ffn_width)  # q, k and v, or the gated products
    return 4 * batch * config.tokens * (2 * config.dim + widest)


def forward_flops(config: DiTConfig) -> int:
    """Return the operations of a forward of one row."""
    dim, width, tokens = config.dim, config.conditioning_width, config.tokens
    of_tokens, of_images = (config.n_layers * weights for weights in block_weights(config))
    patch = config.patch_size**2
    per_token = of_tokens + dim * patch * (config.in_channels + config.out_channels)
    per_image = of_images + width * (2 * dim + TIMESTEP_WIDTH + width)
    attention = 2 * tokens**2 * dim * config.n_layers
    return 2 * (tokens * per_token + per_image + attention)


def training_flops(config: DiTConfig) -> int:
    """Return the operations of training on one image (forward and backward)."""
    return BACKWARD_AND_FORWARD * forward_flops(config)
