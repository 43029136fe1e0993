"""The class-conditional diffusion transformer of TerDiT, all in one file.

    network: f(x, t, y) -> [eps | variance]

A DiT (Peebles & Xie, arXiv 2212.09748) with LLaMA's blocks (RMSNorm, rotary embedding, SwiGLU:
Large-DiT of Alpha-VLLM/LLaMA2-Accessory) and, in TerDiT, an RMSNorm after each block's adaLN
projection. The same class is the full-precision baseline, the QAT model and the packed model: only
the factory `linear` for the eight large matrices of a block differs.

Shapes: B batch, C latent channels, H = W = input_size, p patch, T = (H/p)^2 tokens, D dim,
A = min(D, 1024) width of the conditioning, K = n_kv_heads * head_dim, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.model.ternary import TernaryLinear

LinearFactory = Callable[..., nn.Module]

# name: (dim, n_layers, n_heads). The published ones are upstream's; "4.2b" is its `3B`.
SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (64, 4, 4),
    "tiny": (128, 6, 4),
    "small": (256, 8, 4),
    "base": (512, 12, 8),
    "600m": (1536, 16, 32),
    "4.2b": (3072, 32, 32),
    "7b": (4096, 32, 32),
}

TIMESTEP_WIDTH = 256  # sinusoidal features of t
MAX_CONDITIONING_WIDTH = 1024
PLAIN_ATTENTION_TOKENS = 128  # the most for the plain path of `attend` (bfloat16, CPU)


@dataclass(frozen=True)
class DiTConfig:
    """Upstream's constructor arguments, `adaln_norm` for the paper's ablation, and `pos_embed`.

    Upstream encodes positions by rotary attention alone, which sees only their differences.
    `pos_embed` adds DiT's fixed embedding of a patch's position to the tokens, so that a small
    model need not infer it from the borders.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True
    qk_norm: bool = False
    adaln_norm: bool = True
    pos_embed: bool = False

    def __post_init__(self) -> None:
        """Reject shapes that no network can have.

        Raises:
            UsageError: naming the field, its value and the expected one.
        """
        for name in ("input_size", "patch_size", "in_channels", "dim", "n_layers", "n_heads",
                     "multiple_of", "num_classes"):  # fmt: skip
            if getattr(self, name) < 1:
                raise self._error(name, "a positive number")
        if self.input_size % self.patch_size:
            raise self._error("input_size", f"a multiple of patch_size {self.patch_size}")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            least = 2 * self.n_heads
            raise self._error("dim", f"a multiple of {least}, 2 x n_heads {self.n_heads}")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise self._error("n_kv_heads", f"a divisor of n_heads {self.n_heads}")
        if self.pos_embed and self.dim % 4:
            raise self._error("dim", "a multiple of 4, with pos_embed")
        if not 0 <= self.class_dropout_prob < 1:
            raise self._error("class_dropout_prob", "a probability in [0, 1)")
        if not 0 <= self.norm_eps < math.inf:
            raise self._error("norm_eps", "a small number that is not negative")
        multiplier = self.ffn_dim_multiplier
        if multiplier is not None and not (0 < multiplier <= 1000 and self.ffn_width > 0):
            raise self._error("ffn_dim_multiplier", "a number in (0, 1000] that leaves a width")

    def _error(self, name: str, expected: str) -> UsageError:
        value = getattr(self, name)
        return UsageError(
            f"the model cannot be built: {name}",
            got=value,
            expected=expected,
            fix=f"change model.{name}",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def conditioning_width(self) -> int:
        return min(self.dim, MAX_CONDITIONING_WIDTH)

    @property
    def ffn_width(self) -> int:
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", or None when labels are never dropped."""
        return self.num_classes if self.class_dropout_prob > 0 else None


def size_config(size: str) -> dict[str, int]:
    """Return `dim`, `n_layers`, `n_heads` of a named size.

    Raises:
        UsageError: an unknown name.
    """
    if size not in SIZES:
        raise UsageError(
            "unknown model size",
            got=repr(size) + did_you_mean(size, SIZES),
            expected="one of " + ", ".join(SIZES),
            fix="set model.size",
        )
    return dict(zip(("dim", "n_layers", "n_heads"), SIZES[size], strict=True))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x [B, T, D] * (1 + scale [B, D]) + shift [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t: Tensor, width: int = TIMESTEP_WIDTH) -> Tensor:
    """Embed timesteps t [B] -> float32 [B, width]: cosines, then sines (GLIDE)."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents / half)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 [T, head_dim / 2] each, of the 1-D token position.

    Always on the CPU with real values, whatever the default device: the table is computed, not
    loaded, so a model built on the meta device needs it too. Source: RoFormer, theta 10000.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    angles = torch.outer(torch.arange(tokens, device="cpu").float(), 1.0 / 10000.0**exponents)
    return angles.cos(), angles.sin()


def sincos_table(dim: int, side: int) -> Tensor:
    """Return DiT's positional embedding of side * side patches, float32 [side^2, dim].

    Half of the features are of the column and half of the row: sines, then cosines, of frequencies
    from 1 down to 1 / 10000. On the CPU always, as `rope_table`. Source: MAE (arXiv 2111.06377)
    and DiT's `get_2d_sincos_pos_embed`.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device="cpu").double() / (dim // 4))
    angles = torch.outer(torch.arange(side, device="cpu").double(), frequencies)  # [side, dim / 4]
    features = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim / 2]
    return torch.cat([features.repeat(side, 1), features.repeat_interleave(side, 0)], 1).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of x [B, T, heads, head_dim], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, grouped: bool = False) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v of q [B, heads, T, d] and k, v [B, kv heads, T, d].

    torch's fused attention, except for few tokens in bfloat16 on a CPU, where its forward and
    backward pass take 7 to 19 times as long as two products and a softmax in float32
    (docs/lab.md). More tokens gain less, and their probabilities take memory that grows with the
    square of their number.
    """
    if not (q.is_cpu and q.dtype == torch.bfloat16 and q.shape[2] <= PLAIN_ATTENTION_TOKENS):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if grouped:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # [B, heads, T, T]
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


class TimestepEmbedder(nn.Module):
    """t [B] -> [B, A]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_WIDTH, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """y [B] -> [B, A]; where labels can be dropped, the last row is the null class."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the weight's dtype.

    That is float32 under bfloat16 autocast, which leaves this operation to its inputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Self-attention with rotary embedding, optional q/k LayerNorm and grouped k/v heads."""

    def __init__(self, config: DiTConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        dim, kv_width = config.dim, config.kv_heads * config.head_dim
        self.grouped = config.kv_heads != config.n_heads
        self.wq = linear(dim, dim, bias=False)
        self.wk = linear(dim, kv_width, bias=False)
        self.wv = linear(dim, kv_width, bias=False)
        self.wo = linear(dim, dim, bias=False)
        # Over all heads at once, before the head split.
        self.q_norm = nn.LayerNorm(dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(kv_width) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.wq(x), self.wk(x), self.wv(x)  # [B, T, D], [B, T, K], [B, T, K]
        q = apply_rope(self._heads(self.q_norm(q)), cos, sin).type_as(v)
        k = apply_rope(self._heads(self.k_norm(k)), cos, sin).type_as(v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, self._heads(v)))
        out = attend(q, k, v, self.grouped)  # [B, heads, T, head_dim]
        return self.wo(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, T, heads, head_dim]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: DiTConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.w1 = linear(config.dim, config.ffn_width, bias=False)
        self.w2 = linear(config.ffn_width, config.dim, bias=False)
        self.w3 = linear(config.dim, config.ffn_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the conditioning (adaLN)."""

    def __init__(self, config: DiTConfig, linear: LinearFactory) -> None:
        super().__init__()
        self.attention = Attention(config, linear)
        self.feed_forward = FeedForward(config, linear)
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        modulation: list[nn.Module] = [
            nn.SiLU(),
            linear(config.conditioning_width, 6 * config.dim, bias=True),
        ]
        if config.adaln_norm:
            modulation.append(RMSNorm(6 * config.dim, eps=config.norm_eps))
        self.adaLN_modulation = nn.Sequential(*modulation)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(x), shift1, scale1), cos, sin)
        x = x + gate1.unsqueeze(1) * attended
        fed = self.feed_forward(modulate(self.ffn_norm(x), shift2, scale2))
        return x + gate2.unsqueeze(1) * fed


class FinalLayer(nn.Module):
    """[B, T, D] -> [B, T, p * p * out_channels]; always full precision."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(config.conditioning_width, 2 * config.dim)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The network f(x, t, y): eps in the first C channels, the variance in the rest.

    Args:
        config: shapes and options.
        linear: factory `linear(in_features, out_features, bias=...)` of the eight large
            matrices of each block: TernaryLinear (default), nn.Linear or a packed layer.
    """

    def __init__(self, config: DiTConfig, linear: LinearFactory = TernaryLinear) -> None:
        super().__init__()
        self.config = config
        # In training, recompute every k-th block in the backward pass; 0: none, True: all.
        self.activation_checkpointing: int = 0
        width = config.conditioning_width
        self.x_embedder = nn.Linear(config.patch_size**2 * config.in_channels, config.dim)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width, config.class_dropout_prob)
        self.layers = nn.ModuleList([Block(config, linear) for _ in range(config.n_layers)])
        self.final_layer = FinalLayer(config)
        cos, sin = rope_table(config.head_dim, config.tokens)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        side = config.input_size // config.patch_size
        table = sincos_table(config.dim, side) if config.pos_embed else None
        self.register_buffer("pos_embed", table, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as upstream does: xavier, normal(0.02) embeddings, zero adaLN and output."""
        nn.init.xavier_uniform_(self.x_embedder.weight)
        nn.init.zeros_(self.x_embedder.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | TernaryLinear):
                continue
            if name.startswith("final_layer.") or name.endswith("adaLN_modulation.1"):
                nn.init.zeros_(module.weight)
            elif name.startswith("layers."):
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, TernaryLinear):
                module.reset_alphas()

    def patchify(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, C * p * p], (channel, row, col) inside a patch."""
        p = self.config.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h, p, w, p]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, T, p * p * C] -> [B, C, H, W], (row, col, channel) inside a patch."""
        p = self.config.patch_size
        side = self.config.input_size // p
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B, h, w, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def embed(self, x: Tensor) -> Tensor:
        """Return the tokens of x [B, C, H, W], [B, T, D] in the dtype of the parameters."""
        # The residual stream is float32 under bfloat16 autocast.
        tokens = self.x_embedder(self.patchify(x)).to(self.final_layer.linear.weight.dtype)
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance.

        Args:
            x: noisy latents, float [B, C, H, W].
            t: original timesteps 0..999, int or float [B].
            y: class ids, int64 [B]; `config.null_class` for "no class".

        Returns:
            float [B, 2C, H, W] with learned sigma, else [B, C, H, W].

        Raises:
            ValueError: x is not of the configured shape.
        """
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, *{expected})")
        hidden = self.embed(x)
        c = self.t_embedder(t) + self.y_embedder(y)  # [B, A]
        hidden = self.run_blocks(hidden, c)
        return self.unpatchify(self.final_layer(hidden, c))

    def run_blocks(self, hidden: Tensor, c: Tensor) -> Tensor:
        """Run hidden [B, T, D] through all blocks, conditioned by c [B, A] -> [B, T, D].

        The caller gives `hidden` away: an override may overwrite it.
        """
        every = self.activation_checkpointing if self.training else 0
        for index, block in enumerate(self.layers):
            if every and index % every == 0:
                # Nothing in a block is random: no generator state need be kept.
                hidden = checkpoint(
                    block, hidden, c, self.rope_cos, self.rope_sin,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                hidden = block(hidden, c, self.rope_cos, self.rope_sin)
        return hidden


def build_config(size: str, **overrides: object) -> DiTConfig:
    """Return the `DiTConfig` of a named size with fields replaced.

    Raises:
        UsageError: an unknown size or field, or values that do not fit together.
    """
    fields = {field.name for field in dataclasses.fields(DiTConfig)}
    for name in overrides:
        if name not in fields:
            raise UsageError(
                "unknown model field",
                got=repr(name) + did_you_mean(name, fields),
                expected="one of " + ", ".join(sorted(fields)),
            )
    values: dict[str, object] = {**size_config(size), **overrides}
    return DiTConfig(**values)  # type: ignore[arg-type]
