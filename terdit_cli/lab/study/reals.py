"""What a study looks at of the training images: their features, the reference, the probe.

Made once a study, by `eval-fid`; RUNS/<study>/reals/ has them, and probe.json what came of it.
"""

from __future__ import annotations

import shutil

import numpy as np

from terdit_cli import console
from terdit_cli.evaluate.probe import fit_probe
from terdit_cli.lab.children import Run
from terdit_cli.lab.study.measure import Reals, labels_of, read_features, write_images
from terdit_cli.lab.study.records import Folder, Probe, current, save, save_arrays, stamp
from terdit_cli.lab.study.spec import Evaluation, Study
from terdit_cli.recipe import Recipe


def features_words(evaluation: Evaluation) -> list[str]:
    """Return the words by which `eval-fid` makes a study's features."""
    weights = ["--weights", str(evaluation.weights)] if evaluation.weights else []
    return ["--features", evaluation.features, "--precision", evaluation.precision, *weights]


def make_reals(study: Study, folder: Folder, base: Recipe, run: Run) -> Reals:
    """Return the training images' features, the reference and the probe.

    Args:
        base: the recipe whose images these are.

    Raises:
        What `run` and `write_images` raise.
    """
    place = folder.reals
    data = base.model_dump(mode="json")["data"]
    asked = {
        "data": {key: data[key] for key in ("source", "split", "image_size", "channels")},
        "evaluation": study.evaluation.model_dump(include={"features", "precision", "reals"}),
    }
    images, cached = place / "images.npz", place / "features.npz"
    record = current(place / "probe.json", Probe, asked)
    if record is None or not (cached.exists() and images.exists()):
        shutil.rmtree(place / "work", ignore_errors=True)
        console.note(f"study {study.name}: features of the training images, once")
        names = write_images(base, images, study.evaluation.reals)
        done = run(
            [
                "eval-fid", "--images", str(images), *features_words(study.evaluation),
                "--make-reference", str(place / "reference.npz"), "--reference-features",
                "--work", str(place / "work"),
            ]
        )  # fmt: skip
        features = read_features(place / "work", len(labels_of(images)))
        save_arrays(cached, features=features, names=np.array(names))
        probe = fit_probe(features, labels_of(images), len(names))
        save(
            place / "probe.json",
            Probe(
                asked=asked, command=done.command, seconds=round(done.seconds, 1), **stamp(),
                accuracy=probe.held_out_accuracy,
                per_class=dict(zip(names, probe.held_out_per_class, strict=True)),
                trained_on=probe.trained_on, held_out=probe.held_out,
            ),
        )  # fmt: skip
        shutil.rmtree(place / "work", ignore_errors=True)
    with np.load(cached, allow_pickle=False) as arrays:
        features, names = arrays["features"], arrays["names"].tolist()
    labels = labels_of(images)
    return Reals(images, features, labels, names, fit_probe(features, labels, len(names)))
