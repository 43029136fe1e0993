"""Who may import whom, read from the source; and what the command line must not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "terdit_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 700  # split for ideas, not for length

# Folder of the package, or file at its top -> what it may import, anywhere in a file. All may
# import `errors`, `system`, `strict_yaml`, `option` and `class_names`;
# `version` is the package itself.
FREE = {"errors", "system", "strict_yaml", "option", "class_names", "version"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "strict_yaml": set(),
    "option": set(),
    "class_names": set(),
    "console": set(),
    "recipe": set(),
    "system": {"console"},
    "model": {"diffusion"},  # what a file says of its objective
    "diffusion": set(),
    "pack": {"model"},
    "hub": {"model", "pack"},
    "data": {"recipe"},
    "runtime": {"model", "pack", "hub"},
    "report": set(),
    "generate": {"model", "runtime", "diffusion", "data", "hub", "pack", "console", "report"},
    "evaluate": {"report", "console"},
    "train": {"model", "diffusion", "data", "recipe", "console", "report"},
    "commands": {
        "model", "hub", "diffusion", "data", "recipe", "console", "train", "pack", "runtime",
        "generate", "evaluate", "report",
    },
    "lab": {
        "model", "hub", "diffusion", "data", "recipe", "console", "train", "pack", "runtime",
        "generate", "evaluate", "report", "commands",
    },
    "cli": {"commands", "lab", "generate", "evaluate", "data", "hub", "recipe", "console"},
    "__init__": {"runtime", "generate"},
    "__main__": {"cli"},
}  # fmt: skip
HEAVY = {"torch", "torchvision", "diffusers", "cleanfid"}
# Besides cli/, which must import nothing heavy either.
LIGHT_FILES = (
    "errors.py",
    "recipe.py",
    "option.py",
    "generate/options.py",
    "evaluate/request.py",
    "strict_yaml.py",
    "console.py",
    "system/atomic.py",
    "system/locks.py",
    "system/signals.py",
    "__init__.py",
)
BY_SHIM_ONLY = {"torchvision", "diffusers", "cleanfid"}


def part_of(path: Path) -> str:
    """Return the folder of a file in the package, or its own name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[str]:
    """Return every imported module, dotted; `from a import b` counts as a.b."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def at_module_level(tree: ast.Module) -> ast.Module:
    """Return what runs when the module is imported: no functions, no TYPE_CHECKING blocks."""
    body: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        body.append(node)
    return ast.Module(body=body, type_ignores=[])


def parts_used(tree: ast.AST) -> set[str]:
    """Return the parts of the package that a file imports; the package itself is "version"."""
    used = set()
    for name in imports(tree):
        head, *rest = name.split(".")
        if head == "terdit_cli":
            names_part = rest and rest[0] in ALLOWED
            used.add(rest[0] if names_part else "version")
    return used


@pytest.fixture(scope="module", params=FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def source(request) -> tuple[Path, ast.Module]:
    return request.param, ast.parse(request.param.read_text(encoding="utf-8"))


def test_import_rules(source):
    path, tree = source
    part = part_of(path)
    assert part in ALLOWED, f"{path}: a new part needs a rule here and in the architecture"
    allowed = ALLOWED[part] | {part} | (set() if part == "errors" else FREE)
    assert parts_used(tree) <= allowed


def test_vision_packages_come_through_the_shim(source):
    path, tree = source
    heads = {name.split(".")[0] for name in imports(tree)}
    assert not heads & BY_SHIM_ONLY
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and path.name != "torchvision_shim.py":
            called = ast.unparse(node.func)
            text = ast.unparse(node.args[0]) if node.args else ""
            if called.endswith("import_module"):
                assert not any(name in text for name in BY_SHIM_ONLY), f"line {node.lineno}"


def test_vision_imports_are_inside_functions(source):
    _, tree = source
    for node in ast.walk(at_module_level(tree)):
        assert not (isinstance(node, ast.Call) and "import_vision" in ast.unparse(node.func))


def test_light_files_import_nothing_heavy(source):
    path, tree = source
    heads = {name.split(".")[0] for name in imports(at_module_level(tree))}
    relative = path.relative_to(PACKAGE).as_posix()
    light = relative in LIGHT_FILES or relative.startswith("cli/")
    assert not heads & (HEAVY if light else HEAVY - {"torch"})


def test_length_and_docstring(source):
    path, tree = source
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    docstring = ast.get_docstring(tree)
    assert docstring
    assert docstring.splitlines()[0].strip()


def test_code_is_ascii(source):
    path, _ = source
    assert path.read_bytes().isascii()


def test_a_basename_stands_once():
    names = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert not {name for name, count in names.items() if count > 1}


def test_a_prefix_shared_by_three_files_is_a_folder():
    prefixes = Counter((path.parent, path.stem.split("_")[0]) for path in FILES)
    families = {f"{folder.name}/{head}" for (folder, head), n in prefixes.items() if head and n > 2}
    assert not families


def test_only_backends_know_which_backend_runs(source):
    _, tree = source
    asked = [
        ast.unparse(node.left).endswith(("backend", "backend.NAME"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
    ]
    assert not any(asked)


BLOCK_PARTS = ("attention.w", "feed_forward.w", "adaLN_modulation.")


def test_a_blocks_matrices_are_known_in_one_place(source):
    """Beside the network itself, which builds them."""
    path, tree = source
    if path.relative_to(PACKAGE).as_posix() in ("model/dit.py", "model/layout.py"):
        return
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
                  if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            known = node.value in docstrings or not node.value.startswith(BLOCK_PARTS)
            assert known, f"line {node.lineno}"


def test_commands_are_verbs():
    verbs = {path.stem for path in (PACKAGE / "commands").glob("*.py")} - {"__init__"}
    offered = {path.stem.removesuffix("_cli") for path in (PACKAGE / "cli").glob("*_cli.py")}
    assert verbs <= offered


def test_no_catch_all_files():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_rules_name_what_exists():
    parts = {part_of(path) for path in FILES}
    assert set(ALLOWED) <= parts


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_imports_no_torch():
    code = """
import sys
sys.argv = ["terdit", "--help"]
from terdit_cli.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "numpy", "torchvision", "diffusers", "matplotlib", "scipy"} & set(sys.modules)
print("HEAVY:", sorted(heavy))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "HEAVY: []" in done.stdout
    for verb in ("train", "ternarize", "pack", "sample"):
        assert verb in done.stdout


def test_importing_the_package_is_light():
    done = run_python(
        "import sys, terdit_cli; print('torch' in sys.modules, terdit_cli.__version__)"
    )
    assert done.stdout.startswith("False "), done.stderr


def test_a_deployer_never_touches_training():
    code = """
import sys, terdit_cli.runtime.load
names = {name.split(".")[1] for name in sys.modules if name.startswith("terdit_cli.")}
print(sorted(names & {"train", "data", "recipe", "commands", "evaluate", "generate", "console"}))
"""
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr
