"""Trits as bytes: the codecs t2, t5 and int8 in plain PyTorch, the reference packing.

A trit in {-1, 0, 1} is stored as code = trit + 1 in {0, 1, 2}.

t2, 4 trits per byte, the layout that kernels read (so loading is mmap). N is padded to a multiple
of 64 and K to a multiple of 4 with code 1 (weight 0). A panel is 64 output rows; for each 4
consecutive k it holds one 64-byte vector: byte (n % 16) * 4 + k % 4, bits 2j and 2j+1 of which
hold row group j = (n % 64) // 16. Shape uint8 [ceil(N/64), ceil(K/4), 64].

t5, 5 trits per byte (1.6 bits), for disk: the matrix row by row, byte = sum of code_i * 3^i for
i = 0..4, at most 242; the last byte is filled with code 1, and the blob with bytes 121 (all code
1) to a multiple of 64. Shape uint8 [ceil(ceil(N*K/5) / 64) * 64].

int8, one trit per byte, the matrix as it is: the exchange format. Shape int8 [N, K].

released, 4 trits per byte, what the published TerDiT checkpoints hold: rows interleaved by quarter,
row r of byte matrix [N/4, K] = code[r] << 6 | code[r+N/4] << 4 | code[r+2N/4] << 2 | code[r+3N/4].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_ROWS = 64
VECTOR_K = 4
ALIGNMENT = 64  # bytes; every blob of t2 and t5 is a multiple of it
ZERO_CODE = 1
T5_FILLER = 121  # five codes of 1: 1 + 3 + 9 + 27 + 81
T5_LARGEST = 242  # five codes of 2


def t2_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the shape of the t2 blob of a matrix [rows, columns]."""
    return (-(-rows // PANEL_ROWS), -(-columns // VECTOR_K), PANEL_ROWS)


def t2_encode(trits: Tensor) -> Tensor:
    """Pack trits int8 [N, K] -> uint8 [ceil(N/64), ceil(K/4), 64]."""
    rows, columns = trits.shape
    panels, vectors, _ = t2_shape(rows, columns)
    codes = F.pad(
        (trits + 1).to(torch.uint8),
        (0, vectors * VECTOR_K - columns, 0, panels * PANEL_ROWS - rows),
        value=ZERO_CODE,
    )
    # [panel, group j, n % 16, vector, k % 4] -> [panel, vector, n % 16, k % 4] per group
    codes = codes.view(panels, 4, 16, vectors, VECTOR_K).permute(1, 0, 3, 2, 4)
    packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    return packed.reshape(panels, vectors, PANEL_ROWS)


def t2_decode(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Unpack uint8 [ceil(N/64), ceil(K/4), 64] -> trits int8 [N, K]."""
    panels, vectors, _ = t2_shape(rows, columns)
    grid = packed.view(panels, vectors, 16, VECTOR_K)
    groups = [(grid >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
    # 4 x [panel, vector, n % 16, k % 4] -> [panel, group, n % 16, vector, k % 4]
    trits = torch.stack(groups, dim=1).permute(0, 1, 3, 2, 4)
    return trits.reshape(panels * PANEL_ROWS, vectors * VECTOR_K)[:rows, :columns].contiguous()


def t5_length(rows: int, columns: int) -> int:
    """Return the bytes of the t5 blob of a matrix [rows, columns]."""
    used = -(-rows * columns // 5)
    return -(-used // ALIGNMENT) * ALIGNMENT


def t5_encode(trits: Tensor) -> Tensor:
    """Pack trits int8 [N, K] -> uint8 [t5_length(N, K)]."""
    codes = (trits + 1).to(torch.uint8).flatten()
    codes = F.pad(codes, (0, -codes.numel() % 5), value=ZERO_CODE).view(-1, 5)
    packed = codes[:, 4]
    for digit in (3, 2, 1, 0):
        packed = packed * 3 + codes[:, digit]
    return F.pad(packed, (0, t5_length(*trits.shape) - packed.numel()), value=T5_FILLER)


@functools.cache
def _t5_table() -> Tensor:
    """Return int8 [256, 5]: the trits of every byte (bytes above 242 are refused elsewhere)."""
    digits = [[byte // 3**i % 3 - 1 for i in range(5)] for byte in range(256)]
    return torch.tensor(digits, dtype=torch.int8)


def t5_decode(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Unpack uint8 [t5_length(N, K)] -> trits int8 [N, K]."""
    used = packed[: -(-rows * columns // 5)]
    trits = _t5_table().to(packed.device)[used.int()]
    return trits.flatten()[: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Codec:
    """How the trits of a matrix [N, K] are stored in a file; every codec has one byte per element.

    `shape(N, K)` is that of the blob, `encode` maps trits int8 [N, K] to it and
    `decode(blob, N, K)` back. `is_invalid(bytes)` marks the elements that encode no trit.
    """

    dtype: torch.dtype
    shape: Callable[[int, int], tuple[int, ...]]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, int, int], Tensor]
    is_invalid: Callable[[Tensor], Tensor]

    def has_invalid_codes(self, packed: Tensor) -> bool:
        """Return whether a blob holds a value that is not a trit."""
        pieces = packed.flatten().split(1 << 18)  # bytes: temporaries stay in the cache
        return any(bool(self.is_invalid(piece).any()) for piece in pieces)


CODECS: dict[str, Codec] = {
    "t2": Codec(
        torch.uint8, t2_shape, t2_encode, t2_decode,
        lambda codes: codes & codes >> 1 & 0b01010101,  # code 3 in one of four places
    ),
    "t5": Codec(
        torch.uint8, lambda rows, columns: (t5_length(rows, columns),), t5_encode, t5_decode,
        lambda codes: codes > T5_LARGEST,
    ),
    "int8": Codec(
        torch.int8, lambda rows, columns: (rows, columns), lambda trits: trits,
        lambda blob, rows, columns: blob,
        lambda trits: (trits > 1) | (trits < -1),
    ),
}  # fmt: skip


def released_encode(trits: Tensor) -> Tensor:
    """Pack trits int8 [N, K] -> uint8 [N/4, K] as the released TerDiT checkpoints do.

    Raises:
        ValueError: N is not a multiple of 4.
    """
    if trits.shape[0] % 4:
        raise ValueError(f"{trits.shape[0]} rows cannot be packed by quarters: not a multiple of 4")
    first, second, third, fourth = (trits + 1).to(torch.uint8).chunk(4)
    return first << 6 | second << 4 | third << 2 | fourth


def released_decode(packed: Tensor) -> Tensor:
    """Unpack uint8 [N/4, K] of a released checkpoint -> trits int8 [N, K] (code 3 gives 2)."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (6, 4, 2, 0)])
