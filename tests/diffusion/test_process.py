"""Schedules, posteriors and losses against the recorded ones of the original code."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from terdit_cli.diffusion.process import (
    Teacher,
    discretised_log_likelihood,
    make_schedule,
    spaced_timesteps,
)
from terdit_cli.errors import UsageError

RESPACINGS = {"full1000": "", "250": "250", "50": "50", "ddim25": "ddim25"}
RECORDED_NAMES = {
    "timestep_map": "timestep_map",
    "betas": "betas",
    "alphas_cumprod": "alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance_clipped",
    "posterior_mean_coef1": "posterior_mean_coef1",
    "posterior_mean_coef2": "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alpha_bar",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alpha_bar",
}


@pytest.mark.parametrize("recorded", RESPACINGS)
@pytest.mark.parametrize("name", RECORDED_NAMES)
def test_schedule_is_the_recorded_one(golden, recorded, name):
    expected = golden.tensors[f"sched.{recorded}.{name}"]
    got = getattr(make_schedule(RESPACINGS[recorded]), RECORDED_NAMES[name])
    assert got.dtype == expected.dtype
    # Two roundings of float64: vectorised square roots may miss the last bit.
    torch.testing.assert_close(got, expected, rtol=2 * np.finfo(np.float64).eps, atol=0)


@pytest.mark.parametrize("recorded", RESPACINGS)
def test_schedule_steps(golden, recorded):
    facts = golden.meta["schedules"][recorded]
    schedule = make_schedule(RESPACINGS[recorded])
    assert schedule.num_steps == facts["steps"]
    assert schedule.timestep_map[:6].tolist() == facts["first"]
    assert schedule.timestep_map[-4:].tolist() == facts["last"]


def test_respacing_keeps_alpha_bar():
    full = make_schedule("").alpha_bar
    for respacing in ("2", "7", "1000", "ddim2", "10,15,20", "1,1,1"):
        schedule = make_schedule(respacing)
        kept = full[schedule.timestep_map]
        torch.testing.assert_close(schedule.alpha_bar, kept, rtol=1e-12, atol=0)


def test_sections_are_cut_and_spaced():
    steps = spaced_timesteps(" 10, 15,20")
    sections = [steps[:10], steps[10:25], steps[25:]]
    assert [(s[0], s[-1]) for s in sections] == [(0, 333), (334, 666), (667, 999)]
    assert sections[0] == list(range(0, 334, 37))
    for section, size in zip(sections, (334, 333, 333), strict=True):
        stride = (size - 1) / (len(section) - 1)
        assert all(abs(b - a - stride) < 1 for a, b in pairwise(section))


def test_every_count_gives_that_many_steps():
    for count in range(2, 1001):
        steps = spaced_timesteps(str(count))
        assert len(steps) == count
        assert (steps[0], steps[-1]) == (0, 999)
        if count <= 500:
            stride = -(-1000 // count)
            if len(range(0, 1000, stride)) == count:
                assert spaced_timesteps(f"ddim{count}") == list(range(0, 1000, stride))


def test_strides_are_summed():
    # 10 strides of 49.95 sum to just below 499.5 in float64, where the product is a tie.
    assert spaced_timesteps("21")[9:12] == [450, 499, 549]


@pytest.mark.parametrize(
    "respacing",
    ["0", "1", "1001", "99999", "-5", "+5", "1_0", "2.5", "abc", "ddim", "ddim25,25", "ddim-5"]
    + ["10,,20", "10,20,", "0,50", "400,400,400", "\u00b2", "fast27", " "],
)
def test_bad_respacing(respacing):
    with pytest.raises(UsageError) as caught:
        make_schedule(respacing)
    for part in (repr(respacing), "diffusion respacing", "Fix: "):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("respacing", "nearest"),
    [("ddim60", "59 or 63"), ("ddim400", "334 or 500"), ("ddim1001", "1000"), ("ddim1", "2")],
)
def test_uneven_ddim_names_the_nearest(respacing, nearest):
    with pytest.raises(UsageError, match=f"{nearest} steps, the nearest") as caught:
        make_schedule(respacing)
    assert repr(respacing) in str(caught.value)
    assert f"Fix: use {nearest} steps" in str(caught.value)
    for word in nearest.split(" or "):
        assert len(spaced_timesteps(f"ddim{word}")) == int(word)


class Case:
    """A recorded loss case: its schedule, and its tensors as attributes."""

    def __init__(self, golden, name):
        self.schedule = make_schedule("" if name == "full1000" else name)
        self.tensors = {
            key.removeprefix(f"loss.{name}."): value
            for key, value in golden.tensors.items()
            if key.startswith(f"loss.{name}.")
        }

    def __getattr__(self, name):
        return self.tensors[name]


@pytest.fixture(params=["full1000", "250"])
def case(golden, request):
    return Case(golden, request.param)


def assert_within_roundings(got, expected, roundings=4):
    """Compare float32 tensors to a few roundings of the largest value of each image."""
    assert got.dtype == torch.float32
    scale = expected.abs().amax(dim=tuple(range(1, expected.ndim)), keepdim=True)
    assert ((got - expected).abs() <= roundings * 2**-24 * scale).all()


def test_posteriors_are_the_recorded_ones(case):
    s = case.schedule
    assert_within_roundings(s.q_sample(case.x_start, case.t, case.noise), case.x_t)
    q = s.q_posterior(case.x_start, case.x_t, case.t)
    assert_within_roundings(q.mean, case.q_posterior_mean)
    assert_within_roundings(q.variance, case.q_posterior_variance)
    assert_within_roundings(q.log_variance, case.q_posterior_log_variance)
    p = s.p_mean_variance(case.model_output, case.x_t, case.t, clip_denoised=False)
    # exp multiplies the rounding of the log variance, at most 12 here, by its size.
    assert_within_roundings(p.variance, case.p_variance, roundings=24)
    assert_within_roundings(p.mean, case.p_mean)
    assert_within_roundings(p.log_variance, case.p_log_variance)
    assert_within_roundings(p.x0, case.p_pred_xstart)


def test_clipping_moves_x0_and_the_mean(case):
    s = case.schedule
    p = s.p_mean_variance(case.model_output, case.x_t, case.t, clip_denoised=True)
    assert torch.equal(p.x0, case.p_pred_xstart.clamp(-1, 1))
    assert torch.equal(p.mean, s.q_posterior(p.x0, case.x_t, case.t).mean)
    assert not torch.equal(p.mean, case.p_mean)


def test_losses_and_gradient_are_the_recorded_ones(case):
    output = case.model_output.clone().requires_grad_()
    seen = []

    def network(x, t, y):
        seen.append((x, t, y))
        return output

    losses = case.schedule.training_losses(network, case.x_start, case.t, case.y, case.noise)
    assert list(losses) == ["loss", "mse", "vb"]
    ((x, t, y),) = seen
    assert_within_roundings(x, case.x_t)
    assert torch.equal(t, case.model_t)
    assert torch.equal(y, case.y)
    assert_within_roundings(losses["mse"][:, None], case.mse[:, None], roundings=8)
    # The KL sums terms of the size of log variances (up to 12) that cancel: absolute error.
    for name in ("loss", "vb"):
        torch.testing.assert_close(losses[name], case.tensors[name], rtol=1e-6, atol=12 * 2**-24)
    losses["loss"].sum().backward()
    torch.testing.assert_close(output.grad, case.grad_model_output, rtol=1e-4, atol=1e-7)


def test_vb_teaches_only_the_variance(case):
    output = case.model_output.clone().requires_grad_()
    case.schedule.training_losses(lambda x, t, y: output, case.x_start, case.t, case.y, case.noise)[
        "vb"
    ].sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_teacher_takes_the_place_of_some_of_the_noise(case, weight):
    output = case.model_output.clone().requires_grad_()
    theirs = (case.model_output + torch.randn_like(case.model_output)).requires_grad_()
    arguments = (lambda *_: output, case.x_start, case.t, case.y, case.noise)
    plain = case.schedule.training_losses(*arguments)
    losses = case.schedule.training_losses(*arguments, Teacher(lambda *_: theirs, weight))
    for name, value in plain.items():
        assert torch.equal(losses[name], value)
    # The gradient is that of one target between the two.
    eps = case.model_output.shape[1] // 2
    target = (1 - weight) * case.noise + weight * theirs.detach()[:, :eps]
    (gradient,) = torch.autograd.grad(losses["objective"].sum(), output)
    (of_vb,) = torch.autograd.grad(plain["vb"].sum(), output)
    expected = 2 * (output.detach()[:, :eps] - target) / target[0].numel()
    assert_within_roundings(gradient[:, :eps], expected, roundings=16)
    assert torch.equal(gradient[:, eps:], of_vb[:, eps:])
    assert theirs.grad is None


def test_losses_are_float32_whatever_the_network_returns(case):
    half = case.model_output.bfloat16()
    losses, exact = (
        case.schedule.training_losses(
            lambda x, t, y, output=output: output, case.x_start, case.t, case.y, case.noise
        )
        for output in (half, half.float())
    )
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name])


def test_a_schedule_made_in_inference_mode_can_train(case):
    with torch.inference_mode():
        schedule = make_schedule("250")
        schedule.p_mean_variance(case.model_output, case.x_t, case.t.clamp(max=249), False)
    output = case.model_output.clone().requires_grad_()
    t = case.t.clamp(max=249)
    losses = schedule.training_losses(lambda *_: output, case.x_start, t, case.y, case.noise)
    losses["loss"].sum().backward()
    assert output.grad.isfinite().all()


def test_network_without_variance():
    schedule = make_schedule("50")
    generator = torch.Generator().manual_seed(0)
    x0, noise, eps = (torch.randn(3, 1, 5, 7, generator=generator) for _ in range(3))
    t = torch.tensor([0, 1, 49])
    losses = schedule.training_losses(lambda x, t, y: eps, x0, t, torch.zeros(3), noise)
    assert list(losses) == ["loss", "mse"]
    torch.testing.assert_close(losses["loss"], ((noise - eps) ** 2).mean(dim=(1, 2, 3)))
    p = schedule.p_mean_variance(eps, schedule.q_sample(x0, t, noise), t, clip_denoised=False)
    expected = torch.stack([schedule.posterior_variance[1], *schedule.betas[[1, 49]]]).float()
    assert torch.equal(p.variance, expected.reshape(3, 1, 1, 1).expand(3, 1, 5, 7))
    torch.testing.assert_close(p.log_variance, p.variance.log())


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 12, 4, 4), (1, 8, 4, 4), (2, 8, 4, 5)])
def test_wrong_output_shape(shape):
    x = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"expected 4 channels \(eps\) or 8"):
        make_schedule("50").p_mean_variance(torch.zeros(shape), x, torch.tensor([0, 1]), False)


def test_x0_and_eps_are_inverse():
    schedule = make_schedule("")
    x, eps = torch.randn(2, 20, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    t = torch.arange(19, 1000, 50)
    back = schedule.eps_from_x0(x, t, schedule.x0_from_eps(x, t, eps))
    # x0 and x / sqrt(alpha_bar) nearly cancel where the noise is small.
    tolerance = 8 * 2**-24 / schedule.sqrt_recipm1_alpha_bar[t].clamp(max=1)
    assert ((back - eps).abs().amax(dim=(1, 2, 3)) <= tolerance * x.abs().max()).all()


def test_perfect_prediction_costs_nothing_but_the_variance():
    schedule = make_schedule("250")
    x0 = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(2)) * 2 - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([1, 200])
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # v = -1: posterior variance
    losses = schedule.training_losses(lambda *_: output, x0, t, torch.zeros(2), noise)
    assert losses["mse"].abs().max() == 0
    assert losses["vb"].abs().max() < 1e-5


@pytest.mark.parametrize(("mean", "scale"), [(0.1, 0.3), (-0.95, 0.05), (1.2, 1.0)])
def test_likelihood_of_all_levels_sums_to_one(mean, scale):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretised_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(scale))
    )
    # The tanh approximation telescopes; only the floor of 1e-12 a level is added.
    assert abs(log_p.exp().sum().item() - 1) < 1e-9
