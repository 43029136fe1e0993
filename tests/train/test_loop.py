"""The loop: a recorded loss curve, accumulation, divergence, every option, what a run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from terdit_cli.data import images
from terdit_cli.diffusion.process import make_schedule
from terdit_cli.errors import GateFailed, InputFileError, UsageError
from terdit_cli.model.ckpt import load_ckpt
from terdit_cli.recipe import load_recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.parallel import grad_accum_steps
from terdit_cli.train.trainer import Trainer

Train = Callable[..., Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_recorded_loss_curve(tmp_path: Path, train: Train) -> None:
    """20 steps; the tolerance is for other processors, which add in another order."""
    train(tmp_path, "train.steps=20", "logging.every=1")
    entries = logged(tmp_path)
    golden = json.loads(GOLDEN.read_text())
    for key in ("loss", "mse"):
        np.testing.assert_allclose([entry[key] for entry in entries], golden[key], rtol=1e-3)


@pytest.mark.slow
def test_what_a_run_leaves(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str], recipe_path: Path
) -> None:
    words = ["train.steps=12", "checkpoint.every=4", "sample.every=6", "sample.count=3"]
    words += ["sample.steps=2", "sample.sampler=ddim"]
    result = train(tmp_path / "run", *words)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoints",
        "ckpt.pt",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
        "samples",
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    for name in ("loss.png", "samples/step-00000012.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 28
            picture.load()
    recipe = load_recipe(recipe_path, words)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").sha256() == recipe.sha256()
    assert result.checkpoint == tmp_path / "run" / "ckpt.pt"
    assert (result.first_loss, result.last_loss) == tuple(
        logged(tmp_path / "run")[index]["loss"] for index in (0, -1)
    )
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [5, 10, 12]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training small: 12/12 loss" in captured.err


@pytest.mark.slow
def test_ckpt_holds_tensors_and_plain_types(whole_run: Path) -> None:
    values = torch.load(whole_run / "ckpt.pt", weights_only=True)  # would refuse anything else
    assert sorted(values) == ["ema", "format", "info", "model", "recipe", "version"]
    opened = load_ckpt(whole_run / "ckpt.pt")
    assert opened.info.step == 40
    assert opened.info.class_names[9] == "Ankle boot"
    recipe = load_recipe(whole_run / "recipe.yaml")
    assert opened.info.recipe_sha256 == recipe.sha256()
    assert opened.recipe == recipe.to_yaml()
    assert opened.model.keys() == opened.ema.keys()
    changed = [key for key in opened.model if not torch.equal(opened.model[key], opened.ema[key])]
    assert len(changed) == len(opened.model)


def make_trainer(recipe_path: Path, *words: str) -> Trainer:
    recipe = load_recipe(recipe_path, words)
    source = build.open_data(recipe)
    job = Job()
    return Trainer(recipe, source, build.open_space(recipe, job.device), job, Path("unused"))


def gradients_of_a_step(recipe_path: Path, *words: str) -> tuple[dict[str, Tensor], Any]:
    """Take a step whose timesteps and noise are functions of the images, and return it."""
    words = ("train.global_batch_size=12", "model.class_dropout_prob=0", "data.flip=no", *words)
    trainer = make_trainer(recipe_path, *words)
    generator = torch.Generator().manual_seed(5)
    for parameter in trainer.network.parameters():  # away from the zero gates of a new network
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    schedule = make_schedule("")

    def losses(
        network: Any, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor, teacher: None
    ) -> dict[str, Tensor]:
        mean = x0.mean(dim=(1, 2, 3))
        return schedule.training_losses(
            network,
            x0,
            (mean * 1e5).long() % 1000,
            y,
            torch.sin(1e3 * (x0 + mean[:, None, None, None])),
            teacher,
        )

    trainer.objective = SimpleNamespace(num_steps=1000, losses=losses)  # type: ignore[assignment]
    found: dict[str, Tensor] = {}

    def remember(*unused: Any) -> None:
        for name, parameter in trainer.network.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()

    trainer.optimizer.register_step_pre_hook(remember)
    images = torch.from_numpy(trainer.source.images[:12])
    result = trainer.train_step(images, torch.from_numpy(trainer.source.labels[:12]))
    return found, result


def test_accumulated_gradients_are_those_of_the_whole_batch(recipe_path: Path) -> None:
    """Mean of 4 micro-batch means = mean of all. Rounding is relative to the terms summed up.

    A gradient entry is a sum over 12 images x 16 tokens with terms no larger than the whole
    gradient's norm: 192 * 2^-24 * norm = 1.2e-5 * norm bounds each of the two sums' errors.
    """
    whole, one = gradients_of_a_step(recipe_path, "train.micro_batch_size=12")
    parts, four = gradients_of_a_step(recipe_path, "train.micro_batch_size=3")
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole.values()))
    limit = 2.4e-5 * norm
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() <= limit, name
    for field in ("loss", "mse", "vb", "grad_norm"):
        assert getattr(four, field) == pytest.approx(getattr(one, field), rel=1e-5)


def test_clipping(recipe_path: Path) -> None:
    free, result = gradients_of_a_step(recipe_path, "optim.grad_clip=null")
    clipped, same = gradients_of_a_step(recipe_path, "optim.grad_clip=0.01")
    assert result.grad_norm == same.grad_norm > 0.01  # the norm that is logged is the unclipped
    norm = math.sqrt(sum(float(g.square().sum()) for g in clipped.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    for name, gradient in free.items():
        torch.testing.assert_close(
            clipped[name], gradient * (0.01 / result.grad_norm), rtol=1e-3, atol=1e-9
        )


@pytest.mark.parametrize(
    "words",
    [
        ["ternary.enabled=false"],
        ["ternary.scale=absmean"],
        ["ternary.activations=int8"],
        ["ternary.activations=int8", "ternary.granularity=group128"],
        ["ternary.granularity=row"],
        ["ternary.granularity=group128"],
        ["ternary.alpha_init=randn", "ternary.adaln_norm=false"],
        ["model.learn_sigma=false"],
        ["model.class_dropout_prob=0", "sample.every=3", "sample.count=1", "sample.steps=2"],
        ["model.n_kv_heads=1", "model.qk_norm=false"],
        ["data.channels=3"],
        ["train.precision=bf16"],
        ["train.precision=bf16", "ternary.activations=int8"],
        ["optim.schedule=step", "ema.warmup=false", "ema.decay=0"],
    ],
    ids=" ".join,
)
def test_every_option_trains(tmp_path: Path, train: Train, words: list[str]) -> None:
    result = train(tmp_path / "run", "train.steps=3", "logging.every=1", *words)
    entries = logged(tmp_path / "run")
    assert len(entries) == 3
    assert all(math.isfinite(entry[key]) for entry in entries for key in ("loss", "grad_norm"))
    opened = load_ckpt(result.checkpoint)
    for state in (opened.model, opened.ema):
        assert all(
            value.isfinite().all() and value.dtype == torch.float32 for value in state.values()
        )
    if "ema.decay=0" in words:
        assert all(torch.equal(opened.model[key], opened.ema[key]) for key in opened.model)
    if "ternary.enabled=false" in words:
        assert not any(key.endswith("alphas") for key in opened.model)
        assert not any("adaLN_modulation.2" in key for key in opened.model)


def test_activation_checkpointing_changes_nothing(tmp_path: Path, train: Train) -> None:
    words = ["train.steps=3", "logging.every=1"]
    train(tmp_path / "a", *words)
    train(tmp_path / "b", *words, "train.activation_checkpointing=true")
    a, b = (load_ckpt(tmp_path / name / "ckpt.pt") for name in "ab")
    for key, value in a.model.items():
        assert torch.equal(value, b.model[key]), key


def test_a_learning_rate_far_too_high(tmp_path: Path, train: Train) -> None:
    words = ("optim.lr=1e30", "optim.grad_clip=null", "optim.warmup_steps=0", "train.max_skipped=2")
    with pytest.raises(GateFailed, match=r"diverged at step [2-5]") as caught:
        train(tmp_path / "run", *words)
    assert caught.value.exit_code == 5
    assert "optim.lr=5e+29" in str(caught.value)
    assert not list((tmp_path / "run").glob("**/step-*"))  # weights that are worth nothing
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_the_data_must_have_the_models_classes(tmp_path: Path, train: Train) -> None:
    with pytest.raises(UsageError, match="got 10 classes") as caught:
        train(tmp_path / "run", "model.num_classes=12")
    assert "model.num_classes=10" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unreadable_images_stop_or_are_skipped_and_counted(
    tmp_path: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            shade = 40 * index + (name == "dog")
            Image.new("RGB", (30, 28), (shade, 0, 9)).save(
                tmp_path / "data" / name / f"{index}.png"
            )
    bad = tmp_path / "data" / "dog" / "2.png"
    bad.write_bytes(bad.read_bytes()[:40])
    words = ["data.source=folder", f"data.path={tmp_path / 'data'}", "data.split=null"]
    words += ["model.num_classes=2", "train.steps=3"]
    with pytest.raises(InputFileError, match="1 of 8 images unreadable") as caught:
        train(tmp_path / "run", *words)
    assert "dog/2.png" in str(caught.value)
    assert "data.on_bad_image=skip" in str(caught.value)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", *words, "data.on_bad_image=skip")
    assert "1 unreadable images skipped, first: dog/2.png" in capsys.readouterr().err
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)  # found when its turn comes, not before
    train(tmp_path / "lazy", *words, "data.on_bad_image=skip", "logging.every=1")
    assert "1 unreadable images skipped so far, last: dog/2.png" in capsys.readouterr().err


def test_micro_batches_of_several_processes_must_divide(recipe_path: Path) -> None:
    section = load_recipe(recipe_path, ["train.global_batch_size=24"]).train
    assert grad_accum_steps(section, 3) == 2
    with pytest.raises(UsageError, match="a multiple of micro_batch_size 4 x 5") as caught:
        grad_accum_steps(section, 5)
    assert "train.global_batch_size=20" in str(caught.value)
