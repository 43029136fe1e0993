"""`terdit init`: a first recipe for a user's own images, and what training it will take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from terdit_cli import console
from terdit_cli.data.check_recipe import data_mistakes
from terdit_cli.errors import UsageError
from terdit_cli.recipe import Recipe, load_recipe, parse_recipe
from terdit_cli.system.atomic import check_writable, refuse_existing, write_whole
from terdit_cli.train import build
from terdit_cli.train.optim import build_optimizer
from terdit_cli.train.planner import Plan, plan_run
from terdit_cli.train.suggest import ADAMW, DataFacts, look_at, recipe_text, suggest
from terdit_cli.train.ternary_cache import ternarized_once

_TRIED_STEPS = 3
MUON_GAIN = 2.0  # a step of Muon may take so many times as long as one of AdamW


@dataclass(frozen=True)
class InitResult:
    """The recipe, and what its run needs."""

    output: Path
    recipe: Recipe
    facts: DataFacts
    plan: Plan
    seconds: float | None  # of training, on this machine or on the GPUs; None: not known


def run(
    data: Path | None,
    output: Path | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    force: bool = False,
) -> InitResult:
    """Look at images, choose a recipe that trains on them, and write it.

    Args:
        data: any source of labelled images; None: the packaged ones.
        output: the .yaml to write; default NAME.yaml, after the data.
        gpu: a GPU's name ("h100") or memory ("24GB"); None: one that is here, else this CPU.
        gpus: how many of them.
        force: replace a file that exists.

    Raises:
        InputFileError: images that are missing, unreadable or not in classes.
        UsageError: the output exists, an unknown GPU, or a set with splits to choose from.
        EnvironmentProblem: not writable.
    """
    facts = look_at(data)
    for note in facts.notes:
        console.note(note)
    has_gpu = gpu is not None or torch.cuda.is_available()
    if gpu is None and has_gpu:
        gpu = f"{torch.cuda.get_device_properties(0).total_memory >> 20}MiB"
    values = suggest(facts, gpus if has_gpu else 0, output)
    output = output or Path(f"{values['name']}.yaml")
    if output.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(
            "a recipe is a YAML file", got=output.name, fix=f"-o {output.with_suffix('.yaml')}"
        )
    check_writable(output)
    refuse_existing(output, force)
    seconds = None
    if not has_gpu:
        seconds = seconds_per_step(parse_recipe(values, "the suggestion"))
        quick = values | {"optim": dict(ADAMW)}
        if seconds > MUON_GAIN * (other := seconds_per_step(parse_recipe(quick, "the suggestion"))):
            values, seconds = quick, other
    plan = plan_run(parse_recipe(values, "the suggestion"), gpus, gpu)
    write_whole(output, recipe_text(values, facts, output))
    recipe = load_recipe(output, more=data_mistakes)
    if seconds is not None:
        seconds *= recipe.train.steps
    elif plan.days is not None:
        seconds = plan.days * 24 * 3600
    return InitResult(output, recipe, facts, plan, seconds)


def seconds_per_step(recipe: Recipe) -> float:
    """Return how long an optimizer step takes on this CPU, measured on made-up pixels."""
    network = build.build_network(recipe).train()
    optimizer = build_optimizer(network, recipe.optim)
    config, batch = network.config, recipe.train.micro_batch_size
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    zeros = torch.zeros(batch, dtype=torch.long)
    best = float("inf")
    for _ in range(_TRIED_STEPS):
        began = time.perf_counter()
        with ternarized_once(network):
            network(x, zeros, zeros).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.perf_counter() - began)
    return best * (recipe.train.global_batch_size // batch)
