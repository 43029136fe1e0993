"""A trained checkpoint as an exported model: master weights -> trits and alphas.

After quantisation-aware training the master weights are ternarized exactly as in the training
forward pass. A full-precision checkpoint is fitted instead (post-training quantisation): per
scale, the k largest |w| become trits with alpha their mean, k chosen to leave the least squared
error. For fixed trits the best alpha is sum(w * trits) / sum(trits^2), which leaves
|w|^2 - (sum of the k largest |w|)^2 / k; so the best k maximises (prefix sum)^2 / k, an exact
search of the problem that Ternary Weight Networks (arXiv 1605.04711) solve approximately.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from terdit_cli.model.ckpt import Checkpoint, release_pages
from terdit_cli.model.metadata import ModelInfo
from terdit_cli.model.ternary import (
    GROUP_SIZE,
    Granularity,
    absmean_alphas,
    alpha_shape,
    expand_alphas,
    ternarize,
)
from terdit_cli.pack.exported import StateDictModel, check_fit


def fit_trits(weight: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Fit a full-precision matrix [N, K]: the trits int8 and alphas of least squared error."""
    rows, columns = weight.shape
    if granularity == "tensor":
        units = weight.reshape(1, -1)
    elif granularity == "row":
        units = weight
    else:
        groups = -(-columns // GROUP_SIZE)
        padded = F.pad(weight, (0, groups * GROUP_SIZE - columns))
        units = padded.reshape(rows * groups, GROUP_SIZE)
    size, order = units.abs().sort(dim=1, descending=True)
    counts = torch.arange(1, units.shape[1] + 1, dtype=torch.float64)
    prefix = size.double().cumsum(dim=1)
    best = (prefix.square() / counts).argmax(dim=1, keepdim=True)  # k - 1
    alphas = (prefix.gather(1, best) / (best + 1)).float()
    kept = torch.zeros_like(units, dtype=torch.bool)
    kept.scatter_(1, order, torch.arange(units.shape[1])[None] <= best)
    trits = (units.sign() * kept).to(torch.int8)
    if granularity == "group128":
        trits = trits.reshape(rows, -1)[:, :columns].contiguous()
    return trits.reshape(rows, columns), alphas.reshape(alpha_shape(rows, columns, granularity))


@dataclass(frozen=True)
class MatrixError:
    """The error of alpha * trits against the master weight."""

    relative_error: float  # |W - alpha * trits| / |W|, 0 for W = 0
    cosine: float  # between W and alpha * trits, 0 where either is 0


class CheckpointExport(StateDictModel):
    """The ternary view of a ckpt.pt, computed one matrix at a time.

    Args:
        checkpoint: the opened file.
        weights: "ema" or "raw".
        fit_granularity: for full-precision checkpoints, the scales to fit.

    Raises:
        InputFileError: the state dict does not match its own configuration; later, a tensor that is
            not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Literal["ema", "raw"] = "ema",
        fit_granularity: Granularity = "tensor",
    ) -> None:
        info = checkpoint.info
        self.fitted = not info.ternary.enabled
        ternary = info.ternary
        if self.fitted:
            ternary = dataclasses.replace(
                ternary, enabled=True, granularity=fit_granularity, activations="none"
            )
        self.info: ModelInfo = dataclasses.replace(info, ternary=ternary, weights=weights)
        self._state = checkpoint.state_dict(weights)
        self.path = self._where = checkpoint.path
        shapes = {key: tuple(tensor.shape) for key, tensor in self._state.items()}
        check_fit(info.config, info.ternary, shapes, checkpoint.path, "copy it again")

    def master(self, name: str) -> Tensor:
        """Return the float32 master weight of a matrix."""
        return self._state[f"{name}.weight"].float()

    def matrix_shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._state[f"{name}.weight"].shape
        return rows, columns

    @functools.lru_cache(maxsize=1)  # noqa: B019 - trits and alphas of one matrix come together
    def _fit(self, name: str) -> tuple[Tensor, Tensor]:
        self._finite(f"{name}.weight")
        return fit_trits(self.master(name), self.info.ternary.granularity)

    def trits(self, name: str) -> Tensor:
        if self.fitted:
            return self._fit(name)[0]
        master = self._finite(f"{name}.weight")
        trits = ternarize(master.float()).to(torch.int8)
        release_pages(master)
        return trits

    def alphas(self, name: str) -> Tensor:
        if self.fitted:
            return self._fit(name)[1]
        if self.info.ternary.scale == "learned":
            return self._finite(f"{name}.alphas").float()
        return absmean_alphas(self.master(name), self.info.ternary.granularity)

    def matrix_error(self, name: str) -> MatrixError:
        """Compare a matrix with its master weight."""
        master = self.master(name).double()
        columns = master.shape[1]
        effective = expand_alphas(self.alphas(name), columns).double() * self.trits(name)
        norms = float(master.norm()), float(effective.norm())
        difference = float((master - effective).norm())
        product = norms[0] * norms[1]
        return MatrixError(
            relative_error=difference / norms[0] if norms[0] else 0.0,
            cosine=float((master * effective).sum()) / product if product else 0.0,
        )
