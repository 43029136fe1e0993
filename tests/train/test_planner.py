"""The plan: published sizes, bounds on what planning itself takes, activations that add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from terdit_cli.errors import UsageError
from terdit_cli.model.layout import training_flops
from terdit_cli.recipe import Recipe
from terdit_cli.train import build
from terdit_cli.train.planner import plan_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_largest_recipe_is_planned_within_a_laptop() -> None:
    """4.2b would need 17 GB for the weights alone; planning stays under 1.5 GB."""
    code = """
import re, sys
from terdit_cli.cli.app import main
sys.argv = ["terdit", "train", "recipes/4.2b.yaml", "--dry-run", "--json"]
try:
    main()
finally:
    if sys.platform == "linux":  # not ru_maxrss, which begins with what the parent took
        status = open("/proc/self/status").read()
        print(re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["parameters"] == 4_238_414_112
    assert f"{100 * plan['ternary_share']:.3f}" == "99.751"
    assert plan["weight_bytes"] == plan["gradient_bytes"] == plan["ema_bytes"] == 4 * 4_238_414_112
    assert plan["optimizer_bytes"] == 8 * 4_238_414_112
    assert plan["record_bytes"] == 4_227_858_432 / 4
    assert plan["images"] == 604_160_000
    if sys.platform == "linux":
        assert int(done.stderr.splitlines()[-1]) < 1_500_000


def small(n_layers: int = 1, **train: object) -> Recipe:
    model = {"size": "nano", "patch_size": 4, "multiple_of": 8, "num_classes": 10}
    return Recipe.model_validate(
        {
            "name": "a",
            "model": model | {"n_layers": n_layers},
            "data": {"image_size": 16, "channels": 1},
            "train": {"global_batch_size": 6, "micro_batch_size": 3, "precision": "fp32"} | train,
        }
    )


@pytest.mark.slow
def test_planned_activations_are_those_of_a_real_forward() -> None:
    recipe = small(n_layers=4)
    plan = plan_run(recipe)
    network = build.build_network(recipe).train()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    t = torch.zeros(3, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(3, 1, 16, 16), t, t)
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    # This forward ternarized by itself and kept the trits, which a step counts apart.
    assert plan.activation_bytes + plan.codes_bytes == pytest.approx(real, rel=0.02)
    assert plan.parameters == sum(p.numel() for p in network.parameters())
    assert plan.grad_accum_steps == 2


# Each larger than what Python and the allocator take beside the tensors.
LARGE = {"dim": 256, "n_layers": 6, "n_heads": 4, "patch_size": 2, "multiple_of": 32}
WIDE = {"dim": 512, "n_layers": 3, "n_heads": 8, "patch_size": 2, "multiple_of": 32}
MEASURED: dict[str, dict[str, dict[str, Any]]] = {
    "nothing recomputed": {
        "model": LARGE, "train": {"global_batch_size": 4, "micro_batch_size": 4},
    },
    "every block recomputed": {
        "model": LARGE,
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "activation_checkpointing": True},
    },
    "accumulated, every second recomputed": {
        "model": WIDE,
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "activation_checkpointing": 2},
    },
    "bfloat16": {
        "model": LARGE,
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "bf16"},
    },
}  # fmt: skip
MEASURE = """
import gc, json, re, sys
from pathlib import Path
import torch
from terdit_cli.recipe import load_recipe
from terdit_cli.train import build
from terdit_cli.train.run_metrics import Observer
from terdit_cli.system.job import Job
from terdit_cli.train.trainer import Trainer

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def train(path, steps):
    recipe, job = load_recipe(path), Job()
    space = build.open_space(recipe, job.device)
    trainer = Trainer(recipe, build.open_data(recipe), space, job, path.parent)
    observer = Observer(trainer)
    batch = recipe.train.global_batch_size
    for _ in range(steps):
        images = torch.randint(256, (batch, 28, 28, 3), dtype=torch.uint8)
        observer.add(trainer.train_step(images, torch.arange(batch) % 10))
    observer.log()

paths = list(map(Path, sys.argv[1:]))
for path in (paths[0], paths[-1]):
    train(path, 1)  # libraries fill their caches
peaks = []
for path in paths:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    train(path, 2)
    peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_is_what_a_process_takes(tmp_path: Path) -> None:
    """Masters, moments, averages, record and the step's peak together, within 15 percent."""
    recipes = [
        Recipe.model_validate(
            {
                "name": "a",
                "model": values["model"] | {"num_classes": 10},
                "data": {"split": "heldout", "image_size": 28, "channels": 1},
                "train": {"precision": "fp32"} | values["train"],
            }
        )
        for values in MEASURED.values()
    ]
    paths = [tmp_path / f"{i}.yaml" for i in range(len(recipes))]
    for path, recipe in zip(paths, recipes, strict=True):
        path.write_text(recipe.to_yaml())
    # So that what is freed goes back to the system at once.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env=os.environ | malloc | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ratios = {
        name: plan_run(recipe).total_bytes / peak
        for name, recipe, peak in zip(MEASURED, recipes, json.loads(done.stdout), strict=True)
    }
    assert all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_days_are_operations_over_speed() -> None:
    made = small(precision="bf16", steps=10**9)
    plan = plan_run(made, 2, "h100", 0.5)
    assert plan.flops_per_step == 6 * training_flops(build.model_config(made))
    assert plan.days == pytest.approx(1e9 * plan.flops_per_step / (2 * 989e12 * 0.5) / 86400)
    assert (plan.gpu_bytes, plan.mfu) == (80e9, 0.5)
    plain = plan_run(made, 2, "80GB")
    assert (plain.days, plain.peak_flops, plain.mfu) == (None, None, 0.4)
    assert plan_run(small(), 2, "h100").days is None  # no peak is known of fp32


@pytest.mark.slow
def test_the_largest_micro_batch_just_fits() -> None:
    two, three = (small(global_batch_size=6, micro_batch_size=size) for size in (2, 3))
    plan = plan_run(three)
    assert plan.largest_micro_batch is None  # of no GPU
    needed = plan.total_bytes / 0.95 / 1e6
    assert plan_run(two, 1, f"{1.001 * needed:.6f}MB").largest_micro_batch == 3
    assert plan_run(two, 1, f"{0.999 * needed:.6f}MB").largest_micro_batch == 2


@pytest.mark.parametrize(
    ("gpu", "mfu", "words"),
    [
        ("h100", 0.0, "got --mfu 0.0, expected a number in (0, 1]"),
        ("h100", 1.5, "got --mfu 1.5"),
        ("80GB", 0.4, "peak is unknown"),
        (None, 0.4, "peak is unknown"),
        ("h1000", None, "did you mean 'h100'?"),
    ],
)
def test_a_plan_of_nothing(gpu: str | None, mfu: float | None, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_run(small(precision="bf16"), 1, gpu, mfu)
    assert words in str(caught.value)


@pytest.mark.slow
def test_eight_bit_moments_are_a_quarter() -> None:
    values = small().model_dump()
    values["optim"]["kind"] = "adamw8bit"
    eight, full = plan_run(Recipe.model_validate(values)), plan_run(small())
    assert 0.25 < eight.optimizer_bytes / full.optimizer_bytes < 0.35  # few values stay float32
    assert eight.total_bytes < full.total_bytes


@pytest.mark.slow
def test_muon_has_one_moment_of_the_blocks_matrices() -> None:
    values = small().model_dump()
    values["optim"]["kind"] = "muon"
    one, two = plan_run(Recipe.model_validate(values)), plan_run(small())
    assert two.optimizer_bytes - one.optimizer_bytes == 4 * two.ternary


@pytest.mark.slow
def test_checkpointing_needs_less_and_images_need_more() -> None:
    plan = plan_run(small())
    plain = plan.activation_bytes
    assert plan.checkpointed_bytes < plain / 2
    chosen = plan_run(small(activation_checkpointing=True))
    assert (chosen.activation_bytes, chosen.checkpointed_bytes) == (plain, plan.checkpointed_bytes)
    six, twelve = (
        plan_run(small(micro_batch_size=size, global_batch_size=12)).activation_bytes
        for size in (6, 12)
    )
    # Effective weights once, and then the same for each image.
    assert twelve - six == pytest.approx(2 * (six - plain), rel=0.01)
    assert six > plain


@pytest.mark.slow
def test_a_full_precision_parent_has_no_ternary_weight() -> None:
    values = small().model_dump()
    values["ternary"]["enabled"] = False
    plan = plan_run(Recipe.model_validate(values))
    assert plan.ternary == 0
    assert plan.ternary_share == 0
