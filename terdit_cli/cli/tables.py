"""The tables in which the verbs print their results. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from terdit_cli import console

if TYPE_CHECKING:
    from terdit_cli.commands.pack import PackResult
    from terdit_cli.commands.ternarize import TernarizeResult
    from terdit_cli.commands.train import Plan
    from terdit_cli.evaluate.result import EvalResult
    from terdit_cli.recipe import Recipe


def print_plan(recipe: Recipe, plan: Plan, json: bool) -> None:
    """Print memory, operations and time of a training run."""
    if json:
        values = dataclasses.asdict(plan)
        values |= {"ternary_share": plan.ternary_share}
        console.result_json(values)
        return
    size = console.byte_size
    train = recipe.train
    chosen = "enabled" if train.activation_checkpointing else "not enabled"
    moments = {
        "adamw": "Adam state, fp32",
        "adamw8bit": "Adam state, 8 bit",
        "muon": "Muon and Adam state, fp32",
    }[recipe.optim.kind]
    processes = "one process" if plan.gpus == 1 else f"{plan.gpus} processes, {plan.mode}"
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("ternary", f"{plan.ternary:,} ({100 * plan.ternary_share:.3f} %)"),
        ("weights, fp32", size(plan.weight_bytes)),
        (f"optimizer, {moments}", size(plan.optimizer_bytes)),
        ("EMA, fp32", size(plan.ema_bytes)),
        ("last trits, to count flips", size(plan.record_bytes)),
        *([("teacher, fp32", size(plan.teacher_bytes))] if plan.teacher_bytes else []),
        (
            f"activations, {train.micro_batch_size} images, {train.precision}",
            size(plan.activation_bytes),
        ),
        (f"  with activation checkpointing ({chosen})", size(plan.checkpointed_bytes)),
        ("gradients, fp32", size(plan.gradient_bytes)),
        ("trits of a step", size(plan.codes_bytes)),
        ("peak of a step: the last three, gathered weights, temporaries", size(plan.step_bytes)),
        ("total memory per process", size(plan.total_bytes)),
    ]
    if plan.host_bytes:
        rows.append(("offloaded to host memory, per process", size(plan.host_bytes)))
    if plan.gpu_bytes is not None:
        largest = plan.largest_micro_batch
        fits = f"{largest} images" if largest else "none: use more GPUs or activation checkpointing"
        rows.append((f"largest micro-batch that fits {size(plan.gpu_bytes)}", fits))
    rows += [
        ("steps", f"{plan.steps:,}"),
        ("images", f"{plan.images:,}"),
        ("micro-batches per step and process", f"{plan.grad_accum_steps:,}"),
        ("operations per step", f"{plan.flops_per_step / 1e12:,.2f} TFLOP"),
    ]
    if plan.days is not None and plan.peak_flops is not None:
        speed = f"{plan.gpus} x {plan.peak_flops / 1e12:,.0f} TFLOP/s at {plan.mfu:.0%} MFU"
        rows.append((speed, f"{plan.days:,.1f} days"))
    console.result_table(f"{recipe.name}: plan for {processes}", ("", ""), rows)


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
            "this checkpoint was trained in full precision: post-training quantisation has a mean "
            f"relative error of {result.relative_error:.2f}. Such a model usually generates noise; "
            "for a usable one train with ternary.enabled=true"
        )


def print_packed(result: PackResult) -> None:
    """Print what a .tdt holds and how much smaller it is."""
    rows = [
        ("parameters", f"{result.parameters:,}"),
        ("ternary", f"{result.ternary:,} ({100 * result.ternary / result.parameters:.3f} %)"),
        ("codec", f"{result.codec}, {result.bits_per_weight:.3f} bits per ternary weight"),
        ("other tensors", result.rest),
        ("fp32", f"{result.fp32_bytes:,} bytes"),
        ("this file", f"{result.file_bytes:,} bytes ({result.ratio:.2f} times smaller)"),
        ("packed and verified in", console.duration(result.seconds)),
    ]
    console.result_table(str(result.output), ("", ""), rows)


def print_evaluation(result: EvalResult) -> None:
    """Print every metric with its interval, and the result of each gate."""
    from terdit_cli.evaluate.result import format_interval, format_value, share

    rows = [
        (
            name,
            format_value(name, value),
            format_interval(name, result.intervals[name]) if name in result.intervals else "",
        )
        for name, value in result.metrics.items()
    ]
    found = result.recognised
    rows += [
        (name, format_value("", value), f"accuracy {share(found[name])}" if name in found else "")
        for name, value in result.per_class.items()
    ]
    reference = "of unknown size" if result.n_reference is None else result.n_reference
    title = f"{result.n} images, reference {reference}; {result.pipeline}"
    header = ("", "", "95 %" if result.intervals else "")
    console.result_table(title, header, rows)
    for gate in result.gates:
        console.result(f"{'passed' if gate.passed else 'FAILED'} {gate.name}: {gate.reason}")
