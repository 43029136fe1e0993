"""The command line itself: help, usage errors, what it imports, signals."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import terdit_cli
from terdit_cli.cli.app import RENAMED

ROOT = Path(__file__).parents[2]
VERBS = (
    "init", "recipes", "train", "plot", "export", "prepare", "ternarize", "pack", "sample",
    "eval-fid", "info", "models", "study", "bench",
)  # fmt: skip
Terdit = Callable[..., Any]


def test_help_names_the_verbs_and_exit_codes(terdit: Terdit) -> None:
    for word in ("--help", "-h"):
        done = terdit(word)
        assert done.code == 0
        assert done.err == ""
        text = " ".join(done.out.split())
        for verb in VERBS:
            assert f" {verb} " in text
        assert "Exit codes: 0 ok, 1 bug" in text
        assert "130/143 stopped by" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["models"], ["models", "--json"]]
)
def test_results_onto_a_full_disk(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "terdit_cli", *words]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 4
    assert re.fullmatch(r"error: .*: got No space left on device\. Fix: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.EDQUOT, "a disk is full: got Disk quota exceeded"),
        (errno.EFBIG, "a file is larger than allowed here: got File too large"),
        (errno.EIO, "a disk or a terminal fails: got Input/output error"),
    ],
)
def test_help_that_the_system_refuses_to_write(
    terdit: Terdit, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    def refuse(*words: object, **settings: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("terdit_cli.cli.app.app", refuse)
    done = terdit("train", "--help")
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(f"error: {what}. Fix: ")
    assert done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
@pytest.mark.parametrize(
    ("words", "code"),
    [(["models"], 0), (["models", "nobody"], 2), (["sample", "--prompt-class", "nobody"], 2)],
)
def test_a_full_disk_behind_stderr_changes_nothing(words: list[str], code: int) -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "terdit_cli", *words]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=full, cwd=ROOT)
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0)


def test_memory_that_runs_out_is_no_bug(terdit: Terdit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr("terdit_cli.commands.models.run", fail)
    done = terdit("models")
    assert done.code == 4
    assert re.fullmatch(
        r"error: too little memory for terdit models: got .*\. Fix: free .*\n", done.err
    )


def test_what_the_system_refuses_is_no_bug(
    terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder that may not be entered does, to all but root: Path.exists raises for it."""
    long = tmp_path / ("x" * 300)
    for words in (("--model", long), ("-o", f"{long}.png")):
        done = terdit("sample", "--prompt-class", "sneaker", *words)
        assert done.code == 4, done.err
        assert done.err.startswith("error: ")
        assert "File name too long" in done.err
        assert "xxx" in done.err
        assert done.err.count("\n") == 1

    def forbidden(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    done = terdit("sample", "--prompt-class", "sneaker", "-o", "/forbidden/x.png")
    assert done.code == 4
    assert "cannot write: got Permission denied (/forbidden/x.png). Fix: name a folder" in done.err


@pytest.mark.slow
def test_a_closed_stdout_is_no_failure() -> None:
    line = f"{sys.executable} -m terdit_cli models --json >&-"
    done = subprocess.run(line, shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_examples(terdit: Terdit, verb: str) -> None:
    done = terdit(verb, "--help")
    assert done.code == 0
    assert "Examples:" in done.out
    assert f"terdit {verb}" in done.out.split("Examples:")[1]
    assert "--json" in done.out


def test_help_needs_no_torch() -> None:
    code = """
import sys
sys.argv = ["terdit", "--help"]
from terdit_cli.cli.app import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "PIL", "pydantic", "diffusers", "matplotlib"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_as_a_module() -> None:
    line = [sys.executable, "-m", "terdit_cli", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, terdit_cli.__version__)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Usage: terdit"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["train", "a.yaml", "--ressume", "auto"], "No such option: --ressume"),
        (["train", "a.yaml", "--resume"], "requires an argument"),
        (["ternarize", "a"], "Missing option '--out'"),
        (["pack", "a", "--codec", "t3"], "'t3' is not one of 't2', 't5'"),
        (["pack", "a", "--rest", "fp16"], "fp16"),
        (["sample"], "Missing option '--prompt-class'"),
        (["sample", "--prompt-class", "1", "-n", "many"], "-n"),
        (["sample", "--prompt-class", "1", "--cfg-channels", "4"], "--cfg-channels"),
    ],
)
def test_usage_errors(
    terdit: Terdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = terdit(*words)
    assert done.code == 2
    assert done.out == ""
    assert message in done.err
    assert not words or "-h' for help" in done.err or "requires an argument" in message
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(terdit: Terdit, tmp_path: Path) -> None:
    plain = terdit("pack", tmp_path / "none", "-o", tmp_path / "x.tdt")
    debug = terdit("--debug", "pack", tmp_path / "none", "-o", tmp_path / "x.tdt")
    assert plain.code == debug.code == 3
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert debug.err.endswith(plain.err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_pack_leaves_the_old_file(
    terdit: Terdit, tmp_path: Path, small_run: Path, number: signal.Signals
) -> None:
    output, marker = tmp_path / "out" / "model.tdt", tmp_path / "marker"
    output.parent.mkdir()
    output.write_bytes(b"the old file")
    code = f"""
import pathlib, sys, time
from terdit_cli.cli.app import main
from terdit_cli.pack import tdt
encode = tdt._encode_matrix
def slow(model, name, codec):
    encoded = encode(model, name, codec)
    if name.endswith("wo"):  # half of the file is written
        pathlib.Path({str(marker)!r}).touch()
        time.sleep(60)
    return encoded
tdt._encode_matrix = slow
sys.argv = ["terdit", "pack", {str(small_run)!r}, "--force", "-o", {str(output)!r}]
main()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert any(path.name.startswith(".model.tdt") for path in output.parent.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == ""
    assert output.read_bytes() == b"the old file"
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}" in err
        assert "Traceback" not in err
        assert [path.name for path in output.parent.iterdir()] == ["model.tdt"]
    assert terdit("pack", small_run, "-o", output, "--force").code == 0
    assert output.read_bytes() != b"the old file"


@pytest.mark.slow
def test_a_network_that_cannot_be_compiled(small_recipe: Path, tmp_path: Path) -> None:
    """Shipped recipes compile, and a machine without a C++ compiler is no bug of terdit's."""
    words = ("train", small_recipe, "train.compile=true", "train.steps=1", "--out", tmp_path / "r")
    environment = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "terdit_cli", *map(str, words)], cwd=ROOT, text=True,
        env=os.environ | environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr[-2000:]
    assert "error: torch cannot compile the network: got " in done.stderr
    assert "train.compile=false" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("verb", "option"), sorted(RENAMED))
def test_an_earlier_name_is_answered_with_the_new_one(
    refused: Callable[..., str], verb: str, option: str
) -> None:
    for words in ([option, "x"], [f"{option}=x"]):
        message = refused(2, verb, "x", *words)
        assert f"terdit {verb} has no {option}" in message
        assert f"use {RENAMED[verb, option]}." in message


def test_the_help_of_long_verbs_has_headings(terdit: Terdit) -> None:
    text = terdit("eval-fid", "--help").out
    titles = [
        "Options:",
        "Features and metrics:",
        "Quality gates:",
        "Output:",
        "Sampling:",
        "Model:",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert places[2] < text.index("--max-fid") < places[3]
    assert places[4] < text.index("--cfg-scale") < places[5]


@pytest.mark.parametrize(
    "words",
    [
        ["models"],
        ["sample", "--model", "nowhere.tdt", "--prompt-class", "1"],
        ["pack", "nowhere"],
        ["ternarize", "nowhere", "-o", "x.safetensors"],
        ["export", "nowhere"],
        ["plot", "nowhere"],
        ["train", "nowhere.yaml"],
        ["train", str(ROOT / "recipes" / "quickstart.yaml"), "train.stepz=1"],
        ["prepare", "nowhere.yaml"],
        ["eval-fid", "--model", "nowhere", "--reference", "embedded"],
        ["eval-fid", "--images", "embedded", "--reference", "nowhere"],
        ["eval-fid", "--images", "embedded"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_at_a_glance_needs_no_torch(words: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv[1:] = {words!r}
from terdit_cli.cli.app import main
try:
    main()
except SystemExit as end:
    print("torch" in sys.modules, end.code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    wanted = "False 0" if words == ["models"] else "False [23]"
    assert re.search(wanted, done.stderr.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_sampling_imports_no_library_of_training_or_images(tmp_path: Path) -> None:
    code = """
import sys
sys.argv[1:] = ["sample", "--prompt-class", "Sneaker", "--steps", "2", "--sampler", "unipc"]
from terdit_cli.cli.app import main
try:
    main()
except SystemExit as end:
    heavy = {"torchvision", "diffusers", "scipy.stats", "sympy", "torch._dynamo", "matplotlib"}
    print(heavy & set(sys.modules), end.code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1] == "set() 0", done.stderr
