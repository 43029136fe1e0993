"""What the verbs print of their results, as tables. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from terdit_cli import console

if TYPE_CHECKING:
    from terdit_cli.commands.pack import PackResult
    from terdit_cli.commands.ternarize import TernarizeResult
    from terdit_cli.commands.train import Plan
    from terdit_cli.recipe import Recipe


def print_plan(recipe: Recipe, plan: Plan, json: bool) -> None:
    """Print sizes, memory and work of a training run."""
    if json:
        values = dataclasses.asdict(plan)
        values |= {"ternary_share": plan.ternary_share, "total_bytes": plan.total_bytes}
        console.result_json(values)
        return
    size = console.byte_size
    checkpointing = "with" if recipe.train.activation_checkpointing else "without"
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("ternary", f"{plan.ternary:,} ({100 * plan.ternary_share:.3f} %)"),
        ("weights, fp32", size(plan.weight_bytes)),
        ("gradients, fp32", size(plan.gradient_bytes)),
        ("optimizer, two moments", size(plan.optimizer_bytes)),
        ("EMA, fp32", size(plan.ema_bytes)),
        (
            f"activations, {recipe.train.micro_batch_size} images, {recipe.train.precision}, "
            f"{checkpointing} checkpointing",
            size(plan.activation_bytes),
        ),
        ("memory of one process", size(plan.total_bytes)),
        ("steps", f"{plan.steps:,}"),
        ("images", f"{plan.images:,}"),
        ("micro-batches a step (one process)", f"{plan.grad_accum_steps:,}"),
        ("operations a step", f"{plan.flops_per_step / 1e12:,.2f} TFLOP"),
    ]
    console.result_table(f"{recipe.name}: plan, nothing trained", ("", ""), rows)


def print_ternarized(result: TernarizeResult) -> None:
    """Print every ternarized layer."""
    header = ("layer", "shape", "-1 %", "0 %", "+1 %", "gamma", "alpha", "error", "cosine")
    rows = [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            *(f"{100 * share:.1f}" for share in (layer.minus, layer.zero, layer.plus)),
            f"{layer.gamma:.4f}",
            f"{layer.alpha:+.4f}",
            f"{layer.relative_error:.3f}",
            f"{layer.cosine:+.3f}",
        )
        for layer in result.layers
    ]
    console.result_table(f"{result.output} ({result.weights} weights)", header, rows)
    if result.fitted:
        console.warn(
            "this checkpoint was trained in full precision: its weights were fitted afterwards "
            f"with a mean relative error of {result.relative_error:.2f}. Such a model usually "
            "draws noise; for a usable one train with ternary.enabled=true"
        )


def print_packed(result: PackResult) -> None:
    """Print what a .tdt holds and how much smaller it is."""
    rows = [
        ("parameters", f"{result.parameters:,}"),
        ("ternary", f"{result.ternary:,} ({100 * result.ternary / result.parameters:.3f} %)"),
        ("codec", f"{result.codec}, {result.bits_per_weight:.3f} bits per ternary weight"),
        ("rest", result.rest),
        ("fp32", f"{result.fp32_bytes:,} bytes"),
        ("this file", f"{result.file_bytes:,} bytes ({result.ratio:.2f} times smaller)"),
        ("packed and verified in", console.duration(result.seconds)),
    ]
    console.result_table(str(result.output), ("", ""), rows)
