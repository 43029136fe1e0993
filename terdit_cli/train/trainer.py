"""One process's training state and its step: losses -> clip -> AdamW -> EMA.

Every random number is a function of (seed, position of its sample), so a run that is stopped at
any time and resumed from its newest checkpoint continues bit for bit, and any number of
processes, sharded or not, or of micro-batches computes the same up to the rounding of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from terdit_cli.data.loader import BatchSource
from terdit_cli.data.vae import Space
from terdit_cli.diffusion.objectives import OBJECTIVES, Objective
from terdit_cli.diffusion.process import Teacher
from terdit_cli.model.ckpt import CKPT
from terdit_cli.model.dit import DiT
from terdit_cli.model.ema import Ema
from terdit_cli.recipe import Recipe
from terdit_cli.system.job import Job
from terdit_cli.train import build
from terdit_cli.train.checkpoint import CheckpointWriter, folder_of, read_manifest
from terdit_cli.train.init_from import copy_weights
from terdit_cli.train.optim import (
    build_optimizer,
    learning_rate,
    plain_state,
    set_learning_rate,
    with_state,
)
from terdit_cli.train.parallel import (
    autocast,
    distribute,
    grad_accum_steps,
    gradient_sync,
    reshard,
    sampling_network,
    seed_weights,
)
from terdit_cli.train.preview import save_preview
from terdit_cli.train.rng import RandomNumbers, RandomStream
from terdit_cli.train.ste import clip_straight_through
from terdit_cli.train.teacher import FeatureMatch, load_teacher, teacher_weight
from terdit_cli.train.ternary_cache import ternarized_once
from terdit_cli.train.write_ckpt import write_ckpt

QUARTERS = 4
_NAMES = ("loss", "mse", "vb", "distill", "features")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean losses of the batch and the gradients' L2 norm before clipping.

    Quarters are quarters of the timesteps, from the least noise to the most. Each has its share of
    the batch and its part of the loss; the parts add up to `loss`.
    """

    loss: float
    mse: float
    vb: float
    distill: float  # squared difference to the teacher's predictions; 0 without one
    features: float  # relative squared difference to its features; 0 if they are not matched
    grad_norm: float
    quarter_losses: tuple[float, ...] = (0.0,) * QUARTERS
    quarter_shares: tuple[float, ...] = (0.0,) * QUARTERS
    notices: tuple[bool, ...] = ()  # those of the step: true if any process set it

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """Everything that changes during a run."""

    def __init__(
        self,
        recipe: Recipe,
        source: BatchSource,
        space: Space,
        job: Job,
        run_folder: Path,
        start: Path | None = None,
    ) -> None:
        """Build what is trained.

        Args:
            start: the ckpt.pt to initialise the network from; None: random weights.

        Raises:
            What `copy_weights`, `load_teacher` and `distribute` raise.
        """
        self.recipe = recipe
        self.source = source
        self.space = space
        self.job = job
        self.run_folder = run_folder
        self.accumulate = grad_accum_steps(recipe.train, job.size)
        self.objective: Objective = OBJECTIVES[recipe.diffusion.objective]()
        seed_weights(recipe.seed)
        self.network: DiT = build.build_network(recipe)  # owns the parameters
        if start is not None:
            copy_weights(self.network, start, source.class_names)
        self._teacher = load_teacher(recipe, job.device)
        self._features = None
        if self._teacher is not None and (weight := recipe.distill.features):
            self._features = FeatureMatch(self.network, self._teacher, weight)
        self.model = distribute(self.network, job, recipe.train, recipe.parallel)
        self.optimizer = build_optimizer(self.network, recipe.optim)
        self.ema = Ema(self.network, recipe.ema.decay, recipe.ema.warmup)
        self.step = 0  # steps done, skipped ones too
        info = build.model_info(recipe, source.class_names, self.step)
        self.checkpoints = CheckpointWriter(run_folder, recipe, info, job)
        config = self.network.config
        self._random = RandomStream(
            recipe.seed,
            recipe.train.global_batch_size,
            (job.rank, job.size),
            (config.in_channels, config.input_size, config.input_size),
            self.objective.timestep,
            config.class_dropout_prob,
            encoding=recipe.data.vae is not None,
        )

    def state(self) -> dict[str, Any]:
        """Return the contents of a resumable checkpoint: dictionaries of tensors and plain values.

        Under fsdp the tensors are DTensors, each process holding its shards, as
        torch.distributed.checkpoint saves and loads them.
        """
        new = not self.optimizer.state
        optimizer = get_optimizer_state_dict(self.network, self.optimizer)
        if new:  # torch created the state with a step of rate 0, and counted it
            for values in self.optimizer.state.values():
                if "step" in values:
                    values["step"].zero_()
        return {
            "model": {name: p.detach() for name, p in self.network.named_parameters()},
            "ema": dict(self.ema.averages),
            "optimizer": plain_state(optimizer),
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Resume from the `state` after `step` optimizer steps."""
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(state["model"][name])
        self.ema.load(state["ema"])
        own = get_optimizer_state_dict(self.network, self.optimizer)
        optimizer = with_state(own, state["optimizer"])
        set_optimizer_state_dict(self.network, self.optimizer, optim_state_dict=optimizer)
        self.step = step

    def save(self) -> Path:
        """Start to write a resumable checkpoint of the present step; return its folder."""
        return self.checkpoints.save(self.step, self.state())

    def finish(self) -> Path:
        """Write ckpt.pt, the result of the run, from the checkpoint of the present step.

        The main process writes it, and the others do not wait: it may take minutes.
        """
        path = self.run_folder / CKPT
        self.checkpoints.wait()
        if self.job.is_main:
            write_ckpt(read_manifest(folder_of(self.run_folder, self.step)), path)
        return path

    def preview(self) -> Path | None:
        """Generate the preview grid of the present step; None on all processes but the main one."""
        with self.ema.applied_to(self.network), ternarized_once(self.network):
            network = sampling_network(self.network, self.recipe.train)
            path = save_preview(
                network, self.network.config, self.recipe, self.space, self.source,
                self.run_folder, self.step, self.job,
            )  # fmt: skip
            if self.job.device.type == "cuda":
                # Offloaded weights are copied from the memory that leaving this overwrites.
                torch.cuda.synchronize(self.job.device)
            reshard(self.network)
        return path

    def train_step(
        self, images: Tensor, labels: Tensor, notices: Sequence[bool] = ()
    ) -> StepResult:
        """Run forward, backward and, when all is finite, the optimizer and the EMA.

        A step that is not finite is counted, but changes nothing: its batch is skipped.

        Args:
            images: this process's share of the global batch as the space encodes it, uint8
                [B, H, W, 3] or VAE posteriors [B, 2C, h, w].
            labels: int64 [B].
            notices: flags to share with all processes; reduced together with the losses.

        Returns:
            The losses of the global batch and the norm of its gradient, the same on all processes.
        """
        self.network.train()
        sums = torch.zeros(len(_NAMES) + 2 * QUARTERS, device=self.job.device)
        numbers = self._random.of_step(self.step).chunk(self.accumulate)
        parts = (images.chunk(self.accumulate), labels.chunk(self.accumulate), numbers)
        with ternarized_once(self.network, self.recipe.train.compile):
            for micro, (batch, y, random) in enumerate(zip(*parts, strict=True)):
                with gradient_sync(self.model, last=micro == self.accumulate - 1):
                    sums += self._backward(batch, y, random) / self.accumulate
        if (clip := self.recipe.ternary.ste_clip) is not None:
            clip_straight_through(self.network, clip)
        limit = self.recipe.optim.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), math.inf if limit is None else limit, foreach=True
        )
        heard = torch.tensor(notices, dtype=sums.dtype).to(self.job.device)
        loss, mse, vb, distill, features, *quarters = self.job.mean(
            torch.cat([sums, heard])
        ).tolist()
        result = StepResult(
            loss, mse, vb, distill, features, float(whole(norm)),
            tuple(quarters[:QUARTERS]), tuple(quarters[QUARTERS : 2 * QUARTERS]),
            tuple(share > 0 for share in quarters[2 * QUARTERS :]),
        )  # fmt: skip
        if result.finite:
            rate = learning_rate(self.step, self.recipe.train.steps, self.recipe.optim)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.ema.update(self.network, self.step + 1)
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _backward(self, batch: Tensor, y: Tensor, random: RandomNumbers) -> Tensor:
        """Add a micro-batch's share of the gradient.

        Returns:
            The means of `_NAMES`, and the quarters' losses and shares: one tensor of all.
        """
        device, null = self.job.device, self.network.config.null_class
        x0 = self.space.encode(batch, random.encoding).to(device)
        y = y if null is None else torch.where(random.dropped, null, y)
        t, noise, y = random.t.to(device), random.noise.to(device), y.to(device)
        teacher = None
        if self._teacher is not None:
            steps, distill = self.recipe.train.steps, self.recipe.distill
            teacher = Teacher(self._teacher, teacher_weight(self.step, steps, distill))
        with autocast(self.recipe.train, device):
            losses = self.objective.losses(self.model, x0, t, y, noise, teacher)
        objective = losses.get("objective", losses["loss"])
        if self._features is not None:
            losses["features"] = self._features.difference()
            objective = objective + self._features.weight * losses["features"]
        (objective.mean() / self.accumulate).backward()
        # Without learned sigma there is no variational bound, without a teacher no differences.
        nothing = torch.zeros_like(losses["loss"])
        parts = [losses.get(name, nothing) for name in _NAMES]
        quarter = t * QUARTERS // self.objective.num_steps
        inside = quarter == torch.arange(QUARTERS, device=device)[:, None]  # [QUARTERS, B]
        quarters = torch.cat([inside * losses["loss"], inside.float()])  # [2 * QUARTERS, B]
        return torch.cat([torch.stack(parts), quarters]).detach().mean(dim=1)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes; all must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
