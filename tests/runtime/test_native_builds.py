"""The native sources by every compiler, sanitizer and processor at hand: each build runs selftest.

What a machine lacks is skipped with the reason. Builds lie in build/ and are made again only where
sources changed. `make native-sanitize` runs the sanitizers alone.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

import terdit_cli

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "terdit_cli" / "runtime" / "native"
# The cmake of the environment that runs the tests, before the system's.
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
)
CXX = next(filter(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]), "c++")


class Build(NamedTuple):
    """A compiler with its flags, CMake's settings for the same, what runs the result, and how."""

    compiler: str
    flags: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ((), ("threads",))  # (): every instruction set


BUILDS = {  # the first is the one that `make install` has built
    "native": Build(CXX),
    "clang": Build("clang++", settings=("-DCMAKE_CXX_COMPILER=clang++",)),
    "neon": Build(
        "aarch64-linux-gnu-g++",
        ("-static",),
        (
            "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ),
        ("qemu-aarch64",),
        (("neon",), ("threads",)),
    ),
    "address-sanitizer": Build(
        CXX, ("-fsanitize=address,undefined",), ("-DTERDIT_SANITIZE=address,undefined",)
    ),
    "thread-sanitizer": Build(
        CXX, ("-fsanitize=thread",), ("-DTERDIT_SANITIZE=thread",), parts=(("threads",),)
    ),
}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command, its output and errors together."""
    return subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def check(*words: str | Path) -> str:
    """Run a command that must succeed; return what it says."""
    done = run(*words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def why_not(build: Build, folder: Path) -> str | None:
    """Return why an empty program cannot be built and run this way, or None if it can."""
    for tool in (build.compiler, *build.runner):
        if shutil.which(tool) is None:
            return f"no {tool}"
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    done = run(build.compiler, *build.flags, source, "-o", program)
    if done.returncode == 0:
        done = run(*build.runner, program)
    return None if done.returncode == 0 else f"{build.compiler}: {done.stdout.strip()[-200:]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.sanitizer] if name.endswith("sanitizer") else [])
        for name in BUILDS
    ],
)
def test_selftest(name: str, tmp_path: Path) -> None:
    build, folder = BUILDS[name], ROOT / "build" / name
    reason = "no cmake" if CMAKE is None else why_not(build, tmp_path)
    if reason is not None:
        pytest.skip(reason)
    assert CMAKE is not None
    check(CMAKE, "-S", NATIVE, "-B", folder, *build.settings)
    check(CMAKE, "--build", folder, "--target", "selftest", "--parallel", "4")
    for part in build.parts:
        assert "ok" in check(*build.runner, folder / "selftest", *part)


def test_library_is_built(tmp_path: Path) -> None:
    """Where there is a compiler the tests shall not pass by running on the reference alone."""
    reason = why_not(Build(CXX), tmp_path)
    if reason is not None:
        pytest.skip(reason)
    library = importlib.resources.files("terdit_cli.runtime") / "native" / "libterdit.so"
    assert library.is_file(), "run `make install`"
    version = ctypes.CDLL(str(library)).terdit_version
    version.restype = ctypes.c_char_p
    assert version().decode() == terdit_cli.__version__
