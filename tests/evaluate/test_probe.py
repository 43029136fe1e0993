"""The linear probe on features whose classes are known."""

from __future__ import annotations

import numpy as np
import pytest

from terdit_cli.errors import InputFileError
from terdit_cli.evaluate.probe import accuracy_by_class, fit_probe


def features(count: int, apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three normal clouds in eight dimensions, their means `apart` from 0 on an axis each."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    means = apart * np.eye(3, 8)
    return (means[labels] + random.normal(size=(count, 8))).astype(np.float32), labels


def test_separate_classes_are_told_apart() -> None:
    probe = fit_probe(*features(300, 20.0), classes=3)
    assert probe.held_out_accuracy == 1.0
    new, labels = features(90, 20.0, seed=1)
    assert (probe.classify(new) == labels).all()
    assert (probe.trained_on, probe.held_out) == (270, 30)


def test_overlapping_classes_reach_what_the_best_rule_reaches() -> None:
    probe = fit_probe(*features(6000, 1.5), classes=3)
    new, labels = features(6000, 1.5, seed=1)
    best = np.argmax(new[:, :3], axis=1)  # equal clouds: the nearest mean
    assert abs((probe.classify(new) == labels).mean() - (best == labels).mean()) < 0.01


def test_labels_of_noise_are_not_learned() -> None:
    x, labels = features(3000, 0.0)
    assert abs(fit_probe(x, labels, 3).held_out_accuracy - 1 / 3) < 0.1


def test_the_same_images_give_the_same_probe() -> None:
    first, second = (fit_probe(*features(200, 2.0), classes=3) for _ in range(2))
    assert first.weight.equal(second.weight)


def test_a_constant_feature_does_no_harm() -> None:
    x, labels = features(300, 20.0)
    x[:, 5] = 7.0
    assert fit_probe(x, labels, 3).held_out_accuracy == 1.0


def test_accuracy_of_each_class() -> None:
    shares = accuracy_by_class(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]), 3)
    assert shares[:2] == [0.5, 0.5]
    assert np.isnan(shares[2])


def test_too_few_images() -> None:
    with pytest.raises(InputFileError, match="too few labelled images"):
        fit_probe(*features(15, 1.0), classes=3)
