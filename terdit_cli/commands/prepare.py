"""`terdit prepare`: encodes the images of a recipe into latents on disk, once for all runs.

Alone or started by torchrun; the missing shards are divided among the processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from terdit_cli import console
from terdit_cli.data.image_set import ImageSet
from terdit_cli.data.image_sources import open_labelled
from terdit_cli.data.latent_shards import INDEX, LatentIndex, damage_of, read_index
from terdit_cli.data.latent_work import LatentWork, make_plan
from terdit_cli.data.vae import VaeSpace
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.generate.generator import usable_device
from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.system.atomic import check_writable
from terdit_cli.system.gpu_memory import ELSEWHERE, explained
from terdit_cli.system.job import Job, join_job
from terdit_cli.train import build

FOLDER = "latents"
SHARD_MB = 256
BATCH_SIZE = 16
_SPARE = 16 << 20  # bytes of free disk to leave
_HASHERS = 4  # files read at once by `verify`


@dataclass(frozen=True)
class PrepareResult:
    """What the folder holds now, and what this job added to it."""

    folder: Path
    images: int
    skipped: int
    shards: int
    bytes: int
    shards_made: int
    images_per_second: float | None


@dataclass(frozen=True)
class VerifyResult:
    """A folder whose shards are all intact."""

    folder: Path
    images: int
    shards: int
    bytes: int
    seconds: float


def run(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    shard_mb: float = SHARD_MB,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
) -> PrepareResult:
    """Prepare the latents of a recipe's images, or resume where a stopped job left off.

    Args:
        out: the folder; default latents/<name of the recipe>.
        shard_mb: target size of a shard, 10^6 bytes.
        batch_size: images encoded at once, their mirror images in addition.
        device: default a GPU if there is one.

    Raises:
        UsageError: a recipe without VAE, or of latents; a folder of other latents.
        InputFileError: images or VAE missing or unreadable.
        EnvironmentProblem: not enough disk, or not writable.
    """
    if shard_mb <= 0 or batch_size < 1:
        raise UsageError(
            "wrong size",
            got=f"{shard_mb} MB per shard, {batch_size} images per batch",
            expected="positive numbers",
            fix="leave out --shard-mb and --batch-size",
        )
    recipe = load_recipe(recipe_path, overrides)
    _check_recipe(recipe)
    folder = out or Path(FOLDER) / recipe.name
    check_writable(folder / INDEX)
    with join_job() as job:
        data = recipe.data
        listing = open_labelled(data.source, data.path, data.split)
        build.check_classes(recipe, listing.class_names)
        for note in listing.notes:
            console.note(note)
        place = usable_device(job.device_named(device))
        fix = f"--batch-size {batch_size // 2}" if batch_size > 1 else ELSEWHERE
        fits = partial(explained, f"the VAE and {batch_size} images at once", place, fix)
        with fits():
            space = build.open_space(recipe, place)
        if not isinstance(space, VaeSpace) or not space.has_moments:
            raise UsageError(
                "this VAE has no posterior to prepare",
                got=f"data.vae {data.vae}, an AutoencoderTiny",
                expected="an AutoencoderKL",
                fix="train on the images themselves: this VAE encodes fast",
            )
        plan = make_plan(data, listing, space, round(shard_mb * 1e6), batch_size)
        work = LatentWork(folder, plan)
        if job.broadcast(work.is_complete() if job.is_main else None):
            console.note(f"{folder}: all {plan.num_shards} shards exist already")
            return _result(folder, read_index(folder), 0, None)
        if job.is_main:
            _announce(work)
            work.claim()
            _check_disk(work)
        job.wait()
        work.join()
        done = work.finished()
        missing = [number for number in range(plan.num_shards) if number not in done]
        job.wait()  # all have seen the same shards before the first one is added
        with fits():
            rate = _make_shards(work, missing, job, listing, space, recipe)
        job.wait()
        if job.is_main:
            work.finish()
        job.wait()
        return _result(folder, read_index(folder), len(missing), rate)


def _check_recipe(recipe: Recipe) -> None:
    if recipe.data.vae is None:
        raise UsageError(
            "the recipe has no VAE: its model works on pixels, there is nothing to prepare",
            where="data.vae",
            fix="set data.vae, or train without preparing",
        )
    if recipe.data.source == "latents":
        raise UsageError(
            "the recipe already trains on latents",
            got="data.source latents",
            expected="a source of images",
            fix="set data.source=folder data.path=IMAGES",
        )


def _announce(work: LatentWork) -> None:
    plan = work.plan
    channels, height, width = plan.latent_shape
    views = "each also mirrored" if plan.mirrored else "not mirrored"
    console.note(
        f"preparing {plan.listed:,} images of {plan.image_size} pixels, {views}, as posteriors of "
        f"{channels} x {height} x {width} latents in bfloat16: "
        f"{console.byte_size(plan.total_bytes)} in {plan.num_shards} shards, into {work.folder}"
    )


def _check_disk(work: LatentWork) -> None:
    done = work.finished()
    needed = _SPARE + sum(
        work.plan.shard_bytes(len(work.plan.images_of(number)))
        for number in range(work.plan.num_shards)
        if number not in done
    )
    free = shutil.disk_usage(work.folder).free
    if free < needed:
        raise EnvironmentProblem(
            "not enough disk for the latents",
            got=f"{console.byte_size(free)} free",
            expected=f"{console.byte_size(needed)} for the missing shards",
            where=work.folder,
            fix="free disk space or name another folder with -o",
        )


def _make_shards(
    work: LatentWork,
    missing: list[int],
    job: Job,
    listing: ImageSet,
    space: VaeSpace,
    recipe: Recipe,
) -> float | None:
    """Make this process's share of the missing shards; return the job's images per second."""
    plan, data = work.plan, recipe.data
    pending = sum(len(plan.images_of(number)) for number in missing)
    before = plan.listed - pending
    began = time.monotonic()
    pool_context = ThreadPoolExecutor(max(1, data.workers), thread_name_prefix="terdit-decode")
    meter_context = (
        console.progress(f"preparing {recipe.name}", plan.listed) if job.is_main else nullcontext()
    )
    with pool_context as pool, meter_context as meter:
        if meter is not None:
            meter.start_at(before)

        def report(in_shard: int) -> None:
            if meter is None:
                return
            recorded = filter(work.is_recorded, missing)
            done = in_shard + sum(len(plan.images_of(number)) for number in recorded)
            rate = done / (time.monotonic() - began)
            left = console.duration((pending - done) / rate)
            meter.update(before + done, f"{rate:.1f} img/s  {left} left")

        skip_bad = data.on_bad_image == "skip"
        for number in missing[job.rank :: job.size]:
            record = work.make(number, listing, space, pool, skip_bad, report)
            if record.skipped:
                console.warn(
                    f"{record.file}: {len(record.skipped)} unreadable images skipped, "
                    f"first: {record.skipped[0]}"
                )
    job.wait()
    seconds = time.monotonic() - began
    return pending / seconds if pending else None


def _result(folder: Path, index: LatentIndex, made: int, rate: float | None) -> PrepareResult:
    return PrepareResult(
        folder=folder,
        images=index.images,
        skipped=sum(len(record.skipped) for record in index.shards),
        shards=len(index.shards),
        bytes=sum(record.bytes for record in index.shards),
        shards_made=made,
        images_per_second=rate,
    )


def verify(folder: Path) -> VerifyResult:
    """Read all shards of a finished folder again and compare their hashes with the index.

    Raises:
        InputFileError: no finished folder; damaged or missing shards, which it names.
    """
    index = read_index(folder)
    began = time.monotonic()
    done, damage = 0, []
    with (
        ThreadPoolExecutor(_HASHERS, thread_name_prefix="terdit-hash") as pool,
        console.progress("verifying", len(index.shards)) as meter,
    ):
        found = pool.map(lambda record: damage_of(folder, record), index.shards)
        for record, problem in zip(index.shards, found, strict=True):
            done += record.bytes
            rate = done / max(1e-9, time.monotonic() - began)
            meter.update(record.number + 1, f"{console.byte_size(rate)}/s")
            if problem is not None:
                damage.append(f"{record.file} ({problem})")
    if damage:
        raise InputFileError(
            f"{len(damage)} of {len(index.shards)} shards are damaged",
            got=", ".join(damage[:20]) + (f" and {len(damage) - 20} more" if damage[20:] else ""),
            where=folder,
            fix="delete these files and rerun the `terdit prepare` that wrote them: "
            "it writes only what is missing",
        )
    total = sum(record.bytes for record in index.shards)
    seconds = time.monotonic() - began
    return VerifyResult(folder, index.images, len(index.shards), total, seconds)
