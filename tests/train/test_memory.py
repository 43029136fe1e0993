"""The plan: published sizes, bounds on what planning itself takes, activations that add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from terdit_cli.recipe import Recipe, load_recipe
from terdit_cli.train import build
from terdit_cli.train.memory import plan_run

ROOT = Path(__file__).parents[2]


def test_600m_as_published() -> None:
    recipe = load_recipe(ROOT / "recipes" / "600m.yaml")
    plan = plan_run(recipe)
    assert plan.parameters == 609_984_160
    assert f"{100 * plan.ternary_share:.3f}" == "99.016"
    assert plan.weight_bytes == plan.gradient_bytes == plan.ema_bytes == 4 * 609_984_160
    assert plan.optimizer_bytes == 8 * 609_984_160
    assert plan.images == recipe.train.steps * recipe.train.global_batch_size
    assert plan.total_bytes > 5 * plan.weight_bytes
    # Forward and backward are at least 2 x 3 operations a weight, token and image.
    tokens = (32 // 2) ** 2
    at_least = 6 * plan.ternary * tokens * recipe.train.global_batch_size
    assert 0.7 * at_least < plan.flops_per_step < 2 * at_least


def test_the_largest_recipe_is_planned_within_a_laptop() -> None:
    """4.2b would need 17 GB for the weights alone; planning stays under 1.5 GB."""
    code = """
import resource, sys
from terdit_cli.app import main
sys.argv = ["terdit", "train", "recipes/4.2b.yaml", "--dry-run", "--json"]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["parameters"] == 4_238_414_112
    assert plan["ternary_share"] > 0.99
    kilobytes = int(done.stderr.splitlines()[-1])
    if sys.platform == "linux":  # elsewhere the unit differs
        assert kilobytes < 1_500_000


def small(**train: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "a",
            "model": {"size": "nano", "patch_size": 4, "multiple_of": 8, "num_classes": 10},
            "data": {"image_size": 16, "channels": 1},
            "train": {"global_batch_size": 6, "micro_batch_size": 3, "precision": "fp32"} | train,
        }
    )


def test_planned_activations_are_those_of_a_real_forward() -> None:
    recipe = small()
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


def test_checkpointing_needs_less_and_images_need_more() -> None:
    plan = plan_run(small())
    plain = plan.activation_bytes
    assert plan.checkpointed_bytes < plain / 2
    chosen = plan_run(small(activation_checkpointing=True))
    assert (chosen.activation_bytes, chosen.checkpointed_bytes) == (plain, plan.checkpointed_bytes)
    assert chosen.step_bytes < plan.step_bytes
    six, twelve = (
        plan_run(small(micro_batch_size=size, global_batch_size=12)).activation_bytes
        for size in (6, 12)
    )
    # Effective weights once, and then the same for each image.
    assert twelve - six == pytest.approx(2 * (six - plain), rel=0.01)
    assert six > plain


def test_a_full_precision_parent_has_no_ternary_weight() -> None:
    values = small().model_dump()
    values["ternary"]["enabled"] = False
    plan = plan_run(Recipe.model_validate(values))
    assert plan.ternary == 0
    assert plan.ternary_share == 0
