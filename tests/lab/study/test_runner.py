"""A study of real, tiny models: what is missing is done, what is there stays, stops cost nothing.

The verbs run in this process, so that a whole study takes seconds; one training runs as a child.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from terdit_cli.cli import app
from terdit_cli.errors import Interrupted, UsageError
from terdit_cli.lab.children import ChildFailed, Finished, command_of, lock
from terdit_cli.lab.study.collect import collect
from terdit_cli.lab.study.records import Conversion, Folder, Score, Training, read
from terdit_cli.lab.study.runner import Runner
from terdit_cli.lab.study.spec import Study, load_study

RECIPE = """\
name: dots
model:
  {size: nano, n_layers: 1, dim: 16, n_heads: 2, patch_size: 4, multiple_of: 16, num_classes: 3}
ternary: {granularity: tensor}
data: {source: folder, path: IMAGES, image_size: 8, channels: 3, flip: false, workers: 1}
train: {steps: 4, global_batch_size: 4, micro_batch_size: 4, precision: fp32}
optim: {lr: 3e-3}
ema: {decay: 0.9}
sample: {every: 0}
logging: {every: 1}
"""
STUDY = """\
name: dots
title: Dots
recipe: recipe.yaml
seeds: [0]
steps: [2, 4]
headline: {ternary: ternary, baseline: baseline}
variants:
  - {name: baseline, label: full precision, question: "a?", overrides: [ternary.enabled=false]}
  - {name: ternary, label: ternary, question: "b?"}
  - {name: ptq, label: after, question: "c?", of: baseline, ternarize: row}
  - {name: packed, label: packed, question: "d?", of: ternary, pack: {codec: t5, rest: bf16}}
  - {name: scaled, label: scaled, question: "e?", of: baseline, eps_scale: 0.9}
evaluation:
  {features: "FEATURES", n: 12, curve_n: 10, sampling_steps: 2, batch_size: 12, loss_n: 16,
   cfg_scales: [2.0], grid: 1}
"""
Run = Callable[..., Finished]


def terdit(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
    """Run a verb in this process, as `run_terdit` does in another."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        patch.object(sys, "argv", ["terdit", *words, "--json"]),
        patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code or 0
    if code:
        print(err.getvalue())
        raise ChildFailed(words, code)
    if tick is not None:
        tick()
    return Finished(json.loads(out.getvalue()), 1.0, 1000, command_of(words))


class StoppedAfter:
    """Runs so many verbs, then is stopped."""

    def __init__(self, verbs: int) -> None:
        self._left = verbs

    def __call__(self, words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        if not self._left:
            raise Interrupted("stop", signal_number=signal.SIGTERM)
        self._left -= 1
        return terdit(words, tick)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 images of three classes, an extractor, a recipe and a study of them."""
    folder = tmp_path_factory.mktemp("dots")
    random = np.random.default_rng(0)
    for index in range(60):
        path = folder / "images" / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 100, (8, 8, 3)) + 50 * (index % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    network = folder / "grid.pt"
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(network))
    (folder / "recipe.yaml").write_text(RECIPE.replace("IMAGES", str(folder / "images")))
    study = STUDY.replace("FEATURES", f"torchscript:{network}")
    (folder / "dots.yaml").write_text(study)
    return folder


@pytest.fixture(scope="module")
def tiny(place: Path) -> Study:
    return load_study(place / "dots.yaml")


@pytest.fixture(scope="module")
def done(place: Path, tiny: Study) -> Folder:
    """The study, done without a stop."""
    folder = Folder(place / "runs" / "dots")
    Runner(tiny, folder, terdit, lambda: None).work()
    return folder


def findings(study: Study, folder: Folder) -> dict[str, Any]:
    """Return all numbers that do not depend on the machine's speed."""
    found: dict[str, Any] = {}
    for model in collect(study, folder).models:
        key = f"{model.variant.name}/{model.seed}"
        for (step, scale, n), score in model.scores.items():
            values = (score.evaluation["metrics"], score.accuracy, score.nearest)
            found[f"{key}/{step}/{scale:g}/{n}"] = values
        found[f"{key}/losses"] = {s: loss.quarters for s, loss in model.losses.items()}
        found[f"{key}/grids"] = {s: images.tobytes() for s, images in model.grids.items()}
        assert model.footprint is not None
        found[f"{key}/bytes"] = model.footprint.file_bytes
    return found


@pytest.mark.slow
def test_a_study_finds_all_of_every_variant(tiny: Study, done: Folder) -> None:
    found = collect(tiny, done)
    assert found.missing == 0
    assert "ternary : baseline" in found.verdict
    names = {"baseline", "ternary", "ptq", "packed", "scaled"}
    assert {model.variant.name for model in found.models} == names
    by_name = {model.variant.name: model for model in found.models}
    assert set(by_name["ternary"].scores) == {(2, 2.0, 10), (4, 2.0, 10), (4, 2.0, 12)}
    assert set(by_name["ptq"].scores) == {(4, 2.0, 12)}
    costs = {name: model.footprint for name, model in by_name.items()}
    assert costs["baseline"] is not None
    assert set(costs["baseline"].file_bytes) == {"bf16", "fp32"}
    assert costs["baseline"].bytes == 2 * costs["baseline"].parameters
    assert costs["packed"] is not None
    assert costs["packed"].form == "t5"
    assert found.probe is not None
    assert found.probe.accuracy == 1.0  # the classes differ in brightness
    assert found.class_names == ["a", "b", "c"]


@pytest.mark.slow
def test_a_scaled_variant_is_the_same_model_sampled_otherwise(tiny: Study, done: Folder) -> None:
    by_name = {model.variant.name: model for model in collect(tiny, done).models}
    baseline, scaled = by_name["baseline"], by_name["scaled"]
    assert scaled.losses[4] == baseline.losses[4].model_copy(
        update={key: getattr(scaled.losses[4], key) for key in ("asked", "command", "date")}
    )
    ours, theirs = (model.scores[4, 2.0, 12].evaluation for model in (scaled, baseline))
    assert ours["provenance"]["eps_scale"] == 0.9
    assert theirs["provenance"]["eps_scale"] == 1.0
    assert ours["provenance"]["model_sha256"] == theirs["provenance"]["model_sha256"]
    assert ours["metrics"] != theirs["metrics"]
    assert scaled.footprint is not None
    assert baseline.footprint is not None
    assert scaled.footprint.file_bytes == baseline.footprint.file_bytes
    assert not list(done.place(tiny.variant("scaled"), 0).folder.glob("step-*"))


def test_the_losses_tell_the_models_apart_and_fall(tiny: Study, done: Folder) -> None:
    by_name = {model.variant.name: model for model in collect(tiny, done).models}
    losses = by_name["ternary"].losses
    assert losses[4].loss < losses[2].loss
    assert losses[4].loss == pytest.approx(losses[4].mse + losses[4].vb)
    assert losses[4].loss == pytest.approx(np.mean(losses[4].quarters))
    assert losses[4].loss != by_name["baseline"].losses[4].loss


def test_only_what_is_kept_for_scores_stays_on_disk(tiny: Study, done: Folder) -> None:
    place = done.place(tiny.variant("ternary"), 0)
    assert sorted(p.name for p in place.folder.glob("step-*")) == [
        "step-00000002.pt", "step-00000004.pt"
    ]  # fmt: skip
    assert [p.name for p in (place.run / "checkpoints").iterdir()] == ["step-00000004"]
    assert not list(done.path.rglob("*.work"))
    assert not list(done.path.rglob("footprint-*"))


def test_a_finished_study_does_nothing(tiny: Study, done: Folder) -> None:
    def refuse(words: Sequence[str], tick: object = None) -> Finished:
        raise AssertionError(command_of(words))

    Runner(tiny, done, refuse, lambda: None).work()


def test_what_is_recorded_stays_without_the_weights(place: Path, tiny: Study, done: Folder) -> None:
    folder = Folder(place / "kept" / "dots")
    shutil.copytree(done.path, folder.path)
    for pattern in ("*.pt", "*.safetensors", "*.tdt", "reals/*.npz"):
        for path in folder.path.rglob(pattern):
            path.unlink()
    for path in list(folder.path.rglob("run")):
        shutil.rmtree(path)
    assert findings(tiny, folder) == findings(tiny, done)
    before = {model.variant.name: model.metrics for model in collect(tiny, done).models}
    assert {m.variant.name: m.metrics for m in collect(tiny, folder).models} == before
    assert before["ternary"]
    verbs: list[str] = []

    def run(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        verbs.append(words[0])
        return terdit(words, tick)

    Runner(tiny, folder, run, lambda: None).work()
    assert verbs == []
    folder.place(tiny.variant("ptq"), 0).score(4, 2.0, 12).unlink()
    Runner(tiny, folder, run, lambda: None).work()
    assert verbs == ["eval-fid", "train", "ternarize", "eval-fid"]  # features of the reals first
    assert findings(tiny, folder) == findings(tiny, done)


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_numbers(
    place: Path, tiny: Study, done: Folder
) -> None:
    folder = Folder(place / "stopped" / "dots")
    for life in range(60):
        try:  # 0 to 5 verbs a life: a footprint takes five at once
            Runner(tiny, folder, StoppedAfter(life % 6), lambda: None).work(["ternary", "ptq"])
            break
        except Interrupted:
            continue
    assert life >= 6
    ours, theirs = findings(tiny, folder), findings(tiny, done)
    assert ours
    left = ("packed", "scaled")
    assert ours == {key: value for key, value in theirs.items() if not key.startswith(left)}


def test_a_changed_evaluation_is_scored_again_without_training(
    place: Path, tiny: Study, done: Folder
) -> None:
    changed = place / "changed.yaml"
    changed.write_text((place / "dots.yaml").read_text().replace("n: 12", "n: 15"))
    study = load_study(changed)
    verbs: list[str] = []

    def run(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        verbs.append(words[0])
        return terdit(words, tick)

    Runner(study, done, run, lambda: None).work(["ternary"])
    assert verbs == ["eval-fid"]
    score = read(done.place(study.variant("ternary"), 0).score(4, 2.0, 15), Score)
    assert score is not None
    assert score.n == 15


def test_a_changed_recipe_is_refused_before_any_work(place: Path, done: Folder) -> None:
    study = load_study(place / "dots.yaml", ["optim.lr=1"])
    with pytest.raises(UsageError, match=r"of other settings.*recipe\.optim\.lr.*--runs"):
        Runner(study, done, terdit, lambda: None).work()


def test_images_that_were_deleted_are_drawn_again(place: Path, tiny: Study, done: Folder) -> None:
    """As a message about damaged ones advises; the page can be made meanwhile."""
    folder = Folder(place / "deleted" / "dots")
    shutil.copytree(done.path, folder.path)
    for name in ("ptq", "ternary"):
        folder.place(tiny.variant(name), 0).grid(2.0).unlink()
    folder.place(tiny.variant("ternary"), 0).nearest_images.unlink()
    by_name = {model.variant.name: model for model in collect(tiny, folder).models}
    assert not by_name["ptq"].grids
    assert by_name["ternary"].neighbours is None
    verbs: list[str] = []

    def run(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        verbs.append(words[0])
        return terdit(words, tick)

    Runner(tiny, folder, run, lambda: collect(tiny, folder)).work()
    assert verbs == ["sample", "sample"]
    assert findings(tiny, folder) == findings(tiny, done)


def test_a_stopped_scoring_does_not_go_on_under_other_settings(
    place: Path, tiny: Study, done: Folder
) -> None:
    folder = Folder(place / "half-scored" / "dots")
    shutil.copytree(done.path, folder.path)
    ours = folder.place(tiny.variant("ternary"), 0)
    for n in (10, 12):
        ours.score(4, 2.0, n).unlink()

    def stop(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        terdit(words, tick)  # all features are there, and the record is not
        raise Interrupted("stop", signal_number=signal.SIGTERM)

    with pytest.raises(Interrupted):
        Runner(tiny, folder, stop, lambda: None).work(["ternary"])
    assert ours.features(4, 2.0).exists()
    changed = place / "other-images.yaml"
    changed.write_text((place / "dots.yaml").read_text().replace("n: 12,", "n: 12, seed: 1,"))
    study = load_study(changed)
    with pytest.raises(Interrupted):  # of the first step, which is scored first
        Runner(study, folder, StoppedAfter(1), lambda: None).work(["ternary"])
    Runner(study, folder, terdit, lambda: None).work(["ternary"])
    score = read(ours.score(4, 2.0, 12), Score)
    assert score is not None
    assert score.evaluation["provenance"]["seed"] == 1
    assert not list(folder.path.rglob("*.work"))
    assert not ours.features_started(4, 2.0).exists()


LED = """\
  - {name: led, label: led, question: "e?", after: baseline,
     overrides: [train.init_from=$after, distill.teacher=$after, distill.weight=1,
                 distill.schedule=linear]}
  - {name: ptq, """


@pytest.fixture(scope="module")
def led(place: Path) -> tuple[Path, Folder]:
    """A study, its ternary variant initialised and distilled from the baseline; its folder."""
    path = place / "led.yaml"
    text = (place / "dots.yaml").read_text().replace("ternary: ternary, ", "ternary: led, ")
    path.write_text(text.replace("  - {name: ptq, ", LED))
    folder = Folder(place / "led" / "dots")
    Runner(load_study(path), folder, terdit, lambda: None).work(["led"])
    return path, folder


@pytest.mark.slow
def test_a_variant_begins_with_another_and_is_led_by_it(led: tuple[Path, Folder]) -> None:
    path, folder = led
    study = load_study(path)
    found = collect(study, folder)
    assert {model.variant.name for model in found.models} == {"baseline", "led"}
    assert study.steps_taken(study.variant("led")) == (4, 4)
    assert found.ratio("led", 2.0) is not None
    first, second = (model.losses[2].loss for model in found.models)
    assert second < first  # four steps ahead
    baseline = str(folder.place(study.variant("baseline"), 0).model(4, study.variant("baseline")))
    training = found.models[1].training
    assert training is not None
    assert f"train.init_from={baseline} distill.teacher={baseline}" in training.command


@pytest.mark.slow
def test_a_half_done_training_of_other_settings_is_refused(led: tuple[Path, Folder]) -> None:
    """A resumed run would be a mixture of both, and would be shown as the new one."""
    path, folder = led
    study = load_study(path)
    record = folder.place(study.variant("led"), 0).training
    before = record.read_bytes()
    record.unlink()  # as if it had been stopped
    try:
        changed = path.with_name("changed-led.yaml")
        changed.write_text(path.read_text().replace("schedule=linear", "schedule=constant"))
        with pytest.raises(UsageError, match=r"led of other settings.*recipe\.distill\.schedule"):
            Runner(load_study(changed), folder, terdit, lambda: None).work(["led"])
        Runner(study, folder, terdit, lambda: None).work(["led"])
    finally:
        record.write_bytes(before)


def test_a_half_done_training_does_not_go_on_from_another_parent(
    led: tuple[Path, Folder], place: Path
) -> None:
    """The run's own recipe is the same: only the checkpoint that it starts from is another."""
    path, folder = led[0], Folder(place / "orphan" / "dots")
    shutil.copytree(led[1].path, folder.path)
    study = load_study(path)
    folder.place(study.variant("led"), 0).training.unlink()
    shutil.rmtree(folder.place(study.variant("baseline"), 0).folder)
    changed = path.with_name("changed-baseline.yaml")
    old = "overrides: [ternary.enabled=false]"
    changed.write_text(path.read_text().replace(old, f"{old[:-1]}, optim.lr=1e-3]"))
    with pytest.raises(UsageError, match=r"led of other settings.*after\.recipe\.optim\.lr"):
        Runner(load_study(changed), folder, terdit, lambda: None).work(["led"])


def test_a_variant_after_a_failed_one_is_skipped(led: tuple[Path, Folder], place: Path) -> None:
    def run(words: Sequence[str], tick: object = None) -> Finished:
        raise ChildFailed(words, 5)

    study, folder = load_study(led[0]), Folder(place / "led-failed" / "dots")
    Runner(study, folder, run, lambda: None).work(["led"])
    assert not folder.place(study.variant("led"), 0).folder.exists()


def test_a_changed_conversion_is_made_and_measured_again(
    place: Path, tiny: Study, done: Folder
) -> None:
    folder = Folder(place / "converted" / "dots")
    shutil.copytree(done.path, folder.path)
    path = place / "converted.yaml"
    path.write_text(
        (place / "dots.yaml").read_text().replace("ternarize: row", "ternarize: tensor")
    )
    study = load_study(path)
    verbs: list[str] = []

    def run(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        verbs.append(words[0])
        return terdit(words, tick)

    Runner(study, folder, run, lambda: None).work(["ptq"])
    assert verbs[:3] == ["ternarize", "eval-fid", "sample"]
    old, new = (findings(s, f)["ptq/0/losses"] for s, f in ((tiny, done), (study, folder)))
    assert old != new
    verbs.clear()
    os.utime(folder.place(study.variant("baseline"), 0).model(4, study.variant("baseline")))
    Runner(study, folder, run, lambda: None).work(["ptq"])
    assert verbs == []
    folder.place(study.variant("ptq"), 0).grid_record(2.0).unlink()
    Runner(study, folder, run, lambda: None).work(["ptq"])
    assert verbs == ["ternarize", "sample"]  # of a newer checkpoint of the same settings
    record = read(folder.place(study.variant("ptq"), 0).conversion, Conversion)
    assert record is not None
    assert "--granularity tensor" in record.command


def test_a_training_that_diverges_is_a_finding(place: Path, tiny: Study) -> None:
    folder = Folder(place / "diverged" / "dots")

    def run(words: Sequence[str], tick: Callable[[], None] | None = None) -> Finished:
        if words[0] == "train" and "ternary.enabled=false" in words:
            raise ChildFailed(words, 5)
        return terdit(words, tick)

    Runner(tiny, folder, run, lambda: None).work(["baseline", "ptq"])
    training = read(folder.place(tiny.variant("baseline"), 0).training, Training)
    assert training is not None
    assert training.failed == "training diverged: no finite losses any more"
    assert collect(tiny, folder).models[0].scores == {}


def test_other_failures_end_the_study_with_their_code(place: Path, tiny: Study) -> None:
    def run(words: Sequence[str], tick: object = None) -> Finished:
        raise ChildFailed(words, 3)

    with pytest.raises(ChildFailed, match=r"a step failed.*exit code 3") as error:
        Runner(tiny, Folder(place / "failed"), run, lambda: None).work()
    assert error.value.exit_code == 3


CHILD = """
import sys
from pathlib import Path
from terdit_cli.system.signals import StopSignal, handled, raise_stop
from terdit_cli.lab.children import lock, run_terdit
recipe, out = sys.argv[1:]
try:
    with handled(raise_stop), lock(Path(out)) as held:
        words = ["train", recipe, "train.steps=1000000", "--out", out + "/run", "--resume", "auto"]
        run_terdit(words, descriptor=held)
except StopSignal as stop:
    sys.exit(stop.told().exit_code)
"""


@pytest.mark.slow
def test_a_stop_reaches_the_child_which_saves(place: Path) -> None:
    out = place / "child"
    words = [sys.executable, "-c", CHILD, str(place / "recipe.yaml"), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        log = out / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 100
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(UsageError, match="another process is at work"), lock(out):
            pass
        process.terminate()
        assert process.wait(100) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert list((out / "run" / "checkpoints").glob("step-*/manifest.json"))
    with lock(out):  # the child has ended too
        pass
