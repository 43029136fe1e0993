"""`terdit prepare`: exact, resumable, the same by any number of processes; and training on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from terdit_cli.cli.prepare_cli import prepare as prepare_verb
from terdit_cli.commands import prepare as command
from terdit_cli.commands import train as train_command
from terdit_cli.data.images import open_images
from terdit_cli.data.latent_shards import read_index
from terdit_cli.data.latents import LatentSpace
from terdit_cli.data.sources import parquet
from terdit_cli.data.vae import VaeSpace
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.recipe import load_recipe
from terdit_cli.system.torchvision_shim import import_vision

ROOT = Path(__file__).parents[2]
COUNT, SIDE, BATCH = 23, 32, 2
# A row is 2 * 8 * 4 * 4 * 2 + 24 = 536 bytes: 4 images a shard, 6 shards.
SHARD_MB = 4.5 * 536 / 1e6
RECIPE = """\
name: tiny-latents
seed: 3
model:
  {{size: nano, n_layers: 1, dim: 32, n_heads: 2, patch_size: 2, multiple_of: 16, num_classes: 3}}
data:
  {{source: folder, path: {images}, image_size: 32, vae: {vae}, scale_factor: 0.5, workers: 1}}
train: {{steps: 3, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
sample: {{every: 3, count: 3, steps: 2}}
logging: {{every: 1}}
checkpoint: {{every: 3}}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_vae(folder: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    vae = import_vision("diffusers").AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.save_pretrained(folder)
    return vae


def make_images(root: Path, side: int = SIDE) -> Path:
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        folder = root / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return root


class Place:
    """A folder with images, a VAE and a recipe of both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = make_images(root / "images")
        make_vae(root / "vae")
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(images=self.images, vae=root / "vae"))

    def prepare(self, out: Path, *words: str) -> command.PrepareResult:
        return command.run(self.recipe, words, out, SHARD_MB, BATCH)

    def start(self, out: Path, processes: int = 1) -> subprocess.Popen[str]:
        """Begin to prepare in processes of their own."""
        script = self.root / "script.py"
        script.write_text(
            "import sys\nfrom pathlib import Path\nfrom terdit_cli.commands.prepare import run\n"
            f"run(Path(sys.argv[1]), (), Path(sys.argv[2]), {SHARD_MB}, {BATCH})\n"
        )
        launch = [sys.executable]
        if processes > 1:
            launch += [str(ROOT / "tests/torchrun.py"), str(processes)]
        return subprocess.Popen(
            [*launch, str(script), str(self.recipe), str(out)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("prepare"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A folder of latents made without a stop; tests must not change it."""
    folder = place.root / "whole"
    result = place.prepare(folder)
    assert (result.images, result.skipped, result.shards, result.shards_made) == (COUNT, 0, 6, 6)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process and return its stderr; a hanging one is ended with its group."""
    try:
        _, error = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return error


# --- exactness ------------------------------------------------------------------------------------


def test_moments_are_those_of_encoding_on_the_fly(place: Place, whole: Path) -> None:
    source = open_images("folder", place.images, SIDE)
    assert source.images is not None
    images = torch.from_numpy(source.images)
    space = VaeSpace(str(place.root / "vae"), 0.5)
    index = read_index(whole)
    tensors = [load_file(whole / record.file) for record in index.shards]
    stored = torch.cat([part["moments"] for part in tensors])
    assert torch.cat([part["labels"] for part in tensors]).tolist() == source.labels.tolist()
    assert index.class_names == ["a", "b", "c"]
    assert index.latent_shape == [4, 4, 4]
    # The same batches as `prepare` took: the images of a batch and then their mirrors.
    for first in range(0, COUNT, BATCH):
        batch = images[first : first + BATCH]
        moments = space.moments(torch.cat([batch, batch.flip(2)])).to(torch.bfloat16)
        assert torch.equal(stored[first : first + BATCH, 0], moments[: len(batch)])
        assert torch.equal(stored[first : first + BATCH, 1], moments[len(batch) :])

    recipe = load_recipe(place.recipe, ["data.source=latents", f"data.path={whole}"])
    prepared = LatentSpace(recipe.data, torch.device("cpu"))
    noise = torch.randn(len(images), 4, 4, 4, generator=torch.Generator().manual_seed(1))
    mirrors = space.encode(images.flip(2), noise)
    assert torch.allclose(prepared.encode(stored[:, 1], noise), mirrors, rtol=0, atol=0.5 * 0.02)
    assert not torch.allclose(prepared.encode(stored[:, 0]), space.encode(images.flip(2)), atol=0.1)


def test_every_image_is_described(place: Place, whole: Path) -> None:
    index = read_index(whole)
    assert index.vae == str(place.root / "vae")
    assert index.scale_factor == 0.5
    assert index.data["path"] == str(place.images)
    assert [record.images for record in index.shards] == [4, 4, 4, 4, 4, 3]
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["index.json", *(f"shard-0000{k}.safetensors" for k in range(6))]


# --- stops and processes --------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_by_two_processes(place: Place, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = place.start(folder)
    end = time.monotonic() + 100
    while not (folder / "shard-00001.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (folder / "index.json").exists()
    assert (folder / "prepare.json").exists()
    left = sorted(path.name for path in folder.glob("shard-*.json"))
    assert len(left) < 6
    host = socket.gethostname()
    leftover = folder / f".shard-00005.safetensors.terdit-{host}-1-0badf00d.tmp"
    leftover.write_bytes(b"half")
    torn = folder / "shard-00005.safetensors"  # without a record: it does not count
    torn.write_bytes(b"half")
    process = place.start(folder, processes=2)
    error = finish(process)
    assert process.returncode == 0, error
    assert "23 images of 32 pixels, each also mirrored" in error
    assert content(folder) == content(whole)


def test_finished_work_is_not_done_again(place: Place, whole: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    result = place.prepare(whole)
    assert result.shards_made == 0
    assert result.images_per_second is None
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_damage_is_named_and_repaired(place: Place, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    checked = command.verify(folder)
    assert (checked.images, checked.shards) == (COUNT, 6)
    cut, flipped, lost = (folder / f"shard-0000{k}.safetensors" for k in (0, 2, 4))
    cut.write_bytes(cut.read_bytes()[:-5])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\xff")
    lost.unlink()
    with pytest.raises(InputFileError) as caught:
        command.verify(folder)
    for word in ("3 of 6 shards", cut.name, "SHA-256", flipped.name, lost.name, "Fix: delete"):
        assert word in str(caught.value)
    assert "shard-00001" not in str(caught.value)
    cut.unlink()
    flipped.unlink()
    assert place.prepare(folder).shards_made == 3
    assert content(folder) == content(whole)


# --- what stands in the way -----------------------------------------------------------------------


def test_folder_of_other_latents(place: Place, whole: Path) -> None:
    with pytest.raises(UsageError) as caught:
        place.prepare(whole, "data.image_size=64", "data.flip=false")
    for word in ("image_size 32", "expected image_size 64", "mirrored True", str(whole), "-o"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.vae=null"], "there is nothing to prepare"),
        (["data.source=latents"], "already trains on latents"),
        (
            ["model.num_classes=5"],
            "got 3 classes \\(a, b, c\\), expected",
        ),
    ],
)
def test_recipes_that_cannot_be_prepared(
    place: Place, words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        place.prepare(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_wrong_sizes(place: Place, tmp_path: Path) -> None:
    for shard_mb, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="positive numbers"):
            command.run(place.recipe, (), tmp_path, shard_mb, batch_size)


def test_vae_without_distributions(place: Place, tmp_path: Path) -> None:
    import_vision("diffusers").AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(tmp_path / "vae")
    with pytest.raises(UsageError, match="an AutoencoderTiny, expected an AutoencoderKL"):
        place.prepare(tmp_path / "out", f"data.vae={tmp_path / 'vae'}")


def test_full_disk_is_seen_before(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1_000_000))
    with pytest.raises(EnvironmentProblem, match=r"1.0 MB free, expected 16.8 MB.*Fix: free disk"):
        place.prepare(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_unreadable_images(place: Place, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(place.images, images)
    (images / "a" / "03.png").write_bytes(b"no image")
    words = [f"data.path={images}"]
    with pytest.raises(InputFileError, match=r"03.png.*on-bad-image"):
        place.prepare(tmp_path / "out", *words)
    result = place.prepare(tmp_path / "out", *words, "data.on_bad_image=skip")
    assert (result.images, result.skipped) == (COUNT - 1, 1)
    index = read_index(tmp_path / "out")
    assert index.shards[0].skipped == ["a/03.png"]
    assert load_file(tmp_path / "out" / index.shards[0].file)["moments"].shape[0] == 3
    assert place.prepare(tmp_path / "out", *words).shards_made == 0
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputFileError, match="not one image could be read: got 23 unreadable"):
        place.prepare(tmp_path / "none", *words, "data.on_bad_image=skip")


def test_tars_give_the_same_latents(place: Place, whole: Path, tmp_path: Path) -> None:
    for name in "abc":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for path in sorted((place.images / name).iterdir()):
                archive.add(path, path.name)
    place.prepare(tmp_path / "out", "data.source=tars", f"data.path={tmp_path}")
    shards = {name: value for name, value in content(whole).items() if "shard" in name}
    assert {
        name: value for name, value in content(tmp_path / "out").items() if "shard" in name
    } == (shards)


def test_parquet_without_the_extra(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data.source=parquet", f"data.path={tmp_path}"]
    with pytest.raises(InputFileError, match=r"expected .parquet files"):
        place.prepare(tmp_path / "out", *words)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(parquet.importlib, "import_module", missing)
    with pytest.raises(EnvironmentProblem, match=r"'pyarrow'.*Fix: pip install 'terdit\[parquet\]"):
        place.prepare(tmp_path / "out", *words)


# --- training on latents --------------------------------------------------------------------------


@pytest.fixture
def train(place: Place, whole: Path, tmp_path: Path) -> Callable[..., train_command.TrainResult]:
    def run(*words: str) -> train_command.TrainResult:
        path = ["data.source=latents", f"data.path={whole}"]
        return train_command.run(place.recipe, [*path, *words], None, tmp_path / "run")

    return run


def test_train_on_latents(place: Place, train: Any, tmp_path: Path) -> None:
    result = train()
    assert result.steps == 3
    assert np.isfinite(result.last_loss)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    info = load_ckpt(result.checkpoint).info
    assert info.space.kind == "vae"
    assert info.space.vae == str(place.root / "vae")
    assert info.space.scale_factor == 0.5
    assert info.class_names == ["a", "b", "c"]


def test_another_decoder_will_do_but_not_another_encoder(
    place: Place, train: Any, tmp_path: Path
) -> None:
    vae = make_vae(tmp_path / "decoder")
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
        vae.save_pretrained(tmp_path / "decoder")
        vae.encoder.conv_in.weight.mul_(2)
        vae.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UsageError) as caught:
        train(f"data.vae={tmp_path / 'encoder'}")
    for word in ("another VAE", str(tmp_path / "encoder"), str(place.root / "vae"), "set data.vae"):
        assert word in str(caught.value)
    assert train(f"data.vae={tmp_path / 'decoder'}").steps == 3


def test_no_vae_is_loaded_without_previews(train: Any) -> None:
    assert train("data.vae=somebody/somewhere", "sample.every=0").steps == 3


def test_training_stops_at_damaged_latents(place: Place, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "zeroed"
    shutil.copytree(whole, folder)
    for path in folder.glob("*.safetensors"):  # as after a crash that lost pages
        path.write_bytes(path.read_bytes()[:-1024] + bytes(1024))
    words = ["data.source=latents", f"data.path={folder}", "sample.every=0"]
    with pytest.raises(InputFileError, match=r"is damaged: got a wrong checksum.*zeroed/shard-"):
        train_command.run(place.recipe, words, None, tmp_path / "run")
    cut = folder / "shard-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(InputFileError, match=r"is damaged: got \d+ bytes.*shard-00003"):
        train_command.run(place.recipe, words, None, tmp_path / "run")


# --- the verb -------------------------------------------------------------------------------------


def test_verb(place: Place, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_verb(place.recipe, None, whole, SHARD_MB, BATCH)
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{whole}: 23 images in 6 shards, ")
    assert "data.source=latents" in printed.err
    prepare_verb(place.recipe, None, whole, SHARD_MB, BATCH, json=True)
    assert json.loads(capsys.readouterr().out)["shards_made"] == 0
    prepare_verb(verify=whole)
    assert "6 shards are intact, 23 images" in capsys.readouterr().out
    prepare_verb(verify=whole, json=True)
    assert json.loads(capsys.readouterr().out)["images"] == COUNT
    for recipe, verify in ((None, None), (place.recipe, whole)):
        with pytest.raises(UsageError, match="needs a recipe, or --verify"):
            prepare_verb(recipe, verify=verify)
