"""Prepared latents: the files, the source that the loader reads, the space, and every damage."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from terdit_cli.data.latent_shards import (
    LatentIndex,
    LatentPlan,
    damage_of,
    read_index,
    write_json,
    write_shard,
)
from terdit_cli.data.latents import LatentSource, LatentSpace
from terdit_cli.data.loader import BatchLoader
from terdit_cli.data.order import batch_indices, flip_mask
from terdit_cli.data.vae import sample_moments
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.recipe import DataSection, parse_recipe

COUNT, SHARD = 37, 10  # the last shard has 7 images
SHAPE = [4, 2, 2]
SCALE = 0.5


def plan(**changes: Any) -> LatentPlan:
    values: dict[str, Any] = {
        "image_size": 16,
        "latent_shape": SHAPE,
        "mirrored": True,
        "vae": "vae",
        "encoder_sha256": "0" * 64,
        "scale_factor": SCALE,
        "class_names": ["even", "odd"],
        "listed": COUNT,
        "listing_sha256": "1" * 64,
        "images_a_shard": SHARD,
        "batch_size": 2,
        "data": {},
        "data_sha256": "2" * 64,
    }
    return LatentPlan(**(values | changes))


def moments(**changes: Any) -> torch.Tensor:
    """bfloat16 [N, V, 2C, h, w]: no two rows are alike."""
    generator = torch.Generator().manual_seed(0)
    shape = plan(**changes).moments_shape(COUNT)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def make(folder: Path, skip: frozenset[int] = frozenset(), **changes: Any) -> Path:
    """Write a finished folder of made-up latents, without the images `skip`."""
    folder.mkdir()
    described, values = plan(**changes), moments(**changes)
    shards, total = [], 0
    for number in range(described.num_shards):
        kept = [index for index in described.images_of(number) if index not in skip]
        names = [f"image {index}" for index in described.images_of(number) if index in skip]
        bits = values[kept].view(torch.uint16).numpy()
        labels = np.array(kept, dtype=np.int64) % 2
        shards.append(write_shard(folder, number, bits, labels, names))
        total += len(kept)
    write_json(
        folder / "index.json", LatentIndex(**described.model_dump(), images=total, shards=shards)
    )
    return folder


def section(folder: Path, **changes: Any) -> DataSection:
    values = {
        "source": "latents", "path": folder, "image_size": 16, "vae": "vae", "scale_factor": SCALE,
    }  # fmt: skip
    return DataSection(**(values | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "latents")


# --- files ----------------------------------------------------------------------------------------


def test_shards_are_safetensors(folder: Path) -> None:
    values = moments()
    for number in range(4):
        path = folder / f"shard-0000{number}.safetensors"
        tensors = load_file(path)
        here = slice(number * SHARD, number * SHARD + SHARD)
        assert torch.equal(tensors["moments"], values[here])
        assert tensors["labels"].tolist() == [index % 2 for index in range(COUNT)][here]
        header = int.from_bytes(path.read_bytes()[:8], "little")
        tail = tensors["moments"].numel() * 2
        assert header % 8 == 0
        assert (path.stat().st_size - tail) % 4096 == 0  # rows of whole pages begin at one


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("latent_shape", [[4, 32, 32], [1, 3, 5]])
def test_sizes_are_known_before(mirrored: bool, latent_shape: list[int], tmp_path: Path) -> None:
    folder = make(tmp_path / "latents", mirrored=mirrored, latent_shape=latent_shape)
    index = read_index(folder)
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert sizes == [record.bytes for record in index.shards]
    assert sum(sizes) == index.total_bytes


def test_imagenet_in_two_views_is_42_gigabytes() -> None:
    imagenet = plan(latent_shape=[4, 32, 32], listed=1_280_000, images_a_shard=7_792)
    assert 1_280_000 * 2 * 2 * 4 * 32 * 32 * 2 == 41_943_040_000
    assert imagenet.total_bytes == pytest.approx(41_943_040_000, rel=2e-3)
    assert imagenet.shard_bytes(7_792) == pytest.approx(256e6, rel=3e-3)


# --- the source -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [True, False])
def test_batches_follow_the_order(folder: Path, flip: bool) -> None:
    source, values = LatentSource(section(folder, flip=flip)), moments()
    assert len(source) == COUNT
    assert source.class_names == ["even", "odd"]
    with BatchLoader(source, 5, 8, flip) as loader:
        for step, (rows, labels) in enumerate(islice(loader.iterate(), 12)):
            indices = batch_indices(COUNT, 5, step, 8)
            views = flip_mask(5, step, 8).astype(int) if flip else np.zeros(8, dtype=int)
            assert rows.dtype == torch.bfloat16
            assert torch.equal(rows, values[indices, views])
            assert labels.tolist() == (indices % 2).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_an_epoch_over_ranks_shows_each_image_once(folder: Path, ranks: int) -> None:
    """37 images divide by none: the union of all ranks over 37 steps is 60 whole epochs."""
    source, values = LatentSource(section(folder, flip=False)), moments()
    position = {bytes(row.view(torch.uint8).numpy()): k for k, row in enumerate(values[:, 0])}
    seen = []
    for rank in range(ranks):
        with BatchLoader(source, 1, 60, False, rank, ranks) as loader:
            for rows, _ in islice(loader.iterate(), COUNT):
                seen += [position[bytes(row.view(torch.uint8).numpy())] for row in rows]
    assert np.bincount(seen).tolist() == [60] * COUNT


def test_resume_is_arithmetic(folder: Path) -> None:
    source = LatentSource(section(folder))
    with BatchLoader(source, 1, 6, True, workers=3) as loader:
        whole = list(islice(loader.iterate(), 20))
    with BatchLoader(LatentSource(section(folder)), 1, 6, True) as loader:
        for (rows, labels), (others, other_labels) in zip(
            whole[13:], islice(loader.iterate(13), 7), strict=True
        ):
            assert torch.equal(rows, others)
            assert torch.equal(labels, other_labels)


def test_skipped_images_leave_no_gap(tmp_path: Path) -> None:
    skip = frozenset({0, 11, 12, *range(20, 30)})  # one shard is empty
    source = LatentSource(section(make(tmp_path / "latents", skip), flip=False))
    kept = [index for index in range(COUNT) if index not in skip]
    assert len(source) == len(kept)
    rows = source.allocate(len(kept))
    source.fill(rows, np.arange(len(kept)), np.zeros(len(kept), dtype=bool))
    assert torch.equal(rows, moments()[kept, 0])
    assert source.labels.tolist() == [index % 2 for index in kept]


# --- the space ------------------------------------------------------------------------------------


def test_latents_are_drawn_from_the_moments(folder: Path) -> None:
    space = LatentSpace(section(folder), torch.device("cpu"))
    assert space.latent_shape(16) == (4, 2, 2)
    rows = moments()[:, 1]
    mean, log_variance = rows.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    expected = SCALE * (mean + torch.exp(log_variance / 2) * noise)
    drawn = space.encode(rows, noise)
    assert drawn.dtype == torch.float32
    assert torch.allclose(drawn, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(space.encode(rows), SCALE * mean)
    assert torch.equal(drawn, sample_moments(rows, SCALE, noise))


# --- another recipe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 32}, ["got data.image_size=32", "expected data.image_size=16"]),
        ({"scale_factor": 0.2}, ["data.scale_factor=0.2", "data.scale_factor=0.5"]),
    ],
)
def test_latents_of_another_recipe(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        LatentSource(section(folder, **changes))
    for word in [*words, "index.json", "Fix: change the recipe, or prepare"]:
        assert word in str(caught.value)


def test_mirrors_that_were_not_prepared(tmp_path: Path) -> None:
    folder = make(tmp_path / "latents", mirrored=False)
    with pytest.raises(UsageError, match=r"got data.flip=True, expected data.flip=False"):
        LatentSource(section(folder, flip=True))
    assert len(LatentSource(section(folder, flip=False))) == COUNT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "data.vae is needed for source 'latents'"),
        ({"split": "train"}, "add data.split=null"),
        ({"path": None}, "data.path is needed"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    data = {"source": "latents", "path": "latents", "vae": "vae"} | changes
    with pytest.raises(UsageError, match=message):
        parse_recipe({"name": "x", "data": data}, "here")


# --- damage ---------------------------------------------------------------------------------------


def test_not_prepared_and_not_finished(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"got no index.json.*Fix: set data.path"):
        LatentSource(section(tmp_path))
    write_json(tmp_path / "prepare.json", plan())
    with pytest.raises(InputFileError, match=r"not finished.*Fix: run the same `terdit prepare`"):
        LatentSource(section(tmp_path))


def test_truncated_shard(folder: Path) -> None:
    path = folder / "shard-00002.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputFileError) as caught:
        LatentSource(section(folder))
    for word in (f"got {size - 1} bytes", f"expected {size} bytes", str(path), "delete it and run"):
        assert word in str(caught.value)


def test_missing_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(InputFileError, match="No such file"):
        LatentSource(section(folder))


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_flipped_bit_stops_the_batch_that_has_it(folder: Path) -> None:
    path = folder / "shard-00003.safetensors"
    flip_byte(path, -1)  # the mirror of image 36
    source = LatentSource(section(folder))
    assert damage_of(folder, source.index.shards[2]) is None
    assert "SHA-256" in str(damage_of(folder, source.index.shards[3]))
    rows, indices = source.allocate(2), np.array([0, 36])
    source.fill(rows, indices, np.array([True, False]))
    with pytest.raises(InputFileError) as caught:
        source.fill(rows, indices, np.array([False, True]))
    for word in ("wrong checksum in image 6", str(path), "is damaged", "Fix: copy it again"):
        assert word in str(caught.value)
    with BatchLoader(source, 0, COUNT, True) as loader, pytest.raises(InputFileError):
        list(islice(loader.iterate(), 20))


@pytest.mark.parametrize(("offset", "got"), [(0, "another header"), (30, "another header")])
def test_flipped_header(folder: Path, offset: int, got: str) -> None:
    flip_byte(folder / "shard-00000.safetensors", offset)
    with pytest.raises(InputFileError, match=got):
        LatentSource(section(folder))


def test_label_of_no_class(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip_byte(path, start + 4)
    with pytest.raises(InputFileError, match="got labels of no class, expected 0 to 1"):
        LatentSource(section(folder))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"version": 2}, "version"),
        ({"images": 38}, "another number of images"),
        ({"latent_shape": [4, 2]}, "latent_shape"),
        ({"latent_shape": [4, 2, 1 << 40]}, "latent_shape"),
        ({"latent_shape": [4, 2, 4]}, "has other bytes"),
        ({"listed": 1 << 39, "images_a_shard": 1}, "expected 549755813888 shards"),
        ({"encoder_sha256": "x"}, "encoder_sha256"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_index_that_contradicts_itself(folder: Path, changes: dict[str, Any], got: str) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputFileError, match=got) as caught:
        read_index(folder)
    assert str(path) in str(caught.value)
    assert "prepare the latents again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": "terdit-latents"}'])
def test_index_that_is_none(folder: Path, text: str) -> None:
    (folder / "index.json").write_text(text)
    with pytest.raises(InputFileError, match="cannot read the description"):
        read_index(folder)
