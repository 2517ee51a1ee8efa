# SPDX-License-Identifier: Apache-2.0
"""From any Stable Diffusion scheduler to a correct deterministic DDIM, and from that to the numbers the loops use."""

from __future__ import annotations

import inspect

from diffusers import DDIMScheduler, SchedulerMixin

from .records import Schedule

PREDICTION_TYPES = ("epsilon", "v_prediction")
# What the pipeline's own DDIM takes over of the configuration of a checkpoint's scheduler.
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
    """A DDIM with the scheduler's noise schedule and no clipping; the scheduler given is left alone.

    Of another sampler's configuration only the noise schedule is taken: its spacing and offsets are its own affair,
    and for keys it lacks DDIM's defaults, clipping among them, are wrong for latents.

    Args:
        scheduler: any scheduler of a Stable Diffusion checkpoint.

    Raises:
        ValueError: it is not one of a Stable Diffusion checkpoint, or it predicts something unknown.
    """
    config = dict(scheduler.config)
    if "beta_schedule" not in config:
        raise ValueError(f"`scheduler` {type(scheduler).__name__} has no noise schedule of betas to run DDIM on")
    if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(
            f"`scheduler` predicts {config['prediction_type']!r}; only {' and '.join(PREDICTION_TYPES)} are supported"
        )
    if not isinstance(scheduler, DDIMScheduler):
        config.update(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    config.update(clip_sample=False, thresholding=False)
    known = inspect.signature(DDIMScheduler).parameters
    return DDIMScheduler.from_config({name: value for name, value in config.items() if name in known})


def ddim_schedule(scheduler: SchedulerMixin, num_inference_steps: int, inversion_steps: int) -> Schedule:
    """The steps of a deterministic DDIM, checked to be invertible as deep as asked.

    Args:
        scheduler: any scheduler of a Stable Diffusion checkpoint.
        num_inference_steps: N.
        inversion_steps: T ≤ N.

    Raises:
        ValueError: the trained timesteps cannot be cut into that many steps, or ᾱ vanishes on the way.
    """
    ddim = deterministic_ddim(scheduler)
    ddim.set_timesteps(num_inference_steps)
    timesteps = ddim.timesteps.tolist()[::-1]
    trained = len(ddim.alphas_cumprod)
    distinct = len(timesteps) == num_inference_steps and timesteps == sorted(set(timesteps))
    if not distinct or timesteps[0] < 0 or timesteps[-1] >= trained:
        raise ValueError(
            f"`num_inference_steps` {num_inference_steps} does not cut the scheduler's {trained} timesteps into "
            "distinct steps; use fewer"
        )
    alpha_bars = [float(ddim.final_alpha_cumprod), *ddim.alphas_cumprod[timesteps].tolist()]
    if min(alpha_bars[: inversion_steps + 1]) <= 0:
        raise ValueError(f"`inversion_steps` {inversion_steps} reaches a timestep without signal; use fewer")
    return Schedule(tuple(timesteps), tuple(alpha_bars))


def schedule_settings(scheduler: SchedulerMixin) -> dict[str, object]:
    """What of a scheduler decides the frames, by the names of `SCHEDULE_SETTINGS`."""
    config = deterministic_ddim(scheduler).config
    return {name: config[name] for name in SCHEDULE_SETTINGS}
