"""Trits that flipped since the last measurement, and the shares of -1, 0 and +1.

The function of a ternary model changes mostly where trits change. Between measurements the trits
are kept, four per byte: a quarter of a byte for each ternary weight that this process holds. Each
process counts the rows it holds, and one small all-reduce adds them up; replicas count the same,
which does not change the shares.

    code = trit + 1 in {0, 1, 2};  byte = c0 | c1 << 2 | c2 << 4 | c3 << 6
    a trit flipped  <=>  its two bits of (old ^ new) are not both 0
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from terdit_cli.model.ternary import TernaryLinear, gammas, ternarize
from terdit_cli.train.ternary_cache import sharded_gammas

KINDS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "adaLN")
TRITS_PER_BYTE = 4


def record_bytes(weights: int) -> int:
    """Return the bytes that the packed trits of `weights` weights take."""
    return -(-weights // TRITS_PER_BYTE)


def kind_of(name: str) -> str:
    """Return the layer type of a module's name: its last word, or adaLN."""
    return "adaLN" if "adaLN" in name else name.rsplit(".", 1)[-1]


class FlipMeter:
    """Keeps the trits of a network from the last measurement."""

    def __init__(self, network: nn.Module) -> None:
        """Measure for the first time; all processes must call."""
        self._layers = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, TernaryLinear)
        }
        self._records: dict[str, Tensor] = {}
        self.measure()

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Compare with the last measurement; all processes must call.

        Returns:
            {"flipped" | "minus" | "zero" | "plus": {layer type or "all": share of its trits}},
            empty for a network without ternary weights.
        """
        if not self._layers:
            return {}
        counts = torch.zeros(len(KINDS), 4, dtype=torch.float64)  # flipped, -1, 0, +1
        for name, rows, gamma in self._rows():
            trits = ternarize(rows, gamma).to(torch.int8)
            minus, zero, plus = ((trits == value).sum() for value in (-1, 0, 1))
            record = pack_trits(trits)
            before = self._records.get(name, record)
            self._records[name] = record
            row = torch.stack([count_flips(before, record), minus, zero, plus])
            counts[KINDS.index(kind_of(name))] += row.double().cpu()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return shares(counts)

    def _rows(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each layer's name, the rows this process holds, and gamma of the whole."""
        weights: list[Tensor] = [layer.weight for layer in self._layers.values()]
        sharded = [weight for weight in weights if isinstance(weight, DTensor)]
        if sharded:  # all of them: FSDP shards whole networks
            rows = [weight.to_local() for weight in sharded]
            known = sharded_gammas(sharded)
        else:
            rows, known = weights, gammas(weights).unbind()
        yield from zip(self._layers, rows, known, strict=True)


def shares(counts: Tensor) -> dict[str, dict[str, float]]:
    """Turn counts [kinds, (flipped, -1, 0, +1)] into shares of each kind's trits and of all."""
    rows = dict(zip(("all", *KINDS), torch.cat([counts.sum(0, keepdim=True), counts]), strict=True))
    return {
        what: {kind: float(row[i] / row[1:].sum()) for kind, row in rows.items() if row.any()}
        for i, what in enumerate(("flipped", "minus", "zero", "plus"))
    }


def pack_trits(trits: Tensor) -> Tensor:
    """Pack int8 trits of any shape into uint8, four per byte; the last byte is filled with 0."""
    flat = (trits.reshape(-1) + 1).view(torch.uint8)
    missing = -len(flat) % TRITS_PER_BYTE
    if missing:
        flat = F.pad(flat, (0, missing))
    c0, c1, c2, c3 = flat.view(TRITS_PER_BYTE, -1)
    return c0 | c1 << 2 | c2 << 4 | c3 << 6


def count_flips(before: Tensor, now: Tensor) -> Tensor:
    """Return how many trits of two packed tensors differ, int64 [] (on their device)."""
    differing = before ^ now
    differing = (differing | differing >> 1) & 0b01010101  # one bit per trit
    pairs = (differing & 0b00010001) + (differing >> 2 & 0b00010001)
    return ((pairs & 0b1111) + (pairs >> 4)).sum(dtype=torch.int64)
