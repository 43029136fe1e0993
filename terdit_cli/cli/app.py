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
    models_cli,
    pack_cli,
    plot_cli,
    prepare_cli,
    sample_cli,
    study_cli,
    ternarize_cli,
    train_cli,
)
from terdit_cli.cli.flags import Command, examples, expanded
from terdit_cli.errors import EnvironmentProblem, TerditError, UsageError
from terdit_cli.system.signals import StopSignal, handled, raise_stop

EXIT_CODES = """Exit codes: 0 ok, 1 bug (with traceback), 2 usage or recipe, 3 bad input file,
4 environment (backend or extra missing, disk full), 5 quality gate failed or training diverged,
130/143 stopped by SIGINT/SIGTERM after saving (129: the terminal was closed)."""

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
    ("train", train_cli.train, train_cli.EXAMPLES),
    ("plot", plot_cli.plot, plot_cli.EXAMPLES),
    ("export", export_cli.export, export_cli.EXAMPLES),
    ("prepare", prepare_cli.prepare, prepare_cli.EXAMPLES),
    ("ternarize", ternarize_cli.ternarize, ternarize_cli.EXAMPLES),
    ("pack", pack_cli.pack, pack_cli.EXAMPLES),
    ("sample", sample_cli.sample, sample_cli.EXAMPLES),
    ("eval-fid", eval_fid_cli.eval_fid, eval_fid_cli.EXAMPLES),
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
    try:
        _refuse_empty(sys.argv[1:])
        _refuse_renamed(sys.argv[1:])
        with handled(raise_stop):
            app(prog_name="terdit")
    except SystemExit as end:
        code = end.code
        if isinstance(
            end.__context__, BrokenPipeError
        ):  # click's exit code for it is 1, which means a bug here
            code = 128 + signal.SIGPIPE
    except StopSignal as stop:
        code = _fail(stop.told())
    except TerditError as error:
        code = _fail(error)
    except OSError as error:  # when typer writes help, for example; `atomic` handles its own
        if error.errno not in _REFUSALS:
            raise
        what, fix = _REFUSALS[error.errno]
        code = _fail(EnvironmentProblem(what, got=error.strerror, where=error.filename, fix=fix))
    except Exception as error:
        if (problem := _not_compiled(error)) is None:
            raise
        code = _fail(problem)
    sys.exit(code)


# What the operating system may refuse anywhere: errno -> what failed, the fix.
_FORBIDDEN = ("no permission", "name another place, or get the permission")
_REFUSALS = {
    errno.ENOSPC: ("a disk is full", "free disk space, or write to another disk"),
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
