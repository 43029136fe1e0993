"""Images by number: their classes, and the same image whoever draws it beside whichever others."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from terdit_cli.diffusion.noise import ImageNoise
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.generate import generator as generate
from terdit_cli.generate.generator import (
    ImageGenerator,
    class_of,
    open_generator,
    usable_device,
)
from terdit_cli.generate.options import Labels, ModelOptions
from terdit_cli.hub.model_file import ModelFile
from terdit_cli.runtime import cpu, reference
from terdit_cli.runtime.gpu import backend as gpu
from terdit_cli.runtime.gpu.graph_step import sampling_bytes

Patch = pytest.MonkeyPatch


def bound(freedom: int) -> float:
    """What a chi-square value is above once in 100 times or less; the seeds here are fixed."""
    return freedom + 4 * (2 * freedom) ** 0.5


def test_balanced_labels_take_turns() -> None:
    """DiT's 50,000 images of 1,000 classes: 50 of each; (class c, copy j) is image 1000 j + c."""
    classes = [class_of(index, 1000, "balanced", 3) for index in range(50_000)]
    assert set(Counter(classes).values()) == {50}
    assert classes[:3] == [0, 1, 2]
    assert class_of(7 * 1000 + 42, 1000, "balanced", 0) == 42


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_labels_are_uniform(classes: int, seed: int) -> None:
    count = 20 * classes
    drawn = [class_of(index, classes, "uniform", seed) for index in range(count)]
    assert drawn == [class_of(index, classes, "uniform", seed) for index in range(count)]
    counts = np.bincount(drawn, minlength=classes)
    assert len(counts) == classes
    assert ((counts - 20) ** 2 / 20).sum() < bound(classes - 1)


def test_uniform_labels_of_neighbours_and_seeds_are_independent() -> None:
    """Pairs of classes, of one image and the next and of two seeds, are uniform too."""
    classes, count = 10, 4000
    ours = np.array([class_of(index, classes, "uniform", 0) for index in range(count + 1)])
    other = np.array([class_of(index, classes, "uniform", 1) for index in range(count)])
    for pairs in (ours[:-1] * classes + ours[1:], ours[:-1] * classes + other):
        counts = np.bincount(pairs, minlength=classes**2)
        assert ((counts - 40) ** 2 / 40).sum() < bound(classes**2 - 1)


def test_a_uniform_label_is_what_it_was() -> None:
    """A change of the rule would change every image of every uniform evaluation."""
    assert [class_of(index, 1000, "uniform", 0) for index in range(4)] == [703, 826, 354, 14]


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("labels", ["balanced", "uniform"])
def test_any_part_is_the_same_image_by_image(
    small_tdt: Path, activations: str, labels: Labels
) -> None:
    backend = "cpu" if cpu.available(torch.device("cpu")) is None else "reference"
    generator = open_generator(
        ModelFile.open(small_tdt),
        ModelOptions(backend=backend, device="cpu", activations=activations),
    )
    sampler = generator.fit(SamplerConfig("ddpm", 4, 4.0, "3"))

    def draw(start: int, end: int, batch_size: int) -> tuple[NDArray[np.uint8], list[int]]:
        indices = range(start, end)
        batches = list(generator.images(indices, sampler, 5, batch_size, labels=labels))
        assert all(len(images) <= batch_size for images, _ in batches)
        return np.concatenate([images for images, _ in batches]), [
            class_id for _, classes in batches for class_id in classes
        ]

    whole, classes = draw(0, 12, 4)
    assert len({image.tobytes() for image in whole}) == 12
    # What the processes of an evaluation do: whole batches of one size, dealt in any way.
    for start, end in ((0, 4), (4, 8), (8, 12), (4, 12)):
        part = draw(start, end, 4)
        np.testing.assert_array_equal(part[0], whole[start:end])
        assert part[1] == classes[start:end]
    # Of batches of another size torch's products may round otherwise, which int8 can amplify.
    for start, end, batch_size in ((5, 9, 4), (0, 12, 12), (3, 8, 1)):
        part = draw(start, end, batch_size)
        assert part[1] == classes[start:end]
        difference = np.abs(part[0].astype(int) - whole[start:end])
        assert difference.max() <= (1 if activations == "fp32" else 16)


def test_images_that_are_no_numbers_are_no_images(small_tdt: Path, monkeypatch: Patch) -> None:
    """As bytes they would be black, and have a distance like others."""
    generator = open_generator(ModelFile.open(small_tdt), ModelOptions(backend="reference"))

    def sample(network: object, config: object, z: torch.Tensor, *_: object,
               **__: object) -> torch.Tensor:  # fmt: skip
        images = torch.zeros(z.shape)
        images[1:3, 0, 5, 5] = torch.tensor([torch.nan, torch.inf])
        return images

    monkeypatch.setattr(generate, "sample", sample)
    with pytest.raises(InputFileError, match=r"got 2 of 4 images, the first of them number 6"):
        list(generator.images(range(5, 9), SamplerConfig("ddim", 2), 0, 4))


def test_the_hash_is_of_the_file_that_is_loaded(released_folder: Path, tmp_path: Path) -> None:
    """A folder may hold the full-precision weights as well, whose name comes first."""
    folder = tmp_path / "released"
    shutil.copytree(released_folder, folder)
    with ModelFile.open(folder).exported(n_heads=4) as model:
        expected = hashlib.sha256(model.path.read_bytes()).hexdigest()
    (folder / "consolidated_ema.00-of-01.pth").write_bytes(b"others")
    (folder / "consolidated.00-of-01.pth").write_bytes(b"others")
    assert ModelFile.open(folder).sha256 == expected


# GPUs, which are not there


@pytest.fixture
def on_gpu(small_tdt: Path) -> ImageGenerator:
    """Return a generator that believes to be on a GPU."""
    generator = open_generator(ModelFile.open(small_tdt), ModelOptions(backend="reference"))
    cuda = torch.device("cuda:0")
    model = dataclasses.replace(generator.model, runs_on=gpu, precision="int8", device=cuda)
    return dataclasses.replace(generator, model=model, device=cuda)


def set_free(patch: Patch, free: int) -> None:
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    patch.setattr(torch.cuda, "get_device_name", lambda device: "Small GPU")


def test_the_batch_is_what_a_gpu_has_room_for(on_gpu: ImageGenerator, monkeypatch: Patch) -> None:
    config = on_gpu.model.info.config
    set_free(monkeypatch, sampling_bytes(config, 8, "int8"))
    assert on_gpu.batch_size(4, guided=True) == 4
    assert on_gpu.batch_size(8, guided=False) == 8
    assert on_gpu.batch_size(None, guided=False) == 8
    assert on_gpu.batch_size(None, guided=True) == 4
    with pytest.raises(EnvironmentProblem, match=r"Fix: --batch-size 4\.") as error:
        on_gpu.batch_size(5, guided=True)
    assert "expected room for 5 images at once (cuda:0)" in str(error.value)
    set_free(monkeypatch, 100)
    for asked in (1, None):
        with pytest.raises(EnvironmentProblem, match=r"room for one image .*--device cpu") as error:
            on_gpu.batch_size(asked, guided=True)
        assert error.value.exit_code == 4
    on_cpu = dataclasses.replace(on_gpu, model=dataclasses.replace(on_gpu.model, runs_on=cpu))
    assert on_cpu.batch_size(10**9, guided=True) == 10**9
    assert on_cpu.batch_size(None, guided=True) == 8


def test_memory_that_runs_out_while_sampling(on_gpu: ImageGenerator, monkeypatch: Patch) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 ...")

    on_cpu = ImageNoise(0, [0], (1, 28, 28))
    monkeypatch.setattr(generate, "ImageNoise", lambda *_: on_cpu)
    monkeypatch.setattr(generate, "sample", run_out)
    set_free(monkeypatch, 10**8)
    sampler = SamplerConfig("ddim", 2)
    with pytest.raises(
        EnvironmentProblem, match=r"for 5 images at once.*--batch-size 2\."
    ) as error:
        list(on_gpu.images(range(5), sampler, 0, 5))
    assert "got 0.10 GB free of 80.00 GB (cuda:0, Small GPU)" in str(error.value)
    with pytest.raises(EnvironmentProblem, match=r"for 1 images.* use --device cpu"):
        list(on_gpu.images(range(1), sampler, 0, 1))


def test_labels_lie_where_the_network_wants_them(
    on_gpu: ImageGenerator, monkeypatch: Patch
) -> None:
    """On the gpu backend the CPU, on others beside the noise."""
    seen: list[tuple[str, str]] = []

    def sample(network: object, config: object, z: torch.Tensor, y: torch.Tensor, *_: object,
               **__: object) -> torch.Tensor:  # fmt: skip
        seen.append((z.device.type, y.device.type))
        return torch.zeros(z.shape)

    monkeypatch.setattr(generate, "sample", sample)
    meta = torch.device("meta")
    for backend in (gpu, reference):
        model = dataclasses.replace(on_gpu.model, runs_on=backend, device=meta)
        generator = dataclasses.replace(on_gpu, model=model, device=meta)
        list(generator.images([3], SamplerConfig("ddim", 2), 0, 1))
    assert seen == [("meta", "cpu"), ("meta", "meta")]


def test_a_device_that_is_not_there(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("auto") == usable_device(None) == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(EnvironmentProblem, match=r"no usable GPU.*--device cpu, or") as e:
            usable_device(name)
        assert f"got --device {name}; torch {torch.__version__}" in str(e.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EnvironmentProblem, match=r"no such GPU: got --device cuda:2, .*to cuda:1"):
        usable_device("cuda:2")
    for name in ("toaster", "cuda:x"):
        with pytest.raises(UsageError, match="cannot be used"):
            usable_device(name)
