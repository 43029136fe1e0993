"""Images by number: their classes, and the same image whoever draws it beside whichever others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from terdit_cli.commands import generate
from terdit_cli.commands.generate import ImageGenerator, Labels, class_of, open_generator
from terdit_cli.diffusion.sampler import SamplerConfig
from terdit_cli.errors import EnvironmentProblem
from terdit_cli.runtime import cpu
from terdit_cli.runtime.gpu_step import step_bytes


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
    generator = open_generator(small_tdt, backend, "cpu", activations=activations)
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


# A GPU with too little memory


@pytest.fixture
def on_gpu(small_tdt: Path) -> ImageGenerator:
    """Return a generator that believes to be on a GPU."""
    generator = open_generator(small_tdt, "reference")
    model = dataclasses.replace(generator.model, backend="gpu", precision="int8")
    return dataclasses.replace(generator, model=model, device=torch.device("cuda:0"))


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(
    on_gpu: ImageGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_gpu.model.info.config
    free = step_bytes(config, 14, "int8")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    on_gpu.require_memory(7, guided=True)
    on_gpu.require_memory(14, guided=False)
    with pytest.raises(EnvironmentProblem, match="Fix: --batch-size 7") as error:
        on_gpu.require_memory(8, guided=True)
    assert "for 8 images at once" in str(error.value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 80e9))
    with pytest.raises(EnvironmentProblem, match="Fix: free memory"):
        on_gpu.require_memory(1, guided=True)
    on_cpu = dataclasses.replace(on_gpu.model, backend="cpu")
    dataclasses.replace(on_gpu, model=on_cpu).require_memory(10**9, guided=True)


def test_memory_that_runs_out_while_sampling_and_loading(
    small_tdt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 ...")

    generator = open_generator(small_tdt)
    monkeypatch.setattr(generate, "sample", run_out)
    sampler = SamplerConfig("ddim", 2)
    with pytest.raises(EnvironmentProblem, match="--batch-size 2"):
        list(generator.images(range(5), sampler, 0, 5))
    with pytest.raises(EnvironmentProblem, match="--device cpu"):
        list(generator.images(range(1), sampler, 0, 1))
    monkeypatch.setattr(generate, "load", run_out)
    with pytest.raises(EnvironmentProblem, match="room for the model"):
        open_generator(small_tdt)
