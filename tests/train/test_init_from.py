"""A run that starts from the weights of another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from terdit_cli.commands.train import TrainResult
from terdit_cli.data.sources.idx import FASHION_CLASSES
from terdit_cli.errors import InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.model.ternary import least_squares_alphas, ternarize
from terdit_cli.recipe import load_recipe
from terdit_cli.train import build
from terdit_cli.train.init_from import copy_weights
from terdit_cli.train.parallel import seed_weights

TWIN = "ternary.enabled=false"

Train = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """Return the run folder of a full-precision model whose adaLN is no longer zero."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    train(folder, TWIN, "train.steps=2")
    return folder


def test_a_ternary_run_starts_from_its_baseline(
    train: Train, baseline: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run", f"train.init_from={baseline}", "train.steps=1", "optim.lr=1e-9")
    theirs = load_ckpt(baseline / "ckpt.pt").ema
    ours = load_ckpt(tmp_path / "run" / "ckpt.pt").model
    assert set(theirs) < set(ours)
    for name, tensor in theirs.items():  # a step of rate 1e-9 moves no weight by more
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-9, msg=name)
    scales = [name for name in ours if name.endswith(".alphas")]
    assert scales
    for name in scales:
        weight = theirs[name.replace(".alphas", ".weight")]
        fitted = least_squares_alphas(weight, ternarize(weight), "tensor")
        torch.testing.assert_close(ours[name], fitted, rtol=0, atol=2e-9, msg=name)
    norms = [ours[name] for name in ours if name not in theirs and name not in scales]
    assert norms
    assert all(torch.allclose(norm, torch.ones(()), atol=2e-9) for norm in norms)


def test_learned_scales_come_along(
    train: Train, recipe_path: Path, baseline: Path, tmp_path: Path
) -> None:
    train(tmp_path / "first", f"train.init_from={baseline / 'ckpt.pt'}", "train.steps=2")
    theirs = load_ckpt(tmp_path / "first" / "ckpt.pt").ema
    recipe = load_recipe(recipe_path, ["ternary.alpha_init=randn"])
    network = build.build_network(recipe)
    copy_weights(network, tmp_path / "first", FASHION_CLASSES)
    assert all(torch.equal(p, theirs[name]) for name, p in network.named_parameters())


def test_random_scales_stay_random(recipe_path: Path, baseline: Path) -> None:
    recipe = load_recipe(recipe_path, ["ternary.alpha_init=randn"])
    seed_weights(1)
    network = build.build_network(recipe)
    before = {n: p.clone() for n, p in network.named_parameters() if n.endswith(".alphas")}
    copy_weights(network, baseline, FASHION_CLASSES)
    own = dict(network.named_parameters())
    assert all(own[name].abs().max() > 0 for name in before)
    assert any(own[name] < 0 for name in before)


@pytest.mark.slow
def test_a_resumed_run_does_without_the_first_one(
    train: Train, baseline: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(baseline, first)
    word = f"train.init_from={first}"
    train(tmp_path / "run", word, "train.steps=1")
    shutil.rmtree(first)
    result = train(tmp_path / "run", word, "train.steps=2", resume="auto")
    assert result.steps == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["model.dim=64"], "final_layer.adaLN_modulation.1.bias [64]"),
        (["model.n_layers=3"], "no layers.2"),
        (["model.n_layers=1"], "layers.1"),
    ],
)
def test_weights_of_another_model_are_refused(
    recipe_path: Path, baseline: Path, words: list[str], problem: str
) -> None:
    network = build.build_network(load_recipe(recipe_path, words))
    with pytest.raises(UsageError, match="do not match the model") as caught:
        copy_weights(network, baseline, FASHION_CLASSES)
    assert problem in str(caught.value)


def test_a_ternary_start_of_a_full_precision_run_is_refused(
    train: Train, recipe_path: Path, baseline: Path, tmp_path: Path
) -> None:
    train(tmp_path / "ternary", "train.steps=1")
    network = build.build_network(load_recipe(recipe_path, [TWIN]))
    with pytest.raises(UsageError, match="alphas"):
        copy_weights(network, tmp_path / "ternary", FASHION_CLASSES)


def test_no_checkpoint_there(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"none\.pt"):
        train(tmp_path / "run", f"train.init_from={tmp_path / 'none.pt'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (["Bag", "Kimono"], [8, None, 10], "2 here; label embeddings: 1 kept by name, 1 new"),
        ([f"new {k}" for k in range(12)], [None] * 12 + [10], "12 here; label embeddings: 0 kept"),
        (
            FASHION_CLASSES[::-1],
            [*range(9, -1, -1), 10],
            "10 here; label embeddings: 10 kept by name",
        ),
        ([str(k) for k in range(10)], [*range(11)], None),  # as many without a name in common
        (FASHION_CLASSES, [*range(11)], None),
    ],
)
def test_other_classes_keep_the_rows_of_their_names(
    recipe_path: Path,
    baseline: Path,
    names: list[str],
    expected: list[int | None],
    said: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = build.build_network(load_recipe(recipe_path, [f"model.num_classes={len(names)}"]))
    fresh = network.y_embedder.embedding_table.weight.detach().clone()
    copy_weights(network, baseline, names)
    theirs = load_ckpt(baseline / "ckpt.pt").ema["y_embedder.embedding_table.weight"]
    rows = network.y_embedder.embedding_table.weight
    for row, place in enumerate(expected):
        assert torch.equal(rows[row], fresh[row] if place is None else theirs[place]), row
    told = capsys.readouterr().err
    assert (said or "") in told
    assert ("label embeddings" in told) == (said is not None)
