"""A second witness: the network as plain functions on a state dict, in float64.

Written from the published description (RMSNorm blocks with adaLN, rotary embedding, SwiGLU) and
sharing no code with the package: explicit loops over heads, a softmax, complex rotations.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from terdit_cli.model.dit import DiTConfig

Weights = dict[str, Tensor]


def effective_weight(w: Weights, name: str) -> Tensor:
    """alpha * trits for a ternary matrix (one scale a tensor), else the weight itself."""
    weight = w[f"{name}.weight"]
    if f"{name}.alphas" not in w:
        return weight
    # The threshold is on float32 masters: decide there, so that no code differs by rounding.
    master = weight.float()
    return w[f"{name}.alphas"] * (master / (master.abs().mean() + 1e-6)).round().clamp(-1, 1)


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ effective_weight(w, name).double().T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor) -> Tensor:
    """x [B, T, width of a head]: position times frequency, as a complex rotation."""
    tokens, width = x.shape[1:]
    frequency = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones(()).double(), torch.arange(tokens)[:, None] * frequency)
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turn
    return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)


def attention(w: Weights, config: DiTConfig, name: str, x: Tensor) -> Tensor:
    q, k, v = (affine(w, f"{name}.{part}", x) for part in ("wq", "wk", "wv"))
    if config.qk_norm:
        q = layer_norm(q, 1e-5) * w[f"{name}.q_norm.weight"] + w[f"{name}.q_norm.bias"]
        k = layer_norm(k, 1e-5) * w[f"{name}.k_norm.weight"] + w[f"{name}.k_norm.bias"]
    width = config.dim // config.n_heads
    shared = config.n_heads // (config.n_kv_heads or config.n_heads)
    heads = []
    for head in range(config.n_heads):
        mine = slice(head * width, (head + 1) * width)
        group = slice(head // shared * width, (head // shared + 1) * width)
        scores = rotate(q[..., mine]) @ rotate(k[..., group]).transpose(1, 2) / math.sqrt(width)
        heads.append(torch.softmax(scores, -1) @ v[..., group])
    return affine(w, f"{name}.wo", torch.cat(heads, -1))


def reference_dit(
    state: Weights, config: DiTConfig, x: Tensor, t: Tensor, y: Tensor
) -> Tensor:  # fmt: skip
    """f(x, t, y) in float64."""
    w = {key: value.double() for key, value in state.items()}
    batch, p, side = len(x), config.patch_size, config.input_size // config.patch_size
    tokens = [
        x.double()[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(batch, -1)
        for i in range(side)
        for j in range(side)
    ]
    hidden = affine(w, "x_embedder", torch.stack(tokens, 1))
    if config.pos_embed:
        hidden = hidden + get_2d_sincos_pos_embed(config.dim, side, base_size=side)
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1)
    c = affine(w, "t_embedder.mlp.2", silu(affine(w, "t_embedder.mlp.0", features)))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for index in range(config.n_layers):
        layer = f"layers.{index}"
        m = affine(w, f"{layer}.adaLN_modulation.1", silu(c))
        if config.adaln_norm:
            m = rms(m, w[f"{layer}.adaLN_modulation.2.weight"], config.norm_eps)
        shift1, scale1, gate1, shift2, scale2, gate2 = m[:, None].chunk(6, -1)
        a = rms(hidden, w[f"{layer}.attention_norm.weight"], config.norm_eps)
        hidden = hidden + gate1 * attention(
            w, config, f"{layer}.attention", a * (1 + scale1) + shift1
        )
        f = rms(hidden, w[f"{layer}.ffn_norm.weight"], config.norm_eps) * (1 + scale2) + shift2
        ff = f"{layer}.feed_forward"
        inner = silu(affine(w, f"{ff}.w1", f)) * affine(w, f"{ff}.w3", f)
        hidden = hidden + gate2 * affine(w, f"{ff}.w2", inner)
    shift, scale = affine(w, "final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, -1)
    out = affine(w, "final_layer.linear", layer_norm(hidden, 1e-6) * (1 + scale) + shift)
    channels = out.shape[-1] // p**2
    image = torch.empty(batch, channels, config.input_size, config.input_size).double()
    for token in range(side * side):
        i, j = divmod(token, side)
        patch = out[:, token].reshape(batch, p, p, channels).permute(0, 3, 1, 2)
        image[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = patch
    return image
