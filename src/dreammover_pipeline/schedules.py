# SPDX-License-Identifier: Apache-2.0
"""Deterministic DDIM from any Stable Diffusion scheduler, and the timesteps and ᾱ that the sampling loops use."""

from __future__ import annotations

import inspect

import torch
from diffusers import DDIMScheduler, SchedulerMixin

from .records import Schedule

PREDICTION_TYPES = ("epsilon", "v_prediction")
# The settings of a deterministic DDIM that decide the frames, by their names in a diffusers configuration.
SCHEDULE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
)


def deterministic_ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of `scheduler` and without clipping; `scheduler` is not changed.

    From a scheduler that is no DDIM, only the noise schedule and the prediction type are taken. Its timestep spacing
    and offsets belong to its own sampler; Stable Diffusion's DDIM values replace them. DDIM's own defaults, such as
    clipping, would be wrong for latents.

    Args:
        scheduler: Any scheduler of a Stable Diffusion checkpoint.

    Raises:
        ValueError: The scheduler has no noise schedule of betas, or its prediction type is not supported.
    """
    config = dict(scheduler.config)
    if "beta_schedule" not in config:
        raise ValueError(f"`scheduler` {type(scheduler).__name__} has no noise schedule of betas to run DDIM on")
    if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(
            f"`scheduler` has prediction type {config['prediction_type']!r}; "
            f"only {' and '.join(PREDICTION_TYPES)} are supported"
        )
    if not isinstance(scheduler, DDIMScheduler):
        config.update(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    config.update(clip_sample=False, thresholding=False)
    known = inspect.signature(DDIMScheduler).parameters
    with torch.device("cpu"):  # whatever torch's default device is
        return DDIMScheduler.from_config({name: value for name, value in config.items() if name in known})


def ddim_schedule(scheduler: SchedulerMixin, num_inference_steps: int, inversion_steps: int) -> Schedule:
    """The steps of a deterministic DDIM, checked to be invertible down to step `inversion_steps`.

    Args:
        scheduler: Any scheduler of a Stable Diffusion checkpoint.
        num_inference_steps: Number N of steps in the schedule.
        inversion_steps: Depth T ≤ N of the inversion.

    Raises:
        ValueError: The trained timesteps cannot be cut into N distinct steps, or ᾱ is 0 at one of the first T steps.
    """
    ddim = deterministic_ddim(scheduler)
    with torch.device("cpu"):
        ddim.set_timesteps(num_inference_steps)
    # With trailing spacing diffusers adds a timestep of −1 to schedules of some lengths, by a rounding of its own.
    timesteps = ddim.timesteps.tolist()[:num_inference_steps][::-1]
    trained = len(ddim.alphas_cumprod)
    distinct = len(timesteps) == num_inference_steps and timesteps == sorted(set(timesteps))
    if not distinct or timesteps[0] < 0 or timesteps[-1] >= trained:
        raise ValueError(
            f"`num_inference_steps` {num_inference_steps} does not cut the scheduler's {trained} timesteps into "
            "distinct steps; use fewer"
        )
    alpha_bars = [float(ddim.final_alpha_cumprod), *ddim.alphas_cumprod[timesteps].tolist()]
    schedule = Schedule(tuple(timesteps), tuple(alpha_bars))
    if not schedule.has_signal(inversion_steps):
        raise ValueError(f"`inversion_steps` {inversion_steps} reaches a timestep without signal; use fewer")
    return schedule


def schedule_settings(scheduler: SchedulerMixin) -> dict[str, object]:
    """The settings of a scheduler that decide the frames, by their names in `SCHEDULE_SETTINGS`."""
    config = deterministic_ddim(scheduler).config
    return {name: config[name] for name in SCHEDULE_SETTINGS}
