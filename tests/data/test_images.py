"""The five sources of training images, and what they say about bad data."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terdit_cli.data import images
from terdit_cli.data.images import TrainingImages, open_images
from terdit_cli.data.sources import zips
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.system.torchvision_shim import import_vision

NAMES = ["ant/a.png", "ant/b.png", "ant/sub/c.png", "bee/a.png", "bee/z.png", "cow/m.png"]


def png(seed: int, size: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def contents(names: list[str] = NAMES) -> dict[str, bytes]:
    return {name: png(seed) for seed, name in enumerate(names)}


def make_folder(root: Path, data: dict[str, bytes]) -> Path:
    for name, value in data.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(value)
    return root


def make_zip(path: Path, data: dict[str, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in data.items():
            archive.writestr(prefix + name, value)
    return path


def make_source(kind: str, root: Path, data: dict[str, bytes]) -> Path:
    return make_folder(root / "set", data) if kind == "folder" else make_zip(root / "set.zip", data)


both = pytest.mark.parametrize("kind", ["folder", "zip"])


@pytest.fixture(params=["memory", "lazy"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "lazy":
        monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    return str(request.param)


# --- embedded -----------------------------------------------------------------------------------


def test_embedded_images_are_fashion_mnist() -> None:
    everything = open_images("embedded", None, 28, split="all")
    assert len(everything) == 10_000
    assert everything.class_names[0] == "T-shirt/top"
    assert everything.class_names[9] == "Ankle boot"
    # The first labels of Fashion-MNIST's training split.
    assert everything.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert everything.labels.dtype == np.int64
    assert np.bincount(everything.labels).min() > 900
    assert everything.images is not None
    assert everything.images.shape == (10_000, 28, 28, 3)
    assert np.array_equal(everything.images[..., 0], everything.images[..., 2])
    train, heldout = (open_images("embedded", None, 28, split=s) for s in (None, "heldout"))
    assert (len(train), len(heldout)) == (9_000, 1_000)
    assert np.array_equal(train.read(0), everything.read(0))
    assert np.array_equal(heldout.read(0), everything.read(9_000))
    assert heldout.labels.tolist() == everything.labels[9_000:].tolist()


def test_embedded_images_resize() -> None:
    assert open_images("embedded", None, 16, split="heldout").read(3).shape == (16, 16, 3)


# --- folder and zip -----------------------------------------------------------------------------


@both
def test_class_folders(kind: str, tmp_path: Path, storage: str) -> None:
    extra = {"readme.txt": b"x", "ant/notes.txt": b"x", "ant/._a.png": b"x", "stray.png": b"x"}
    extra["__MACOSX/ant/a.png"] = extra[".cache/ant/a.png"] = b"x"
    source = open_images(kind, make_source(kind, tmp_path, contents() | extra), 12)
    assert source.class_names == ["ant", "bee", "cow"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert [source.name(i) for i in range(len(source))] == NAMES
    assert (source.images is None) == (storage == "lazy")
    for index, data in enumerate(contents().values()):
        expected = np.asarray(Image.open(io.BytesIO(data)))
        assert np.array_equal(source.read(index), expected)


def test_links_back_are_not_followed(tmp_path: Path) -> None:
    make_folder(tmp_path, contents(["a/1.png", "b/2.png"]))
    (tmp_path / "a" / "again").symlink_to(".")
    (tmp_path / "b" / "up").symlink_to("..")
    source = open_images("folder", tmp_path, 12)
    assert [source.name(index) for index in range(len(source))] == ["a/1.png", "b/2.png"]


@pytest.mark.usefixtures("storage")
def test_a_line_of_pixels_is_not_blown_up(tmp_path: Path) -> None:
    """To a short side of 256 it would have 3.9 thousand million pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(stream, "PNG")
    make_folder(tmp_path, {"a/1.png": png(1, 256), "a/2.png": stream.getvalue()})
    source = open_images("folder", tmp_path, 256, "skip")
    assert all(np.array_equal(source.read(i), source.read(0)) for i in range(len(source)))
    assert source.skipped == ["a/2.png"]
    with pytest.raises(
        InputFileError, match=r"1 x 60000 pixels, which would become 256 x 15360000"
    ):
        open_images("folder", tmp_path, 256).read(1)


def test_folder_order_is_torchvisions(tmp_path: Path) -> None:
    names = ["b/1.png", "b/10.png", "b/2.png", "a-1/x.png", "a/y.png", "a/B.png", "a/s/0.png"]
    make_folder(tmp_path, contents(names))
    theirs = import_vision("torchvision.datasets").ImageFolder(str(tmp_path))
    ours = open_images("folder", tmp_path, 12)
    assert ours.class_names == theirs.classes
    assert ours.labels.tolist() == theirs.targets
    samples = [os.path.relpath(path, tmp_path) for path, _ in theirs.samples]
    assert [ours.name(i) for i in range(len(ours))] == samples
    zipped = open_images("zip", make_zip(tmp_path / "x.zip", contents(names)), 12)
    assert zipped.class_names == theirs.classes
    assert zipped.labels.tolist() == theirs.targets


@pytest.mark.parametrize("prefix", ["", "top/", "data/train/"])
def test_zip_with_wrapping_folders(prefix: str, tmp_path: Path) -> None:
    data = {name: png(1) for name in ["ant/a.png", "bee/b.png"]}
    source = open_images("zip", make_zip(tmp_path / "x.zip", data, prefix), 12)
    assert source.class_names == ["ant", "bee"]
    assert source.name(0) == prefix + "ant/a.png"


def test_zip_with_one_class_and_with_backslashes(tmp_path: Path) -> None:
    data = {"ant\\a.png": png(0), "ant\\b.png": png(1)}
    source = open_images("zip", make_zip(tmp_path / "x.zip", data), 12)
    assert source.class_names == ["ant"]
    assert len(source) == 2


def test_zip_survives_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    names = [f"c/{index:03}.png" for index in range(40)]
    source = open_images("zip", make_zip(tmp_path / "x.zip", contents(names)), 12)
    expected = [source.read(index) for index in range(40)]  # opens the parent's handle
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            same = all(
                np.array_equal(source.read(i), expected[i]) for _ in range(5) for i in range(40)
            )
            os._exit(0 if same else 1)
        children.append(child)
    for _ in range(5):
        for index in range(40):
            assert np.array_equal(source.read(index), expected[index])
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


@both
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({}, "no images found: got nothing"),
        ({"readme.txt": b"x"}, "no images found: got 1 file of other kinds"),
        ({"a.png": png(0)}, "no training images with classes: got 1 image without classes"),
        ({"ant/notes.txt": b"x"}, "no images found: got 1 file of other kinds"),
    ],
)
def test_no_images(kind: str, data: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = make_source(kind, tmp_path, data)
    with pytest.raises(InputFileError, match="images") as caught:
        open_images(kind, path, 12)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_class_folder_without_images(tmp_path: Path) -> None:
    make_folder(tmp_path, contents() | {"dog/notes.txt": b"x"})
    with pytest.raises(InputFileError, match=r"without images: got dog .*Fix: add images"):
        open_images("folder", tmp_path, 12)


@pytest.mark.parametrize("source", ["folder", "zip", "cifar10", "fashion-mnist"])
def test_missing_path(source: str, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(InputFileError, match="not found: got nothing there") as caught:
        open_images(source, path, 12)
    assert str(path) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_folder_given_as_zip_and_zip_as_folder(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"got a folder.*Fix: set data.source=folder"):
        open_images("zip", tmp_path, 12)
    with pytest.raises(InputFileError, match="got a file, expected a folder"):
        open_images("folder", make_zip(tmp_path / "x.zip", contents()), 12)


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_corrupt_zip(damage: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", contents())
    data = path.read_bytes()
    path.write_bytes({"text": b"hello", "cut": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(InputFileError, match="cannot open the zip") as caught:
        open_images("zip", path, 12)
    assert str(path) in str(caught.value)
    assert "Fix: copy or download" in str(caught.value)


def test_zip_member_over_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "x.zip", contents())
    monkeypatch.setattr(zips, "MAX_FILE_BYTES", 20)
    with pytest.raises(InputFileError, match=r"6 of 6 images unreadable.*over 20"):
        open_images("zip", path, 12)


def test_zip_members_with_wrong_crc_or_encryption_flag(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", contents())
    data = bytearray(path.read_bytes())
    first = contents()["ant/a.png"]
    data[data.index(first) + len(first) // 2] ^= 255
    central = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)  # of ant/b.png
    data[central + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(InputFileError, match=r"2 of 6 images unreadable: got ant/a.png, ant/b.png"):
        open_images("zip", path, 12)


# --- unreadable images among good ones ------------------------------------------------------------


@both
def test_bad_images_are_named_and_counted(kind: str, tmp_path: Path) -> None:
    data = contents()
    data["ant/b.png"] = data["ant/b.png"][:100]
    data["bee/z.png"] = b"no image"
    path = make_source(kind, tmp_path, data)
    with pytest.raises(InputFileError) as caught:
        open_images(kind, path, 12)
    message = str(caught.value)
    assert "2 of 6 images unreadable: got ant/b.png, bee/z.png; the first: " in message
    assert "truncated" in message
    assert str(path) in message
    assert "data.on_bad_image=skip" in message


def test_many_bad_images_are_cut_to_ten(tmp_path: Path) -> None:
    names = [f"ant/{index:02}.png" for index in range(14)]
    make_folder(tmp_path, {"ant/zz.png": png(0)} | dict.fromkeys(names, b"x"))
    with pytest.raises(InputFileError, match=r"14 of 15 .*ant/09.png, and 4 more; the first"):
        open_images("folder", tmp_path, 12)


@both
def test_skip_leaves_bad_images_out(kind: str, tmp_path: Path) -> None:
    data = contents() | {"ant/b.png": b"x", "cow/m.png": b""}
    source = open_images(kind, make_source(kind, tmp_path, data), 12, "skip")
    assert source.skipped == ["ant/b.png", "cow/m.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.class_names == ["ant", "bee", "cow"]
    assert source.name(1) == "ant/sub/c.png"
    assert np.array_equal(source.read(1), np.asarray(Image.open(io.BytesIO(data["ant/sub/c.png"]))))


def test_skip_with_nothing_left(tmp_path: Path) -> None:
    make_folder(tmp_path, dict.fromkeys(NAMES, b"x"))
    with pytest.raises(InputFileError, match="6 of 6") as caught:
        open_images("folder", tmp_path, 12, "skip")
    assert "on_bad_image" not in str(caught.value)


@both
def test_lazy_skip_takes_the_next_of_the_class(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    data = contents() | {"ant/sub/c.png": b"x", "ant/a.png": b"x", "cow/m.png": b"x"}
    source = open_images(kind, make_source(kind, tmp_path, data), 12, "skip")
    survivor = np.asarray(Image.open(io.BytesIO(data["ant/b.png"])))
    assert np.array_equal(source.read(2), survivor)  # past the end of the class: from its start
    assert np.array_equal(source.read(0), survivor)
    assert np.array_equal(source.read(0), survivor)
    assert sorted(source.skipped) == ["ant/a.png", "ant/sub/c.png"]
    with pytest.raises(InputFileError, match=r"class 'cow' has no readable image.*cow/m.png"):
        source.read(5)


def test_lazy_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    make_folder(tmp_path, contents() | {"bee/a.png": b"x"})
    source = open_images("folder", tmp_path, 12)
    source.read(0)
    with pytest.raises(InputFileError, match=r"bee/a.png"):
        source.read(3)
    (tmp_path / "ant/a.png").unlink()
    os.mkfifo(tmp_path / "ant/a.png")  # reading it would block for ever
    with pytest.raises(InputFileError, match=r"no regular file.*ant/a.png"):
        source.read(0)


def test_progress_counts_every_image(tmp_path: Path) -> None:
    names = [f"c/{index:03}.png" for index in range(150)]
    make_folder(tmp_path, contents(names))
    calls: list[tuple[int, int]] = []
    open_images("folder", tmp_path, 4, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (150, 150)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


# --- CIFAR-10 -----------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny CIFAR-10 in torchvision's layout, its MD5 sums taken for the published ones."""
    dataset = import_vision("torchvision.datasets").CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, value: object) -> str:
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(seed: int, count: int) -> dict[str, object]:
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [(seed + i) % 2 for i in range(count)]}

    train = [["data_batch_1", write("data_batch_1", batch(0, 5))]]
    monkeypatch.setattr(dataset, "train_list", train)
    monkeypatch.setattr(dataset, "test_list", [["test_batch", write("test_batch", batch(1, 3))]])
    md5 = write("batches.meta", {"label_names": ["airplane", "truck"]})
    monkeypatch.setattr(
        dataset, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5}
    )
    return folder


def test_cifar10(cifar: Path) -> None:
    source = open_images("cifar10", cifar.parent, 32, split="all")
    assert len(source) == 8
    assert source.class_names == ["airplane", "truck"]
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    batch = pickle.loads((cifar / "data_batch_1").read_bytes())
    assert np.array_equal(source.read(2), batch["data"][2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert len(open_images("cifar10", cifar, 16)) == 5  # the inner folder will do, too
    assert len(open_images("cifar10", cifar, 16, split="heldout")) == 3


def test_altered_cifar10_is_not_unpickled(cifar: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (cifar / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputFileError, match=r"MD5.*Fix: unpack the archive again") as caught:
        open_images("cifar10", tmp_path, 32)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


# --- the full Fashion-MNIST -----------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def make_fashion(root: Path, gzipped: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", 7), ("t10k", 4)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, data in (
            ("images-idx3", idx(pixels)),
            ("labels-idx1", idx(np.arange(count) % 10)),
        ):
            path = root / f"{name}-{kind}-ubyte{'.gz' if gzipped else ''}"
            path.write_bytes(gzip.compress(data) if gzipped else data)
    return root


@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("gzipped", [True, False])
def test_full_fashion_mnist(inner: str, gzipped: bool, tmp_path: Path) -> None:
    make_fashion(tmp_path / inner, gzipped)
    before = sorted(tmp_path.rglob("*"))
    lengths = [
        len(open_images("fashion-mnist", tmp_path, 28, split=split))
        for split in (None, "heldout", "all")
    ]
    assert lengths == [7, 4, 11]
    assert sorted(tmp_path.rglob("*")) == before  # nothing unpacked into the user's folder


def test_fashion_mnist_agrees_with_torchvision(tmp_path: Path) -> None:
    make_fashion(tmp_path / "FashionMNIST/raw", gzipped=False)
    theirs = import_vision("torchvision.datasets").FashionMNIST(tmp_path, download=False)
    ours = open_images("fashion-mnist", tmp_path, 28)
    assert ours.class_names == theirs.classes
    assert ours.images is not None
    assert np.array_equal(ours.images[..., 1], theirs.data.numpy())
    assert ours.labels.tolist() == theirs.targets.tolist()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "starts with"),
        (b"hello world, hello world", "68 65 6c 6c"),
        (idx(np.zeros((7, 28, 28)))[:-1], "5487 of 5488 values"),
        (idx(np.zeros((7, 28, 28))) + b"x", "more than 5488 values"),
        (idx(np.zeros((7, 28))), "starts with 00 00 08 02"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "bytes"),
        (idx(np.zeros((6, 28, 28))), "6 images and 7 labels"),
        (idx(np.zeros((7, 20, 28))), "images of 20 x 28"),
    ],
)
def test_broken_idx(data: bytes, reason: str, tmp_path: Path) -> None:
    make_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(data))
    with pytest.raises(InputFileError) as caught:
        open_images("fashion-mnist", tmp_path, 28)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "Fix: " in str(caught.value)


def test_broken_gzip_and_missing_idx(tmp_path: Path) -> None:
    make_fashion(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    for data in (b"no gzip at all", path.read_bytes()[:-9]):
        path.write_bytes(data)
        with pytest.raises(InputFileError, match=r"cannot read the idx file.*train-labels"):
            open_images("fashion-mnist", tmp_path, 28)
    path.unlink()
    with pytest.raises(InputFileError, match=r"neither train-labels-idx1-ubyte.gz nor"):
        open_images("fashion-mnist", tmp_path, 28)
    make_fashion(tmp_path)
    path.write_bytes(gzip.compress(idx(np.full(7, 10))))
    with pytest.raises(InputFileError, match="got label 10"):
        open_images("fashion-mnist", tmp_path, 28)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("embeded", None, 28), ["'embeded'", "did you mean 'embedded'", "data.source"]),
        (("folder", None, 28), ["needs a path", "Fix: set data.path"]),
        (("embedded", Path("x"), 28), ["takes no path", "got x", "Fix: remove data.path"]),
        (("embedded", None, 28, "ignore"), ["'ignore'", "error or skip"]),
        (("embedded", None, 28, "error", "test"), ["'test'", "train, heldout, all"]),
        (("zip", Path("x"), 28, "error", "train"), ["'train'", "Fix: leave the split out"]),
        (("embedded", None, 0), ["got 0", "at least 1 pixel"]),
    ],
)
def test_bad_arguments(arguments: tuple, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        open_images(*arguments)
    for part in parts:
        assert part in str(caught.value)


def test_sources_share_one_interface() -> None:
    source = open_images("embedded", None, 28, split="heldout")
    assert isinstance(source, TrainingImages)
    assert source.skipped == []
    assert source.image_size == 28
    assert source.name(3) == "Fashion-MNIST subset image 3"


def test_interruption_stops_the_decoding(tmp_path: Path) -> None:
    names = [f"c/{index:03}.png" for index in range(200)]
    make_folder(tmp_path, contents(names))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images("folder", tmp_path, 4, on_progress=interrupt)
