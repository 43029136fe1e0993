"""Ternary weights with learned scales, and how to train through them.

    gamma = mean |W|                                  (one number per tensor)
    trits = clip(round(W / (gamma + 1e-6)), -1, 1)    (round half to even)
    y     = x @ (alpha * trits).T + bias

gamma only decides the rounding threshold; alpha is the scale. Gradients are straight-through
(STE): the trits pass theirs to the master weight W unchanged, so d/dW = alpha * dL/dWeff and
d/dalpha = sum(dL/dWeff * trits). Source: TerDiT (arXiv 2405.14854, section 3.2) for the learned
alpha; BitNet b1.58 (arXiv 2402.17764) for the absmean scale and the int8 activations.
With `ste="identity"` d/dW = sign(alpha) * dL/dWeff, as for BitNet's scales, which are positive.
Adam, whose step size does not depend on the gradient's scale, is hardly affected; Muon, which works
on whole matrices, is: a row's alpha no longer weights the row.

gamma's sum is one of integers, so it is exact: any order of summation, number of threads, device
or sharding gives the same bits, and with them the same trits (`fixed_point_sums`).

Shapes: B batch, T tokens, K in features, N out features, G = ceil(K / 128) groups.
Scales (`alphas`, float32) have a granularity: [1] per tensor, [N] per output row, [N, G] per
group of 128 inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_SIZE = 128
GAMMA_EPS = 1e-6
FIXED_POINT_BITS = 30  # of gamma's terms
CACHED_PIECE = 1 << 17  # weights summed at once on a CPU
ACTIVATION_FLOOR = 1e-5  # smallest per-token absmax, as in BitNet b1.58: no division by zero

Scale = Literal["learned", "absmean"]
AlphaInit = Literal["randn", "absmean"]
Granularity = Literal["tensor", "row", "group128"]
Activations = Literal["none", "int8"]
Ste = Literal["scaled", "identity"]
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", "group128")


@dataclass(frozen=True)
class TernaryConfig:
    """How the large matrices are quantised (the recipe's `ternary` section)."""

    enabled: bool = True
    scale: Scale = "learned"
    alpha_init: AlphaInit = "randn"
    granularity: Granularity = "tensor"
    activations: Activations = "none"
    ste: Ste = "scaled"

    def linear(self) -> Callable[..., nn.Module]:
        """Return the factory `linear(in_features, out_features, bias=...)` for `DiT`."""
        if not self.enabled:
            return nn.Linear
        return functools.partial(
            TernaryLinear,
            scale=self.scale,
            alpha_init=self.alpha_init,
            granularity=self.granularity,
            activations=self.activations,
            ste=self.ste,
        )


def largest_magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """Return max |W| of each of L tensors, float32 [L]; 0 of an empty one, NaN where there is one.

    L tensors at once, here and below: few operations on scalars, which cost as much as small
    matrices do.
    """
    empty = torch.zeros(2, device=weights[0].device)
    ranges = [torch.stack(torch.aminmax(w)) if w.numel() else empty for w in weights]
    return torch.stack(ranges).float().abs().amax(dim=1)


def fixed_point_sums(weights: Sequence[Tensor], largest: Tensor) -> Tensor:
    """Return sum(rint(|W| * 2^(30 - e))) of each tensor, int64 [L]; 2^e > largest [L] >= max |W|.

    Exact: each term is an integer of at most 2^30, and 2^33 of them fit. Shares of a tensor that
    are summed with the `largest` of the whole add up to the sum of the whole. A weight within a
    factor 64 of the largest keeps all of its float32 bits.
    """
    scales = torch.ldexp(torch.ones_like(largest), FIXED_POINT_BITS - _exponents(largest))
    sums = []
    for weight, scale in zip(weights, scales.unbind(), strict=True):
        flat = weight.reshape(-1)
        # In pieces that stay in the cache; compiled code and other devices make one pass anyway,
        # and so do tensors without values (a FakeTensor of the planner's).
        apart = flat.is_cpu and type(flat) is Tensor and not torch.compiler.is_compiling()
        pieces = flat.split(CACHED_PIECE) if apart else (flat,)
        terms = [
            torch.mul(piece.float(), scale).round_().to(torch.int32).abs_().sum()
            for piece in pieces
        ]
        sums.append(terms[0] if len(terms) == 1 else torch.stack(terms).sum())
    return torch.stack(sums)


def gammas_of_sums(largest: Tensor, totals: Tensor, counts: Sequence[int]) -> Tensor:
    """Return gamma, float32 [L], of L tensors with these sums and numbers of weights.

    A `largest` that is not finite comes back as it is.
    """
    numbers = torch.tensor(counts, dtype=torch.float64, device=totals.device)
    exponents = _exponents(largest) - FIXED_POINT_BITS
    means = torch.ldexp(totals.double() / numbers, exponents)
    return torch.where(largest.isfinite(), means.float(), largest)


def _exponents(largest: Tensor) -> Tensor:
    """Return e with 2^e > largest; at least -60, for master weights of 2^-90 count as zeros."""
    return torch.frexp(largest).exponent.clamp(-60, 128)


def gammas(weights: Sequence[Tensor]) -> Tensor:
    """Return gamma of each of L whole tensors: float32 [L]."""
    largest = largest_magnitudes(weights)
    sums = fixed_point_sums(weights, largest)
    return gammas_of_sums(largest, sums, [weight.numel() for weight in weights])


def absmean(weight: Tensor) -> Tensor:
    """Return gamma, the mean absolute value of `weight`, as a 0-d tensor of its dtype."""
    return gammas([weight.detach()])[0].to(weight.dtype)


def ternarize(weight: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Round `weight` [N, K] to trits in {-1, 0, 1}, same shape and dtype (TerDiT, eq. 2).

    All arithmetic is in the tensor's own dtype, as upstream's; master weights are float32. A part
    of a larger matrix needs the `gamma` of the whole.
    """
    gamma = absmean(weight) if gamma is None else gamma
    return (weight / (gamma + GAMMA_EPS)).round_().clamp_(-1, 1)


def ternarize_all(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the trits of L whole tensors; `torch.compile` makes three passes over each of it."""
    pairs = zip(weights, gammas(weights).unbind(), strict=True)
    return [ternarize(weight, gamma).to(dtype) for weight, gamma in pairs]


def alpha_shape(out_features: int, in_features: int, granularity: Granularity) -> tuple[int, ...]:
    """Return the shape of `alphas` for a matrix [N, K] at a granularity."""
    if granularity == "tensor":
        return (1,)
    if granularity == "row":
        return (out_features,)
    return (out_features, -(-in_features // GROUP_SIZE))


def expand_alphas(alphas: Tensor, in_features: int) -> Tensor:
    """Return `alphas` ([1], [N] or [N, G]) shaped to multiply a matrix [N, K]."""
    if alphas.dim() == 2:
        # Not repeat_interleave: torch.compile on CPUs turns it into code that reads other memory.
        return alphas[:, torch.arange(in_features, device=alphas.device) // GROUP_SIZE]
    return alphas[:, None] if alphas.numel() > 1 else alphas


def reduce_to_alphas(values: Tensor, granularity: Granularity) -> Tensor:
    """Sum `values` [N, K] over each scale's own weights -> the shape of `alphas`."""
    if granularity == "tensor":
        return values.sum().reshape(1)
    if granularity == "row":
        return values.sum(dim=1)
    groups = -(-values.shape[1] // GROUP_SIZE)
    padded = F.pad(values, (0, groups * GROUP_SIZE - values.shape[1]))
    return padded.unflatten(1, (groups, GROUP_SIZE)).sum(dim=2)


def absmean_alphas(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return BitNet's scale: mean |W| over each scale's own weights, at least 1e-5."""
    if granularity == "tensor":
        return absmean_scale(absmean(weight).reshape(1))
    total = reduce_to_alphas(weight.abs(), granularity)
    count = reduce_to_alphas(torch.ones_like(weight), granularity)
    return absmean_scale(total / count)


def absmean_scale(mean: Tensor) -> Tensor:
    """Return the scale of weights with this mean |W|: never 0."""
    return mean.clamp_min(ACTIVATION_FLOOR)


def least_squares_alphas(weight: Tensor, trits: Tensor, granularity: Granularity) -> Tensor:
    """Return the alphas that minimise |W - alpha * trits|^2: sum(W * trits) / sum(trits^2).

    For ternarized master weights this is the mean of |W| over the weights whose trit is not 0.
    Scales whose trits are all 0 get 0.
    """
    norm = reduce_to_alphas(trits * trits, granularity)
    return reduce_to_alphas(weight * trits, granularity) / norm.clamp_min(1.0)


class _StraightThrough(torch.autograd.Function):
    """Forward the second argument, send its gradient to the first unchanged."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly; its gradient flows to `source` as through the identity."""
    return _StraightThrough.apply(source, value.detach())


def signs(alphas: Tensor) -> Tensor:
    """Return the sign of each alpha, which goes through 0 in a line where an alpha does."""
    return alphas / _sizes(alphas)


def _sizes(alphas: Tensor) -> Tensor:
    return alphas.abs().clamp_min(ACTIVATION_FLOOR)


class _EffectiveWeight(torch.autograd.Function):
    """alpha * trits [N, K] with the straight-through gradient, in as few passes as possible."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, trits: Tensor, alphas: Tensor, granularity: Granularity, ste: Ste
    ) -> Tensor:
        ctx.save_for_backward(trits, alphas)
        ctx.granularity, ctx.ste = granularity, ste
        return expand_alphas(alphas, trits.shape[1]) * trits

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        trits, alphas = ctx.saved_tensors
        gradient = gradients[0]
        if not ctx.needs_input_grad[2]:  # absmean: straight through the scale as well
            return gradient, None, None, None, None
        to_alphas = reduce_to_alphas(gradient * trits, ctx.granularity).to(alphas.dtype)
        factors = alphas if ctx.ste == "scaled" else signs(alphas)
        return gradient * expand_alphas(factors, trits.shape[1]), None, to_alphas, None, None


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each token of `x` [..., K] to integers in [-127, 127]: symmetric absmax int8.

    Returns (u, step): u float32 [..., K] holds the integers (STE gradient to x), step float32
    [..., 1] their size: x is about u * step. The rounding is fixed here for every runtime:
    u = rint(x * ((1 / absmax) * 127)), half to even; step = absmax / 127; every operation rounded
    to float32. The product is at most 127 * (1 + 2^-24)^3, so rint never leaves int8.
    """
    x = x.float()
    with torch.no_grad():
        limit = x.abs().amax(dim=-1, keepdim=True).clamp_min(ACTIVATION_FLOOR)
        inverse = limit.reciprocal() * 127.0
    scaled = x * inverse
    # By a tensor: CUDA would multiply by the rounded reciprocal of a number.
    return straight_through(scaled, scaled.round()), limit / torch.full_like(limit, 127.0)


def ternary_linear(
    x: Tensor, trits: Tensor, alphas: Tensor, bias: Tensor | None, activations: Activations
) -> Tensor:
    """Compute x [..., K] @ (alpha * trits [N, K]).T + bias [N] -> [..., N]: the definition.

    Training, the ternarized model and the reference backend all call this function, so they
    agree bit for bit. With int8 activations the sums are over integers of at most
    127 * K < 2^24 (K < 132,000): exact in float32 in any order, hence equal to an int32 sum;
    then y = (sum * step) * alpha + bias in that order, each operation rounded to float32. Group
    scales: the groups' sums times their alphas, added in ascending order, times step. Under
    bfloat16 autocast the inputs (integers up to 127, trits) are still exact and each sum is
    rounded to bfloat16 once.
    """
    if activations == "none":
        return F.linear(x, expand_alphas(alphas, trits.shape[1]) * trits, bias)
    u, step = quantise_activations(x)
    y = scaled_sums(u, step, trits, alphas)
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def scaled_sums(u: Tensor, step: Tensor, trits: Tensor, alphas: Tensor) -> Tensor:
    """Return u @ trits.T times scales, float32 [..., N], in the order that every kernel keeps.

    Args:
        u: whole numbers [..., K] in a dtype in which their sums are exact.
        step: float32 [..., 1].
        trits: [N, K] in the dtype of u.
        alphas: float32 [1], [N] or [N, G].
    """
    if alphas.dim() < 2:
        return F.linear(u, trits).float() * step * alphas
    y = torch.zeros((), dtype=torch.float32, device=u.device)
    groups = zip(u.split(GROUP_SIZE, -1), trits.split(GROUP_SIZE, 1), alphas.T, strict=True)
    for u_group, trits_group, alpha_group in groups:
        y = y + F.linear(u_group, trits_group).float() * alpha_group
    return y * step


class TernarizedWeight(NamedTuple):
    """What the forward pass needs of the master weights, kept while they do not change."""

    trits: Tensor | None  # [N, K]; None where `weight` itself holds trits (gathered from shards)
    alphas: Tensor | None  # the absmean scales; None where they are learned


class TernaryLinear(nn.Module):
    """A linear layer whose forward uses alpha * trits of its float32 master weight.

    State dict: `weight` [N, K] (master weights), `alphas` ([1], [N] or [N, G]; only when learned),
    `bias` [N]. `scale="absmean"` computes the scale from the master weights and passes
    them the gradient of the effective weight unchanged (BitNet b1.58).

    Each forward pass ternarizes the master weights, unless `ternarized` holds the result: whoever
    sets it clears it before the master weights change.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale: Scale = "learned",
        alpha_init: AlphaInit = "randn",
        granularity: Granularity = "tensor",
        activations: Activations = "none",
        ste: Ste = "scaled",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.alpha_init = alpha_init
        self.granularity = granularity
        self.activations = activations
        self.ste = ste
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if scale == "learned":
            self.alphas: nn.Parameter | None = nn.Parameter(
                torch.empty(alpha_shape(out_features, in_features, granularity))
            )
        else:
            self.register_parameter("alphas", None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.ternarized: TernarizedWeight | None = None
        nn.init.xavier_uniform_(self.weight)
        self.reset_alphas()

    @torch.no_grad()
    def reset_alphas(self) -> None:
        """Initialise the learned alphas; call again after initialising the master weights.

        randn: a standard normal, as upstream: random sign and size, unrelated to the weights.
        absmean: the least-squares scale of the present master weights. Zero weights (adaLN) have
        none and get 0.02, the standard deviation of DiT's other embeddings: an alpha of 0 would
        block the gradients of the master weights and its own for ever.
        """
        if self.alphas is None or self.weight.is_meta:  # nothing to fill, or nothing to fit to
            return
        if self.alpha_init == "randn":
            nn.init.normal_(self.alphas)
        else:
            fitted = least_squares_alphas(self.weight, ternarize(self.weight), self.granularity)
            self.alphas.copy_(torch.where(fitted > 0, fitted, 0.02))

    @torch.no_grad()
    def export(self) -> tuple[Tensor, Tensor]:
        """Return (trits int8 [N, K], alphas float32), which reproduce the forward exactly."""
        if self.alphas is not None:
            alphas = self.alphas.detach().clone()
        else:
            alphas = absmean_alphas(self.weight, self.granularity)
        return ternarize(self.weight).to(torch.int8), alphas

    @torch.no_grad()
    def ternarized_weight(self, trits: Tensor | None = None) -> TernarizedWeight:
        """Ternarize the present master weights, whose `trits` may be known already."""
        learned = self.alphas is not None
        alphas = None if learned else absmean_alphas(self.weight, self.granularity)
        return TernarizedWeight(ternarize(self.weight) if trits is None else trits, alphas)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N]."""
        weight = self.weight
        trits, alphas = self.ternarized or self.ternarized_weight()
        trits = weight.detach() if trits is None else trits
        scales = self.alphas if alphas is None else alphas
        assert scales is not None
        if self.activations == "none":
            effective = _EffectiveWeight.apply(weight, trits, scales, self.granularity, self.ste)
            return F.linear(x, effective, self.bias)  # what `ternary_linear` computes, bit for bit
        source: Tensor = weight
        if alphas is not None or self.ste == "identity":
            # Dividing the source by |alpha| makes d(alpha * trits)/dW the sign of alpha.
            source = weight / expand_alphas(_sizes(scales.detach()), self.in_features)
        ste = straight_through(source, trits.to(weight.dtype))
        return ternary_linear(x, ste, scales, self.bias, self.activations)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, granularity={self.granularity}, "
            f"activations={self.activations}"
        )
