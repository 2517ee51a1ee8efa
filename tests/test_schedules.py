# SPDX-License-Identifier: Apache-2.0
"""Any Stable Diffusion scheduler becomes the same deterministic DDIM."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers

from dreammover_pipeline.model_checks import check_noise_levels
from dreammover_pipeline.sampling import denoise, invert
from dreammover_pipeline.schedules import ddim_schedule, deterministic_ddim, schedule_settings
from dreammover_pipeline.settings import RenderSettings

# raised inside diffusers, by some of its schedulers
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SAMPLERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name != "EDMEulerScheduler"]
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}  # SD 1.5's


def build(name, **config):
    try:
        return getattr(diffusers, name)(**{**BETAS, **config})
    except ImportError as error:  # a sampler of optional requirements
        pytest.skip(str(error).strip().splitlines()[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_becomes_stable_diffusions_ddim(name):
    scheduler = build(name, **(LEADING if name.startswith("DDIM") else {}))
    scheduler.set_timesteps(7)
    config, timesteps = dict(scheduler.config), scheduler.timesteps.clone()

    ddim = deterministic_ddim(scheduler)
    assert type(ddim) is DDIMScheduler
    assert not ddim.config.clip_sample
    assert not ddim.config.thresholding
    ddim.set_timesteps(50)
    assert ddim.timesteps.tolist() == list(range(981, 0, -20))

    schedule = ddim_schedule(scheduler, 50, 30)
    assert schedule.timesteps == tuple(range(1, 1000, 20))
    expected = [ALPHAS_CUMPROD[0], *ALPHAS_CUMPROD[1::20]]
    np.testing.assert_allclose(schedule.alpha_bars, expected, rtol=2e-5)

    assert dict(scheduler.config) == config
    assert torch.equal(scheduler.timesteps, timesteps)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**BETAS),  # says nothing of clipping, so DDIM's default would clip
        DDIMScheduler(**BETAS, **LEADING, clip_sample=True),
        DDIMScheduler(**BETAS, **LEADING, clip_sample=False, thresholding=True),
    ],
    ids=["pndm", "clipping", "thresholding"],
)
def test_nothing_is_clipped(scheduler):
    ddim = deterministic_ddim(scheduler)
    ddim.set_timesteps(50)
    clean = ddim.step(torch.zeros(1, 4, 2, 2), 1, torch.full((1, 4, 2, 2), 5.0)).pred_original_sample
    torch.testing.assert_close(clean, torch.full((1, 4, 2, 2), 5 / ALPHAS_CUMPROD[1] ** 0.5).float())


def test_a_ddims_own_schedule_is_kept():
    config = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "rescale_betas_zero_snr": True,
    }
    scheduler = DDIMScheduler(**BETAS, **config, prediction_type="v_prediction", clip_sample=True)
    ddim = deterministic_ddim(scheduler)
    assert ddim is not scheduler
    assert scheduler.config.clip_sample
    for name, value in {**config, **BETAS, "prediction_type": "v_prediction", "clip_sample": False}.items():
        assert ddim.config[name] == value
    schedule = ddim_schedule(scheduler, 10, 9)
    assert schedule.timesteps == tuple(range(99, 1000, 100))
    assert schedule.alpha_bars[0] == 1
    assert schedule.alpha_bars[-1] == 0


def test_the_noise_schedule_of_another_sampler_is_kept():
    betas = np.linspace(0.001, 0.01, 100)
    scheduler = EulerDiscreteScheduler(100, trained_betas=betas, prediction_type="v_prediction")
    assert deterministic_ddim(scheduler).config.prediction_type == "v_prediction"
    schedule = ddim_schedule(scheduler, 5, 3)
    assert schedule.timesteps == (1, 21, 41, 61, 81)
    np.testing.assert_allclose(schedule.alpha_bars[1:], np.cumprod(1 - betas)[1::20], rtol=2e-5)


@pytest.mark.parametrize(("n", "steps"), [(1, 1), (50, 30), (50, 50), (333, 333), (999, 999)])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_ascend_and_lead_there_and_back(spacing, n, steps):
    scheduler = DDIMScheduler(**BETAS, **LEADING, timestep_spacing=spacing)
    schedule = ddim_schedule(scheduler, n, steps)
    assert len(schedule.timesteps) == n
    assert 0 <= schedule.timesteps[0] <= schedule.timesteps[-1] < 1000
    assert all(type(timestep) is int for timestep in schedule.timesteps)
    assert all(type(alpha_bar) is float for alpha_bar in schedule.alpha_bars)
    np.testing.assert_allclose(schedule.alpha_bars[1:], ALPHAS_CUMPROD[list(schedule.timesteps)], rtol=2e-5)

    clean, eps = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inversion = invert(clean, lambda latents, timestep: eps, schedule, steps)
    returned = denoise(inversion.path[-1], lambda latents, timestep: eps, schedule, steps)
    torch.testing.assert_close(returned, clean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [61, 103])  # for which diffusers rounds to one step too many, at timestep −1
def test_a_step_too_many_is_dropped(n):
    schedule = ddim_schedule(DDIMScheduler(**BETAS, **LEADING, timestep_spacing="trailing"), n, n)
    assert len(schedule.timesteps) == n
    assert schedule.timesteps[-1] == 999
    apart = np.diff(schedule.timesteps)
    assert apart.max() - apart.min() <= 1


@pytest.mark.parametrize(
    ("spacing", "n"),
    [
        ("leading", 1000),  # its last step would be the 1001st timestep
        ("leading", 1001),
        ("trailing", 1001),
    ],
)
def test_steps_that_do_not_fit_are_refused(spacing, n):
    with pytest.raises(ValueError, match="num_inference_steps"):
        ddim_schedule(DDIMScheduler(**BETAS, **LEADING, timestep_spacing=spacing), n, 1)


def test_a_step_before_the_first_trained_timestep_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps"):
        ddim_schedule(DDIMScheduler(**BETAS, steps_offset=-1), 10, 1)


def test_a_scheduler_that_names_no_prediction_type_predicts_noise():
    scheduler = RePaintScheduler(**BETAS)
    assert "prediction_type" not in scheduler.config
    assert deterministic_ddim(scheduler).config.prediction_type == "epsilon"


def test_the_settings_that_decide_the_frames_are_those_of_the_ddim_that_a_sampler_becomes():
    ddim = schedule_settings(DDIMScheduler(**BETAS, **LEADING))
    assert {name: ddim[name] for name in (*BETAS, *LEADING)} == {**BETAS, **LEADING}
    assert schedule_settings(EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=0)) == ddim
    assert schedule_settings(EulerDiscreteScheduler(**{**BETAS, "beta_end": 0.02})) != ddim


def test_torchs_default_device_does_not_matter():
    expected = ddim_schedule(DDIMScheduler(**BETAS, **LEADING), 10, 5)
    with torch.device("meta"):
        assert ddim_schedule(DDIMScheduler(**BETAS, **LEADING), 10, 5) == expected


def test_a_timestep_without_signal_is_refused_and_the_one_before_is_not():
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    schedule = ddim_schedule(scheduler, 50, 49)
    assert schedule.alpha_bars[50] == 0 < schedule.alpha_bars[49]
    with pytest.raises(ValueError, match="`inversion_steps` 50"):
        ddim_schedule(scheduler, 50, 50)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            DDIMScheduler(**BETAS, prediction_type="sample"),
            "`scheduler` has prediction type 'sample'; only epsilon and v_",
        ),
        (PNDMScheduler(**BETAS, prediction_type="sample"), "`scheduler` has prediction type 'sample'"),
        (FlowMatchEulerDiscreteScheduler(), "`scheduler` FlowMatchEulerDiscreteScheduler has no noise schedule"),
        (diffusers.EDMEulerScheduler(), "`scheduler` EDMEulerScheduler has no noise schedule"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "`scheduler` has prediction type 'flow_prediction'",
        ),
    ],
    ids=["sample", "pndm-sample", "flow-matching", "edm", "flow-sigmas"],
)
def test_what_is_no_noise_predicting_diffusion_is_refused(scheduler, message):
    for function in (deterministic_ddim, lambda scheduler: ddim_schedule(scheduler, 50, 30)):
        with pytest.raises(ValueError, match=message):
            function(scheduler)


def test_noise_levels_that_leave_nothing_of_the_photos_are_refused():
    scheduler = DDIMScheduler(
        **BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    schedule = ddim_schedule(scheduler, 10, 6)
    assert schedule.has_signal(9)
    assert not schedule.has_signal(10)
    check_noise_levels(RenderSettings(method="noise", noise_levels=(0.25, 0.9)), schedule)
    check_noise_levels(RenderSettings(noise_levels=(0.25, 1.0)), schedule)
    with pytest.raises(ValueError, match=r"`noise_levels` \(0.25, 1.0\) reach a timestep without signal"):
        check_noise_levels(RenderSettings(method="noise", noise_levels=(0.25, 1.0)), schedule)
