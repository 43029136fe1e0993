"""Does a generated image look like its class? A linear probe on features of real images says so.

Multinomial logistic regression, fitted to the features of nine tenths of the training images:

    z = (features - mean) / deviation,  p(class) = softmax(W z + b)
    loss = mean cross entropy + L2 / 2 * |W|^2,  by L-BFGS from zero: one minimum, no seed

Every tenth image is held out: the accuracy on those says what the probe can see at all. The loss
is convex, so the result depends on the images alone.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from terdit_cli.errors import InputFileError

HELD_OUT_EVERY = 10  # images
L2 = 1e-3
_ITERATIONS = 200

Samples = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe, and how it does on real images that it has not seen."""

    mean: Tensor  # [D]
    deviation: Tensor  # [D]
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    trained_on: int
    held_out: int
    held_out_accuracy: float
    held_out_per_class: list[float]

    @torch.inference_mode()
    def classify(self, features: Samples) -> Labels:
        """Return the most likely class of features [N, D]: int64 [N]."""
        z = (torch.from_numpy(features) - self.mean) / self.deviation
        classes: Labels = F.linear(z, self.weight, self.bias).argmax(dim=1).numpy()
        return classes


def accuracy_by_class(found: Labels, labels: Labels, classes: int) -> list[float]:
    """Return the share of each class's images that were recognised; not a number without any."""
    shares = []
    for class_id in range(classes):
        own = found[labels == class_id]
        shares.append(float((own == class_id).mean()) if len(own) else float("nan"))
    return shares


def fit_probe(features: Samples, labels: Labels, classes: int) -> LinearProbe:
    """Fit the probe to real images, every tenth held out.

    Args:
        features: float32 [N, D]; labels: int64 [N], each below `classes`.

    Raises:
        InputFileError: too few images for a held-out part.
    """
    if len(features) != len(labels) or len(features) < 2 * HELD_OUT_EVERY:
        raise InputFileError(
            "too few labelled images for a probe",
            got=f"{len(features)} features, {len(labels)} labels",
            expected=f"at least {2 * HELD_OUT_EVERY} of each",
        )
    # By place within the class, so that every class has its share of the held-out ones.
    held = np.zeros(len(labels), dtype=bool)
    for class_id in range(classes):
        held[np.flatnonzero(labels == class_id)[::HELD_OUT_EVERY]] = True
    x, y = torch.from_numpy(features[~held]), torch.from_numpy(labels[~held])
    mean = x.mean(dim=0)
    deviation = x.std(dim=0).clamp_min(1e-6)
    z = (x - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(z, weight, bias), y) + L2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = LinearProbe(
        mean, deviation, weight.detach(), bias.detach(), len(x), int(held.sum()), 0.0, []
    )
    found = fitted.classify(features[held])
    return LinearProbe(
        mean, deviation, fitted.weight, fitted.bias, len(x), int(held.sum()),
        float((found == labels[held]).mean()),
        accuracy_by_class(found, labels[held], classes),
    )  # fmt: skip
