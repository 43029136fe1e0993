"""Clipping of the straight-through estimator: master weights far from any threshold get none.

A master weight W rounds to 0 below gamma / 2 and to its sign above. The estimator gives
a weight of many gammas the same gradient as one at the threshold, though its trit will not change
soon. Without that gradient, weight decay brings it back to where its trit can change. Hubara et al.
clip the sign function's estimator in this way (arXiv 1602.02830, eq. 4), at |W| = 1; here the
limit is a multiple of gamma, which scales with the weights. The optimizer may still move such a
weight: by momentum, or by Muon, which orthogonalises whole matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from terdit_cli.model.ternary import TernaryLinear, gammas
from terdit_cli.train.ternary_cache import sharded_gammas


@torch.no_grad()
def clip_straight_through(network: nn.Module, limit: float) -> None:
    """Zero the gradients of ternary master weights [N, K] where |W| > limit * gamma, in place.

    Gamma is the mean |W| of a whole matrix, also if FSDP shards it: then all ranks must call,
    and each handles its own rows. Gradients that are not finite stay so.

    Args:
        network: master weights without a gradient are skipped.
        limit: in gammas, above 0.
    """
    masters = [layer.weight for layer in network.modules() if isinstance(layer, TernaryLinear)]
    shards = [weight for weight in masters if isinstance(weight, DTensor)]
    wholes = [weight for weight in masters if not isinstance(weight, DTensor)]
    if wholes:
        for weight, gamma in zip(wholes, gammas(wholes).unbind(), strict=True):
            _clip(weight, weight.grad, limit * gamma)
    for shard, gamma in zip(shards, sharded_gammas(shards), strict=True):
        assert isinstance(shard.grad, DTensor)
        _clip(shard._local_tensor, shard.grad._local_tensor, limit * gamma)


def _clip(weight: Tensor, gradient: Tensor | None, largest: Tensor) -> None:
    if gradient is not None:
        gradient.mul_(weight.abs() <= largest)
