"""What a network is trained to predict, and everything that depends on it.

An objective defines how timesteps are sampled, what the loss is, which samplers work with it, and
its metadata in model files. Trainer, generator and measurements ask it; no other code knows the
process. A new objective is an entry of `OBJECTIVES`.

    eps    predict the noise of Ho et al. 2020 (arXiv 2006.11239), 1000 linear betas, and the
           variance where the network has channels for it (`process.py`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from terdit_cli.diffusion.process import (
    BETA_END,
    BETA_START,
    TRAIN_STEPS,
    Network,
    Teacher,
    make_schedule,
)


class Objective(ABC):
    """The interface of an objective."""

    name: ClassVar[str]
    num_steps: ClassVar[int]  # timesteps; t [B] int64 is 0 .. num_steps - 1, the least noise first
    samplers: ClassVar[tuple[str, ...]]  # that work with a network trained with it
    description: ClassVar[dict[str, object]]  # in the metadata of model files; plain JSON types

    @abstractmethod
    def timestep(self, share: float) -> int:
        """Return the timestep t of a random number in [0, 1)."""

    @abstractmethod
    def losses(
        self,
        network: Network,
        x0: Tensor,
        t: Tensor,
        y: Tensor,
        noise: Tensor,
        teacher: Teacher | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of images x0 [B, C, H, W] at t [B], by name, float32 [B].

        "loss" is to be minimised, or "objective" where a teacher adds to it.
        """


class EpsObjective(Objective):
    """Predict the noise; `Schedule.training_losses` has the loss."""

    name = "eps"
    num_steps = TRAIN_STEPS
    samplers = ("ddpm", "ddim", "dpmpp-2m", "unipc", "euler")
    # Networks with `learn_sigma` predict the variance; that of others is fixed.
    description: ClassVar[dict[str, object]] = {
        "steps": TRAIN_STEPS,
        "schedule": "linear",
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "prediction": "eps",
        "variance": "learned_range",
    }

    def __init__(self) -> None:
        self._schedule = make_schedule("")

    def timestep(self, share: float) -> int:
        """Return a timestep, uniformly distributed."""
        return int(share * self.num_steps)

    def losses(
        self,
        network: Network,
        x0: Tensor,
        t: Tensor,
        y: Tensor,
        noise: Tensor,
        teacher: Teacher | None = None,
    ) -> dict[str, Tensor]:
        """Return `Schedule.training_losses` of the whole schedule."""
        return self._schedule.training_losses(network, x0, t, y, noise, teacher)


OBJECTIVES: dict[str, type[Objective]] = {"eps": EpsObjective}


def objective_of(description: dict[str, object]) -> Objective:
    """Return the objective that the metadata of a model file describe.

    Raises:
        KeyError: unknown to this version.
    """
    for make in OBJECTIVES.values():
        if make.description == description:
            return make()
    raise KeyError("no such objective")
