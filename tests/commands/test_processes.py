"""eval-fid and sample by several processes, killed and resumed: the same bits as by one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from terdit_cli.errors import EnvironmentProblem
from terdit_cli.evaluate.feature_shards import FACTS_FILE
from terdit_cli.system.job import Job, own_device
from terdit_cli.system.launcher import Launched

TORCHRUN = Path(__file__).parents[1] / "torchrun.py"
Terdit = Callable[..., Any]
Blocks = dict[str, dict[str, np.ndarray]]

PATIENCE = 120  # seconds; a job that hangs fails the test
COUNT = 200  # images: blocks of 64, 64, 64 and 8
OF_THE_RUN = ("date", "seconds", "command")


def run_together(words: tuple[object, ...], processes: int) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a job that torchrun starts."""
    job = subprocess.run(
        [sys.executable, TORCHRUN, str(processes), "-m", "terdit_cli", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )
    return job.returncode, job.stdout, job.stderr


def blocks(work: Path) -> Blocks:
    """Return all arrays of all blocks below a work folder."""
    found: Blocks = {}
    for path in sorted(work.rglob("block-*.npz")):
        with np.load(path) as arrays:
            found[str(path.relative_to(work))] = dict(arrays)
    return found


def require_same(ours: Blocks, theirs: Blocks) -> None:
    assert list(ours) == list(theirs)
    for name, arrays in ours.items():
        assert set(arrays) == set(theirs[name])
        for key, values in arrays.items():
            np.testing.assert_array_equal(values, theirs[name][key], strict=True)


def repeatable(output: str) -> dict[str, Any]:
    """Return a result without what differs between two runs of it."""
    result: dict[str, Any] = json.loads(output)
    for name in OF_THE_RUN:
        del result["provenance"][name]
    return result


@pytest.fixture(scope="module")
def words(small_tdt: Path, features: str) -> tuple[object, ...]:
    """What is evaluated here, but for --work."""
    return (
        "eval-fid", "--model", small_tdt, "--reference", "embedded:heldout", "-n", COUNT,
        "--features", features, "--steps", 2, "--labels", "uniform", "--device", "cpu",
        "--confidence", 5, "--per-class", "1,8", "--json", "--work",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(
    terdit: Terdit, words: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Blocks]:
    """The result of one process that nothing stops, and its blocks."""
    work = tmp_path_factory.mktemp("alone")
    done = terdit(*words, work)
    assert done.code == 0, done.err
    return repeatable(done.out), blocks(work)


@pytest.mark.slow
def test_two_processes_give_the_same_bits(
    words: tuple[object, ...], alone: tuple[dict[str, Any], Blocks], tmp_path: Path
) -> None:
    code, out, err = run_together((*words, tmp_path), 2)
    assert code == 0, err
    assert repeatable(out) == alone[0]
    assert len(alone[1]) == 8  # four of the images, four of the reference
    require_same(blocks(tmp_path), alone[1])


@pytest.mark.slow
def test_more_processes_than_blocks_and_a_temporary_folder(
    terdit: Terdit, folder: Path, features: str, tmp_path: Path
) -> None:
    """40 images are one block: two of three processes have nothing to do."""
    grid = tmp_path / "grid.png"
    words = ("eval-fid", "--images", folder, "--reference", folder, "--features", features)
    words += ("--json", "--report", str(grid))
    code, out, err = run_together(words, 3)
    assert code == 0, err
    assert repeatable(out) == repeatable(terdit(*words).out)
    assert err.count("warning:") == 1
    assert grid.exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_job(folder: Path, features: str, tmp_path: Path) -> None:
    """The second block is the second process's; the first waits for it in vain."""
    for index in range(40, 100):
        (folder / f"{index:03d}.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "090.png").write_bytes(b"not a png")
    words = ("eval-fid", "--images", folder, "--features", features)
    code, out, err = run_together((*words, "--make-reference", tmp_path / "r.npz"), 2)
    assert code != 0
    assert out == ""
    assert "error: unreadable image: got not an image" in err
    assert "090.png" in err
    for line in err.splitlines():
        assert not line.startswith("[rank"), "a traceback of a process"
    assert not (tmp_path / "r.npz").exists()


KILLED = """
import os, signal, sys
import numpy as np
from terdit_cli.cli import app

wanted, save = sys.argv.pop(1), np.savez

def die_half_way(file, **arrays):
    if wanted in file.name:
        save(file, **dict(list(arrays.items())[:1]))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, **arrays)

np.savez = die_half_way
app.main()
"""


def test_half_a_job(
    refused: Callable[..., str], folder: Path, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    words = ("eval-fid", "--images", folder, "--reference", folder, "--features", features)
    message = refused(4, *words)
    for part in ("WORLD_SIZE=2", "RANK", "Fix: start it with torchrun, or unset WORLD_SIZE"):
        assert part in message


@pytest.mark.slow
def test_a_killed_run_goes_on(
    terdit: Terdit, words: tuple[object, ...], alone: tuple[dict[str, Any], Blocks], tmp_path: Path
) -> None:
    """SIGKILL while a block, no matter which, is being written."""
    killed_in = random.randrange(4)
    job = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED,
            f"images/.block-{killed_in:08d}",
            *map(str, words),
            tmp_path,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        timeout=PATIENCE,
        capture_output=True,
        check=False,
    )
    assert job.returncode == -signal.SIGKILL, job.stderr
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("block-*.npz")}
    assert len(before) == 4 + killed_in, "the reference, and the blocks before"
    done = terdit(*words, tmp_path)
    assert done.code == 0, done.err
    assert f"reference: going on after {COUNT} of {COUNT} images" in done.err
    if killed_in:
        assert f"images: going on after {64 * killed_in} of {COUNT} images" in done.err
    assert repeatable(done.out) == alone[0]
    require_same(blocks(tmp_path), alone[1])
    for path, time_ns in before.items():
        assert path.stat().st_mtime_ns == time_ns


def test_a_damaged_block_is_made_again(
    terdit: Terdit, words: tuple[object, ...], alone: tuple[dict[str, Any], Blocks], tmp_path: Path
) -> None:
    assert terdit(*words, tmp_path).code == 0
    places = sorted((tmp_path / "images").glob("block-*.npz"))
    content = bytearray(places[1].read_bytes())
    content[len(content) // 2] ^= 1
    places[1].write_bytes(content)
    places[3].unlink()
    before = [path.stat().st_mtime_ns for path in (places[0], places[2])]
    done = terdit(*words, tmp_path)
    assert done.code == 0, done.err
    assert repeatable(done.out) == alone[0]
    require_same(blocks(tmp_path), alone[1])
    assert [path.stat().st_mtime_ns for path in (places[0], places[2])] == before


@pytest.mark.slow
def test_the_work_folder_of_another_run(
    terdit: Terdit, words: tuple[object, ...], tmp_path: Path
) -> None:
    assert terdit(*words, tmp_path).code == 0
    before = blocks(tmp_path)
    for other, field, values in (
        (("--seed", 1), "seed", (0, 1)),
        (("--batch-size", 16), "batch_size", (8, 16)),
        (("--labels", "balanced"), "labels", ("uniform", "balanced")),
    ):
        done = terdit(*words, tmp_path, *other)
        assert done.code == 2
        assert done.out == ""
        for value in values:
            assert f"{field} {value!r}" in done.err
        assert "--work" in done.err
    require_same(blocks(tmp_path), before)
    # A model's fewer images are the first of the same, but a set's are spread over it.
    done = terdit(*words, tmp_path, "-n", 100)
    assert done.code == 2
    assert done.out == ""
    for said in ("images_sha256", "reference", "--work"):
        assert said in done.err
    require_same(blocks(tmp_path), before)
    # Pictures change no features: they can be asked for afterwards.
    grid = tmp_path / "grid.png"
    assert terdit(*words, tmp_path, "--report", grid).code == 0
    assert grid.exists()
    (tmp_path / "images" / FACTS_FILE).write_text("{")
    done = terdit(*words, tmp_path)
    assert done.code == 3
    assert "delete the folder" in done.err


# sample


def drawing(model: Path, output: Path) -> tuple[object, ...]:
    """Return the words that draw 13 images in batches of 3: the last of them is smaller."""
    return (
        "sample", "--model", model, "--prompt-class", 7, "-n", 13, "--steps", 3, "--sampler",
        "ddim", "--cfg-scale", 2, "--batch-size", 3, "--device", "cpu", "-o", output,
    )  # fmt: skip


@pytest.mark.parametrize("output", ["s.npz", "grid.png", "folder"])
def test_two_processes_draw_the_same_images(
    terdit: Terdit, small_tdt: Path, tmp_path: Path, output: str
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert terdit(*drawing(small_tdt, tmp_path / "one" / output)).code == 0
    code, out, err = run_together((*drawing(small_tdt, tmp_path / "two" / output), "--json"), 2)
    assert code == 0, err
    result = json.loads(out)  # one object, of one process
    assert result["images"] == 13
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert ours == theirs
    assert len(ours) == (13 if output == "folder" else 1)


@pytest.mark.slow
def test_more_processes_than_batches(terdit: Terdit, small_tdt: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", small_tdt, "--prompt-class", 0, "--steps", 2, "--device", "cpu")
    code, out, err = run_together((*words, "-o", tmp_path / "a.npz"), 3)
    assert code == 0, err
    assert out.count("a.npz: 1 image, ") == 1
    assert terdit(*words, "-o", tmp_path / "b.npz").code == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.slow
def test_a_process_that_cannot_write_ends_the_job(small_tdt: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    blocked = tmp_path / "folder" / "000003-class0007.png"  # of the second process
    blocked.mkdir()
    code, out, err = run_together(drawing(small_tdt, tmp_path / "folder"), 2)
    assert code != 0
    assert out == ""
    assert "error: cannot write" in err
    assert blocked.name in err
    assert not [line for line in err.splitlines() if line.startswith("[rank")]


# Runs the command line with a fault: words are a folder for exit codes, the fault, the command.
FAULTY = """
import os, signal, sys, time
from pathlib import Path
from terdit_cli.cli import app
from terdit_cli.generate import generator as generate
from terdit_cli.errors import InputFileError

notes, fault, rank = Path(sys.argv.pop(1)), sys.argv.pop(1), os.environ["RANK"]
draw = generate.sample

def sample(*words, **options):
    if fault == "none":
        return draw(*words, **options)
    if rank == "1" and fault.startswith("killed"):
        time.sleep(2 if fault == "killed later" else 0)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and fault == "error":
        raise InputFileError("something is wrong with the file")
    if fault == "killed later":
        return draw(*words, **options)
    (notes / f"drawing-{rank}").touch()
    while True:
        time.sleep(0.1)

generate.sample = sample
try:
    app.main()
except SystemExit as stop:
    (notes / f"exit-{rank}").write_text(str(stop.code or 0))
    raise
"""


class Faulty:
    """A job of two processes that draws images and has a fault."""

    def __init__(self, folder: Path, fault: str, words: tuple[object, ...]) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir()
        script = folder / "faulty.py"
        script.write_text(FAULTY)
        self.process = subprocess.Popen(
            [sys.executable, TORCHRUN, "2", script, self.notes, fault, *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[list[str], list[str]]:
        """Return the exit codes by rank, "" of one that was killed, and the lines of errors."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 1, err
        assert out == ""
        codes = [self.notes / f"exit-{rank}" for rank in range(2)]
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return [path.read_text() if path.exists() else "" for path in codes], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("killed", ["4", ""], "was killed: got no message from rank 1"),
        # The closed connection is seen, or torchrun's signal, whichever comes first.
        ("killed later", ["4", ""], "has ended: got |was killed: got no message from rank 1"),
        ("error", ["3", "3"], "something is wrong with the file"),
    ],
)
def test_a_job_ends_with_one_message(
    small_tdt: Path, tmp_path: Path, fault: str, codes: list[str], message: str
) -> None:
    """Whether the main process is drawing or waits for the other's images."""
    output = tmp_path / "out" / "grid.png"
    found, errors = Faulty(tmp_path, fault, drawing(small_tdt, output)).end()
    assert found == codes
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not output.parent.exists()


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(small_tdt: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", small_tdt, "--prompt-class", "nothing", "--device", "cpu")
    found, errors = Faulty(tmp_path, "none", words).end()
    assert found == ["2", "2"]
    assert len(errors) == 1
    assert "'nothing'" in errors[0]


@pytest.mark.slow
def test_a_signal_to_torchrun_is_told_once(small_tdt: Path, tmp_path: Path) -> None:
    job = Faulty(tmp_path, "endless", drawing(small_tdt, tmp_path / "out" / "grid.png"))
    deadline = time.monotonic() + PATIENCE
    while len(list(job.notes.glob("drawing-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    found, errors = job.end()
    assert found == ["143", "143"]
    assert len(errors) == 1
    assert "stopped by SIGTERM: nothing half-written is left" in errors[0]
    assert not (tmp_path / "out").exists()


def test_devices_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Launched(6, 8, 2, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    third = Job(device=own_device(place))
    for name in (None, "auto", "cpu"):
        assert third.device_named(name) == "cpu"
    assert third.device_named("cuda") == "cuda"  # which is refused when it is used
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    third = Job(device=own_device(place))
    for name in (None, "auto", "cuda"):
        assert third.device_named(name) == "cuda:2"
    assert [third.device_named(name) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(own_device(place)) == "cuda:0"  # shared
    with pytest.raises(EnvironmentProblem, match="this machine has more processes than GPUs"):
        own_device(place, a_gpu_each=True)
