"""Samplers: from unit noise and a network f(x, t, y) to images or latents.

    ddpm      x_{t-1} = mean(x_t) + exp(log variance / 2) noise_k      (Ho et al. 2020)
    ddim      x_{t-1} = sqrt(ab') x0 + sqrt(1 - ab' - s^2) eps + s noise_k   (Song et al. 2021)
    dpmpp-2m, unipc, euler    the ODE solvers of `solvers.py`, deterministic
    guidance  eps = eps_null + cfg_scale (eps_class - eps_null)        (Ho and Salimans 2022)
    scaling   eps = eps_scale eps, after guidance                      (Ning et al. 2024)

where ab' is alpha_bar of the next step and s = eta times the ddpm deviation. Noise comes from a
callable: noise(k) is the draw of the k-th step, counted from the noisiest, asked for at every
step of ddpm and ddim even where its factor is 0, so that a recorded trajectory can be replayed.

The network gets t on the device of y, which need not be that of x.

Shapes: B images, C channels, H, W pixels or latents. x stays float32. t [B] int64, y [B] int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from terdit_cli.diffusion.process import (
    TRAIN_STEPS,
    Network,
    Schedule,
    at,
    make_schedule,
    spaced_timesteps,
    split_output,
)
from terdit_cli.diffusion.solvers import SOLVERS
from terdit_cli.errors import UsageError, did_you_mean

SamplerName = Literal["ddpm", "ddim", "dpmpp-2m", "unipc", "euler"]
CfgChannels = Literal["3", "all"]
Noise = Callable[[int], Tensor]
OnStep = Callable[[int, Tensor], None]

NAMES = ("ddpm", "ddim", *SOLVERS)


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler, number of steps and CFG scale; wrong values raise UsageError."""

    name: SamplerName = "ddpm"
    steps: int = 250
    cfg_scale: float = 4.0  # 1.0 = off
    cfg_channels: CfgChannels = "3"
    eps_scale: float = 1.0  # 1.0 = off; arXiv 2308.15321 divides by its lambda instead
    eta: float = 0.0  # ddim only: 0 = deterministic, 1 = as much noise as ddpm
    clip_denoised: bool = False  # clamp every predicted x0 to [-1, 1]: for pixels, not latents

    def __post_init__(self) -> None:
        """Check every field."""
        if self.name not in NAMES:
            raise UsageError(
                "unknown sampler",
                got=repr(self.name) + did_you_mean(str(self.name), NAMES),
                expected=f"one of {', '.join(NAMES)}",
                where="sampler",
                fix="--sampler ddpm",
            )
        # The solvers' grid cannot hold 1000 different timesteps above 0.
        low, high = (1, TRAIN_STEPS - 1) if self.name in SOLVERS else (2, TRAIN_STEPS)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise _wrong("steps", self.steps, "an integer", "--steps 50")
        if not low <= self.steps <= high:
            raise _wrong("steps", self.steps, f"{low} to {high} for {self.name}", "--steps 50")
        if self.name == "ddim":
            spaced_timesteps(self.respacing)
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise _wrong("cfg_scale", self.cfg_scale, "a number >= 0, 1.0 = off", "--cfg-scale 4")
        if not (math.isfinite(self.eps_scale) and self.eps_scale > 0):
            raise _wrong("eps_scale", self.eps_scale, "a number > 0, 1.0 = off", "--eps-scale 1")
        if self.cfg_channels not in ("3", "all"):
            raise _wrong("cfg_channels", repr(self.cfg_channels), "'3' or 'all'", "cfg_channels=3")
        if not 0 <= self.eta <= 1:
            raise _wrong("eta", self.eta, "a number from 0 to 1", "eta=0")
        if self.eta and self.name != "ddim":
            raise _wrong("eta", self.eta, f"0 for {self.name}", "eta=0, or --sampler ddim")

    def clipped_for(self, pixels: bool) -> SamplerConfig:
        """Return the sampler for pixels, which end in [-1, 1], or for latents, without bounds.

        ddpm and ddim clamp their predictions of pixels, as ADM does; the solvers, which extrapolate
        between predictions, do not.
        """
        return replace(self, clip_denoised=pixels and self.name not in SOLVERS)

    @property
    def respacing(self) -> str:
        """Return the respacing string of the ddpm or ddim schedule."""
        return f"ddim{self.steps}" if self.name == "ddim" else str(self.steps)

    @property
    def guided(self) -> bool:
        """Return whether the network is called twice per step, with the class and without."""
        return self.cfg_scale != 1.0

    @property
    def nfe(self) -> int:
        """Return the number of network calls per image."""
        return self.steps * (2 if self.guided else 1)


def _wrong(field: str, got: object, expected: str, fix: str) -> UsageError:
    return UsageError(f"wrong {field}", got=got, expected=expected, where="sampler", fix=fix)


def sample(
    network: Network,
    config: SamplerConfig,
    z: Tensor,
    y: Tensor,
    null_class: int,
    noise: Noise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return [B, C, H, W] float32: one image or latent for each unit noise of z and class of y.

    z: [B, C, H, W]; y: [B] int64; null_class: the id that means "no class" in guidance.
    noise(k) gives [B, C, H, W] for step k; the solvers never call it. on_step(k, x) sees the
    state after each step. The caller decides on gradients and dropout: run in inference mode.
    """
    if config.guided:
        network = guided(network, null_class, config.cfg_scale, config.cfg_channels)
    if config.eps_scale != 1.0:
        network = scaled(network, config.eps_scale)
    if config.name in SOLVERS:
        return solver_loop(network, config, z, y, on_step=on_step)
    schedule = make_schedule(config.respacing)
    if config.name == "ddpm":
        return ddpm_loop(
            network, schedule, z, y, noise, clip_denoised=config.clip_denoised, on_step=on_step
        )
    return ddim_loop(
        network,
        schedule,
        z,
        y,
        noise,
        eta=config.eta,
        clip_denoised=config.clip_denoised,
        on_step=on_step,
    )


def forward_with_cfg(
    network: Network,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    cfg_scale: float,
    cfg_channels: CfgChannels = "3",
) -> Tensor:
    """Return the network's output [2B, C or 2C, H, W] with guided eps, the same in both halves.

    x: [2B, C, H, W], of which only the first half is read; t: [2B]; y: [2B], first the classes,
    then the null class. "3" guides the first three channels of eps, as DiT does (which of fewer
    than three would guide the variance as well), "all" guides every one; the rest, the variance
    with it, stays what each half's own class gave.
    """
    half = x[: len(x) // 2]
    output = network(torch.cat([half, half]), t, y)
    channels = x.shape[1] if cfg_channels == "all" else min(3, x.shape[1])
    with_class, without = output[:, :channels].chunk(2)
    eps = without + cfg_scale * (with_class - without)
    return torch.cat([torch.cat([eps, eps]), output[:, channels:]], dim=1)


def guided(
    network: Network, null_class: int, cfg_scale: float, cfg_channels: CfgChannels = "3"
) -> Network:
    """Return a network with the same interface that applies CFG, with 2B rows per call."""

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, null_class)])
        x, t = torch.cat([x, x]), torch.cat([t, t])
        return forward_with_cfg(network, x, t, labels, cfg_scale, cfg_channels)[: len(y)]

    return call


def scaled(network: Network, eps_scale: float) -> Network:
    """Return a network with the same interface whose eps [B, C, H, W] is times `eps_scale`.

    The variance channels stay. In sampling, states carry the errors of earlier steps, unlike the
    states of training, so the noise that the network predicts is a little too much or too little.
    One factor for all steps may correct part of that: the epsilon scaling of Ning
    et al. 2024 (arXiv 2308.15321).
    """

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output = network(x, t, y)
        eps, variance = output.split([x.shape[1], output.shape[1] - x.shape[1]], dim=1)
        return torch.cat([eps_scale * eps, variance], dim=1)

    return call


def ddpm_loop(
    network: Network,
    schedule: Schedule,
    z: Tensor,
    y: Tensor,
    noise: Noise,
    *,
    clip_denoised: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return [B, C, H, W] by ancestral sampling over any schedule (Ho et al., algorithm 2)."""
    x = z.float()
    for k in range(schedule.num_steps):
        t, told = _timesteps(schedule.num_steps - 1 - k, x, y)
        output = schedule.call(network, x, told, y)
        p = schedule.p_mean_variance(output, x, t, clip_denoised)
        draw = _draw(noise, k, x)
        last = k == schedule.num_steps - 1
        x = p.mean if last else p.mean + torch.exp(0.5 * p.log_variance) * draw
        if on_step is not None:
            on_step(k, x)
    return x


def ddim_loop(
    network: Network,
    schedule: Schedule,
    z: Tensor,
    y: Tensor,
    noise: Noise,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return [B, C, H, W] by DDIM over any schedule (Song et al. 2021, equations 12 and 16)."""
    x = z.float()
    for k in range(schedule.num_steps):
        t, told = _timesteps(schedule.num_steps - 1 - k, x, y)
        output = schedule.call(network, x, told, y)
        x0 = schedule.p_mean_variance(output, x, t, clip_denoised).x0
        eps = schedule.eps_from_x0(x, t, x0)
        now, after = at(schedule.alpha_bar, t), at(schedule.alpha_bar_prev, t)
        sigma = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        draw = _draw(noise, k, x)
        mean = x0 * after.sqrt() + (1 - after - sigma**2).sqrt() * eps
        last = k == schedule.num_steps - 1
        x = mean if last else mean + sigma * draw
        if on_step is not None:
            on_step(k, x)
    return x


def solver_loop(
    network: Network,
    config: SamplerConfig,
    z: Tensor,
    y: Tensor,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return [B, C, H, W] by one of the ODE solvers over evenly spaced whole timesteps.

    All three walk from timestep 999 down to 999 / steps, and from there to the clean image.
    Euler's state is x_t / sqrt(alpha_bar_t), so on_step sees it on that scale.
    """
    timesteps = solver_timesteps(config.steps)
    schedule = make_schedule("")
    solver = SOLVERS[config.name](sigmas_of(timesteps))
    x = z.float() * solver.start
    for k, timestep in enumerate(timesteps):
        t, told = _timesteps(timestep, x, y)
        x_t = solver.network_input(x, k)
        eps, _ = split_output(network(x_t, told, y), x_t)
        if config.clip_denoised:
            eps = schedule.eps_from_x0(x_t, t, schedule.x0_from_eps(x_t, t, eps).clamp(-1, 1))
        x = solver.step(x, eps, k)
        if on_step is not None:
            on_step(k, x)
    return x


def _timesteps(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `step` for each image, int64 [B]: on the device of x for arithmetic, of y for f."""
    t = torch.full((len(x),), step, device=x.device)
    return t, t if y.device == x.device else torch.full((len(x),), step, device=y.device)


def solver_timesteps(steps: int) -> list[int]:
    """Return `steps` whole timesteps from 999 on, evenly spaced, the last above 0.

    diffusers' spacing "linspace"; its "trailing" yields -1 for 62 of the counts (61, 103, ...).
    """
    grid = np.linspace(0, TRAIN_STEPS - 1, steps + 1).round().astype(np.int64)
    return grid[:0:-1].tolist()


def sigmas_of(timesteps: Sequence[int]) -> Tensor:
    """Return sqrt((1 - alpha_bar) / alpha_bar) of timesteps, and 0 after them: float32 [N + 1].

    In float32 from the betas on, as diffusers computes it.
    """
    betas = make_schedule("").betas.float()
    alpha_bar = torch.cumprod(1.0 - betas, dim=0)
    sigmas = ((1 - alpha_bar) / alpha_bar) ** 0.5
    return torch.cat([sigmas[torch.tensor(timesteps)], torch.zeros(1)])


def _draw(noise: Noise, k: int, x: Tensor) -> Tensor:
    """Return noise(k) on the device of x; ValueError if its shape would broadcast."""
    draw = noise(k)
    if draw.shape != x.shape:
        raise ValueError(f"noise({k}) is {list(draw.shape)}, expected {list(x.shape)}")
    return draw.to(x)
