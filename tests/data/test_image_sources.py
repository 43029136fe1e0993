"""Every kind of image source: what trains can be scored, what is scored can train."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data import images
from terdit_cli.data.image_sources import SOURCES, open_image_set, open_labelled
from terdit_cli.data.images import open_images
from terdit_cli.errors import InputFileError, UsageError

SIDE, COUNT = 28, 12
LABELS = [index % 3 for index in range(COUNT)]
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


def png(index: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(stream, "PNG")
    return stream.getvalue()


def named() -> dict[str, bytes]:
    return {f"c{label}/{index:02}.png": png(index) for index, label in enumerate(LABELS)}


def folder(root: Path) -> Path:
    for name, content in named().items():
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(content)
    return root / "set"


def zipped(root: Path) -> Path:
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name, content in named().items():
            archive.writestr(name, content)
    return root / "set.zip"


def tars(root: Path) -> Path:
    with tarfile.open(root / "set.tar", "w") as archive:
        for name, content in sorted(named().items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root / "set.tar"


def npz(root: Path) -> Path:
    order = np.argsort(LABELS, kind="stable")
    np.savez_compressed(root / "set.npz", arr_0=PIXELS[order], arr_1=np.array(LABELS)[order])
    return root / "set.npz"


def parquet(root: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    order = np.argsort(LABELS, kind="stable").tolist()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": png(index), "path": None} for index in order], type=kind)
    label = {"_type": "ClassLabel", "names": ["c0", "c1", "c2"]}
    noted = json.dumps({"info": {"features": {"label": label}}})
    table = pa.table({"image": column, "label": [LABELS[index] for index in order]})
    pq.write_table(table.replace_schema_metadata({"huggingface": noted}), root / "train.parquet")
    return root / "train.parquet"


MADE: dict[str, Callable[[Path], Path]] = {
    "folder": folder, "zip": zipped, "tars": tars, "npz": npz, "parquet": parquet,
}  # fmt: skip


def test_every_source_is_tried_here() -> None:
    assert set(SOURCES) == {*MADE, "embedded", "cifar10", "fashion-mnist"}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("limit", [None, 0])
def test_trained_on_and_scored_alike(
    kind: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images, classes and order, read one by one in either way and in any order."""
    if limit is not None and kind != "npz":  # a compressed one is not read lazily
        monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    path = MADE[kind](tmp_path)
    order = np.argsort(LABELS, kind="stable")
    trained = open_images(kind, path, SIDE)
    scored = open_image_set(str(path))
    assert trained.labels.tolist() == scored.labels.tolist() == sorted(LABELS)
    names = ["0", "1", "2"] if kind == "npz" else ["c0", "c1", "c2"]
    assert trained.class_names == scored.class_names == names
    for index in (11, 0, 7, 3):
        assert np.array_equal(trained.read(index), PIXELS[order[index]])
        assert np.array_equal(scored.read(index)[0], PIXELS[order[index]])
    assert trained.notes == scored.notes == []


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_published_sets_are_scored_by_their_folder(tmp_path: Path) -> None:
    for name, count in (("train", 12), ("t10k", 11)):
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(PIXELS[:count, :, :, 0]))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    counts = [
        len(open_image_set(f"{tmp_path}{part}")) for part in ("", ":train", ":heldout", ":all")
    ]
    assert counts == [12, 12, 11, 23]
    train, held_out = open_image_set(str(tmp_path)), open_image_set(f"{tmp_path}:heldout")
    assert train.sha256([0, 1]) == held_out.sha256([0, 1])  # of the same pixels here
    assert train.sha256([0, 1]) != train.sha256([0, 2])
    with pytest.raises(UsageError, match=r"no such split: got 'test', expected one of train"):
        open_image_set(f"{tmp_path}:test")


def test_a_colon_in_a_name_is_a_name(tmp_path: Path) -> None:
    made = folder(tmp_path).rename(tmp_path / "2026:train")
    assert len(open_image_set(str(made))) == COUNT
    with pytest.raises(UsageError, match="no such split"):
        open_image_set(f"{made}:heldout")
    with pytest.raises(InputFileError, match="images not found"):
        open_image_set(f"{tmp_path}/nowhere:train")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_strays_are_counted_and_system_folders_are_nothing(kind: str, tmp_path: Path) -> None:
    extra = {
        "c0/@eaDir/00.png/SYNOPHOTO_THUMB_B.png": png(0), "@eaDir/x.png": png(0),
        "lost+found/x.png": png(0), "__MACOSX/c0/00.png": png(0), "c1/Thumbs.db": b"",
        "c0/a.heic": b"", "c1/b.HEIC": b"", "c1/notes.txt": b"", "c2/photo.jfif": png(1),
    }  # fmt: skip
    root = folder(tmp_path)
    for name, content in extra.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "cover.png").write_bytes(png(0))
    path = root
    if kind == "zip":
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(root.rglob("*")):
                archive.write(file, file.relative_to(root).as_posix())
    found = open_labelled(kind, path)
    assert len(found) == COUNT + 1
    assert found.class_names == ["c0", "c1", "c2"]
    assert found.notes == [
        f"{path}: 4 files left out that are not read as images "
        "(2 .heic, 1 .txt, 1 in no class folder)"
    ]
    scored = open_image_set(str(path))
    assert len(scored) == COUNT + 2
    assert scored.classes is None  # the cover has no class
    assert "3 files left out" in scored.notes[0]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_are_no_classes(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            (root / part / label / "1.png").write_bytes(png(0))
    path = root
    if kind == "zip":
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(root.rglob("*.png")):
                archive.write(file, file.relative_to(root).as_posix())
    with pytest.raises(InputFileError) as caught:
        open_labelled(kind, path)
    assert "got train, val" in str(caught.value)
    assert f"data.path={path}/train" in str(caught.value)
    if kind == "folder":
        assert open_labelled(kind, root / "train").class_names == ["cat", "dog"]


def test_npz_without_labels_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "x.npz", PIXELS)
    with pytest.raises(InputFileError, match=r"without labels.*integers \[12\] under arr_1"):
        open_images("npz", tmp_path / "x.npz", SIDE)
    assert open_image_set(str(tmp_path / "x.npz")).classes is None
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    with pytest.raises(InputFileError, match=r"Fix: save them with numpy.savez, uncompressed"):
        open_images("npz", npz(tmp_path), SIDE)
    np.savez(tmp_path / "y.npz", PIXELS, np.array(LABELS))
    lazy = open_images("npz", tmp_path / "y.npz", SIDE)
    assert np.array_equal(lazy.read(5), PIXELS[5])
