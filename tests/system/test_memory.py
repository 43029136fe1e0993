"""Memory that runs out is told in one sentence, whoever notices it and whatever it is taken for."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.system import memory

TORCH = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
RAN_OUT = [
    MemoryError(),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError(TORCH + "you tried to allocate 4000000000 bytes. Error code 12 (Cannot allocate)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", RAN_OUT, ids=str)
def test_which_errors_are_meant(error: Exception) -> None:
    assert memory.is_out_of_memory(error)
    for kind in (InputFileError, UsageError):
        with pytest.raises(EnvironmentProblem, match=r"^too little memory for a cake: got"):
            blame(error, kind)


def blame(error: Exception, kind: type[Exception]) -> None:
    with memory.explained("a cake"):
        try:
            raise error
        except Exception as found:
            raise kind("the file is damaged") from found


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        RuntimeError("a bug"),
        ValueError("can't allocate memory"),
        EnvironmentProblem("something else"),
    ],
    ids=str,
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.explained("a cake"):
        raise error
    assert caught.value is error


def test_what_was_handled_is_no_cause() -> None:
    with pytest.raises(ValueError, match="nested") as caught, memory.parsing():
        raise MemoryError
    assert not memory.is_out_of_memory(caught.value)


def test_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 3 * 10**9}
    endless = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda name: (limits.get(name, endless), endless))
    with (
        pytest.raises(EnvironmentProblem) as caught,
        memory.explained("8 images at once", "--batch-size 4", lambda: 5 * 10**9),
    ):
        raise RAN_OUT[2]
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "too little memory for 8 images at once: got a request for 4.00 GB with a limit of 3.00 GB "
        "(ulimit -v), expected about 5.00 GB. Fix: --batch-size 4."
    )


def test_a_need_that_cannot_be_told_for_want_of_memory() -> None:
    def fail() -> int:
        raise MemoryError

    with (
        pytest.raises(EnvironmentProblem, match=r"for a cake: got a [^,]*\. Fix: free memory"),
        memory.explained("a cake", needs=fail),
    ):
        raise MemoryError


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(1 << 50, dtype=torch.uint8),
        lambda: np.empty(1 << 50, np.uint8),
        lambda: bytearray(1 << 50),
    ],
    ids=["torch", "numpy", "python"],
)
def test_what_libraries_really_say(allocate: object) -> None:
    with pytest.raises(EnvironmentProblem, match="for a cake"), memory.explained("a cake"):
        allocate()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/", {"memory.max": "2000000000"}, 2 * 10**9),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/memory.max": "1000000000", "a/b/memory.max": "max"}, 10**9),
        ("0::/a/b", {"a/memory.max": "1000000000", "a/b/memory.max": "500000000"}, 5 * 10**8),
        (
            "9:name=systemd:/x\n3:cpu,memory:/docker/7",
            {"memory/memory.limit_in_bytes": "700000000"},
            7 * 10**8,
        ),
        ("3:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_a_containers_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    limit: int | None,
) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "mine")
    (tmp_path / "mine").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert memory.container_bytes() == limit


def test_what_cannot_fit_a_container_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would kill it."""

    def unasked() -> int:
        raise AssertionError

    monkeypatch.setattr(memory, "container_bytes", lambda: None)
    memory.require("a cake", unasked, "eat less")
    monkeypatch.setattr(memory, "container_bytes", lambda: 2 * 10**9)
    memory.require("a cake", lambda: 10**9, "eat less")
    with pytest.raises(EnvironmentProblem) as caught:
        memory.require("a cake", lambda: 3 * 10**9, "eat less")
    assert str(caught.value) == (
        "too little memory for a cake: got a container of 2.00 GB, expected about 3.00 GB. "
        "Fix: eat less."
    )


THREADS = """
import mmap, resource, threading
from terdit_cli.system import memory

limit = 4 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
memory.require_room("a test")
held = []
threading.Thread(target=held.append, args=(0,)).start()
try:
    while True:
        held.append(mmap.mmap(-1, 1 << 20))
except OSError:
    del held[-5:]  # room for less than a thread
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(error)
"""


def test_a_thread_without_room_fails_where_it_is_started() -> None:
    """Python's own start would wait for it for ever."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "can't start new thread\n"


MODEL = ("--model", "fashion-mnist", "--steps", "2")
VERBS = {
    "models": ["models"],
    "sample": ["sample", *MODEL, "--prompt-class", "1", "-o", "a.png"],
    "large batch": ["sample", *MODEL, "--prompt-class", "all", "-n", "400", "--batch-size", "4000",
                    "-o", "a.npz"],
    "pack": ["pack", "fashion-mnist", "-o", "a.tdt"],
    "train": ["train", "{recipe}", "--out", "run", "train.micro_batch_size=256",
              "train.global_batch_size=256", "model.dim=256", "model.patch_size=1"],
    "eval-fid": ["eval-fid", *MODEL, "-n", "64", "--features", "efficientnet-lite0",
                 "--make-reference", "a.npz"],
}  # fmt: skip
RECIPE = """\
name: small
model: {size: nano, n_layers: 2, dim: 32, n_heads: 2, patch_size: 7, num_classes: 10}
data: {source: embedded, split: heldout, image_size: 28, channels: 1, workers: 1}
train: {steps: 1, global_batch_size: 8, micro_batch_size: 8, precision: fp32}
sample: {every: 0}
"""


def limited(words: list[str], limit: int, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "terdit_cli", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, cwd=folder, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit it")
@pytest.mark.parametrize(
    ("verb", "megabytes"),
    [
        *((verb, 300) for verb in VERBS),
        ("train", 1600),
        *(
            pytest.param(verb, size, marks=pytest.mark.slow)
            for verb in VERBS
            for size in (700, 1080, 1350)
        ),
    ],
)
def test_each_verb_under_a_limit_works_or_says_so(
    tmp_path: Path, verb: str, megabytes: int
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [word.format(recipe=tmp_path / "recipe.yaml") for word in VERBS[verb]]
    done = limited(words, megabytes << 20, tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (0, 4), (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(errors) == (done.returncode == 4), done.stderr
    for line in errors:
        assert line.startswith("error: too little memory for "), line
        assert "Fix: " in line
    if megabytes == 300:
        assert done.returncode == (0 if verb == "models" else 4)
