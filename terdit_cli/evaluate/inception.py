"""Inception of 2015-12-05 in the two pipelines whose distance is called FID.

    adm     as guided-diffusion's evaluator runs the TensorFlow graph, what DiT and TerDiT publish:
            TF1's bilinear resize from the image's own size to 299, (x - 128) / 128;
            torch-fidelity's port of the network.
            pool     'pool_3:0'                                            [2048]
            spatial  'mixed_6/conv:0', its first 7 channels, order y, x, c [17 * 17 * 7 = 2023]
            logits   pool @ softmax/weights, without the bias              [1008]
    clean   clean-fid's antialiased bicubic resize to 299, (x - 128) / 128; StyleGAN's TorchScript
            of the network.
            pool     `layers`                                              [2048]
            logits   pool @ output.weight.T, as its `no_output_bias` does  [1008]

TensorFlow calls the four 17 x 17 blocks mixed_4 ... mixed_7 and torch-fidelity Mixed_6b ...
Mixed_6e, so mixed_6 is Mixed_6d; `conv` is its 1x1 branch after the ReLU, which comes first in the
block's output. sFID is Nash et al. 2021 (arXiv 2103.03841) with guided-diffusion's choice of layer.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.evaluate.feature_network import (
    Image,
    Network,
    Outputs,
    clean_resize,
    first_sentence,
)
from terdit_cli.evaluate.torchscript import load_torchscript, no_features, run_torchscript
from terdit_cli.evaluate.weights import (
    ADM,
    CLEAN,
    PinnedFile,
    Progress,
    WeightFile,
    given_weights,
    pinned_weights,
)
from terdit_cli.system.torchvision_shim import import_vision

SIZE, DIM, CLASSES = 299, 2048, 1008
SPATIAL_CHANNELS, SPATIAL_DIM = 7, 17 * 17 * 7

_LAYOUT = torch.channels_last  # 1.5 times as fast on CPUs
_SPATIAL_BLOCK = "Mixed_6d"
_BLOCKS = (  # torch-fidelity's modules, in the order in which its forward calls them
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", _SPATIAL_BLOCK, "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def adm(weights: Path | None, device: torch.device, progress: Progress | None = None) -> Network:
    """Return guided-diffusion's pipeline.

    Raises:
        EnvironmentProblem: torch-fidelity is not installed, or no weights and no network.
        InputFileError: a file that is not torch-fidelity's weights.
    """
    try:
        library = import_vision("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise EnvironmentProblem(
            "the adm pipeline needs torch-fidelity", got=error, fix="pip install torch-fidelity"
        ) from error
    file = _weights(weights, ADM, progress)
    network = _load_adm(library, file.path)
    network = network.to(device, memory_format=_LAYOUT)
    resize: Callable[..., Tensor] = library.interpolate_bilinear_2d_like_tensorflow1x

    def prepare(image: Image) -> Tensor:
        # On the CPU, where torch-fidelity's resize gives TensorFlow's bits.
        pixels = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        return (resize(pixels, size=(SIZE, SIZE), align_corners=False)[0] - 128) / 128

    def forward(batch: Tensor) -> Outputs:
        x = batch.contiguous(memory_format=_LAYOUT)
        for name in _BLOCKS:
            x = getattr(network, name)(x)
            if name == _SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(batch.device.type, enabled=False):
            pool = network.AvgPool(x.float()).flatten(1)
            return Outputs(pool, spatial, pool.mm(network.fc.weight.T))

    return Network(
        pipeline=f"adm@{file.short} tensorflow bilinear {SIZE}",
        distance_name="FID",
        dim=DIM,
        spatial_dim=SPATIAL_DIM,
        classes=CLASSES,
        fixed_size=True,
        prepare=prepare,
        forward=forward,
        warnings=(file.warning,) if file.warning else (),
    )


def clean(weights: Path | None, device: torch.device, progress: Progress | None = None) -> Network:
    """Return clean-fid's pipeline; it has no spatial features.

    Raises:
        EnvironmentProblem: no weights and no network.
        InputFileError: a file that is not that TorchScript program.
    """
    file = _weights(weights, CLEAN, progress)
    network = load_torchscript(file.path, device, f"get it from {CLEAN.url}").to(
        memory_format=_LAYOUT
    )
    layers = getattr(network, "layers", None)
    if layers is None:
        raise InputFileError(
            "not the Inception network of clean-fid",
            got="a TorchScript program without `layers`",
            expected=CLEAN.name,
            where=file.path,
            fix=f"get it from {CLEAN.url}",
        )
    classifier = _classifier(network)
    resize = clean_resize(SIZE)

    def prepare(image: Image) -> Tensor:
        return (resize(image) - 128) / 128

    def forward(batch: Tensor) -> Outputs:
        batch = batch.contiguous(memory_format=_LAYOUT)
        pool = run_torchscript(layers.forward, batch, file.path).flatten(1)
        if pool.shape[1] != DIM:
            raise no_features(f"{pool.shape[1]} features, not {DIM}", file.path, f"[B, {DIM}]")
        with torch.autocast(batch.device.type, enabled=False):
            pool = pool.float()
            logits = None if classifier is None else pool.mm(classifier.T)
            return Outputs(pool, None, logits)

    return Network(
        pipeline=f"clean@{file.short} clean-fid bicubic {SIZE}",
        distance_name="FID",
        dim=DIM,
        spatial_dim=None,
        classes=None if classifier is None else len(classifier),
        fixed_size=True,
        prepare=prepare,
        forward=forward,
        warnings=(file.warning,) if file.warning else (),
    )


def _classifier(network: Any) -> Tensor | None:
    """Return the weight [C, 2048] of StyleGAN's `output`, if the program has it."""
    weight = getattr(getattr(network, "output", None), "weight", None)
    fits = isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == DIM
    return weight if fits else None


def _weights(given: Path | None, pinned: PinnedFile, progress: Progress | None) -> WeightFile:
    if given is not None:
        return given_weights(given, pinned.sha256)
    return pinned_weights(pinned, progress)


def _load_adm(library: Any, path: Path) -> Any:
    """Return torch-fidelity's network with the tensors of a file.

    The library itself unpickles whatever it is given, so it gets a copy that holds tensors only.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise TypeError(f"a {type(tensors).__name__}, not a state dict")
        strange = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if strange:
            raise TypeError(f"{strange[0]!r} is no tensor")
        copy = io.BytesIO()
        torch.save(tensors, copy)
        copy.seek(0)
        return library.FeatureExtractorInceptionV3("adm", ["2048"], copy)
    except Exception as error:  # the file is the user's: torch.load fails in many ways
        raise InputFileError(
            "not the weights of torch-fidelity's Inception",
            got=first_sentence(error),
            expected=ADM.name,
            where=path,
            fix=f"get it from {ADM.url}",
        ) from error
