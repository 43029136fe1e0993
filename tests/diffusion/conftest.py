"""Recorded runs of the original diffusion code, the toy network they used, and a replayer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from terdit_cli.diffusion.process import Network, make_schedule
from terdit_cli.diffusion.sampler import ddim_loop, ddpm_loop, guided

GOLDEN = Path(__file__).parents[1] / "golden"
FP32_EPS = 2.0**-24


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@pytest.fixture(scope="session")
def golden() -> Golden:
    meta = json.loads((GOLDEN / "diffusion.json").read_text())
    return Golden(load_file(GOLDEN / "diffusion.safetensors"), meta)


@pytest.fixture(scope="session")
def toy(golden: Golden) -> Network:
    """The toy network of the recorded runs: nearly the exact eps of x0 ~ N(0.5 cos y, 0.25)."""
    s2, b = golden.meta["toy"]["s2"], golden.meta["toy"]["b"]
    alpha_bar = golden.tensors["sched.full1000.alphas_cumprod"].float()

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        ab, t, y = (v.float().reshape(-1, 1, 1, 1) for v in (alpha_bar[t], t, y))
        eps = (1 - ab).sqrt() * (x - ab.sqrt() * 0.5 * y.cos()) / (ab * s2 + 1 - ab)
        return torch.cat([eps + 0.02 * (3 * x).sin(), b * (2 * x + t / 1000).sin()], dim=1)

    return network


@pytest.fixture(scope="session")
def replay(golden: Golden) -> Callable[[str, Network], float]:
    """Return replay(run, network): runs it on the recorded noise and compares every kept state.

    The tolerance: a step rounds x, its x0 and eps a handful of times (8 roundings of the largest
    magnitude on the path), the errors of S steps add up as a random walk, and the recorded
    sensitivity says how much a relative error of z is amplified on the way, never counted as
    less than 1. Returns the largest error as a share of the tolerance.
    """

    def run(name: str, network: Network) -> float:
        facts = golden.meta["runs"][name]
        z, y, noise, samples, at, final = (
            golden.tensors[f"run.{name}.{field}"]
            for field in ("z", "y", "noise", "samples", "samples_at", "final")
        )
        states: dict[int, Tensor] = {}
        if facts["cfg_scale"] is not None:
            network = guided(network, int(y[-1]), facts["cfg_scale"])
        options = {"clip_denoised": facts["clip_denoised"], "on_step": states.__setitem__}
        schedule = make_schedule(facts["schedule"])
        with torch.inference_mode():
            if facts["loop"] == "ddim_sample_loop":
                options["eta"] = facts["eta"]
                x = ddim_loop(network, schedule, z, y[: len(z)], noise.__getitem__, **options)
            else:
                x = ddpm_loop(network, schedule, z, y[: len(z)], noise.__getitem__, **options)
        assert list(states) == list(range(schedule.num_steps))
        amplified = max(1.0, facts["rel_change_of_final_if_z_times_1_plus_1e-6"] / 1e-6)
        largest = max(samples.abs().max().item(), z.abs().max().item())
        tolerance = 8 * FP32_EPS * schedule.num_steps**0.5 * amplified * largest
        errors = [
            (states[int(k)] - state).abs().max() for k, state in zip(at, samples, strict=True)
        ]
        errors.append((x - final).abs().max())
        return torch.stack(errors).max().item() / tolerance

    return run
