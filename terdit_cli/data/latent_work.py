"""Making a folder of latents: shard after shard, by any number of processes, with stops between.

A shard is a function of the plan and its number: its images, encoded in batches counted from its
first one, each batch with the mirrors after it. So it does not matter which process makes a shard,
nor when. (Processors and libraries of another kind may round differently.)

Shapes: b images of S pixels; V views; moments [b, V, 2C, h, w].
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from terdit_cli.data.image_set import ImageSet
from terdit_cli.data.latent_shards import (
    INDEX,
    PLAN,
    LatentIndex,
    LatentPlan,
    ShardRecord,
    read_index,
    read_json,
    record_name,
    shard_name,
    write_json,
    write_shard,
)
from terdit_cli.data.vae import VaeSpace
from terdit_cli.errors import EnvironmentProblem, InputFileError, UsageError
from terdit_cli.recipe import DataSection
from terdit_cli.system.atomic import remove_file

_AHEAD = 2  # batches decoded while one is encoded

Pixels = NDArray[np.uint8]
Progress = Callable[[int], None]


def make_plan(
    data: DataSection, listing: ImageSet, space: VaeSpace, shard_bytes: int, batch_size: int
) -> LatentPlan:
    """Say what a recipe's latents will be: about `shard_bytes` a shard, in whole batches.

    Raises:
        UsageError: the image size does not fit the VAE.
    """
    latent_shape = space.latent_shape(data.image_size)
    section = data.model_dump(mode="json")
    names = hashlib.sha256("\n".join(listing.names).encode(errors="surrogatepass"))
    names.update(listing.labels.tobytes())
    views = 2 if data.flip else 1
    row = views * (2 * 2 * int(np.prod(latent_shape)) + 8) + 8  # bytes
    batches = max(1, shard_bytes // (row * batch_size))
    return LatentPlan(
        image_size=data.image_size,
        latent_shape=list(latent_shape),
        mirrored=data.flip,
        vae=str(data.vae),
        encoder_sha256=space.encoder_sha256(),
        scale_factor=data.scale_factor,
        class_names=listing.class_names,
        listed=len(listing),
        listing_sha256=names.hexdigest(),
        images_a_shard=batches * batch_size,
        batch_size=batch_size,
        data=section,
        data_sha256=hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest(),
    )


class LatentWork:
    """One folder of latents in the making."""

    def __init__(self, folder: Path, plan: LatentPlan) -> None:
        self.folder, self.plan = folder, plan

    def claim(self) -> None:
        """Begin, or go on with what was stopped here, or with a finished folder that lost shards.

        Only one process of a job may call it.

        Raises:
            UsageError: the folder holds latents of another plan; says what differs.
            InputFileError: their description cannot be read. EnvironmentProblem: not writable.
        """
        there = self._plan_there()
        if there is not None:
            self._refuse_other(there)
        if isinstance(there, LatentIndex):
            for record in there.shards:
                if self._has(record) and not self._record_path(record.number).exists():
                    write_json(self._record_path(record.number), record)
        write_json(self.folder / PLAN, LatentPlan(**self.plan.model_dump()))
        remove_file(self.folder / INDEX)

    def is_complete(self) -> bool:
        """Say whether the finished folder lies there already, with all its shards.

        Raises:
            UsageError: it is of another plan. InputFileError: its index cannot be read.
        """
        if not (self.folder / INDEX).is_file():
            return False
        index = read_index(self.folder)
        self._refuse_other(index)
        return all(self._has(record) for record in index.shards)

    def join(self) -> None:
        """Check that the process that claimed the folder did so for the same work.

        Raises:
            EnvironmentProblem: this process does not see the folder, or other images.
        """
        path = self.folder / PLAN
        if not path.is_file():
            raise EnvironmentProblem(
                "this process does not see the folder of the others",
                got="no " + PLAN,
                expected="a folder that all machines share",
                where=self.folder,
                fix="name one with -o",
            )
        unlike = self.plan.differences(read_json(path, LatentPlan))
        if unlike:
            raise EnvironmentProblem(
                "this process sees other data than the first one",
                got=f"another {', '.join(unlike)}",
                where=self.folder,
                fix="give all machines the same images and VAE",
            )

    def _plan_there(self) -> LatentPlan | None:
        if (self.folder / INDEX).is_file():
            return read_index(self.folder)
        if (self.folder / PLAN).is_file():
            return read_json(self.folder / PLAN, LatentPlan)
        return None

    def _refuse_other(self, there: LatentPlan) -> None:
        unlike = self.plan.differences(there)
        if unlike:
            facts = [
                (name, *(str(getattr(plan, name))[:60] for plan in (there, self.plan)))
                for name in unlike
            ]
            raise UsageError(
                "the folder holds other latents",
                got=", ".join(f"{name} {theirs}" for name, theirs, _ in facts),
                expected=", ".join(f"{name} {ours}" for name, _, ours in facts),
                where=self.folder,
                fix="name another folder with -o, or delete this one",
            )

    def _record_path(self, number: int) -> Path:
        return self.folder / record_name(number)

    def _has(self, record: ShardRecord) -> bool:
        path = self.folder / record.file
        return path.is_file() and path.stat().st_size == record.bytes

    def is_recorded(self, number: int) -> bool:
        """Say whether a shard is done, without reading its record."""
        return self._record_path(number).exists()

    def finished(self) -> dict[int, ShardRecord]:
        """Return the records of the shards that are done, by number."""
        found = {}
        for number in range(self.plan.num_shards):
            path = self._record_path(number)
            if path.is_file():
                record = read_json(path, ShardRecord)
                if record.number == number and self._has(record):
                    found[number] = record
        return found

    def make(
        self,
        number: int,
        listing: ImageSet,
        space: VaeSpace,
        pool: ThreadPoolExecutor,
        skip_bad: bool,
        on_progress: Progress,
    ) -> ShardRecord:
        """Encode and write one shard.

        Args:
            pool: decodes the images.
            skip_bad: leave unreadable images out; otherwise the first one is an error.
            on_progress: called with the shard's images done after each batch.

        Raises:
            InputFileError: an unreadable image. EnvironmentProblem: the shard cannot be written.
        """
        images, batch_size = self.plan.images_of(number), self.plan.batch_size
        batches = [images[k : k + batch_size] for k in range(0, len(images), batch_size)]
        moments = np.empty(self.plan.moments_shape(len(images)), dtype=np.uint16)
        kept: list[int] = []
        skipped: list[str] = []
        ahead: deque[list[Future[Pixels | None]]] = deque()

        def decode(index: int) -> Pixels | None:
            try:
                return listing.cropped(index, self.plan.image_size)
            except InputFileError:
                if skip_bad:
                    return None
                raise

        try:
            for place, batch in enumerate(batches):
                for later in batches[place + len(ahead) : place + 1 + _AHEAD]:
                    ahead.append([pool.submit(decode, index) for index in later])
                decoded = [future.result() for future in ahead.popleft()]
                skipped += [
                    listing.names[index]
                    for index, pixels in zip(batch, decoded, strict=True)
                    if pixels is None
                ]
                good = [pixels for pixels in decoded if pixels is not None]
                if good:
                    moments[len(kept) : len(kept) + len(good)] = self._encode(space, good)
                kept += [
                    index
                    for index, pixels in zip(batch, decoded, strict=True)
                    if pixels is not None
                ]
                on_progress(batch.stop - images.start)
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()
        labels = listing.labels[np.array(kept, dtype=np.int64)]
        return write_shard(self.folder, number, moments[: len(kept)], labels, skipped)

    def _encode(self, space: VaeSpace, images: list[Pixels]) -> NDArray[np.uint16]:
        """Return the bits of the moments in bfloat16, [b, V, 2C, h, w]."""
        batch = torch.from_numpy(np.stack(images))
        views = torch.cat([batch, batch.flip(2)]) if self.plan.mirrored else batch
        moments = space.moments(views).to(torch.bfloat16).cpu()
        moments = moments.unflatten(0, (self.plan.views, len(images))).transpose(0, 1)
        return moments.contiguous().view(torch.uint16).numpy()

    def finish(self) -> LatentIndex:
        """Write the index of all shards and remove what it replaces.

        Raises:
            InputFileError: no image could be read, or a shard has disappeared.
        """
        records = self.finished()
        missing = [k for k in range(self.plan.num_shards) if k not in records]
        if missing:
            raise InputFileError(
                "shards have disappeared",
                got=f"no {shard_name(missing[0])}",
                where=self.folder,
                fix="run the same command again",
            )
        shards = [records[number] for number in range(self.plan.num_shards)]
        images = sum(record.images for record in shards)
        if images == 0:
            raise InputFileError(
                "not one image could be read",
                got=f"{self.plan.listed} unreadable ones",
                where=self.plan.data["path"],
                fix="check data.path",
            )
        index = LatentIndex(**self.plan.model_dump(), images=images, shards=shards)
        write_json(self.folder / INDEX, index)
        remove_file(self.folder / PLAN)
        for number in records:
            remove_file(self._record_path(number))
        return index
