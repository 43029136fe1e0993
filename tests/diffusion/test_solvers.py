"""Our ODE solvers against diffusers' schedulers of the same names: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from terdit_cli.diffusion.process import TRAIN_STEPS, make_schedule
from terdit_cli.diffusion.sampler import sigmas_of, solver_timesteps
from terdit_cli.diffusion.solvers import SOLVERS
from terdit_cli.system.torchvision_shim import import_vision

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp-2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def scheduler_of(name: str, spacing: str, steps: int) -> Any:
    class_name, options = THEIRS[name]
    scheduler = getattr(import_vision("diffusers"), class_name)(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=make_schedule("").betas.tolist(),
        prediction_type="epsilon",
        timestep_spacing=spacing,
        **options,
    )
    if name == "euler" and spacing == "linspace":  # its own has fractional timesteps
        scheduler.set_timesteps(timesteps=solver_timesteps(steps))
    else:
        scheduler.set_timesteps(steps)
    return scheduler


def eps_of(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """Any smooth function will do."""
    return torch.sin(x * 1.3 + timestep / 100) + 0.1 * x


def theirs(
    name: str, spacing: str, steps: int, z: torch.Tensor, start: float | torch.Tensor | None = None
) -> tuple[list[int], torch.Tensor]:
    scheduler = scheduler_of(name, spacing, steps)
    x = z * (scheduler.init_noise_sigma if start is None else start)
    for timestep in scheduler.timesteps:
        eps = eps_of(scheduler.scale_model_input(x, timestep), int(timestep))
        x = scheduler.step(eps, timestep, x).prev_sample
    return [int(timestep) for timestep in scheduler.timesteps], x


def ours(name: str, timesteps: list[int], z: torch.Tensor) -> torch.Tensor:
    solver = SOLVERS[name](sigmas_of(timesteps))
    x = z * solver.start
    for k, timestep in enumerate(timesteps):
        x = solver.step(x, eps_of(solver.network_input(x, k), timestep), k)
    return x


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))


def test_every_solver_is_compared() -> None:
    assert set(THEIRS) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 20, 50, 61, 250, 999])
def test_the_bits_of_diffusers(name: str, steps: int, z: torch.Tensor) -> None:
    timesteps, expected = theirs(name, "linspace", steps, z)
    assert timesteps == solver_timesteps(steps)
    assert torch.equal(ours(name, timesteps, z), expected)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [4, 10, 20, 25, 100])
def test_other_spacings(name: str, spacing: str, steps: int, z: torch.Tensor) -> None:
    timesteps = [int(timestep) for timestep in scheduler_of(name, spacing, steps).timesteps]
    start = SOLVERS[name](sigmas_of(timesteps)).start  # diffusers' "leading" Euler has another
    _, expected = theirs(name, spacing, steps, z, start)
    torch.testing.assert_close(ours(name, timesteps, z), expected, rtol=1e-6, atol=1e-6)
