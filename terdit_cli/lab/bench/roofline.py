"""What the matrix products of a forward cost at least on a chip, counted, not measured.

    time >= max(operations / peak, bytes / bandwidth)

of each product y [M, N] = x [M, K] @ W [N, K].T, with W at 2 bits or in bfloat16. Attention,
norms and gates are left out: they are the same for both. Peaks and bandwidths are those of the
makers' data sheets, dense, without sparsity.

Shapes: I images with guidance are R = 2 I rows of the batch; T tokens, D dim, A width of the
conditioning, K k/v width, F feed-forward width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from terdit_cli.errors import UsageError
from terdit_cli.model.dit import DiTConfig
from terdit_cli.model.layout import ADALN, GATE_MATRIX, block_layout
from terdit_cli.system.gpus import Gpu

TRIT_BITS = 2
ITEM_BYTES = {"int8": 1, "fp8": 1, "bf16": 2}  # of an activation


@dataclass(frozen=True)
class Product:
    """One launch: y [M, N] = x [M, K] @ W.T, `count` times in a forward."""

    name: str
    m: int
    n: int
    k: int
    count: int
    outputs: int  # values written per row: SwiGLU writes half of its columns

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def bytes(self, activations: str, weight_bits: int) -> float:
        """Return the bytes read and written once: codes, activations, results in bfloat16."""
        moved = self.m * self.k * ITEM_BYTES[activations] + 2 * self.m * self.outputs
        return self.n * self.k * weight_bits / 8 + moved


def products(config: DiTConfig, images: int) -> list[Product]:
    """Return the products of a forward of so many images with guidance."""
    rows, layers = 2 * images, config.n_layers
    layout = block_layout(config)
    found = []
    for group in layout.groups:
        name = " ".join(matrix.name.rpartition(".")[2] for matrix in group)
        width = sum(matrix.rows for matrix in group)
        # SwiGLU is part of the launch of its two matrices.
        written = width // 2 if group[0].name == GATE_MATRIX else width
        found.append(Product(name, rows * config.tokens, width, group[0].columns, layers, written))
    adaln = next(matrix for matrix in layout.matrices if matrix.name == ADALN)
    width = layers * adaln.rows
    return [*found, Product("adaLN, all blocks", rows, width, adaln.columns, 1, width)]


@dataclass(frozen=True)
class Bound:
    """The least time of a product on a chip."""

    seconds: float
    limit: str  # "operations" or "bytes"

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.0f} {self.limit}".rstrip()


def bound(product: Product, chip: Gpu, activations: str, weight_bits: int = TRIT_BITS) -> Bound:
    """Return the least time of one launch.

    Raises:
        UsageError: the chip does not have this arithmetic.
    """
    peak = getattr(chip, activations)
    if peak is None:
        raise UsageError(f"{chip.title} has no {activations}", fix="choose int8 or bf16")
    by_operations = product.operations / peak
    by_bytes = product.bytes(activations, weight_bits) / chip.bandwidth
    if by_operations >= by_bytes:
        return Bound(by_operations, "operations")
    return Bound(by_bytes, "bytes")


@dataclass(frozen=True)
class RooflineRow:
    """A product, or the whole forward, with W2A8 beside a bfloat16 matrix on one chip."""

    chip: str
    model: str
    size: int  # of the image, pixels
    images: int
    product: str
    shape: str
    operations: float  # of all launches of a forward
    packed_bytes: float
    bf16_bytes: float
    ternary: Bound  # W2A8, all launches
    bf16: Bound

    @property
    def at_most(self) -> float:
        """Return how many times faster than bfloat16 it can be at most."""
        return self.bf16.seconds / self.ternary.seconds


def analyse(config: DiTConfig, chip: Gpu, images: int, model: str, size: int) -> list[RooflineRow]:
    """Return the products of a forward and, last, their sum."""
    rows = []
    for product in products(config, images):
        ours, theirs = bound(product, chip, "int8"), bound(product, chip, "bf16", 16)
        count = product.count
        rows.append(
            RooflineRow(
                chip=chip.title, model=model, size=size, images=images, product=product.name,
                shape=f"{count} x [{product.m}, {product.k}] -> {product.n}",
                operations=count * product.operations,
                packed_bytes=count * product.bytes("int8", TRIT_BITS),
                bf16_bytes=count * product.bytes("bf16", 16),
                ternary=Bound(count * ours.seconds, ours.limit),
                bf16=Bound(count * theirs.seconds, theirs.limit),
            )
        )  # fmt: skip
    sums = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("operations", "packed_bytes", "bf16_bytes")
    }
    ternary, bf16 = (
        Bound(sum(getattr(row, who).seconds for row in rows), "") for who in ("ternary", "bf16")
    )
    total = replace(rows[0], product="all", shape="", ternary=ternary, bf16=bf16, **sums)
    return [*rows, total]
