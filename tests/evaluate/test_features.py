"""Extractors on files of the real form: shapes, resize, names and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.evaluate.features import INCEPTION_FILE, make_extractor
from terdit_cli.torchvision_shim import import_vision


def some_images(sizes: list[tuple[int, int]], seed: int = 0) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


class Layers(nn.Module):
    """Stands for the body of Inception: [B, 3, 299, 299] about [-1, 1] -> [B, 2048, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, [32, 64])
        return pooled.mean(dim=1).flatten(1)[:, :, None, None]


class TinyInception(nn.Module):
    """A file of the form that FID's Inception has: a scripted module with `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers(x)


@pytest.fixture
def inception_file(tmp_path: Path) -> Path:
    path = tmp_path / INCEPTION_FILE
    torch.jit.script(TinyInception()).save(str(path))
    return path


def test_inception_equals_clean_fid_s_own_pipeline(inception_file: Path) -> None:
    images = some_images([(28, 28), (40, 28), (300, 310)])
    extractor = make_extractor("inception", inception_file)
    wrapper = import_vision("cleanfid.inception_torchscript").InceptionV3W(
        str(inception_file.parent), download=False, resize_inside=False
    )
    resize = import_vision("cleanfid.resize").build_resizer("clean")
    batch = torch.from_numpy(np.stack([resize(image) for image in images]))
    theirs = wrapper(batch.permute(0, 3, 1, 2)).numpy()
    assert np.array_equal(extractor(images), theirs)
    assert extractor.distance_name == "FID"


def test_inception_is_found_in_the_cache(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERDIT_CACHE", str(inception_file.parent))
    assert make_extractor("inception").pipeline.startswith("inception@")


def test_missing_inception_says_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERDIT_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentProblem) as error:
        make_extractor("inception")
    for part in (str(tmp_path / INCEPTION_FILE), "--weights FILE", "efficientnet-lite0"):
        assert part in str(error.value)


def test_another_torchscript_is_not_inception(tmp_path: Path) -> None:
    path = tmp_path / "layers.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputFileError, match=r"not the Inception network.*layers\.pt"):
        make_extractor("inception", path)


def test_efficientnet_is_batch_independent_and_not_called_fid() -> None:
    extractor = make_extractor("efficientnet-lite0")
    images = some_images([(28, 28), (64, 48), (28, 28)])
    together = extractor(images)
    assert together.shape == (3, 1280)
    assert together.dtype == np.float32
    alone = np.concatenate([extractor([image]) for image in images])
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())
    assert extractor.distance_name == "fd-efficientnet-lite0"
    assert not np.allclose(together[0], together[2])


def test_torchscript_file_at_native_size(tmp_path: Path) -> None:
    path = tmp_path / "means.pt"
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).save(str(path))
    extractor = make_extractor(f"torchscript:{path}")
    images = some_images([(5, 7), (5, 7)])
    expected = np.stack([image.astype(np.float64).mean(axis=(0, 1)) for image in images])
    assert np.allclose(extractor(images), expected, rtol=1e-5)
    assert extractor.distance_name == "fd-means"


def test_torchscript_that_gives_no_vectors(tmp_path: Path) -> None:
    path = tmp_path / "same.pt"
    torch.jit.script(nn.Identity()).save(str(path))
    with pytest.raises(InputFileError, match=r"one feature vector an image.*\(1, 3, 4, 4\)"):
        make_extractor(f"torchscript:{path}")(some_images([(4, 4)]))


@pytest.mark.parametrize("content", [b"", b"not torchscript", b"PK\x03\x04" + bytes(100)])
def test_damaged_torchscript(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"not a TorchScript file.*net\.pt"):
        make_extractor(f"torchscript:{path}")


def test_weights_that_are_not_efficientnet_s(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputFileError, match=r"w\.pth.*--weights"):
        make_extractor("efficientnet-lite0", path)


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'inception'.*--features"):
        make_extractor("incepton")
    with pytest.raises(InputFileError, match="no such feature extractor"):
        make_extractor("torchscript:gone.pt")


class Wrong(nn.Module):
    """A network that fails in a chosen way."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            raise ValueError("no such image")
        return x.mean(dim=(2, 3)) / 0.0 * 0.0


@pytest.mark.parametrize(("kind", "got"), [(0, "no such image"), (1, "not finite")])
def test_torchscript_that_fails_on_images(tmp_path: Path, kind: int, got: str) -> None:
    path = tmp_path / "wrong.pt"
    torch.jit.script(Wrong(kind)).save(str(path))
    extractor = make_extractor(f"torchscript:{path}")
    with pytest.raises(InputFileError, match=rf"{got}.*wrong\.pt.*Fix: give a network"):
        extractor(some_images([(4, 4)]))


def test_only_2048_features_are_fid(tmp_path: Path) -> None:
    path = tmp_path / "narrow.pt"
    narrow = nn.Sequential()
    narrow.add_module("layers", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    torch.jit.script(narrow).save(str(path))
    with pytest.raises(InputFileError, match="12 features, not 2048"):
        make_extractor("inception", path)(some_images([(28, 28)]))


def test_weights_beside_a_torchscript_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--weights has no use here: got w\.pt.*leave --weights"):
        make_extractor("torchscript:net.pt", Path("w.pt"))
