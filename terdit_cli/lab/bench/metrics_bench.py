"""The metrics of `terdit eval-fid`: what they give beside other libraries, what they cost.

Agreement: every metric on the same features, ours, recorded (where a file is given), clean-fid's
and torch-fidelity's. Cost: synthetic features of Inception's width, each metric in a process of its
own, so that its peak of memory is its own; the Frechet distance takes turns with clean-fid's.

A recording is a JSON file and an .npz of the same name beside it:

    npz   TAG.real [N, D], TAG.fake [M, D], TAG.logits [N, C]
    JSON  fid.TAG.clean_fid   kid.TAG.seedS_subsetsK_maxM   precision_recall.TAG.kK.{precision,
          recall}   inception_score.TAG.splitN
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from terdit_cli import console
from terdit_cli.errors import EnvironmentProblem, InputFileError
from terdit_cli.evaluate import metrics
from terdit_cli.evaluate.statistics import FeatureStatistics
from terdit_cli.lab.bench.results import AgreementRow, Figure, ScoreRow
from terdit_cli.lab.bench.settings import Options
from terdit_cli.lab.bench.worker import Process, release_freed
from terdit_cli.lab.children import resident_bytes
from terdit_cli.system.torchvision_shim import import_vision

DIM = 2048  # of Inception's features
# Metrics that are timed, with the numbers of samples of the published protocols.
COSTS = (
    ("statistics", 50_000), ("distance", 50_000), ("precision, recall", 10_000), ("KID", 50_000)
)  # fmt: skip
BATCH = 1000  # samples made, and added to the statistics, at once
CLEAN_FID_RUNS = 3  # each takes ten seconds

Features = NDArray[np.floating]
Cases = dict[str, dict[str, dict[str, Any]]]


def measure(options: Options) -> dict[str, Any]:
    """Compare all metrics with the other libraries', and with `full` time them.

    Returns `agreement` and `scores` of a `BenchResult`.

    Raises:
        InputFileError: the recording; EnvironmentProblem: a process of terdit's own failed.
    """
    if options.recorded is None:
        cases, arrays = _synthetic_cases(options.seed)
    else:
        cases, arrays = _read_recording(options.recorded)
    with contextlib.redirect_stdout(sys.stderr):  # clean-fid prints its warnings
        agreement = list(_agreement(cases, arrays))
    scores = []
    for name, n in COSTS if options.full else ():
        console.note(f"bench: {name} of {n} x {DIM} features")
        threads = options.thread_counts[0]
        with Process(threads) as process:
            answer = process.ask(
                "score", name=name, n=n, dim=DIM, seed=options.seed, runs=CLEAN_FID_RUNS
            )
        if "seconds" not in answer:
            raise EnvironmentProblem("a benchmark process failed", got=answer["why_not"])
        figures = Figure(answer.pop("seconds")), Figure(answer.pop("clean_fid_seconds"))
        scores.append(ScoreRow(name, n, DIM, threads, *figures, **answer))
    return {"agreement": agreement, "scores": scores}


def score(name: str, n: int, dim: int, seed: int, runs: int) -> dict[str, Any]:
    """Make features and time one metric on them, in this process.

    Returns {"seconds": of each run, "clean_fid_seconds": of each run of its distance,
    "difference": of the two distances or None, "resident": bytes before the metric,
    "peak_resident": bytes}.
    """
    calls: dict[str, Callable[..., Any]] = {
        "distance": metrics.frechet_distance,
        "precision, recall": metrics.precision_recall,
        "KID": metrics.kernel_inception_distance,
    }
    seconds: list[float] = []
    theirs: list[float] = []
    difference: float | None = None
    arguments: list[NDArray[Any]] = []
    if name == "distance":
        for side in range(2):
            statistics, _ = _statistics(n, dim, seed, side)
            arguments += [statistics.mean, statistics.covariance]
    elif name in calls:
        arguments = [np.concatenate(list(_batches(n, dim, seed, side))) for side in range(2)]
    before = _start_peak()
    if name == "statistics":
        seconds.append(_statistics(n, dim, seed, 0)[1])
    else:
        ours = _timed(lambda: calls[name](*arguments), seconds)
    peak = resident_bytes("self")[1]
    rival = clean_fid_distance() if name == "distance" else None
    for _ in range(runs if rival else 0):
        assert rival is not None
        value = _timed(partial(rival, *arguments), theirs)
        ours = _timed(lambda: calls[name](*arguments), seconds)
        difference = abs(ours - float(value))
    return {
        "seconds": seconds,
        "clean_fid_seconds": theirs,
        "difference": difference,
        "resident": before,
        "peak_resident": peak,
    }


def _start_peak() -> int | None:
    """Return resident memory, and let its peak be counted from now on where Linux can."""
    release_freed()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes("self")[0]


def _timed(call: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.perf_counter()
    value = call()
    seconds.append(time.perf_counter() - started)
    return value


def _batches(n: int, dim: int, seed: int, side: int) -> Iterator[NDArray[np.float32]]:
    """Yield correlated features >= 0 whose variances fall as those of a network's do.

    The sides differ a little in scale.
    """
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
    mix *= torch.arange(1, dim + 1)[:, None] ** -0.6
    generator = torch.Generator().manual_seed(2 * seed + 1 + side)
    for start in range(0, n, BATCH):
        batch = torch.randn(min(BATCH, n - start), dim, generator=generator)
        yield (batch @ mix * (1 + 0.1 * side) + 0.3).relu().numpy()


def _statistics(n: int, dim: int, seed: int, side: int) -> tuple[FeatureStatistics, float]:
    """Return mean and covariance of a stream, and the seconds that took without making it."""
    statistics = FeatureStatistics(dim)
    seconds: list[float] = []
    for batch in _batches(n, dim, seed, side):
        _timed(partial(statistics.update, batch), seconds)
    return statistics, sum(seconds)


def witness(name: str) -> ModuleType | None:
    """Return a module of another library, or None where it is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        return None
    return import_vision(name)


def clean_fid_distance() -> Callable[..., Any] | None:
    """Return clean-fid's Frechet distance, or None: scipy 1.18 removed an argument it needs."""
    module = witness("cleanfid.fid")
    if module is None or "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        return None
    distance: Callable[..., Any] = module.frechet_distance
    return distance


def _synthetic_cases(seed: int) -> tuple[Cases, dict[str, Features]]:
    """Return features with more and with fewer samples than features, and logits."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Features] = {}
    for tag, n, m, dim in (("d64", 600, 500, 64), ("d256", 200, 150, 256)):
        mix = random.normal(size=(dim, dim)) / np.sqrt(dim)
        arrays[f"{tag}.real"] = np.maximum(random.normal(size=(n, dim)) @ mix, 0)
        arrays[f"{tag}.fake"] = np.maximum(1.1 * random.normal(size=(m, dim)) @ mix, 0)
    arrays["c50.logits"] = 2 * random.normal(size=(800, 50))
    tags = ("d64", "d256")
    cases: Cases = {
        "fid": {tag: {} for tag in tags},
        "kid": {tag: {"seed0_subsets20_max100": None} for tag in tags},
        "precision_recall": {tag: {"k3": {}} for tag in tags},
        "inception_score": {"c50": {"split5000": None, "split200": None}},
    }
    return cases, arrays


def _read_recording(path: Path) -> tuple[Cases, dict[str, Features]]:
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as values:
            arrays = {name: values[name].astype(np.float64) for name in values.files}
        for metric in ("fid", "kid", "precision_recall", "inception_score"):
            suffix = ".logits" if metric == "inception_score" else ".fake"
            if not all(tag + suffix in arrays for tag in cases[metric]):
                raise ValueError(f"an array of {metric} is missing")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputFileError(
            "the recorded metrics cannot be read",
            got=f"{type(error).__name__}: {error}",
            expected="a .json, and an .npz of the same name beside it",
            where=path,
            fix="terdit bench tests/golden/metrics.json",
        ) from error
    return cases, arrays


def _agreement(cases: Cases, arrays: dict[str, Features]) -> Iterator[AgreementRow]:
    for tag, recorded in cases["fid"].items():
        yield _frechet_row(tag, arrays[f"{tag}.real"], arrays[f"{tag}.fake"], recorded)
    for tag, settings in cases["kid"].items():
        for name, value in settings.items():
            yield _kid_row(tag, name, arrays[f"{tag}.real"], arrays[f"{tag}.fake"], value)
    for tag, settings in cases["precision_recall"].items():
        for name, recorded in settings.items():
            sides = arrays[f"{tag}.real"], arrays[f"{tag}.fake"]
            yield from _neighbour_rows(tag, int(name[1:]), *sides, recorded)
    for tag, settings in cases["inception_score"].items():
        for name, value in settings.items():
            if match := re.fullmatch(r"split(\d+)", name):
                yield _inception_row(tag, int(match[1]), arrays[f"{tag}.logits"], value)


def _frechet_row(
    tag: str, real: Features, fake: Features, recorded: dict[str, float]
) -> AgreementRow:
    statistics = [part for x in (real, fake) for part in (x.mean(axis=0), np.cov(x, rowvar=False))]
    clean, fidelity = clean_fid_distance(), witness("torch_fidelity.metric_fid")
    theirs = None
    if fidelity is not None:
        sides = [fidelity.fid_features_to_statistics(torch.tensor(x)) for x in (fake, real)]
        found = fidelity.fid_statistics_to_metric(*sides, verbose=False)
        theirs = float(found["frechet_inception_distance"])
    ours, cleans = metrics.frechet_distance(*statistics), clean and float(clean(*statistics))
    return AgreementRow("FID", tag, ours, recorded.get("clean_fid"), cleans, theirs)


def _kid_row(
    tag: str, name: str, real: Features, fake: Features, recorded: float | None
) -> AgreementRow:
    match = re.fullmatch(r"seed(\d+)_subsets(\d+)_max(\d+)", name)
    if match is None:
        raise InputFileError("unknown KID case", got=name, expected="seedS_subsetsK_maxM")
    seed, subsets, largest = map(int, match.groups())
    clean, fidelity = witness("cleanfid.fid"), witness("torch_fidelity.metric_kid")
    theirs, cleans = None, None
    if clean is not None:
        with _global_seed(seed):
            cleans = float(clean.kernel_distance(real, fake, subsets, largest))
    if fidelity is not None:
        found = fidelity.kid_features_to_metric(
            torch.tensor(fake), torch.tensor(real), kid_subsets=subsets, rng_seed=seed,
            kid_subset_size=min(largest, len(real), len(fake)), verbose=False,
        )  # fmt: skip
        theirs = float(found["kernel_inception_distance_mean"])
    ours = metrics.kernel_inception_distance(real, fake, subsets, largest, seed)
    case = f"{tag}, {subsets} of {largest}, seed {seed}"
    return AgreementRow("KID", case, ours, recorded, cleans, theirs)


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global stream, which clean-fid uses, and put it back."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _neighbour_rows(
    tag: str, k: int, real: Features, fake: Features, recorded: dict[str, float]
) -> Iterator[AgreementRow]:
    fidelity = witness("torch_fidelity.metric_prc")
    theirs: dict[str, float] = {}
    if fidelity is not None:
        theirs = fidelity.prc_features_to_metric(
            torch.tensor(fake), torch.tensor(real), prc_neighborhood=k, prc_batch_size=len(fake),
            save_cpu_ram=True, verbose=False,
        )  # fmt: skip
    ours = metrics.precision_recall(real, fake, k)
    for name, value in zip(("precision", "recall"), ours, strict=True):
        others = recorded.get(name), None, theirs.get(name)
        yield AgreementRow(name, f"{tag}, k = {k}", value, *others)


def _inception_row(tag: str, split: int, logits: Features, recorded: float | None) -> AgreementRow:
    """torch-fidelity cuts into equal parts: it has the same splits only where they are equal."""
    fidelity = witness("torch_fidelity.metric_isc")
    size, theirs = min(split, len(logits)), None
    if fidelity is not None and len(logits) % size == 0:
        splits = len(logits) // size
        found = fidelity.isc_features_to_metric(torch.tensor(logits), splits=splits, shuffle=False)
        theirs = float(found["inception_score_mean"])
    ours = metrics.inception_score(logits, split)
    return AgreementRow("IS", f"{tag}, splits of {split}", ours, recorded, None, theirs)
