"""The command line: arguments, help, exit codes. Nothing here imports torch.

Exit codes: see `errors.py`. The verbs' work is in `commands/`, imported when a verb runs.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import signal
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import terdit_cli
from terdit_cli import console
from terdit_cli.cli import eval_fid_cli as app_eval
from terdit_cli.cli import models_cli as app_models
from terdit_cli.cli import prepare_cli as app_prepare
from terdit_cli.cli import study_cli as app_study
from terdit_cli.cli import tables
from terdit_cli.cli import train_cli as app_train
from terdit_cli.cli.flags import (
    Activations,
    BackendName,
    BatchSizeThatFits,
    CfgChannels,
    CfgScale,
    Device,
    EpsScale,
    GuidedChannels,
    Json,
    RawWeights,
    Sampler,
    Seed,
    Steps,
    Threads,
    Vae,
    chosen_weights,
    refuse_given,
)
from terdit_cli.errors import EnvironmentProblem, TerditError, UsageError
from terdit_cli.system.signals import StopSignal, handled, raise_stop

EXIT_CODES = """Exit codes: 0 ok, 1 bug (with traceback), 2 usage or recipe, 3 bad input file,
4 environment (backend or extra missing, disk full), 5 quality gate failed or training diverged,
130/143 stopped by SIGINT/SIGTERM after saving (129: the terminal was closed)."""

app = typer.Typer(
    name="terdit",
    help="Ternary diffusion transformers: train, ternarize, pack, sample and score.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class PackCodec(StrEnum):
    """How trits are stored in a .tdt."""

    t2 = "t2"
    t5 = "t5"


class Rest(StrEnum):
    """Dtype of everything that is not ternary."""

    bf16 = "bf16"
    fp32 = "fp32"


class ScaleGranularity(StrEnum):
    """What one fitted scale covers."""

    tensor = "tensor"
    row = "row"
    group128 = "group128"


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


def _example(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


app.command(epilog=_example(*app_train.EXAMPLES))(app_train.train)
app.command(epilog=_example(*app_prepare.EXAMPLES))(app_prepare.prepare)


@app.command(
    epilog=_example(
        "terdit ternarize runs/quickstart -o quickstart.safetensors",
        "terdit ternarize runs/parent/ckpt.pt -o parent.safetensors --granularity row",
    )
)
def ternarize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="ckpt.pt, or its run folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    ema: RawWeights = True,
    granularity: Annotated[
        ScaleGranularity | None,
        typer.Option(help="Scales of a full-precision checkpoint's fit.  [default: tensor]"),
    ] = None,
    json: Json = False,
) -> None:
    """Freeze a checkpoint into int8 trits, alphas and the rest, with a table of every layer."""
    from terdit_cli.commands import ternarize as command

    result = command.run(
        checkpoint, out, chosen_weights(ema), granularity.value if granularity else None
    )
    if json:
        console.result_json(dataclasses.asdict(result))
    else:
        tables.print_ternarized(result)


@app.command(
    epilog=_example(
        "terdit pack runs/quickstart -o quickstart.tdt",
        "terdit pack runs/quickstart -o small.tdt --codec t5 --rest bf16",
        "terdit pack 3B_1180000/ -o terdit-4.2b.tdt",
    )
)
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder, ckpt.pt, ternarized .safetensors, or a released TerDiT folder.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="What a released folder does not say: n_heads=32."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .tdt file to write.")] = Path(
        "model.tdt"
    ),
    codec: Annotated[
        PackCodec, typer.Option(help="t2: 2 bits a weight, mapped at load. t5: 1.6, unpacked.")
    ] = PackCodec.t2,
    rest: Annotated[
        Rest, typer.Option(help="Dtype of the rest. fp32 keeps outputs bit for bit.")
    ] = Rest.fp32,
    ema: RawWeights = True,
    json: Json = False,
) -> None:
    """Pack a ternary model into one verified .tdt file."""
    from terdit_cli.commands import pack as command

    fields = _parse_fields(overrides or [])
    result = command.run(source, out, codec.value, rest.value, chosen_weights(ema), fields)
    if json:
        console.result_json(dataclasses.asdict(result) | {"ratio": result.ratio})
        return
    tables.print_packed(result)


def _parse_fields(words: list[str]) -> dict[str, Any]:
    """Parse `n_heads=32` words into configuration fields; values are numbers."""
    fields: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            fields[key] = int(text) if text.lstrip("-").isdecimal() else float(text)
        except ValueError:
            raise UsageError(
                "an override is not KEY=NUMBER", got=repr(word), fix="write it as n_heads=32"
            ) from None
    return fields


@app.command(
    epilog=_example(
        "terdit sample --prompt-class sneaker",
        'terdit sample --prompt-class "Ankle boot" -n 4',
        "terdit sample --model model.tdt --prompt-class 207 --steps 50 --sampler dpmpp-2m",
        "terdit sample --model runs/quickstart --prompt-class all -n 8 -o samples.npz",
        "torchrun --nproc-per-node 2 -m terdit_cli sample --model model.tdt --prompt-class all "
        "-n 50 -o samples/",
    )
)
def sample(
    prompt_class: Annotated[
        str, typer.Option(help="Class id, class name, a comma separated list of them, or all.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="File, folder or packaged model.  [default: TERDIT_MODEL, the only .tdt here, "
            "newest run, packaged model of that class]"
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images of each class.")] = 1,
    steps: Steps = None,
    sampler: Sampler = None,
    cfg_scale: CfgScale = None,
    cfg_channels: GuidedChannels = CfgChannels.three,
    eps_scale: EpsScale = None,
    seed: Seed = 0,
    batch_size: BatchSizeThatFits = None,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    threads: Threads = None,
    device: Device = None,
    vae: Vae = None,
    ema: RawWeights = True,
    out: Annotated[
        Path, typer.Option("--out", "-o", help=".png: labelled grid; .npz; else a folder of PNGs.")
    ] = Path("sample.png"),
    json: Json = False,
) -> None:
    """Draw images of named classes from a model."""
    from terdit_cli.commands import sample as command

    result = command.run(
        prompt_class, model, n=n, steps=steps, sampler=sampler, cfg_scale=cfg_scale,
        cfg_channels=cfg_channels.value, eps_scale=eps_scale, seed=seed, batch_size=batch_size,
        backend=backend, activations=activations, threads=threads, device=device, vae=vae,
        output=out, weights=chosen_weights(ema),
    )  # fmt: skip
    if json:
        console.result_json(dataclasses.asdict(result))
        return
    rate = result.images * result.nfe / result.seconds
    images = "1 image" if result.images == 1 else f"{result.images} images"
    console.result(
        f"{result.output}: {images}, {result.nfe} NFE each, "
        f"{console.duration(result.seconds)}, {rate:.3g} NFE/s"
    )


app.command(name="eval-fid", epilog=_example(*app_eval.EXAMPLES))(app_eval.eval_fid)
app.command(epilog=_example(*app_models.EXAMPLES))(app_models.models)
app.command(epilog=_example(*app_study.EXAMPLES))(app_study.study)


_BENCHED = {
    "batch": ("all", "forward"),
    "activations": ("all", "gemm", "forward", "images"),
    "rivals": ("all", "gemm", "forward"),
    "ggml": ("all", "gemm"),
    "recorded": ("metrics",),
}


@app.command(
    epilog=_example(
        "terdit bench",
        "terdit bench 4.2b --what gemm --threads 1,2 --rivals bf16,int8-ao",
        "terdit bench model.tdt --what images --device cpu",
        "terdit bench model.tdt --what forward --rivals none --json",
        "terdit bench 600m --size 256,512 --threads 1,2 --out docs/bench.md",
        "terdit bench --what metrics --threads 1 --recorded tests/golden/metrics.json",
        "terdit bench recipes/quickstart.yaml --what training",
        "terdit bench 600m,4.2b --device cuda --out docs/gpu.md",
        "terdit bench 600m,4.2b --what roofline --gpu a100",
    )
)
def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A size (600m, 4.2b, ...: random weights), a .tdt, or a recipe.")
    ] = "600m",
    what: Annotated[
        str,
        typer.Option(
            help="gemm, forward, sample, images (of a .tdt), all; metrics; training; "
            "roofline, kernels (of GPUs)."
        ),
    ] = "all",
    size: Annotated[str, typer.Option(help="Image sizes in pixels, as 256,512.")] = "",
    batch: Annotated[int, typer.Option(help="Rows of a forward; a guided image is two.")] = 2,
    images: Annotated[
        str, typer.Option(help="On a GPU: guided images a batch.  [default: 1,8,32]")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu, or cuda for the GPU's own tables.")] = "cpu",
    gpu: Annotated[
        str, typer.Option(help="Data sheet of the roofline: h100, a100, l4, 4090, ...")
    ] = "h100",
    threads: Annotated[str, typer.Option(help="Thread counts, as 1,2.  [default: torch's]")] = "",
    activations: Annotated[
        str,
        typer.Option(help="Of int8, int16, bf16, fp32; the first runs everywhere.  [default: all]"),
    ] = "",
    backend: BackendName = "auto",
    rivals: Annotated[
        str,
        typer.Option(
            help="all, none, or of fp32,fp32-medium,bf16,bf16-compiled,int8-ao,int8-mm,unpack."
        ),
    ] = "all",
    ggml: Annotated[
        Path | None, typer.Option(help="A libggml-cpu.so: its TQ2_0 is a rival too.")
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="A .json of recorded metrics, an .npz beside it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats; medians are shown.")] = 7,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write, .md.")] = None,
    json: Json = False,
) -> None:
    """Measure speed, exactness and memory on this CPU or a GPU, beside the rivals."""
    line = shlex.join(["terdit", *sys.argv[1:]])
    if what in ("roofline", "kernels") or (device != "cpu" and what != "images"):
        foreign = ("batch", "threads", "activations", "backend", "rivals", "ggml", "recorded")
        refuse_given(context, foreign, "for the benchmarks of CPUs")
        from terdit_cli.lab.bench import on_gpu as bench_gpu

        report = bench_gpu.run(
            model, what, size=size, images=images, device=device, chip=gpu, repeats=repeats,
            seed=seed, output=out, command=line,
        )  # fmt: skip
        if json:
            console.result_json(bench_gpu.as_json(report))
            return
        for table in bench_gpu.gpu_tables(report):
            console.result_table(*table)
        return
    refuse_given(context, ("images", "gpu"), "for the benchmarks of GPUs")
    for option, kinds in _BENCHED.items():
        if what not in kinds:
            refuse_given(context, (option,), f"for --what {' or '.join(kinds)}")
    from terdit_cli.lab.bench import on_cpu as command

    result = command.run(
        model, what, size=size, batch=batch, threads=threads, activations=activations,
        backend=backend, others=rivals, repeats=repeats, seed=seed, ggml=ggml, output=out,
        command=line, recorded=recorded, device=device,
    )  # fmt: skip
    if json:
        console.result_json(command.as_json(result))
        return
    for table in command.tables(result):
        console.result_table(*table)


def main() -> None:
    """Run the command line and exit with a documented code.

    A stop signal becomes an exception, so that half-written files are removed; training, while it
    runs, handles them itself (`train/loop.py`).
    """
    code: Any = 0
    try:
        _refuse_empty(sys.argv[1:])
        with handled(raise_stop):
            app(prog_name="terdit")
    except SystemExit as end:
        code = end.code
        if isinstance(end.__context__, BrokenPipeError):  # of which click says 1, a bug
            code = 128 + signal.SIGPIPE
    except StopSignal as stop:
        code = _fail(stop.told())
    except TerditError as error:
        code = _fail(error)
    except OSError as error:  # help, say, which typer writes; what `atomic` writes is handled there
        if error.errno not in _REFUSALS:
            raise
        what, fix = _REFUSALS[error.errno]
        code = _fail(EnvironmentProblem(what, got=error.strerror, where=error.filename, fix=fix))
    except Exception as error:
        if (problem := _not_compiled(error)) is None:
            raise
        code = _fail(problem)
    sys.exit(code)


# What the operating system refuses anywhere: its number -> what is wrong, the way out.
_FORBIDDEN = ("no permission", "name another place, or ask for the right to it")
_REFUSALS = {
    errno.ENOSPC: ("a disk is full", "make room, or write elsewhere"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENAMETOOLONG: ("a name is too long for the file system", "give a shorter one"),
}


def _not_compiled(error: BaseException) -> EnvironmentProblem | None:
    """Return what to say if torch.compile failed, for want of a compiler mostly; else None."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(("torch._dynamo", "torch._inductor")):
            lines = str(error.__cause__ or error).strip().splitlines()
            return EnvironmentProblem(
                "torch cannot compile the network", got=lines[0][:200] if lines else "no reason",
                fix="install a C++ compiler (Debian: g++ python3-dev), or do without: "
                "train.compile=false, no --compile",
            )  # fmt: skip
        seen = seen.__cause__ or seen.__context__
    return None


def _refuse_empty(words: list[str]) -> None:
    """Refuse an empty word, which as a path would be the current folder."""
    if "" in words:
        raise UsageError(
            "a word of the command is empty",
            got=shlex.join(["terdit", *words]),
            fix="give it a value; a shell variable without one leaves such a word",
        )


def _fail(error: TerditError) -> int:
    """Print an error and return its exit code."""
    if os.environ.get("TERDIT_DEBUG"):
        traceback.print_exc()
    console.fail(str(error))
    return error.exit_code
