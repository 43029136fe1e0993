"""The fused step: all blocks of a packed DiT in one call of the native library.

    hidden <- blocks(hidden, modulations),  modulations = adaLN of all blocks, once for each c

The same modules and state dict as the composable network, whose `forward` this shares except for
the loop over the blocks. Rows of the conditioning c recur: CFG repeats the null class, and one
schedule serves many batches. So modulations are cached by the row's bytes; the least recently used
are dropped first.

Shapes: B images, T tokens, D dim, A width of the conditioning, L layers.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from terdit_cli.model.dit import DiT
from terdit_cli.model.layout import ADALN, block_layout
from terdit_cli.runtime import cpu
from terdit_cli.runtime.reference import Precision

CACHE_BYTES = 8 << 20  # of modulations, per network

# terdit_block of native/ternary.h: a block's matrices, then its norms, in the order of its layout.
_MATRICES, _NORMS = 8, 7


class _Block(ctypes.Structure):
    """terdit_block of native/ternary.h."""

    _fields_ = (("matrices", cpu.Matrix * _MATRICES), ("norms", ctypes.c_void_p * _NORMS))


class _Model(ctypes.Structure):
    """terdit_model of native/ternary.h."""

    _fields_ = (
        ("dim", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("ffn_width", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("conditioning_width", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("qk_norm_eps", ctypes.c_float),
        ("rope_cos", ctypes.c_void_p),
        ("rope_sin", ctypes.c_void_p),
        ("n_blocks", ctypes.c_int64),
        ("blocks", ctypes.POINTER(_Block)),
        ("attention", ctypes.c_int32),
    )


# Held only briefly, never during a call of the library. The child of a fork gets a fresh one.
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class _Slot(NamedTuple):
    """A tensor whose address the library has: where a module keeps it, and its state then."""

    owner: dict[str, Any]
    key: str
    tensor: Tensor
    address: int
    version: int

    def is_unchanged(self) -> bool:
        found = self.owner.get(self.key)
        return (
            found is self.tensor
            and found.data_ptr() == self.address
            and _version(found) == self.version
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Native:
    """A network as the library sees it, valid as long as its tensors are unchanged."""

    def __init__(self, network: DiT) -> None:
        config = network.config
        layout = block_layout(config)
        assert (len(layout.matrices), len(layout.norms)) == (_MATRICES, _NORMS)
        self.slots: list[_Slot] = []
        self.kept: list[Tensor] = []
        self.cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self.blocks = (_Block * config.n_layers)()
        self.width = next(m.rows for m in layout.matrices if m.name == ADALN)
        precisions: dict[str, set[Precision]] = {"blocks": set(), "adaLN": set()}
        grouped: set[bool] = set()
        for index in range(config.n_layers):
            for place, matrix in enumerate(layout.matrices):
                path = f"layers.{index}.{matrix.name}"
                layer: Any = network.get_submodule(path)
                tensors = [self._tensor(layer, key) for key in ("weight", "alphas", "bias")]
                assert tensors[0] is not None, path
                assert tensors[1] is not None, path
                self.blocks[index].matrices[place] = cpu.describe_matrix(
                    tensors[0], tensors[1], tensors[2], (matrix.rows, matrix.columns)
                )
                precisions["adaLN" if matrix.name == ADALN else "blocks"].add(layer.precision)
                grouped.add(tensors[1].dim() == 2)
            for place, norm in enumerate(layout.norms):
                self.blocks[index].norms[place] = self._norm(network, index, *norm)
        # One call runs all blocks, with one memory plan.
        if len(grouped) > 1 or any(len(each) > 1 for each in precisions.values()):
            raise ValueError("the layers have different scale granularities or precisions")
        blocks, adaln = precisions["blocks"].pop(), precisions["adaLN"].pop()
        self.precision = cpu.PRECISION_CODES[blocks]
        self.adaln_precision = cpu.PRECISION_CODES[adaln]
        # int8 in all layers is how a model was trained, with its attention in float; int8 with a
        # finer adaLN is an approximation, which may include attention.
        approximate = blocks == "int8" and adaln != "int8"
        attention: Precision = "int8" if approximate else "fp32"
        rope = (config.tokens, config.head_dim // 2)
        tables = [self._tensor(network, key) for key in ("rope_cos", "rope_sin")]
        q_norm = network.get_submodule("layers.0.attention.q_norm")
        self.model = _Model(
            config.dim,
            config.n_heads,
            config.kv_heads,
            config.ffn_width,
            config.tokens,
            config.conditioning_width,
            config.norm_eps,
            q_norm.eps if isinstance(q_norm, nn.LayerNorm) else 0.0,
            *(cpu.address("rope", table, rope) for table in tables if table is not None),
            config.n_layers,
            self.blocks,
            cpu.PRECISION_CODES[attention],
        )

    def _tensor(self, module: nn.Module, key: str) -> Tensor | None:
        """Return a parameter or buffer of a module, remembered and kept alive."""
        owner = module._parameters if key in module._parameters else module._buffers
        tensor = owner[key]
        if tensor is None:
            return None
        self.kept.append(tensor.detach())
        self.slots.append(_Slot(owner, key, tensor, tensor.data_ptr(), _version(tensor)))
        return self.kept[-1]

    def _norm(self, network: DiT, index: int, name: str, width: int) -> int | None:
        """Return the address of a norm's weight or bias, None where the model has no such norm."""
        path, _, key = f"layers.{index}.{name}".rpartition(".")
        try:
            module = network.get_submodule(path)
        except AttributeError:
            return None
        if isinstance(module, nn.Identity):
            return None
        tensor = self._tensor(module, key)
        assert tensor is not None, path
        return cpu.address(f"{path}.{key}", tensor, (width,))

    def is_valid(self) -> bool:
        return all(slot.is_unchanged() for slot in self.slots)

    def modulations(self, c: Tensor) -> list[Tensor]:
        """Return for each row of c float32 [B, A] the modulations of all blocks, [L, 6 D]."""
        isa = cpu.isa().encode()
        keys = [isa + row.tobytes() for row in c.numpy()]
        found: dict[bytes, Tensor] = {}
        with _lock:
            for key in keys:
                if key in self.cache:
                    self.cache.move_to_end(key)
                    found[key] = self.cache[key]
        rows = {key: index for index, key in enumerate(keys) if key not in found}
        if not rows:
            return [found[key] for key in keys]
        source = c[list(rows.values())].contiguous()
        made = source.new_empty(len(rows), len(self.blocks), self.width)
        cpu.check_status(
            cpu.library().terdit_modulations(
                ctypes.byref(self.model),
                source.data_ptr(),
                len(rows),
                self.adaln_precision,
                made.data_ptr(),
                cpu.thread_count(),
            )
        )
        # Each has its own memory: a view would keep all others alive.
        new = {key: made[index].clone() for index, key in enumerate(rows)}
        most = CACHE_BYTES // made[0].nbytes
        with _lock:
            self.cache.update(new)
            while len(self.cache) > most:
                self.cache.popitem(last=False)
        found |= new
        return [found[key] for key in keys]

    def run(self, hidden: Tensor, c: Tensor) -> None:
        """Run all blocks on hidden float32 [B, T, D] in place."""
        modulations = self.modulations(c)
        addresses = (ctypes.c_void_p * len(modulations))(*(m.data_ptr() for m in modulations))
        cpu.check_status(
            cpu.library().terdit_blocks(
                ctypes.byref(self.model),
                hidden.data_ptr(),
                addresses,
                len(modulations),
                self.precision,
                cpu.thread_count(),
            )
        )


class FusedDiT(DiT):
    """A DiT of PackedTernaryLinear on the cpu backend whose blocks are one native call."""

    _native: _Native | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: all but addresses, which are looked up again."""
        return self.__dict__ | {"_native": None}

    def run_blocks(self, hidden: Tensor, c: Tensor) -> Tensor:
        """Run hidden [B, T, D], float32, through all blocks in place; see `DiT.run_blocks`.

        torch.compile and torch.export see the composable blocks, whose operators they know.

        Raises:
            ValueError: tensors or modules of another dtype, shape or device than float32 on the
                CPU, or matrices that are not all packed alike.
            NotImplementedError: a gradient is required.
            EnvironmentProblem: there is no native library.
        """
        if torch.compiler.is_compiling():
            return super().run_blocks(hidden, c)
        config = self.config
        if torch.is_grad_enabled() and (hidden.requires_grad or c.requires_grad):
            raise NotImplementedError(
                "the cpu backend computes no gradients: load the model with backend='reference'"
            )
        batch = hidden.shape[0]
        hidden = hidden.contiguous()
        cpu.address("hidden", hidden, (batch, config.tokens, config.dim))
        c = c.detach().contiguous()
        cpu.address("c", c, (batch, config.conditioning_width))
        native = self._native
        if native is None or not native.is_valid():
            native = self._native = _Native(self)
        if batch:
            native.run(hidden, c)
        return hidden
