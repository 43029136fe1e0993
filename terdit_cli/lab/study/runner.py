"""Does what a study lacks, one thing after the other; whatever is there already stays.

    for each seed, for each variant:   train or convert -> loss -> scores -> images -> footprint

A seed is finished for all variants before the next begins, so a half-done study already compares
like with like. Killed anywhere, it goes on there: training from its checkpoint, scoring from the
features of the images that it has. A model is made when something that is missing needs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from terdit_cli import console
from terdit_cli.errors import UsageError
from terdit_cli.lab.children import ChildFailed, Finished, Run, command_of
from terdit_cli.lab.study.measure import (
    FixedNoise,
    Reals,
    fix_noise,
    judge,
    measure_loss,
    read_features,
)
from terdit_cli.lab.study.nearest import find_nearest
from terdit_cli.lab.study.reals import features_words, make_reals
from terdit_cli.lab.study.records import (
    Conversion,
    Folder,
    Footprint,
    Grid,
    Loss,
    Neighbours,
    Place,
    Record,
    Score,
    Started,
    Training,
    current,
    differences,
    lost_by,
    model_asked,
    read,
    sampled_by,
    save,
    save_arrays,
    scored_by,
    stamp,
    timed_by,
)
from terdit_cli.lab.study.spec import (
    TRAIN_SPLIT,
    Study,
    Variant,
    checkpoint_words,
    recipe_of,
    words_of,
)
from terdit_cli.model.ckpt import CKPT, load_ckpt
from terdit_cli.model.layout import BACKWARD_AND_FORWARD, training_flops
from terdit_cli.recipe import Recipe
from terdit_cli.system.atomic import atomic_path, remove_file
from terdit_cli.train.checkpoint import complete_checkpoints, read_manifest
from terdit_cli.train.loggers import FILE as METRICS
from terdit_cli.train.loggers import logged_seconds, read_metrics
from terdit_cli.train.write_ckpt import write_ckpt

LATENCY_REPEATS = 3
DIVERGED = 5  # exit code of a training that could not go on
_KEPT_CHECKPOINTS = 2  # of a run that goes on; one of a finished one

Changed = Callable[[], object]


class _NoModel(Exception):
    """A variant of a seed came to nothing; why has been said."""


class Runner:
    """Works through a study."""

    def __init__(self, study: Study, folder: Folder, run: Run, changed: Changed) -> None:
        """Keep what to do and where.

        Args:
            run: runs a verb: `run_terdit` with a lock.
            changed: called whenever a variant of a seed is finished, to write the pages again.
        """
        self._study = study
        self._folder = folder
        self._run = run
        self._changed = changed

    def check(self, only: Iterable[str] = ()) -> list[Variant]:
        """Return the variants that `work` would make and measure; before hours of work.

        Raises:
            UsageError: what lies there is of another study.
        """
        study = self._study
        chosen = study.closure(list(only) or [variant.name for variant in study.variants])
        for variant in chosen:
            for seed in study.seeds_of(variant):
                self._check_place(variant, seed)
        return chosen

    def work(self, only: Iterable[str] = ()) -> None:
        """Do all that is missing, or only what some variants need.

        Raises:
            What `check` and the verbs raise.
        """
        study, chosen = self._study, self.check(only)
        seeds = dict.fromkeys(seed for variant in chosen for seed in study.seeds_of(variant))
        for seed in seeds:
            for variant in chosen:
                if seed not in study.seeds_of(variant):
                    continue
                try:
                    self._measure(variant, seed)
                except _NoModel:
                    continue
                self._changed()

    def _place(self, variant: Variant, seed: int) -> Place:
        return self._folder.place(variant, seed)

    def _asked(self, variant: Variant, seed: int, **more: Any) -> dict[str, Any]:
        """Return what a finding of a model depends on."""
        return {"model": model_asked(self._study, variant, seed), **more}

    def _own(self, variant: Variant) -> dict[str, Any]:
        """Return the facts of a record that the study makes itself, without a verb."""
        return {
            "command": f"{self._study.command} --only {variant.name}", "seconds": 0.0, **stamp()
        }  # fmt: skip

    def _check_place(self, variant: Variant, seed: int) -> None:
        """Raise UsageError where a run folder holds a training with other settings."""
        place = self._place(variant, seed)
        asked = model_asked(self._study, variant, seed)
        record: Record | None = read(place.training, Training)
        if record is None and (place.run / "recipe.yaml").exists():
            record = read(place.started, Started)
        changed = [] if record is None else differences(record.asked, asked)
        if changed:
            raise UsageError(
                f"the study's folder holds {variant.name} of other settings",
                got=f"other {', '.join(changed)}",
                where=place.folder,
                fix="delete it, or name another folder with --runs",
            )

    # Models

    def _model(self, variant: Variant, seed: int, step: int | None = None) -> Path:
        """Return the model of a scored step, or of the last; made if it is not there.

        Raises:
            _NoModel: its training failed, or one that it needs.
        """
        step = step or self._study.steps_of(variant)[-1]
        if not variant.is_trained and not variant.is_converted:
            return self._model(self._study.variant(str(variant.of)), seed, step)
        if not self._make(variant, seed):
            raise _NoModel
        return self._place(variant, seed).model(step, variant)

    def _make(self, variant: Variant, seed: int) -> bool:
        """Train or convert what is missing; return whether there is something to measure."""
        if variant.is_trained:
            return self._train(variant, seed)
        assert variant.of is not None
        source_variant = self._study.variant(variant.of)
        source, place = self._place(source_variant, seed), self._place(variant, seed)
        if not self._make(source_variant, seed):
            console.warn(f"{variant.name}, seed {seed}: skipped, for {variant.of} failed")
            return False
        steps = self._study.steps_of(variant)
        pairs = [(source.model(s, source_variant), place.model(s, variant)) for s in steps]
        asked = model_asked(self._study, variant, seed)
        if current(place.conversion, Conversion, asked) is not None and all(
            new.exists() and _is_newer(new, old) for old, new in pairs
        ):
            return True
        remove_file(place.conversion)
        how = ["ternarize", "--granularity", str(variant.ternarize)]
        if variant.pack is not None:
            how = ["pack", "--codec", variant.pack.codec, "--rest", variant.pack.rest]
        done = [
            self._run([how[0], str(old), "--force", "-o", str(new), *how[1:]]) for old, new in pairs
        ]
        save(place.conversion, Conversion(asked=asked, **_facts(*done)))
        return True

    def _train(self, variant: Variant, seed: int) -> bool:
        study, place = self._study, self._place(variant, seed)
        record = read(place.training, Training)
        exports = {step: place.model(step, variant) for step in study.steps_of(variant)}
        if record is not None and (record.failed or all(map(Path.exists, exports.values()))):
            if record.failed:
                console.warn(f"{variant.name}, seed {seed}: {record.failed}")
            return not record.failed
        after = None
        if variant.after is not None:
            try:
                after = self._model(study.variant(variant.after), seed)
            except _NoModel:
                console.warn(f"{variant.name}, seed {seed}: skipped, for {variant.after} failed")
                return False
        recipe = recipe_of(study, variant, seed, after)
        console.note(f"study {study.name}: training {variant.name}, seed {seed}")
        words = [
            "train", str(study.recipe), *words_of(study, variant, seed, after),
            *checkpoint_words(study, variant, recipe),
            "--out", str(place.run), "--resume", "auto",
        ]  # fmt: skip

        def keep() -> None:
            _keep_checkpoints(place.run, exports, _KEPT_CHECKPOINTS)

        keep()
        asked = model_asked(study, variant, seed)
        facts: dict[str, Any] = {"asked": asked, "steps": recipe.train.steps, **stamp()}
        save(place.started, Started(asked=asked, command=command_of(words), seconds=0.0, **stamp()))
        try:
            done = self._run(words, tick=keep)
        except ChildFailed as error:
            if error.exit_code != DIVERGED:
                raise
            failed = "training diverged: no finite losses any more"
            command = command_of(words)
            save(place.training, Training(command=command, seconds=0.0, failed=failed, **facts))
            return False
        _keep_checkpoints(place.run, exports, 1)
        missing = [step for step, path in exports.items() if not path.exists()]
        if missing:
            raise UsageError(
                "the run has no checkpoint of a step that is to be scored",
                got=f"none of step {', '.join(map(str, missing))}",
                where=place.run,
                fix="delete the run folder to train it again, or take the step out of the study",
            )
        seconds = round(logged_seconds(read_metrics(place.run), recipe.train.global_batch_size), 1)
        with atomic_path(place.metrics) as temporary:
            shutil.copyfile(place.run / METRICS, temporary)
        save(place.training, Training(command=done.command, seconds=seconds, **facts))
        return True

    # Measurements

    def _measure(self, variant: Variant, seed: int) -> None:
        study = self._study
        for step in study.steps_at(variant, seed):
            self._loss(variant, seed, step)
            for cfg_scale in study.evaluation.cfg_scales:
                for n in study.images_at(variant, step):  # the more go on from the fewer
                    self._score(variant, seed, step, cfg_scale, n)
                self._drop_features(self._place(variant, seed), step, cfg_scale)
        if seed == study.seeds_of(variant)[0]:
            for cfg_scale in study.evaluation.cfg_scales:
                self._grid(variant, seed, cfg_scale)
            if variant.name in study.paired:
                self._neighbours(variant, seed)
            self._footprint(variant, seed)

    def _loss(self, variant: Variant, seed: int, step: int) -> None:
        path = self._place(variant, seed).loss(step)
        asked = self._asked(variant, seed, **lost_by(self._study))
        if current(path, Loss, asked) is not None:
            return
        fixed = self._fixed_noise
        model = self._model(variant, seed, step)
        values = measure_loss(model, fixed, _activations(variant))
        record = Loss(
            asked=asked, n=len(fixed.x0), images=fixed.images, **values, **self._own(variant)
        )
        save(path, record)

    def _score(self, variant: Variant, seed: int, step: int, cfg_scale: float, n: int) -> None:
        study, place = self._study, self._place(variant, seed)
        model_and_how = self._asked(
            variant, seed, step=step, cfg_scale=cfg_scale, evaluation=scored_by(study)
        )
        asked = model_and_how | {"n": n}
        path = place.score(step, cfg_scale, n)
        if current(path, Score, asked) is not None:
            return
        reals = self._reals
        evaluation = study.evaluation
        reference = evaluation.reference
        if reference == TRAIN_SPLIT:
            reference = str(self._folder.reals / "reference.npz")
        model, work = self._model(variant, seed, step), place.features(step, cfg_scale)
        # Features of a stopped scoring are good for any n, if all else is as it was.
        started = Started(asked=model_and_how, **self._own(variant))
        before = current(place.features_started(step, cfg_scale), Started, started.asked)
        if before is None or before.machine != started.machine:
            self._drop_features(place, step, cfg_scale)
            save(place.features_started(step, cfg_scale), started)
        console.note(
            f"study {study.name}: scoring {variant.name}, seed {seed}, step {step}, "
            f"cfg {cfg_scale:g}, {n} images"
        )
        words = [
            "eval-fid", "--model", str(model), "--reference", reference,
            "-n", str(n), *features_words(evaluation), "--sampler", evaluation.sampler,
            "--steps", str(evaluation.sampling_steps), "--cfg-scale", f"{cfg_scale:g}",
            "--cfg-channels", evaluation.cfg_channels, "--seed", str(evaluation.seed),
            "--batch-size", str(evaluation.batch_size), *_runs_as(variant), "--work", str(work),
            *(["--compile"] if evaluation.compile and not variant.is_converted else []),
        ]  # fmt: skip
        done = self._run(words)
        accuracy, nearest = judge(read_features(work, n), reals)
        record = Score(
            asked=asked, **_facts(done), step=step, cfg_scale=cfg_scale, n=n,
            evaluation=done.result, accuracy=accuracy, nearest=nearest,
        )  # fmt: skip
        save(path, record)

    def _drop_features(self, place: Place, step: int, cfg_scale: float) -> None:
        shutil.rmtree(place.features(step, cfg_scale), ignore_errors=True)
        remove_file(place.features_started(step, cfg_scale))

    def _grid(self, variant: Variant, seed: int, cfg_scale: float) -> None:
        """Generate images of every class from the same noise."""
        place, evaluation = self._place(variant, seed), self._study.evaluation
        path, record = place.grid(cfg_scale), place.grid_record(cfg_scale)
        asked = self._asked(variant, seed, **sampled_by(self._study, cfg_scale))
        if path.exists() and current(record, Grid, asked) is not None:
            return
        remove_file(record)
        done = self._run(
            [
                "sample", *self._sampling(variant, seed, cfg_scale), "-n", str(evaluation.grid),
                "--batch-size", str(evaluation.batch_size), "--force", "-o", str(path),
            ]
        )  # fmt: skip
        save(record, Grid(asked=asked, **_facts(done)))

    def _neighbours(self, variant: Variant, seed: int) -> None:
        """Find the training images nearest to the grid's of the largest CFG scale."""
        study, place = self._study, self._place(variant, seed)
        largest = study.largest_scale
        asked = self._asked(variant, seed, **sampled_by(study, largest))
        if current(place.neighbours, Neighbours, asked) and place.nearest_images.exists():
            return
        remove_file(place.neighbours)
        with np.load(place.grid(largest), allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["labels"]
        found = find_nearest(self._base, images)
        save_arrays(place.nearest_images, arr_0=found.images, labels=labels)
        record = Neighbours(
            asked=asked, **self._own(variant), distances=found.distances.tolist(),
            held_out=None if found.held_out is None else found.held_out.tolist(),
            searched=found.searched,
        )  # fmt: skip
        save(place.neighbours, record)

    def _sampling(self, variant: Variant, seed: int, cfg_scale: float) -> list[str]:
        evaluation = self._study.evaluation
        return [
            "--prompt-class", "all", "--model", str(self._model(variant, seed)),
            "--sampler", evaluation.sampler, "--steps", str(evaluation.sampling_steps),
            "--cfg-scale", f"{cfg_scale:g}", "--cfg-channels", evaluation.cfg_channels,
            "--seed", str(evaluation.seed), *_runs_as(variant),
        ]  # fmt: skip

    def _footprint(self, variant: Variant, seed: int) -> None:
        """Measure bytes, memory and latency in the form in which a model would be deployed."""
        study, place = self._study, self._place(variant, seed)
        asked = self._asked(variant, seed, **timed_by(study))
        if current(place.footprint, Footprint, asked) is not None:
            return
        model = self._model(variant, seed)
        trained = variant if variant.is_trained else study.variant(str(variant.of))
        info = load_ckpt(self._model(trained, seed)).info
        packed = variant.is_converted or info.ternary.enabled
        file_bytes: dict[str, int] = {}
        ternary, form, deployed = 0, CKPT, model
        made: list[Finished] = []
        if packed:
            for codec in ("t5", "t2"):
                deployed = place.folder / f"footprint-{codec}.tdt"
                words = ["pack", str(model), "--force", "-o", str(deployed), "--codec", codec]
                made = [self._run([*words, "--rest", "bf16"])]
                result = made[0].result
                file_bytes[codec] = result["file_bytes"]
            ternary, parameters, form = result["ternary"], result["parameters"], "t2"
            if variant.pack is not None:
                deployed, form, made = model, variant.pack.codec, []
                file_bytes[form] = model.stat().st_size
        else:
            state = load_ckpt(model).state_dict("ema")
            parameters = sum(tensor.numel() for tensor in state.values())
        file_bytes |= {"bf16": 2 * parameters, "fp32": 4 * parameters}
        words = [
            "sample",
            *self._sampling(variant, seed, study.largest_scale),
            "-n",
            "1",
            "--batch-size",
            "1",
        ]
        words[words.index("--model") + 1] = str(deployed)
        images = place.folder / "footprint.npz"
        runs = [self._run([*words, "--force", "-o", str(images)]) for _ in range(LATENCY_REPEATS)]
        first = runs[0].result
        facts = _facts(*runs) | {"command": _facts(*made, runs[0])["command"]}
        record = Footprint(
            asked=asked, **facts,
            form=form, parameters=parameters, ternary=ternary, file_bytes=file_bytes,
            forward_flops=training_flops(info.config) // BACKWARD_AND_FORWARD, nfe=first["nfe"],
            latency=[run.result["seconds"] / run.result["images"] for run in runs],
            peak_bytes=max(run.peak_bytes for run in runs),
            backend=first["backend"], isa=first["isa"], activations=first["activations"],
            threads=first["threads"],
        )  # fmt: skip
        save(place.footprint, record)
        for path in (images, *place.folder.glob("footprint-*.tdt")):
            remove_file(path)

    # What all variants share

    @cached_property
    def _base(self) -> Recipe:
        study = self._study
        variant = study.variant(study.headline.baseline)
        return recipe_of(study, variant, study.seeds_of(variant)[0])

    @cached_property
    def _fixed_noise(self) -> FixedNoise:
        return fix_noise(self._base, self._study.evaluation.loss_n)

    @cached_property
    def _reals(self) -> Reals:
        return make_reals(self._study, self._folder, self._base, self._run)


def _keep_checkpoints(run: Path, exports: dict[int, Path], newest: int) -> None:
    """Export the checkpoints of scored steps, then delete all but the newest."""
    complete = complete_checkpoints(run)
    for step, folder in complete.items():
        if step in exports and not exports[step].exists():
            write_ckpt(read_manifest(folder), exports[step])
    for folder in list(complete.values())[newest:]:
        shutil.rmtree(folder, ignore_errors=True)


def _facts(*done: Finished) -> dict[str, Any]:
    """Return what a record says of the verbs that made it."""
    command = "\n".join(one.command for one in done)
    return {"command": command, "seconds": round(sum(one.seconds for one in done), 1), **stamp()}


def _activations(variant: Variant) -> str:
    """Return what a converted model computes its activations in; the others are checkpoints."""
    if not variant.is_converted:
        return "auto"
    return variant.pack.activations if variant.pack is not None else "fp32"


def _runs_as(variant: Variant) -> list[str]:
    """Return the words by which a variant's model is sampled, beside those of all variants."""
    words = ["--activations", _activations(variant)] if variant.is_converted else []
    return words if variant.eps_scale == 1 else [*words, "--eps-scale", f"{variant.eps_scale:g}"]


def _is_newer(path: Path, model: Path) -> bool:
    return path.stat().st_mtime >= model.stat().st_mtime
