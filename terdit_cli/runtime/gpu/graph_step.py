"""The fused step on a GPU: ten launches per block, one CUDA graph per batch bucket.

    rows(norm, modulate, quantise) -> [wq wk wv] -> norm, rotary -> attention -> rows -> wo, gated
    rows(norm, modulate, quantise) -> [w1 w3] with SwiGLU                     -> rows -> w2, gated

The same modules and state dict as the composable network: at the first forward pass the codes of
matrices that share an input are concatenated, and the modules' own buffers become views of the
result. The residual stream is float32; between the products values are bfloat16 (float32 in
fp32). The modulations of all blocks are one launch over all their adaLN matrices.

Modulations recur: one schedule serves many batches. If t and y are CPU tensors, their values
are known without waiting for the GPU, and modulations are cached by (t, y); the least recently used
are dropped first. If they are on the GPU, modulations are computed in each step.

Shapes: B images, T tokens, D dim, A width of the conditioning, K k/v width, F feed-forward width,
L layers, M = B T rows.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from terdit_cli.model.dit import DiT, DiTConfig
from terdit_cli.model.layout import ADALN, ADALN_NORM, block_layout
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu.backend import make_rows, multiply
from terdit_cli.runtime.reference import Precision

CACHE_BYTES = 128 << 20  # of modulations, per network
SPARE_BYTES = 64 << 20  # for the libraries' workspaces and the sampler's own tensors
# Batches are filled up to one of these, so that few graphs serve all; larger ones run without.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


class Matrix(NamedTuple):
    """Matrices that share their input, one below the other."""

    packed: Tensor  # uint8 [N, 128 S]
    alphas: Tensor  # float32 [N] or [N, G]


class Layer(NamedTuple):
    """The tensors that a block's launches read."""

    qkv: Matrix
    wo: Matrix
    w13: Matrix
    w2: Matrix
    attention_norm: Tensor  # float32 [1, D]
    ffn_norm: Tensor
    q_norm: tuple[Tensor, Tensor] | None  # weight and bias
    k_norm: tuple[Tensor, Tensor] | None


def _joined(layers: list[Any]) -> Matrix:
    """Concatenate the codes of packed layers and let the layers keep views of the result."""
    packed = torch.cat([layer.weight for layer in layers]) if layers[1:] else layers[0].weight
    start = 0
    for layer in layers:
        rows = layer.shape[0]
        layer.weight = packed[start : start + rows]
        start += rows
    alphas = [layer.alphas for layer in layers]
    if alphas[0].dim() == 1:
        alphas = [each.expand(layer.shape[0]) for each, layer in zip(alphas, layers, strict=True)]
    return Matrix(packed, torch.cat(alphas))


def _state(owner: dict[str, Any], key: str) -> tuple[int, int] | None:
    """Return what changes when a tensor that a module owns is replaced or written to."""
    tensor = owner.get(key)
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class _Graph(NamedTuple):
    """A captured step with the buffers of its inputs and its output."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor


class Step:
    """A network as the kernels read it, valid as long as its tensors are unchanged."""

    def __init__(self, network: GpuDiT) -> None:
        self.network = weakref.proxy(network)  # which owns this step
        config = self.config = network.config
        layers: Any = network.layers
        self.layout = block_layout(config)
        found = [
            (matrix.name, layer.get_submodule(matrix.name).precision)
            for layer in layers
            for matrix in self.layout.matrices
        ]
        kinds = {precision for name, precision in found if name != ADALN}
        adaln = {precision for name, precision in found if name == ADALN}
        if len(kinds) > 1 or len(adaln) > 1:
            raise ValueError("the layers have different precisions")
        self.precision: Precision = kinds.pop()
        self.adaln_precision: Precision = adaln.pop()
        self.layers = [self._layer(layer) for layer in layers]
        projections = [layer.get_submodule(ADALN) for layer in layers]
        self.adaln = _joined(projections)
        self.adaln_bias = torch.cat([layer.bias for layer in projections])
        self.adaln_norm: Tensor | None = None
        if config.adaln_norm:
            self.adaln_norm = torch.stack([layer.get_parameter(ADALN_NORM) for layer in layers])
        self.slots = [
            (owner, key, _state(owner, key))
            for module in network.modules()
            for owner in (module._parameters, module._buffers)
            for key in owner
        ]
        self.cache: OrderedDict[tuple[float, int], Tensor] = OrderedDict()
        self.graphs: dict[tuple[int, bool], _Graph] = {}
        self.pool: Any = None
        self.stream: torch.cuda.Stream | None = None  # on which graphs are captured

    def is_valid(self) -> bool:
        """Return whether all tensors of the network are unchanged."""
        return all(_state(owner, key) == state for owner, key, state in self.slots)

    def _layer(self, block: Any) -> Layer:
        attention = block.attention
        norms = [
            (norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else None
            for norm in (attention.q_norm, attention.k_norm)
        ]
        qkv, wo, w13, w2 = (
            _joined([block.get_submodule(matrix.name) for matrix in group])
            for group in self.layout.groups
        )
        return Layer(
            qkv,
            wo,
            w13,
            w2,
            block.attention_norm.weight[None],
            block.ffn_norm.weight[None],
            norms[0],
            norms[1],
        )

    def modulations(self, c: Tensor) -> Tensor:
        """Return the modulations of all blocks, float32 [B, L, 6 D], of c float32 [B, A]."""
        batch, layers, width = len(c), len(self.layers), 6 * self.config.dim
        out = c.new_empty(batch, layers * width)
        rows = make_rows(F.silu(c), self.adaln_precision)
        multiply(rows, self.adaln.packed, self.adaln.alphas, self.adaln_bias, out)
        if self.adaln_norm is None:
            return out.view(batch, layers, width)
        normed = make_rows(
            out.view(-1, width), "fp32", norm="rms", weight=self.adaln_norm,
            eps=self.config.norm_eps,
        ).values  # fmt: skip
        return normed.view(batch, layers, width)

    def blocks(self, hidden: Tensor, modulations: Tensor) -> Tensor:
        """Run hidden float32 [B, T, D] through all blocks in place."""
        batch, tokens, dim = hidden.shape
        flat = hidden.view(-1, dim)
        for index, layer in enumerate(self.layers):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulations[:, index].chunk(6, dim=1)
            rows = self._normed(flat, layer.attention_norm, shift1, scale1, tokens)
            attended = self._attention(layer, rows, batch)
            rows = make_rows(attended, self.precision)
            multiply(rows, *layer.wo, None, flat, gates=gate1, tokens=tokens)
            rows = self._normed(flat, layer.ffn_norm, shift2, scale2, tokens)
            rows = make_rows(self._gated_feed(layer, rows), self.precision)
            multiply(rows, *layer.w2, None, flat, gates=gate2, tokens=tokens)
        return hidden

    def _normed(
        self, flat: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, tokens: int
    ) -> gpu.Rows:
        return make_rows(
            flat, self.precision, norm="rms", weight=weight, eps=self.config.norm_eps,
            shift=shift, scale=scale, tokens=tokens,
        )  # fmt: skip

    def _empty(self, rows: gpu.Rows, width: int) -> Tensor:
        """Return a buffer for a product [M, width] that another operation reads."""
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        count = len(rows.values) // (2 if rows.precision == "int16" else 1)
        return rows.values.new_empty(count, width, dtype=dtype)

    def _attention(self, layer: Layer, rows: gpu.Rows, batch: int) -> Tensor:
        """Return the heads' outputs [M, D]."""
        config = self.config
        dim, kv_width = config.dim, config.kv_heads * config.head_dim
        heads = multiply(rows, *layer.qkv, None, self._empty(rows, dim + 2 * kv_width))
        tables: Any = self.network
        gpu.rotate(
            heads, tables.rope_cos, tables.rope_sin, dim, kv_width,
            layer.q_norm, layer.k_norm,
        )  # fmt: skip
        q, k, v = (
            part.unflatten(1, (-1, config.head_dim)).unflatten(0, (batch, -1)).transpose(1, 2)
            for part in heads.split([dim, kv_width, kv_width], dim=1)
        )
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=config.kv_heads != config.n_heads)
        return out.transpose(1, 2).reshape(-1, dim)

    def _gated_feed(self, layer: Layer, rows: gpu.Rows) -> Tensor:
        """Return silu(w1 x) * w3 x, [M, F]."""
        width = self.config.ffn_width
        if self.precision != "fp32":
            return multiply(rows, *layer.w13, None, self._empty(rows, width), swiglu=True)
        # Two accumulators of three products each would not fit in the registers.
        both = multiply(rows, *layer.w13, None, self._empty(rows, 2 * width))
        return F.silu(both[:, :width], inplace=True).mul_(both[:, width:])  # as in `step_bytes`

    def final(self, hidden: Tensor, c: Tensor) -> Tensor:
        """The final layer: hidden [B, T, D], c [B, A] -> [B, T, p * p * out_channels]."""
        layer: Any = self.network.final_layer
        batch, tokens, dim = hidden.shape
        shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
        rows = make_rows(
            hidden.view(-1, dim), "fp32", norm="layer", eps=layer.norm_final.eps,
            shift=shift, scale=scale, tokens=tokens,
        )  # fmt: skip
        return layer.linear(rows.values).view(batch, tokens, -1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, modulations: Tensor | None) -> Tensor:
        """Compute f(x, t, y) launch by launch."""
        network = self.network
        hidden = network.embed(x)
        c = network.t_embedder(t) + network.y_embedder(y)
        if modulations is None:
            modulations = self.modulations(c)
        return network.unpatchify(self.final(self.blocks(hidden, modulations), c))

    def cached_modulations(self, t: Tensor, y: Tensor, device: torch.device) -> Tensor:
        """Return the modulations of t and y on the CPU, [B, L, 6 D], computing the new ones."""
        keys = list(zip(t.tolist(), y.tolist(), strict=True))
        new = list(dict.fromkeys(key for key in keys if key not in self.cache))
        if new:
            times = torch.tensor([key[0] for key in new], device=device)
            labels = torch.tensor([key[1] for key in new], device=device)
            network = self.network
            made = self.modulations(network.t_embedder(times) + network.y_embedder(labels))
            # Each has its own memory: a view would keep all others alive.
            self.cache.update(zip(new, (each.clone() for each in made), strict=True))
        for key in keys:
            self.cache.move_to_end(key)
        found = torch.stack([self.cache[key] for key in keys])
        most = CACHE_BYTES // found[0].nbytes
        while len(self.cache) > most:
            self.cache.popitem(last=False)
        return found

    def run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Compute f(x, t, y), with a captured graph if there is one for the batch."""
        batch = len(x)
        known = not t.is_cuda and not y.is_cuda
        modulations = self.cached_modulations(t, y, x.device) if known else None
        t, y = t.to(x.device, torch.float32), y.to(x.device)
        inputs = (x, t, y) if modulations is None else (x, t, y, modulations)
        bucket = next((size for size in BUCKETS if size >= batch), None)
        if bucket is None or not x.is_cuda or torch.cuda.is_current_stream_capturing():
            return self.forward(x, t, y, modulations)
        key = (bucket, known)
        if key not in self.graphs:
            self.graphs[key] = self._capture(bucket, inputs)
        captured = self.graphs[key]
        for place, value in zip(captured.inputs, inputs, strict=True):
            place[:batch].copy_(value)
        captured.graph.replay()
        return captured.out[:batch].clone()

    def _capture(self, bucket: int, inputs: tuple[Tensor, ...]) -> _Graph:
        """Capture the step of a bucket, after a run that compiles its kernels."""
        with torch.inference_mode(False):  # buffers that any later call can write to
            places = tuple(
                value[:1].expand(bucket, *value.shape[1:]).contiguous().clone() for value in inputs
            )
        arguments: tuple[Any, ...] = places if len(places) == 4 else (*places, None)
        # Of this step's GPU: torch's own stream for captures stays on the first GPU that had one.
        stream = self.stream = self.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile, as evaluation does for the batch before.
        with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
            out = self.forward(*arguments)
        # One pool for all: their outputs are copied before another graph runs.
        self.pool = self.pool or graph.pool()
        return _Graph(graph, places, out)


class GpuDiT(DiT):
    """A DiT of PackedTernaryLinear on the gpu backend that runs as one fused step.

    Any threads may call it, on one CUDA stream: its graphs read and write the same memory each
    time, and what another stream enqueues would not wait for them.
    """

    _step: Step | None = None
    _lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: all but graphs and streams, created again later."""
        return self.__dict__ | {"_step": None}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance; see `DiT.forward`. t and y may be on the CPU.

        torch.compile and torch.export see the composable network, whose operators they know.

        Raises:
            ValueError: x is not of the configured shape or type.
            NotImplementedError: a gradient is required.
        """
        if torch.compiler.is_compiling():
            return super().forward(x, t, y)
        config = self.config
        expected = (config.in_channels, config.input_size, config.input_size)
        if tuple(x.shape[1:]) != expected or x.dtype != torch.float32:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, expected {torch.float32} (B, *{expected})"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "the gpu backend computes no gradients: load the model with backend='reference'"
            )
        if not len(x):
            return x.new_empty(0, config.out_channels, config.input_size, config.input_size)
        # One at a time: a graph has one set of input buffers.
        with self._lock, torch.no_grad(), gpu.on(x.device):  # the device of streams and graphs
            step = self._step
            if step is None or not step.is_valid():
                with torch.inference_mode(False):  # buffers that can still be written to
                    step = self._step = Step(self)
            return step.run(x, t, y)


def step_bytes(config: DiTConfig, batch: int, precision: Precision) -> int:
    """Return about how many bytes of GPU memory a step needs in addition to the weights.

    Of a batch: the residual stream, the input of a product and its largest output, which are
    alive together, and the modulations.
    """
    rows = batch * config.tokens
    wide = 4 if precision == "fp32" else 2
    narrow = {"int8": 1, "fp8": 1}.get(precision, wide)
    kv_width = config.kv_heads * config.head_dim
    attention = narrow * config.dim + wide * (2 * config.dim + 2 * kv_width)
    feed = narrow * config.dim + (wide + narrow) * config.ffn_width
    modulations = 2 * 4 * batch * config.n_layers * 6 * config.dim
    return rows * (4 * config.dim + max(attention, feed)) + modulations


def sampling_bytes(config: DiTConfig, batch: int, precision: Precision) -> int:
    """Return about how many bytes sampling `batch` images needs in addition to the weights.

    A captured step keeps its memory, and that of the last, smaller batch is needed in addition.
    """
    rows = next((size for size in BUCKETS if size >= batch), batch)
    steps = step_bytes(config, rows + min(rows, BUCKETS[-1]), precision)
    return steps + CACHE_BYTES + SPARE_BYTES


def largest_batch(config: DiTConfig, free: int, precision: Precision) -> int:
    """Return the most images whose `sampling_bytes` are at most `free`, 0 if none fits."""
    one = step_bytes(config, 1, precision)
    steps = max(0, free - CACHE_BYTES - SPARE_BYTES) // one
    if steps >= 2 * BUCKETS[-1]:
        return steps - BUCKETS[-1]
    return max((size for size in BUCKETS if 2 * size <= steps), default=0)
