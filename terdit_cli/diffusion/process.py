"""The diffusion process: noise schedule, posterior, and the loss a network learns it by.

    x_t  = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps          eps ~ N(0, 1)
    loss = mean (eps - eps_hat)^2 + vb                               vb in bits per dimension

1000 linear betas from 1e-4 to 0.02. A respaced schedule keeps some of the 1000 timesteps and
recomputes its betas so that alpha_bar is unchanged where kept. The network predicts eps and, in
a second half of its output channels, a number v in about [-1, 1] that places the log variance of
p(x_{t-1} | x_t) between its two bounds (learned range). Sources: Ho et al. 2020
(arXiv 2006.11239) for the process, Nichol and Dhariwal 2021 (arXiv 2102.09672) for the learned
range, the hybrid loss and the respacing strings of openai/guided-diffusion.

Coefficients are float64 on the CPU, rounded to float32 at use; losses are float32 whatever the
network returns.

Shapes: B batch, C channels, H, W pixels or latents; S steps of a schedule.
t [B] int64 indexes the schedule (0..S-1); the network sees `timestep_map[t]` (0..999).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from terdit_cli.errors import UsageError

TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
HALF_LEVEL = 1 / 255  # half the distance of two uint8 levels mapped to [-1, 1]

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # f(x, t, y) -> [B, 2C or C, H, W]


class Teacher(NamedTuple):
    """A trained network and its weight in the target, in [0, 1]; the noise has the rest."""

    network: Network
    weight: float


class Gaussian(NamedTuple):
    """A diagonal normal distribution; three tensors [B, C, H, W] float32."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) as the network sees it, with its prediction of x0; tensors [B, C, H, W]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule of S steps; every array is a CPU tensor [S], float64 except the map."""

    timestep_map: Tensor  # int64, ascending: the original timestep (0..999) of each step
    betas: Tensor

    @property
    def num_steps(self) -> int:
        """Return S, the number of steps."""
        return len(self.timestep_map)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Return the share of the signal's variance left at each step."""
        return torch.from_numpy(np.cumprod(1.0 - self.betas.numpy()))

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """Return alpha_bar one step closer to the image; 1 before the first step."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Return the variance of q(x_{t-1} | x_t, x0): Ho et al., equation 7."""
        return self.betas * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Return its log; step 0, whose variance is 0, takes the value of step 1."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Return the weight of x0 in the mean of q(x_{t-1} | x_t, x0)."""
        return self.betas * self.alpha_bar_prev.sqrt() / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Return the weight of x_t in the mean of q(x_{t-1} | x_t, x0)."""
        return (1.0 - self.alpha_bar_prev) * (1.0 - self.betas).sqrt() / (1.0 - self.alpha_bar)

    @cached_property
    def sqrt_recip_alpha_bar(self) -> Tensor:
        """Return sqrt(1 / alpha_bar)."""
        return (1.0 / self.alpha_bar).sqrt()

    @cached_property
    def sqrt_recipm1_alpha_bar(self) -> Tensor:
        """Return sqrt(1 / alpha_bar - 1)."""
        return (1.0 / self.alpha_bar - 1.0).sqrt()

    @cached_property
    def fixed_large_variance(self) -> Tensor:
        """Return the variance for networks that learn none: beta, but the posterior's at step 0."""
        return torch.cat([self.posterior_variance[1:2], self.betas[1:]])

    def call(self, network: Network, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return network(x_t, original timestep, y): [B, 2C or C, H, W] in the network's dtype."""
        return network(x_t, self.timestep_map.to(t.device)[t], y)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t [B, C, H, W] float32 from clean x0 and unit noise of that shape."""
        signal = at(self.alpha_bar.sqrt(), t)
        return signal * x0.float() + at((1.0 - self.alpha_bar).sqrt(), t) * noise.float()

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x0) for x0 and x_t [B, C, H, W] (Ho et al., equation 7)."""
        mean = at(self.posterior_mean_coef1, t) * x0 + at(self.posterior_mean_coef2, t) * x_t
        variance = at(self.posterior_variance, t).expand_as(mean)
        return Gaussian(mean, variance, at(self.posterior_log_variance_clipped, t).expand_as(mean))

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the clean image [B, C, H, W] that noise eps would have brought to x_t."""
        return at(self.sqrt_recip_alpha_bar, t) * x_t - at(self.sqrt_recipm1_alpha_bar, t) * eps

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Return the noise [B, C, H, W] that brought x0 to x_t."""
        return (at(self.sqrt_recip_alpha_bar, t) * x_t - x0) / at(self.sqrt_recipm1_alpha_bar, t)

    def p_mean_variance(
        self, network_output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool
    ) -> Prediction:
        """Return p(x_{t-1} | x_t) from the network's output for x_t [B, C, H, W].

        network_output: [B, 2C, H, W] for eps and v (learned range), or [B, C, H, W] for eps
        (fixed large variance). clip_denoised clamps the predicted x0 to [-1, 1]. Raises
        ValueError for another number of channels.
        """
        eps, v = split_output(network_output, x_t)
        x0 = self.x0_from_eps(x_t, t, eps)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        if v is None:
            variance = at(self.fixed_large_variance, t).expand_as(x_t)
            log_variance = at(self.fixed_large_variance.log(), t).expand_as(x_t)
        else:
            share = (v + 1) / 2
            upper, lower = at(self.betas.log(), t), at(self.posterior_log_variance_clipped, t)
            log_variance = share * upper + (1 - share) * lower
            variance = log_variance.exp()
        return Prediction(self.q_posterior(x0, x_t, t).mean, variance, log_variance, x0)

    def training_losses(
        self,
        network: Network,
        x0: Tensor,
        t: Tensor,
        y: Tensor,
        noise: Tensor,
        teacher: Teacher | None = None,
    ) -> dict[str, Tensor]:
        """Return loss = mse + vb for each image: tensors [B] float32 named loss, mse, vb.

        vb is in bits per dimension, not rescaled, and teaches only the variance: the predicted
        mean is detached in it (Nichol and Dhariwal, section 3.1). A network with C output
        channels learns no variance: its loss is the mse, and there is no vb.

        With a teacher there are two more: distill, the squared difference of the predictions,
        and objective = (1 - weight) * mse + weight * distill + vb, which is then to be minimised.
        """
        x_t = self.q_sample(x0, t, noise)
        if teacher is not None:  # first, before the network's activations fill the memory
            with torch.no_grad():
                theirs = self.call(teacher.network, x_t, t, y).float()
        output = self.call(network, x_t, t, y).float()
        eps, v = split_output(output, x_t)
        mse = image_mean((noise.float() - eps) ** 2)
        losses = {"loss": mse, "mse": mse}
        if v is not None:
            vb = self._variational_bound(torch.cat([eps.detach(), v], dim=1), x0.float(), x_t, t)
            losses |= {"loss": mse + vb, "vb": vb}
        if teacher is not None:
            distill = image_mean((split_output(theirs, x_t)[0] - eps) ** 2)
            objective = losses["loss"] + teacher.weight * (distill - mse)
            losses |= {"distill": distill, "objective": objective}
        return losses

    def _variational_bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return a term of the variational bound [B] in bits: a likelihood at t = 0, else a KL."""
        true = self.q_posterior(x0, x_t, t)
        guess = self.p_mean_variance(output, x_t, t, clip_denoised=False)
        kl = 0.5 * (  # summed in this order: near 0 the terms cancel
            -1.0
            + guess.log_variance
            - true.log_variance
            + torch.exp(true.log_variance - guess.log_variance)
            + (true.mean - guess.mean) ** 2 * torch.exp(-guess.log_variance)
        )
        nll = -discretised_log_likelihood(x0, guess.mean, 0.5 * guess.log_variance)
        return torch.where(t == 0, image_mean(nll), image_mean(kl)) / math.log(2.0)


def make_schedule(respacing: str) -> Schedule:
    """Return the schedule of a respacing string ("", "250", "ddim25", "10,15,20").

    Raises UsageError for a string that `spaced_timesteps` does not know.
    """
    kept = spaced_timesteps(respacing)
    alpha_bar = np.cumprod(1.0 - np.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=np.float64))
    alpha_bar = alpha_bar[kept]
    betas = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return Schedule(torch.tensor(kept, dtype=torch.int64), torch.from_numpy(betas))


def spaced_timesteps(respacing: str) -> list[int]:
    """Return the ascending original timesteps (0..999) that a respacing string keeps.

    "" keeps all; "N" keeps N evenly spaced from 0 to 999, rounded; "A,B,C" cuts 0..999 into equal
    sections and keeps A, B, C of them; "ddimN" keeps every k-th from 0 where some integer k gives
    N. Raises UsageError for anything else, and where fewer than 2 timesteps would be left.
    """
    if not respacing:
        return list(range(TRAIN_STEPS))
    kind = "ddim" if respacing.startswith("ddim") else ""
    words = [word.strip() for word in respacing.removeprefix("ddim").split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) <= 4 for word in words):
        raise _respacing_error(respacing, "'', 'N', 'ddimN' or 'A,B,C' with numbers up to 1000")
    counts = [int(word) for word in words]
    if kind and len(counts) == 1:
        return _strided(respacing, counts[0])
    if kind or len(counts) > TRAIN_STEPS or 0 in counts:
        raise _respacing_error(respacing, "one number after ddim, and none of 0")
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = TRAIN_STEPS // len(counts) + (section < TRAIN_STEPS % len(counts))
        if count > size:
            raise _respacing_error(respacing, f"at most {size} steps of section {section + 1}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed, not multiplied: rounds as upstream does
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += size
    if len(kept) < 2:
        raise _respacing_error(respacing, "at least 2 steps")
    return sorted(kept)


def _strided(respacing: str, count: int) -> list[int]:
    """Return `count` timesteps 0, k, 2k, ...; UsageError names the nearest counts that exist."""
    strides = {len(range(0, TRAIN_STEPS, k)): k for k in range(TRAIN_STEPS - 1, 0, -1)}
    if count not in strides:
        near = {max((n for n in strides if n < count), default=0)}
        near |= {min((n for n in strides if n > count), default=0)}
        valid = " or ".join(str(n) for n in sorted(near - {0}))
        raise UsageError(
            f"{count} DDIM steps are not an even division of {TRAIN_STEPS}",
            got=repr(respacing),
            expected=f"{valid} steps, the nearest even division",
            where="diffusion respacing",
            fix=f"use {valid} steps, or the ddpm sampler, which takes any number",
        )
    return list(range(0, TRAIN_STEPS, strides[count]))


def _respacing_error(respacing: str, expected: str) -> UsageError:
    return UsageError(
        "unknown respacing of the diffusion steps",
        got=repr(respacing),
        expected=expected,
        where="diffusion respacing",
        fix="write '250' or 'ddim25', or '' for all 1000 steps",
    )


def at(values: Tensor, t: Tensor) -> Tensor:
    """Return values [S] float64 at steps t [B] as float32 [B, 1, 1, 1] on the device of t."""
    return values.float().to(t.device)[t].reshape(-1, 1, 1, 1)


def split_output(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return eps and v, each shaped like x [B, C, H, W] and float32; v None for C channels.

    Raises ValueError where the output is neither [B, 2C, H, W] nor [B, C, H, W].
    """
    batch, channels, *size = x.shape
    if output.shape == x.shape:
        return output.float(), None
    if output.shape != (batch, 2 * channels, *size):
        raise ValueError(
            f"network output {list(output.shape)} for input {list(x.shape)}: "
            f"expected {channels} channels (eps) or {2 * channels} (eps and variance)"
        )
    eps, v = output.float().split(channels, dim=1)
    return eps, v


def image_mean(x: Tensor) -> Tensor:
    """Return the mean of each image of x [B, C, H, W]: [B]."""
    return x.mean(dim=(1, 2, 3))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log P(x) in nats for uint8 levels in [-1, 1] under a normal: [B, C, H, W].

    The mass of the level's bin, whose outermost bins reach to infinity (Ho et al., section 3.3),
    with the tanh approximation of the normal distribution function.
    """
    centred, inverse_scale = x - mean, torch.exp(-log_scale)
    above = _normal_cdf(inverse_scale * (centred + HALF_LEVEL))
    below = _normal_cdf(inverse_scale * (centred - HALF_LEVEL))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1.0 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
