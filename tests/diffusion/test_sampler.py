"""Samplers against recorded trajectories, an exact solution, and diffusers' own DDPM."""

from __future__ import annotations

import math

import pytest
import torch

from terdit_cli.diffusion.noise import ImageNoise
from terdit_cli.diffusion.process import make_schedule
from terdit_cli.diffusion.sampler import (
    NAMES,
    SOLVERS,
    SamplerConfig,
    ddim_loop,
    ddpm_loop,
    forward_with_cfg,
    sample,
    scaled,
)
from terdit_cli.errors import UsageError
from terdit_cli.system.torchvision_shim import import_vision

TOY_RUNS = [
    "toy_p250",
    "toy_p50",
    "toy_p50_clip",
    "toy_ddim25_eta0",
    "toy_ddim25_eta05",
    "toy_p_on_ddim25",
    "toy_p50_cfg1.5",
    "toy_ddim25_cfg1.5",
    "toy_p50_cfg4.0",
    "toy_ddim25_cfg4.0",
]


@pytest.mark.parametrize("run", TOY_RUNS)
def test_recorded_trajectory(replay, toy, run):
    assert replay(run, toy) <= 1


def test_every_recorded_toy_run_is_tested(golden):
    runs = golden.meta["runs"]
    assert sorted(TOY_RUNS) == sorted(r for r in runs if runs[r]["network"] == "toy")


@pytest.mark.parametrize(
    ("run", "config"),
    [
        ("toy_p50_cfg4.0", SamplerConfig("ddpm", 50, cfg_scale=4.0)),
        ("toy_p50_clip", SamplerConfig("ddpm", 50, cfg_scale=1.0, clip_denoised=True)),
        ("toy_ddim25_cfg1.5", SamplerConfig("ddim", 25, cfg_scale=1.5)),
        ("toy_ddim25_eta05", SamplerConfig("ddim", 25, cfg_scale=1.0, eta=0.5)),
    ],
)
def test_sample_is_the_recorded_run(golden, toy, run, config):
    z, y, noise, final = (golden.tensors[f"run.{run}.{f}"] for f in ("z", "y", "noise", "final"))
    x = sample(toy, config, z, y[: len(z)], int(y[-1]), noise.__getitem__)
    torch.testing.assert_close(x, final, rtol=1e-5, atol=1e-5)


# The exact toy: x0 ~ N(mu_y, 0.25) has a linear eps, and its probability flow maps z to x0 by
# an affine function, so that ODE samplers can be compared with the truth point by point.
VARIANCE = 0.25


FULL = make_schedule("").alpha_bar


def class_mean(y):
    return 0.5 * y.double().cos().reshape(-1, 1, 1, 1)


def exact_network(x, t, y):
    ab = FULL[t].reshape(-1, 1, 1, 1)
    eps = (1 - ab).sqrt() * (x - ab.sqrt() * class_mean(y)) / (ab * VARIANCE + 1 - ab)
    return torch.cat([eps, torch.zeros_like(eps)], dim=1).float()


def exact_solution(z, y):
    ab, mean = FULL[-1], class_mean(y)
    return mean + (VARIANCE / (ab * VARIANCE + 1 - ab)).sqrt() * (z - ab.sqrt() * mean)


@pytest.fixture(scope="module")
def start():
    """Return z [64, 2, 8, 8], whose every image has exactly mean 0 and deviation 1, and y."""
    z = ImageNoise(0, range(64), (2, 8, 8)).initial()
    z = (z - z.mean(dim=(1, 2, 3), keepdim=True)) / z.std(dim=(1, 2, 3), keepdim=True)
    return z, torch.arange(64) % 3


def unused_noise(k):
    raise AssertionError("a deterministic solver drew noise")


def draw_noise(k):
    return ImageNoise(1, range(64), (2, 8, 8))(k)


@pytest.mark.parametrize(("name", "order"), [("dpmpp-2m", 2), ("unipc", 2), ("euler", 1)])
def test_solver_converges_to_the_exact_solution(start, name, order):
    z, y = start
    error = {}
    for steps in (10, 20, 40, 80):
        config = SamplerConfig(name, steps, cfg_scale=1.0)
        x = sample(exact_network, config, z, y, 9, unused_noise)
        assert x.dtype == torch.float32
        error[steps] = (x - exact_solution(z, y)).abs().mean().item()
    # Four times the steps leave a quarter of the error at order 1, a sixteenth at order 2; a
    # quarter of that gain is given away, for 10 steps are few.
    assert error[40] < error[10] / (3 if order == 1 else 12)
    assert error[80] < (0.02 if order == 1 else 0.002)


@pytest.mark.slow
def test_ddim_converges_to_the_exact_solution(start):
    z, y = start
    errors = []
    for steps in (25, 100, 1000):
        x = sample(exact_network, SamplerConfig("ddim", steps, cfg_scale=1.0), z, y, 9, draw_noise)
        errors.append((x - exact_solution(z, y)).abs().mean().item())
    assert errors[1] < errors[0] / 3
    # From the last kept timestep 0 to the image nothing is lost; from 960 to 999 z differs.
    assert errors[2] < 0.002


@pytest.mark.parametrize("name", NAMES)
def test_distribution_of_samples(start, name):
    z, y = start
    config = SamplerConfig(name, 200, cfg_scale=1.0)
    x = sample(exact_network, config, z, y, 9, draw_noise)
    assert x.shape == z.shape
    # 64 * 128 numbers: five standard errors of chance (only ddpm has any), and 0.01 of bias
    # for 200 steps; the means differ by up to 0.78 between the classes.
    residual = x - class_mean(y)
    assert abs(residual.std().item() - 0.5) < 0.01 + 5 * 0.5 / math.sqrt(2 * x.numel())
    for label in range(3):
        part = residual[y == label]
        assert abs(part.mean().item()) < 0.01 + 5 * 0.5 / math.sqrt(part.numel())


def test_eta_one_has_the_right_distribution(start):
    z, y = start
    config = SamplerConfig("ddim", 200, cfg_scale=1.0, eta=1.0)
    residual = sample(exact_network, config, z, y, 9, draw_noise) - class_mean(y)
    assert abs(residual.mean().item()) < 0.01 + 5 * 0.5 / math.sqrt(residual.numel())
    assert abs(residual.std().item() - 0.5) < 0.01 + 5 * 0.5 / math.sqrt(2 * residual.numel())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 61, 103, 999])
def test_solver_timesteps(name, steps):
    seen = []

    def network(x, t, y):
        assert t.dtype == torch.int64
        assert x.std() < 1.2  # the network sees x_t, never the solver's own scale
        seen.append(t[0].item())
        return exact_network(x, t, y)

    z = ImageNoise(0, [0], (1, 8, 8)).initial()
    sample(network, SamplerConfig(name, steps, cfg_scale=1.0), z, torch.tensor([0]), 9, draw_noise)
    assert len(seen) == len(set(seen)) == steps
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 999
    assert seen[-1] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_calls_counted_and_callbacks_ordered(name, cfg_scale):
    config = SamplerConfig(name, 10, cfg_scale=cfg_scale)
    z = ImageNoise(0, range(3), (1, 5, 7)).initial()
    rows, drawn, states = 0, [], {}

    def network(x, t, y):
        nonlocal rows
        rows += len(x)
        assert len(x) == len(t) == len(y)
        return exact_network(x, t, y)

    def noise(k):
        drawn.append(k)
        return ImageNoise(0, range(3), (1, 5, 7))(k)

    y = torch.tensor([0, 1, 2])
    x = sample(network, config, z, y, 9, noise, states.__setitem__)
    assert rows == config.nfe * len(z)
    assert list(states) == list(range(10))
    assert torch.equal(states[9], x)
    assert drawn == (list(range(10)) if name in ("ddpm", "ddim") else [])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_the_network_gets_t_where_y_lies(name, cfg_scale):
    """A GPU's network may want both on the CPU; here y is on a device without values."""
    config = SamplerConfig(name, 5, cfg_scale=cfg_scale, clip_denoised=True)
    z = ImageNoise(0, range(3), (1, 4, 4)).initial()

    def network(x, t, y):
        assert t.device == y.device
        assert t.dtype == torch.int64
        assert len(t) == len(y) == len(x)
        return torch.cat([0.1 * x, 0 * x], dim=1)

    y = torch.tensor([0, 1, 2])
    noise = ImageNoise(0, range(3), (1, 4, 4))
    beside = sample(network, config, z, y, 9, noise)
    assert torch.equal(sample(network, config, z, y.to("meta"), 9, noise), beside)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    config = SamplerConfig(name, 20, cfg_scale=3.0)

    def draw(indices):
        noise = ImageNoise(5, indices, (4, 4, 4))
        y = torch.tensor([i % 3 for i in indices])
        return sample(exact_network, config, noise.initial(), y, 9, noise)

    whole = draw(range(5))
    for indices in ([3], [4, 0], [2, 1]):
        torch.testing.assert_close(draw(indices), whole[list(indices)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_bounds_the_image(name):
    config = SamplerConfig(name, 20, cfg_scale=1.0, clip_denoised=True)
    z = ImageNoise(0, range(8), (1, 8, 8)).initial()
    noise = ImageNoise(0, range(8), (1, 8, 8))

    def far(x, t, y):  # the exact network of x0 ~ N(2, small): unclipped samples lie near 2
        ab = FULL[t].reshape(-1, 1, 1, 1).float()
        return (1 - ab).sqrt() * (x - 2 * ab.sqrt()) / (0.01 * ab + 1 - ab)

    x = sample(far, config, z, torch.zeros(8, dtype=torch.int64), 9, noise)
    # The last step lands on the clipped x0 itself, to the rounding of eps and back.
    assert x.abs().max() < 1 + 1e-4
    assert x.mean() > 0.9
    free = SamplerConfig(name, 20, cfg_scale=1.0)
    assert sample(far, free, z, torch.zeros(8, dtype=torch.int64), 9, noise).mean() > 1.8


def labelled_network(x, t, y):
    """Return channel c of eps and v as 100 * label + 10 * c + x, so that mixing can be read."""
    c = torch.arange(2 * x.shape[1]).reshape(1, -1, 1, 1)
    return 100.0 * y.reshape(-1, 1, 1, 1) + 10.0 * c + torch.cat([x, x], dim=1)


@pytest.mark.parametrize(
    ("channels", "which", "expected"), [(4, "3", 3), (4, "all", 4), (1, "3", 1), (6, "3", 3)]
)
def test_guidance_mixes_the_guided_channels_only(channels, which, expected):
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, channels, 2, 3)
    y = torch.tensor([1, 2, 7, 7])
    t = torch.tensor([5, 5, 5, 5])
    out = forward_with_cfg(labelled_network, x, t, y, 4.0, which)
    half = torch.cat([x[:2], x[:2]])
    raw = labelled_network(half, t, y)
    assert out.shape == raw.shape
    assert torch.equal(out[:, expected:], raw[:, expected:])
    mixed = raw[2:, :expected] + 4.0 * (raw[:2, :expected] - raw[2:, :expected])
    assert torch.equal(out[:2, :expected], mixed)
    assert torch.equal(out[2:, :expected], mixed)


def test_scale_one_equals_no_guidance():
    x = ImageNoise(0, range(2), (4, 4, 4)).initial()
    y, t = torch.tensor([1, 2]), torch.tensor([500, 500])
    doubled = forward_with_cfg(
        exact_network, torch.cat([x, x]), t.repeat(2), torch.tensor([1, 2, 9, 9]), 1.0, "all"
    )
    torch.testing.assert_close(doubled[:2], exact_network(x, t, y))


@pytest.mark.parametrize("variance", [0, 2])
def test_scaling_leaves_the_variance_alone(variance):
    x = ImageNoise(0, range(2), (2, 4, 4)).initial()

    def network(x, t, y):
        return torch.cat([x + 1, 3 * x], dim=1)[:, : 2 + variance]

    out = scaled(network, 0.5)(x, torch.tensor([5, 5]), torch.tensor([1, 2]))
    assert torch.equal(out[:, :2], 0.5 * (x + 1))
    assert torch.equal(out[:, 2:], (3 * x)[:, :variance])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_every_sampler_scales_the_guided_eps(toy, name, cfg_scale):
    """A factor of 0.9 is as a network whose eps is 0.9 times, for guidance is linear in eps."""
    noise, y = ImageNoise(0, range(3), (4, 4, 4)), torch.tensor([1, 2, 3])

    def less(x, t, y):
        eps, variance = toy(x, t, y).chunk(2, dim=1)
        return torch.cat([0.9 * eps, variance], dim=1)

    plain = SamplerConfig(name, 5, cfg_scale, cfg_channels="all")
    at_09 = SamplerConfig(name, 5, cfg_scale, cfg_channels="all", eps_scale=0.9)
    images = [
        sample(network, config, noise.initial(), y, 9, noise)
        for network, config in ((toy, at_09), (less, plain), (toy, plain))
    ]
    torch.testing.assert_close(images[0], images[1], rtol=1e-5, atol=1e-5)
    assert (images[0] - images[2]).abs().max() > 0.01


@pytest.mark.parametrize("respacing", ["50", "ddim25", "10,15,20"])
@pytest.mark.parametrize(("alpha_bar", "tolerance"), [("float32", 2.4e-5), ("float64", 2e-6)])
def test_diffusers_ddpm_agrees(toy, respacing, alpha_bar, tolerance):
    """A second witness: diffusers' DDPM with learned range on the same noise and timesteps.

    It is given the timesteps: its "leading" spacing is that of ddimN, but its "linspace" is off
    by one somewhere for 278 of the counts, where ties of a half fall the other way because the
    original sums its strides up. It clips x0 by default, which is turned off. Its float32 alpha_bar
    makes 1 - alpha_bar_0 = 1e-4 wrong by up to 2^-24 / 1e-4 = 6e-4 of itself, its root by half
    of that, and times 0.01, the deviation there, and 4, the largest draw, 1.2e-5; the steps
    before add as much again. With float64 alpha_bar only the roundings of 50 steps of values
    of 4 are left, which add up as a random walk: sqrt(50) * 4 * 2^-24 = 1.7e-6.
    """
    schedule = make_schedule(respacing)
    scheduler = import_vision("diffusers").DDPMScheduler(
        trained_betas=make_schedule("").betas.tolist(),
        variance_type="learned_range",
        clip_sample=False,
    )
    scheduler.set_timesteps(timesteps=schedule.timestep_map.flip(0).tolist())
    if alpha_bar == "float64":
        scheduler.alphas_cumprod = FULL
    shape, y = (2, 4, 4, 4), torch.tensor([3, 8])
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(schedule.num_steps, *shape, generator=generator)
    states = {}
    ddpm_loop(toy, schedule, z, y, noise.__getitem__, on_step=states.__setitem__)
    # diffusers draws from its generator: one that repeats the rows of `noise`.
    generator, x = torch.Generator().manual_seed(1), z
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(toy(x, t.repeat(2), y), t, x, generator=generator).prev_sample
        assert (x - states[k]).abs().max() < tolerance


def test_noise_of_another_shape_is_refused(toy):
    z, y = torch.zeros(2, 4, 4, 4), torch.tensor([0, 1])
    for loop in (ddpm_loop, ddim_loop):
        with pytest.raises(ValueError, match=r"noise\(0\) is \[1, 4, 4, 4\], expected \[2, "):
            loop(toy, make_schedule("50"), z, y, lambda k: torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"name": "dppm"}, ["did you mean 'ddpm'", "'dppm'", "euler", "--sampler ddpm"]),
        ({"name": "dpmpp"}, ["did you mean 'dpmpp-2m'?"]),
        ({"steps": 1}, ["got 1, expected 2 to 1000 for ddpm", "--steps 50"]),
        ({"steps": 1001}, ["got 1001"]),
        ({"name": "euler", "steps": 1000}, ["got 1000, expected 1 to 999 for euler"]),
        ({"name": "unipc", "steps": 0}, ["got 0, expected 1 to 999"]),
        ({"steps": 2.5}, ["got 2.5, expected an integer"]),
        ({"steps": True}, ["got True"]),
        ({"name": "ddim", "steps": 60}, ["'ddim60'", "59 or 63 steps"]),
        ({"cfg_scale": math.nan}, ["wrong cfg_scale: got nan", "--cfg-scale 4"]),
        ({"cfg_scale": -1.0}, ["got -1.0"]),
        ({"eps_scale": 0.0}, ["wrong eps_scale: got 0.0", "--eps-scale 1"]),
        ({"eps_scale": math.inf}, ["got inf, expected a number > 0"]),
        ({"cfg_channels": "4"}, ["got '4', expected '3' or 'all'", "cfg_channels=3"]),
        ({"name": "ddim", "steps": 50, "eta": 1.5}, ["got 1.5, expected a number from 0 to 1"]),
        ({"eta": 0.5}, ["got 0.5, expected 0 for ddpm", "--sampler ddim"]),
    ],
)
def test_wrong_config(fields, parts):
    with pytest.raises(UsageError) as caught:
        SamplerConfig(**fields)
    message = str(caught.value)
    for part in [*parts, "Fix: "]:
        assert part in message


def test_network_calls_an_image():
    assert SamplerConfig().nfe == 500
    assert SamplerConfig("unipc", 20, cfg_scale=1.0).nfe == 20
    assert SamplerConfig("ddim", 25, cfg_scale=0.0).nfe == 50
