"""Each master weight is ternarized once per optimizer step, also where it is sharded.

    with ternarized_once(network): forward, backward, again ...      (master weights do not change)

Entering ternarizes all master weights; inside, no forward pass, micro-batch or recomputed block
does. Leaving clears the cached trits, so that none can be stale.

Where FSDP shards the master weights (along rows, N), gamma is that of the whole matrix: the ranks
agree on its largest magnitude and add up their `fixed_point_sums`, which is exact, so the trits
are those of a single process bit for bit. Each rank ternarizes its own rows, and FSDP gathers
those trits, one byte per weight, instead of the master weights (four, or two rounded): FSDP's
extension points `fsdp_pre_all_gather` and `fsdp_post_all_gather`. The gathered parameter holds
trits; its gradient is the straight-through one and goes to the master weights.

Shapes: L layers; a layer's master weights [N, K], a rank's rows [n, K], padded by FSDP to ceil(N /
ranks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from terdit_cli.model.ternary import (
    TernarizedWeight,
    TernaryLinear,
    absmean_alphas,
    absmean_scale,
    alpha_shape,
    fixed_point_sums,
    gammas_of_sums,
    largest_magnitudes,
    ternarize,
    ternarize_all,
)

GROUP = 8  # ternary matrices of a block: compiled once for all blocks


@functools.cache
def _compiled() -> Callable[[Sequence[Tensor], torch.dtype], list[Tensor]]:
    return torch.compile(ternarize_all, dynamic=False)


@contextmanager
def ternarized_once(network: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Cache the trits of the master weights for the forward passes inside; all ranks enter."""
    layers = [module for module in network.modules() if isinstance(module, TernaryLinear)]
    shards = [_Shard(layer) for layer in layers if isinstance(layer.weight, DTensor)]
    wholes = [layer for layer in layers if not isinstance(layer.weight, DTensor)]
    with torch.no_grad():
        sharded = sharded_gammas([shard.weight for shard in shards])
        for shard, gamma in zip(shards, sharded, strict=True):
            shard.ternarize(gamma)
        for first in range(0, len(wholes), GROUP):
            group = wholes[first : first + GROUP]
            weights = [layer.weight.detach() for layer in group]
            # Only on CPUs: code compiled for GPUs divides less exactly, which could flip trits.
            if compiled and weights[0].is_cpu:
                known = _compiled()(weights, torch.int8)
            else:
                known = ternarize_all(weights, weights[0].dtype)
            for layer, trits in zip(group, known, strict=True):
                layer.ternarized = layer.ternarized_weight(trits)
    try:
        yield
    finally:
        for layer in layers:
            layer.ternarized = None
        for shard in shards:
            shard.padded_trits = None


class _Shard:
    """A rank's rows of one layer's master weights, which FSDP gathers as trits."""

    def __init__(self, layer: TernaryLinear) -> None:
        assert isinstance(layer.weight, DTensor)
        self.layer = layer
        self.weight: DTensor = layer.weight
        self.ranks = self.weight.device_mesh.size(_shard_axis(self.weight))
        # FSDP looks for its extension points on this very object.
        self.rows: Tensor = self.weight._local_tensor  # [n, K]
        self.padded_trits: Tensor | None = None  # int8 [ceil(N / ranks), K]

    def ternarize(self, gamma: Tensor) -> None:
        """Cache for forward passes on gathered trits; gamma is that of the whole matrix."""
        trits = ternarize(self.rows, gamma).to(torch.int8)
        missing = -(-self.layer.out_features // self.ranks) - len(trits)
        self.padded_trits = F.pad(trits, (0, 0, 0, missing))
        self.rows.fsdp_pre_all_gather = self._before_gathering  # type: ignore[attr-defined]
        self.rows.fsdp_post_all_gather = _after_gathering  # type: ignore[attr-defined]
        self.layer.ternarized = TernarizedWeight(None, self._alphas(gamma))

    def _alphas(self, gamma: Tensor) -> Tensor | None:
        """Return the absmean scales of the whole matrix, gathered; None if they are learned."""
        granularity = self.layer.granularity
        if self.layer.alphas is not None:
            return None
        if granularity == "tensor":
            return absmean_scale(gamma.reshape(1))
        shape = alpha_shape(self.layer.out_features, self.layer.in_features, granularity)
        local = absmean_alphas(self.rows, granularity)
        return DTensor.from_local(
            local,
            self.weight.device_mesh,
            self.weight.placements,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        ).full_tensor()

    def _before_gathering(
        self,
        mesh: DeviceMesh,
        size: torch.Size,
        stride: tuple[int, ...],
        module: nn.Module,
        policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return to FSDP what it should gather."""
        if self.padded_trits is None:
            raise RuntimeError("forward pass of sharded ternary weights outside of ternarized_once")
        return (self.padded_trits,), None


def _after_gathering(
    gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Make the gathered int8 trits [ranks * ceil(N / ranks), K] the parameter's values."""
    (trits,) = gathered
    if out is None:
        values = trits.to(dtype)
        return values, (values,)
    # Autograd may hold `out` for the backward pass: it was freed meanwhile and is refilled now.
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
        out.copy_(trits[: len(out)])
    return None


def sharded_gammas(weights: Sequence[DTensor]) -> Iterable[Tensor]:
    """Return gamma, float32 0-d, of each whole matrix; with two small all-reduces for all."""
    if not weights:
        return ()
    group, rows = _shard_group(weights[0]), [weight._local_tensor for weight in weights]
    largest = largest_magnitudes(rows)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    totals = fixed_point_sums(rows, largest)
    dist.all_reduce(totals, dist.ReduceOp.SUM, group)
    return gammas_of_sums(largest, totals, [weight.numel() for weight in weights]).unbind()


def _shard_axis(weight: DTensor) -> int:
    return next(i for i, place in enumerate(weight.placements) if place.is_shard())


def _shard_group(weight: DTensor) -> dist.ProcessGroup:
    return weight.device_mesh.get_group(_shard_axis(weight))
