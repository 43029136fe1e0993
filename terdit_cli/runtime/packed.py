"""A linear layer whose weights stay packed, and the DiT made of such layers.

Contract: the packed network on the reference backend equals the QAT forward bit for bit in
float32, because both end in `model.ternary.ternary_linear` with the same trits and alphas.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from terdit_cli.errors import InputFileError
from terdit_cli.model.dit import DiT
from terdit_cli.model.ternary import Activations, Granularity, alpha_shape
from terdit_cli.pack.exported import ExportedModel
from terdit_cli.pack.tdt import TdtFile
from terdit_cli.pack.trits import t2_encode, t2_shape
from terdit_cli.runtime.backends import Backend


class PackedTernaryLinear(nn.Module):
    """y = x @ (alpha * trits).T + bias from t2 bytes.

    Buffers: `weight` uint8 [ceil(N/64), ceil(K/4), 64], `alphas` float32 ([1], [N] or [N, G]),
    `bias` float32 [N] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: Backend,
        granularity: Granularity,
        activations: Activations,
    ) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.backend = backend
        self.activations = activations
        self.weight: Tensor
        self.alphas: Tensor
        self.bias: Tensor | None
        self.register_buffer(
            "weight", torch.empty(t2_shape(out_features, in_features), dtype=torch.uint8)
        )
        self.register_buffer(
            "alphas", torch.empty(alpha_shape(out_features, in_features, granularity))
        )
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N]."""
        return self.backend.matmul(
            x, self.weight, self.alphas, self.bias, self.shape, self.activations
        )

    def extra_repr(self) -> str:
        rows, columns = self.shape
        return f"in_features={columns}, out_features={rows}, backend={self.backend.NAME}"


def packed_network(model: ExportedModel, backend: Backend, device: torch.device) -> DiT:
    """Build the network f(x, t, y) of an exported model with its weights packed as t2.

    A t2 blob of a .tdt stays mapped from the file on the CPU; other codecs are packed here, one
    matrix at a time. All other tensors become float32.

    Raises:
        InputFileError: tensors that do not fit the model's configuration.
    """
    info = model.info
    factory = functools.partial(
        PackedTernaryLinear,
        backend=backend,
        granularity=info.ternary.granularity,
        activations=info.ternary.activations,
    )
    with torch.device("meta"):
        network = DiT(info.config, factory)
    state: dict[str, Tensor] = {}
    for name in model.ternary_names():
        layer = _layer(network, name)
        if layer is None or layer.shape != model.matrix_shape(name):
            raise InputFileError(
                "the weights do not fit the model's configuration",
                got=f"{name} of shape {list(model.matrix_shape(name))}",
                expected="no such layer" if layer is None else list(layer.shape),
                fix="pack the checkpoint again",
            )
        if isinstance(model, TdtFile) and model.codec(name) == "t2":
            packed = model.blob(name)
        else:
            packed = t2_encode(model.trits(name))
        state[f"{name}.weight"] = packed.to(device)
        state[f"{name}.alphas"] = model.alphas(name).to(device)
    for name in model.rest_names():
        state[name] = model.rest(name).float().to(device)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputFileError(
            "the weights do not fit the model's configuration",
            got=" ".join(str(error).split())[:400],
            fix="pack the checkpoint again",
        ) from error
    return network.to(device).eval().requires_grad_(False)


def _layer(network: DiT, name: str) -> PackedTernaryLinear | None:
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        return None
    return layer if isinstance(layer, PackedTernaryLinear) else None
