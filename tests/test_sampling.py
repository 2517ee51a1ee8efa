# SPDX-License-Identifier: Apache-2.0
"""The two loops, with plain functions in the network's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from dreammover_pipeline.ddim import recompose
from dreammover_pipeline.records import Inversion, Schedule
from dreammover_pipeline.sampling import denoise, invert

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule_of(n, final=None):
    """Stable Diffusion's N steps at 1, 1 + 1000/N, …, in float64."""
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    timesteps = tuple(1 + k * (1000 // n) for k in range(n))
    bars = [alphas_cumprod[0] if final is None else final, *(alphas_cumprod[t] for t in timesteps)]
    return Schedule(timesteps, tuple(map(float, bars)))


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair():
    return randn(2, 4, 3, 5)


def curved(latents, timestep):
    """A noise prediction that depends on where and when it is asked."""
    return torch.tanh(latents * (1 + timestep / 1000)) + timestep / 1000


def assert_exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "steps"), [(1, 1), (5, 3), (10, 10), (50, 14), (50, 30), (50, 50), (999, 999)])
@pytest.mark.parametrize("final", [None, 1.0])
def test_denoising_undoes_inversion_when_the_noise_stays_the_same(pair, n, steps, final):
    schedule, eps = schedule_of(n, final), randn(2, 4, 3, 5, seed=1)
    inversion = invert(pair, lambda latents, timestep: eps, schedule, steps)
    torch.testing.assert_close(
        denoise(inversion.path[-1], lambda latents, timestep: eps, schedule, steps), pair, rtol=0, atol=1e-11
    )
    assert_exact(inversion.path[0], pair)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_every_state_of_the_path_is_the_clean_latent_with_that_steps_share_of_noise(pair, steps):
    schedule, eps = schedule_of(5, final=1.0), randn(2, 4, 3, 5, seed=1)
    inversion = invert(pair, lambda latents, timestep: eps, schedule, steps)
    assert inversion.steps == steps
    assert inversion.alpha_bar == schedule.alpha_bars[steps]
    assert inversion.schedule is schedule
    assert torch.equal(inversion.eps, eps)
    for k, latents in enumerate(inversion.path):
        assert_exact(latents, recompose(pair, eps, schedule.alpha_bars[k]))


def test_asks_for_the_noise_where_and_when_it_should(pair):
    asked = []

    def predict_noise(latents, timestep):
        asked.append((timestep, latents.clone()))
        return curved(latents, timestep)

    schedule = schedule_of(10)
    inversion = invert(pair, predict_noise, schedule, 4)
    timesteps, latents = zip(*asked, strict=True)
    assert timesteps == (1, 101, 201, 301, 301)
    assert all(type(timestep) is int for timestep in timesteps)
    # from k−1 to k at (z_{k−1}, τ_k), and then ε_T at (z_T, τ_T)
    assert all(map(torch.equal, latents, [*inversion.path[:-1], inversion.path[-1]]))
    assert torch.equal(inversion.eps, curved(inversion.path[-1], 301))

    asked.clear()
    states = [inversion.path[-1]]
    denoise(states[0], predict_noise, schedule, 4, lambda i, timestep, latents: states.append(latents) or latents)
    timesteps, latents = zip(*asked, strict=True)
    assert timesteps == (301, 201, 101, 1)
    assert all(type(timestep) is int for timestep in timesteps)
    assert all(map(torch.equal, latents, states[:-1]))


def test_a_shallower_inversion_is_a_prefix_of_a_deeper_one(pair):
    schedule = schedule_of(50)
    assert torch.equal(invert(pair, curved, schedule, 14).path, invert(pair, curved, schedule, 30).path[:15])


def test_the_inversion_is_contiguous_whatever_memory_format_the_network_has(pair):
    def predict_noise(latents, timestep):
        return curved(latents, timestep).to(memory_format=torch.channels_last)

    given = pair.to(memory_format=torch.channels_last)
    assert not given.is_contiguous()
    assert not predict_noise(pair, 1).is_contiguous()
    inversion, expected = invert(given, predict_noise, schedule_of(5), 3), invert(pair, curved, schedule_of(5), 3)
    assert inversion.path.is_contiguous()
    assert inversion.eps.is_contiguous()
    torch.testing.assert_close((inversion.path, inversion.eps), (expected.path, expected.eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("to_one", [True, False])
def test_agrees_with_the_schedulers_of_diffusers(pair, to_one):
    config = {**BETAS, "clip_sample": False, "set_alpha_to_one": to_one, "steps_offset": 1}
    forward, inverse = DDIMScheduler(**config), DDIMInverseScheduler(**config)
    for scheduler in (forward, inverse):
        scheduler.set_timesteps(10)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    forward.final_alpha_cumprod = inverse.initial_alpha_cumprod = torch.as_tensor(forward.final_alpha_cumprod).double()
    timesteps = tuple(inverse.timesteps.tolist())
    alpha_bars = (float(forward.final_alpha_cumprod), *forward.alphas_cumprod[list(timesteps)].tolist())
    schedule = Schedule(timesteps, alpha_bars)
    noise = {timestep: randn(2, 4, 3, 5, seed=timestep) for timestep in timesteps}

    theirs = [pair]
    for timestep in timesteps[:7]:
        theirs.append(inverse.step(noise[timestep], timestep, theirs[-1]).prev_sample)
    ours = invert(pair, lambda latents, timestep: noise[timestep], schedule, 7).path
    assert_exact(ours, torch.stack(theirs))

    theirs = ours[-1]
    for timestep in reversed(timesteps[:7]):
        theirs = forward.step(noise[timestep], timestep, theirs).prev_sample
    assert_exact(denoise(ours[-1], lambda latents, timestep: noise[timestep], schedule, 7), theirs)


def test_inversion_at_a_timestep_is_the_state_of_that_step(pair):
    schedule = schedule_of(10)
    inversion = invert(pair, curved, schedule, 6)
    for k in range(1, 7):
        assert torch.equal(inversion.at(schedule.timestep(k)), inversion.path[k])


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_interruption_leaves_the_latents_where_they_are(pair, stop_after):
    schedule, calls, states = schedule_of(5), [], [pair]

    def predict_noise(latents, timestep):
        calls.append(timestep)
        return curved(latents, timestep)

    def on_step(i, timestep, latents):
        states.append(latents)
        return latents

    result = denoise(pair, predict_noise, schedule, 5, on_step, lambda: len(calls) == stop_after)
    assert len(calls) == stop_after
    assert torch.equal(result, states[stop_after])


def test_what_on_step_returns_goes_on(pair):
    schedule, asked, reported = schedule_of(5), [], []

    def predict_noise(latents, timestep):
        asked.append(latents)
        return curved(latents, timestep)

    def on_step(i, timestep, latents):
        reported.append((i, timestep))
        return torch.full_like(latents, float(i))

    result = denoise(pair, predict_noise, schedule, 4, on_step)
    assert reported == [(0, 601), (1, 401), (2, 201), (3, 1)]
    assert torch.equal(torch.stack(asked[1:]), torch.stack([torch.full_like(pair, float(i)) for i in range(3)]))
    assert torch.equal(result, torch.full_like(pair, 3.0))


def test_inversion_reports_every_prediction(pair):
    count = []
    invert(pair, curved, schedule_of(5), 4, lambda: count.append(1))
    assert len(count) == 5


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_keeps_the_latents_in_float32_at_least_whatever_the_network_returns(pair, given, kept):
    schedule, seen = schedule_of(5), set()

    def predict_noise(latents, timestep):
        seen.add(latents.dtype)
        return curved(latents, timestep).to(given)

    before = pair.to(given)
    pair = before.clone()
    inversion = invert(pair, predict_noise, schedule, 3)
    assert isinstance(inversion, Inversion)
    assert inversion.path.dtype == inversion.eps.dtype == kept
    assert denoise(inversion.path[-1].to(given), predict_noise, schedule, 3).dtype == kept
    assert seen == {kept}
    assert torch.equal(pair, before)
