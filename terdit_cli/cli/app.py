"""The command line: verbs, exit codes. Nothing here imports torch.

Each verb's arguments and help are in a file of its own; its work is in `commands/` or `lab/`,
imported when it runs. Exit codes: see `errors.py`.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

import terdit_cli
from terdit_cli import console
from terdit_cli.cli import (
    bench_cli,
    eval_fid_cli,
    export_cli,
    info_cli,
    init_cli,
    models_cli,
    pack_cli,
    plot_cli,
    prepare_cli,
    recipes_cli,
    sample_cli,
    study_cli,
    ternarize_cli,
    train_cli,
)
from terdit_cli.cli.flags import Command, examples, expanded
from terdit_cli.errors import EnvironmentProblem, TerditError, UsageError
from terdit_cli.system import memory
from terdit_cli.system.openmp import bound_spinning
from terdit_cli.system.signals import StopSignal, handled, raise_stop

EXIT_CODES = """Exit codes: 0 ok, 1 bug (with traceback), 2 usage or recipe, 3 bad input file,
4 environment (backend or extra missing, disk full, too little memory), 5 quality gate failed or
training diverged, 130/143 stopped by SIGINT/SIGTERM after saving (129: the terminal was closed)."""

app = typer.Typer(
    name="terdit",
    help="Ternary diffusion transformers: train, ternarize, pack, sample and evaluate.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for _name, _verb, _examples in (
    ("init", init_cli.init, init_cli.EXAMPLES),
    ("recipes", recipes_cli.recipes, recipes_cli.EXAMPLES),
    ("train", train_cli.train, train_cli.EXAMPLES),
    ("plot", plot_cli.plot, plot_cli.EXAMPLES),
    ("export", export_cli.export, export_cli.EXAMPLES),
    ("prepare", prepare_cli.prepare, prepare_cli.EXAMPLES),
    ("ternarize", ternarize_cli.ternarize, ternarize_cli.EXAMPLES),
    ("pack", pack_cli.pack, pack_cli.EXAMPLES),
    ("sample", sample_cli.sample, sample_cli.EXAMPLES),
    ("eval-fid", eval_fid_cli.eval_fid, eval_fid_cli.EXAMPLES),
    ("info", info_cli.info, info_cli.EXAMPLES),
    ("models", models_cli.models, models_cli.EXAMPLES),
    ("study", study_cli.study, study_cli.EXAMPLES),
    ("bench", bench_cli.bench, bench_cli.EXAMPLES),
):
    app.command(_name, cls=Command, epilog=examples(*_examples))(expanded(_verb))

# Renamed options: (verb, old option) -> what to write now.
RENAMED = {
    ("train", "--plot"): "terdit plot RUN",
    ("train", "--export"): "terdit export RUN",
    ("eval-fid", "--html"): "--report FILE.html",
    ("eval-fid", "--markdown"): "--report FILE.md",
    ("eval-fid", "--junit"): "--report FILE.xml",
    ("eval-fid", "--grid"): "--report FILE.png",
    ("eval-fid", "--bootstrap"): "--confidence 100",
    ("eval-fid", "--over-n"): "--confidence 100",
    ("study", "--quick"): "the study recipes/studies/quick.yaml",
    ("bench", "--batch"): "--images N (a batch has two rows per image)",
    ("bench", "--gpu"): "--what limits --device NAME",
    ("bench", "--backend"): "TERDIT_BACKEND=NAME in the environment",
    ("bench", "--ggml"): "--rivals all,LIBGGML-CPU.SO",
    ("bench", "--recorded"): "terdit bench RECORDED.json",
    ("bench", "--repeats"): "--full (7 repeats; else 3)",
    ("bench", "--seed"): "terdit bench without it (the seed is 0)",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        console.result(terdit_cli.__version__)
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of all errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    if debug:
        os.environ["TERDIT_DEBUG"] = "1"


def main() -> None:
    """Run the command line and exit with a documented code.

    A stop signal becomes an exception, so that half-written files are removed; training, while it
    runs, handles them itself (`train/loop.py`).
    """
    # PIL warns of damaged tags without naming the image; pixels are read completely or refused.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    code: Any = 0
    bound_spinning()  # before any verb imports torch
    try:
        _refuse_empty(sys.argv[1:])
        _refuse_renamed(sys.argv[1:])
        with handled(raise_stop):
            app(prog_name="terdit")
    except SystemExit as end:
        code = end.code
        # click's exit code for it is 1, which means a bug here.
        if isinstance(end.__context__, BrokenPipeError):
            code = 128 + signal.SIGPIPE
    except StopSignal as stop:
        code = _fail(stop.told())
    except Exception as error:
        if (problem := _problem(error)) is None:
            raise
        code = _fail(problem)
    sys.exit(code)


def _problem(error: Exception) -> TerditError | None:
    """Return what to say of an error, None if it is a bug."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if (ran_out := memory.told(error, f"terdit {verb}".strip())) is not None:
        return ran_out
    if isinstance(error, TerditError):
        return error
    # Of help, say, which typer writes; what `atomic` writes is handled there.
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        what, fix = _REFUSALS[error.errno]
        return EnvironmentProblem(what, got=error.strerror, where=error.filename, fix=fix)
    return _not_compiled(error)


# What the operating system refuses anywhere: its number -> what is wrong, the way out.
_FULL = ("a disk is full", "make room, or write elsewhere")
_FORBIDDEN = ("no permission", "name another place, or ask for the right to it")
_REFUSALS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("a file is larger than allowed here", "raise ulimit -f, or write elsewhere"),
    errno.EIO: ("a disk or a terminal fails", "look at it, or write elsewhere"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENAMETOOLONG: ("a file name is too long for the file system", "give a shorter one"),
}


def _not_compiled(error: BaseException) -> EnvironmentProblem | None:
    """Return the error to show if torch.compile failed (mostly for lack of a compiler), or None."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(("torch._dynamo", "torch._inductor")):
            lines = str(error.__cause__ or error).strip().splitlines()
            return EnvironmentProblem(
                "torch cannot compile the network", got=lines[0][:200] if lines else "no reason",
                fix="install a C++ compiler (Debian: g++ python3-dev), or set "
                "train.compile=false and leave --compile out",
            )  # fmt: skip
        seen = seen.__cause__ or seen.__context__
    return None


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty argument, which as a path would be the current folder."""
    if "" in words:
        raise UsageError(
            "an argument of the command is empty",
            got=shlex.join(["terdit", *words]),
            fix="give it a value; an unset shell variable leaves an empty argument",
        )


def _refuse_renamed(words: list[str]) -> None:
    """Refuse an option of an earlier version; the message gives its present name."""
    verb = next((word for word in words if not word.startswith("-")), "")
    for word in words[: words.index("--") if "--" in words else None]:
        if new := RENAMED.get((verb, word.partition("=")[0])):
            raise UsageError(f"terdit {verb} has no {word.partition('=')[0]}", fix=f"use {new}")


def _fail(error: TerditError) -> int:
    """Print an error and return its exit code."""
    if os.environ.get("TERDIT_DEBUG"):
        traceback.print_exc()
    console.fail(str(error))
    return error.exit_code
