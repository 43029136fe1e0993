"""Blocks of features on disk: whole or not there, in order, of one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.evaluate.feature_shards import FACTS_FILE, FeatureShards

FACTS = {"pipeline": "a", "seed": 0}


def features(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 5)).astype(np.float32)


def filled(folder: Path, count: int = 10, size: int = 4) -> FeatureShards:
    shards = FeatureShards(folder, count, size)
    shards.claim(FACTS)
    for block in reversed(shards.blocks):
        rows = features(count)[block.start : block.end]
        arrays = {"pool": rows, "logits": rows[:, :2]}
        if block.number == 1:
            arrays |= {"kept": np.array([5]), "images": np.full((1, 2, 3, 3), 7, np.uint8)}
        shards.write(block, arrays)
    return shards


def test_blocks_cover_all_images_once() -> None:
    for count in (1, 3, 4, 5, 8, 9):
        blocks = FeatureShards(Path("x"), count, 4).blocks
        assert [image for block in blocks for image in block.images] == list(range(count))
        assert [block.number for block in blocks] == list(range(len(blocks)))


def test_rows_come_in_the_order_of_the_images(tmp_path: Path) -> None:
    shards = filled(tmp_path)
    np.testing.assert_array_equal(np.concatenate(list(shards.stream("pool"))), features(10))
    np.testing.assert_array_equal(shards.rows("logits"), features(10)[:, :2])
    np.testing.assert_array_equal(shards.rows("pool", [0, 3, 4, 9]), features(10)[[0, 3, 4, 9]])
    assert shards.rows("spatial") is None
    assert shards.rows("spatial", [1]) is None
    pictures = shards.pictures()
    assert list(pictures) == [5]
    assert (pictures[5] == 7).all()


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    shards = filled(tmp_path)
    shards.path(shards.blocks[1]).unlink()
    again = FeatureShards(tmp_path, 10, 4)
    assert again.claim(FACTS) == 6
    assert [again.has(block) for block in again.blocks] == [True, False, True]


@pytest.mark.parametrize(("count", "whole"), [(13, [0, 1]), (12, [0, 1]), (8, [0, 1]), (7, [0])])
def test_a_run_of_more_or_fewer_images_goes_on_with_the_full_blocks(
    tmp_path: Path, count: int, whole: list[int]
) -> None:
    filled(tmp_path, 10)
    other = FeatureShards(tmp_path, count, 4)
    assert other.claim(FACTS) == 4 * len(whole)
    assert [block.number for block in other.blocks if other.has(block)] == whole


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_block_counts_as_missing(tmp_path: Path, damage: str) -> None:
    shards = filled(tmp_path)
    path = shards.path(shards.blocks[0])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        place = content.index(features(10)[:4].tobytes()[:16])
        content[place] ^= 1
    else:
        content = bytearray(b"not an archive")
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="run the command again"):
        shards.rows("pool")
    assert not shards.has(shards.blocks[0])
    assert not path.exists()


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(UsageError, match=r"got seed 0, expected seed 1 \(.*--work"):
        FeatureShards(tmp_path, 10, 4).claim(FACTS | {"seed": 1})
    with pytest.raises(UsageError, match="got block 4, expected block 5"):
        FeatureShards(tmp_path, 10, 5).claim(FACTS)
    (tmp_path / FACTS_FILE).write_text("[1]")
    with pytest.raises(InputFileError, match="delete the folder"):
        FeatureShards(tmp_path, 10, 4).claim(FACTS)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match=r"a file where a folder is needed.*file/x"):
        FeatureShards(tmp_path / "file" / "x", 10, 4).claim(FACTS)
