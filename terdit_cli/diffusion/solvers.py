"""ODE solvers of the probability flow: a state at one noise level -> the state at the next.

They work on sigma = sqrt((1 - alpha_bar) / alpha_bar) of float32, with

    alpha = 1 / sqrt(sigma^2 + 1),  s = sigma alpha,  lambda = log alpha - log s,
    x0 = (x - s eps) / alpha,  h = lambda_next - lambda_now

    euler      x' = x + (sigma' - sigma) eps, on x / alpha          (Karras et al. 2022, 2206.00364)
    dpmpp-2m   x' = s'/s x - alpha' (e^-h - 1) (x0 + (x0 - x0_before) / 2r)    (Lu et al. 2022,
               arXiv 2211.01095, algorithm 2), r = h_before / h
    unipc      the same predictor with B(h) = e^-h - 1, and a corrector that uses the next x0
               (Zhao et al. 2023, arXiv 2302.04867, UniPC-2 with B_2)

and one step of order 1 at the start and at the end, where sigma becomes 0. The order of operations
is that of diffusers' schedulers of these names, so that both give the same bits.

Shapes: x, eps [B, C, H, W] float32; sigmas [N + 1] float32 on the CPU, the last 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Solver(ABC):
    """One trajectory: step k goes from sigmas[k] to sigmas[k + 1].

    `start` is the standard deviation of the initial state.
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.start: float | Tensor = 1.0

    def network_input(self, x: Tensor, k: int) -> Tensor:
        """Return x_t, which the network knows, from the solver's state."""
        return x

    @abstractmethod
    def step(self, x: Tensor, eps: Tensor, k: int) -> Tensor:
        """Return the state after step k; steps come in order."""

    def _levels(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (alpha, s, lambda) of sigmas[k], each []."""
        sigma = self.sigmas[k]
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        s = sigma * alpha
        return alpha, s, torch.log(alpha) - torch.log(s)

    def _x0(self, x: Tensor, eps: Tensor, k: int) -> Tensor:
        alpha, s, _ = self._levels(k)
        return (x - s * eps) / alpha

    @property
    def _last(self) -> int:
        return len(self.sigmas) - 2


class Euler(Solver):
    """First order; its state is x_t / alpha."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self.start = sigmas.max()

    def network_input(self, x: Tensor, k: int) -> Tensor:
        """Return x_t, which the network knows, from the solver's state."""
        return x / ((self.sigmas[k] ** 2 + 1) ** 0.5)

    def step(self, x: Tensor, eps: Tensor, k: int) -> Tensor:
        """Return the state after step k."""
        sigma = self.sigmas[k]
        slope = (x - (x - sigma * eps)) / sigma  # eps, rounded as diffusers rounds it
        return x + slope * (self.sigmas[k + 1] - sigma)


class DpmPlusPlus2M(Solver):
    """DPM-Solver++ (2M): second order from two predictions of x0."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self._before: Tensor | None = None

    def step(self, x: Tensor, eps: Tensor, k: int) -> Tensor:
        """Return the state after step k."""
        x0, before = self._x0(x, eps, k), self._before
        self._before = x0
        _, s, now = self._levels(k)
        alpha_next, s_next, then = self._levels(k + 1)
        h = then - now
        factor = alpha_next * (torch.exp(-h) - 1.0)
        following = (s_next / s) * x - factor * x0
        if before is None or k == self._last:
            return following
        r = (now - self._levels(k - 1)[2]) / h
        return following - 0.5 * factor * ((1.0 / r) * (x0 - before))


class UniPC(Solver):
    """UniPC of order 2: each state is corrected once the network has seen it."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(sigmas)
        self._guesses: list[Tensor] = []  # of x0, at most two
        self._state: Tensor | None = None  # from which the last step started
        self._order = 1

    def step(self, x: Tensor, eps: Tensor, k: int) -> Tensor:
        """Return the state after step k."""
        x0 = self._x0(x, eps, k)
        if self._state is not None:
            x = self._advance(self._state, k - 1, self._order, x0)
        self._guesses = [*self._guesses[-1:], x0]
        self._state = x
        self._order = min(2, self._last + 1 - k, len(self._guesses))
        return self._advance(x, k, self._order, None)

    def _advance(self, x: Tensor, k: int, order: int, seen: Tensor | None) -> Tensor:
        """Go from sigmas[k] to sigmas[k + 1]; with `seen`, the x0 found there, corrected."""
        x0 = self._guesses[-1]
        _, s, now = self._levels(k)
        alpha_next, s_next, then = self._levels(k + 1)
        minus_h = -(then - now)
        scale = torch.expm1(minus_h)  # B(h), and h phi_1(h)
        following = s_next / s * x - alpha_next * scale * x0
        ratios: list[Tensor] = []
        slopes: list[Tensor] = []  # differences of predictions, per unit of the ratio
        if order == 2:
            ratios = [(self._levels(k - 1)[2] - now) / -minus_h]
            slopes = [(self._guesses[-2] - x0) / ratios[0]]
        if seen is None:
            change = 0.5 * slopes[0] if slopes else torch.zeros(())
        else:
            weights = self._weights(ratios, minus_h, scale)
            known = weights[0] * slopes[0] if slopes else 0
            change = known + weights[-1] * (seen - x0)
        return following - alpha_next * scale * change

    @staticmethod
    def _weights(ratios: Sequence[Tensor], minus_h: Tensor, scale: Tensor) -> Tensor:
        """Return the corrector's weights, [order], that match the expansion of phi."""
        if not ratios:
            return torch.ones(1) * 0.5
        points = torch.stack([*ratios, torch.ones(())])
        phi = scale / minus_h - 1
        first = phi / scale
        second = (phi / minus_h - 0.5) * 2 / scale
        powers = torch.stack([torch.pow(points, 0), torch.pow(points, 1)])
        return torch.linalg.solve(powers, torch.stack([first, second]))


SOLVERS: dict[str, type[Solver]] = {"dpmpp-2m": DpmPlusPlus2M, "unipc": UniPC, "euler": Euler}
