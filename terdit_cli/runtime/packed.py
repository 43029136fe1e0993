"""A linear layer whose weights stay packed, and the DiT made of such layers.

Contract: the packed network on the reference backend equals the QAT forward pass bit for bit in
float32, because both end in `model.ternary.ternary_linear` with the same trits and alphas.

The weights of a .tdt are read where the file is mapped: several processes share its pages, and
no full-precision matrix is ever allocated.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.model import mapped
from terdit_cli.model.ckpt import release_pages
from terdit_cli.model.dit import DiT
from terdit_cli.model.layout import ADALN
from terdit_cli.model.restore import empty_network
from terdit_cli.model.ternary import Granularity, alpha_shape
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.pack.trits import t2_encode
from terdit_cli.runtime.backends import Backend, backend_named
from terdit_cli.runtime.reference import Precision


class PackedTernaryLinear(nn.Module):
    """y = x @ (alpha * trits).T + bias from t2 bytes.

    Buffers: `weight` uint8 as the backend keeps it, `alphas` float32 ([1], [N] or [N, G]), `bias`
    float32 [N] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: Backend,
        granularity: Granularity,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.backend = backend
        self.precision = precision
        self.weight: Tensor
        self.alphas: Tensor
        self.bias: Tensor | None
        self.register_buffer(
            "weight",
            torch.empty(backend.weight_shape(out_features, in_features), dtype=torch.uint8),
        )
        self.register_buffer(
            "alphas", torch.empty(alpha_shape(out_features, in_features, granularity))
        )
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N]."""
        return self.backend.matmul(
            x, self.weight, self.alphas, self.bias, self.shape, self.precision
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: of the backend, which is a module, only its name."""
        return self.__dict__ | {"backend": self.backend.NAME}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"backend": backend_named(state["backend"])})

    def extra_repr(self) -> str:
        rows, columns = self.shape
        return (
            f"in_features={columns}, out_features={rows}, backend={self.backend.NAME}, "
            f"precision={self.precision}"
        )


def packed_network(
    model: ExportedModel, backend: Backend, device: torch.device, precision: Precision
) -> DiT:
    """Build the network f(x, t, y) of an exported model with its weights packed as t2.

    A t2 blob of a .tdt stays mapped from a local file on the CPU; other codecs are packed here, one
    matrix at a time. All other tensors become float32.

    Args:
        precision: as `resolve_activations` gives it for this model.

    Raises:
        EnvironmentProblem: a matrix that the backend cannot multiply with, or a precision that the
            GPU does not support.
    """
    info = model.info
    backend.check_precision(precision, device)
    factory = functools.partial(
        PackedTernaryLinear,
        backend=backend,
        granularity=info.ternary.granularity,
        precision=precision,
    )
    network = empty_network(info.config, factory, backend.network_class())
    adaln: Precision = precision
    if precision in backend.FINER_ADALN and info.ternary.activations == "none":
        adaln = "int16"
    state: dict[str, Tensor] = {}
    for name in model.ternary_names():
        layer = network.get_submodule(name)
        assert isinstance(layer, PackedTernaryLinear)
        if layer.shape[1] > backend.LARGEST_K:
            raise EnvironmentProblem(
                f"a matrix is too wide for the {backend.NAME} backend",
                got=f"{name} of shape {list(layer.shape)}",
                expected=f"at most {backend.LARGEST_K} inputs",
                fix="use --backend reference",
            )
        if name.endswith(ADALN):
            layer.precision = adaln
        packed = _packed(model, name, backend).to(device)
        state[f"{name}.weight"] = backend.from_t2(packed, *layer.shape)
        state[f"{name}.alphas"] = _aligned(model.alphas(name)).to(device)
    for name in model.rest_names():
        stored = model.rest(name)
        state[name] = _aligned(stored.float()).to(device)
        if stored.dtype != torch.float32:
            release_pages(stored)
    if device.type == "cpu" and model.path is not None:
        mapped.keep(network, state, model.path)
    else:
        network.load_state_dict(state, strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _packed(model: ExportedModel, name: str, backend: Backend) -> Tensor:
    """Return the t2 bytes of a matrix; the pages of a repacked blob are released."""
    if not isinstance(model, TdtFile):
        return t2_encode(model.trits(name))
    codec = model.codec(name)
    if codec == "t2":
        return model.blob(name)
    if codec == "t5":
        packed = backend.t5_to_t2(model.blob(name), *model.matrix_shape(name))
    else:
        packed = t2_encode(model.trits(name))
    release_pages(model.blob(name))
    return packed


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor with its elements aligned in memory; in a file they need not be."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
