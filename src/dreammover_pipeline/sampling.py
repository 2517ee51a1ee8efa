# SPDX-License-Identifier: Apache-2.0
"""The two loops of deterministic DDIM: inversion into the noise, and denoising back out of it.

Both call `predict_noise(latents, timestep) -> eps`, which may be a UNet, a UNet with reference attention, or a lambda
in a test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ddim import predict_clean, recompose, working_dtype
from .records import Inversion, Schedule

PredictNoise = Callable[[torch.Tensor, int], torch.Tensor]
# A function called after each step with (i from 0, timestep, latents), which returns the latents to go on with.
AfterStep = Callable[[int, int, torch.Tensor], torch.Tensor]


def invert(
    clean: torch.Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> Inversion:
    """Deterministic DDIM inversion of a pair, from the clean latents to step `steps`, keeping the whole path.

    For the way from step k−1 to step k the noise is predicted at (z_{k−1}, τ_k).

    Source: DreamMover Eq. (2), §3.1. Official code differs: it inverts three times, to 14, 30 and 30 steps; here the
    shallower states are a prefix of the one path.

    Args:
        clean: The clean latents z_0 of the two images, (2, C, h, w).
        predict_noise: Function from latents (2, C, h, w) and a timestep to their noise ε. It is called `steps` + 1
            times, the last time for ε at step T.
        schedule: The DDIM schedule whose steps are inverted.
        steps: The depth T of the inversion, 1 … len(schedule.timesteps).
        on_step: Function called after each prediction of noise.

    Returns:
        The latents at every step from 0 to T, and the noise predicted at step T.
    """
    latents = clean.to(working_dtype(clean))
    path = [latents]
    for k in range(1, steps + 1):
        eps = predict_noise(latents, schedule.timestep(k))
        predicted = predict_clean(latents, eps, schedule.alpha_bars[k - 1])
        latents = recompose(predicted, eps, schedule.alpha_bars[k])
        path.append(latents)
        on_step()
    eps = predict_noise(latents, schedule.timestep(steps)).to(latents.dtype)
    on_step()
    # A model's output may have a memory format of its own, on which later rounding depends; a pair loaded from a file
    # is contiguous.
    return Inversion(torch.stack(path).contiguous(), eps.contiguous(), schedule)


def denoise(
    latents: torch.Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    steps: int,
    on_step: AfterStep = lambda i, timestep, latents: latents,
    interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Deterministic DDIM from step `steps` down to the clean end.

    Source: DreamMover Eq. (2), §3.1 and §3.4.

    Args:
        latents: The noisy latents z_T of the frames, (F, C, h, w).
        predict_noise: Function from latents (F, C, h, w) and a timestep to their noise ε; called `steps` times.
        schedule: The DDIM schedule whose steps are taken.
        steps: The step T at which denoising starts, 1 … len(schedule.timesteps).
        on_step: Function called after each step with (i from 0, timestep, latents); the latents that it returns
            replace those it was given.
        interrupted: Function called before each step; if it returns True, denoising ends with the latents as they are.

    Returns:
        The clean latents z_0 of the frames, (F, C, h, w), or the latents at the step where denoising was interrupted.
    """
    latents = latents.to(working_dtype(latents))
    for i, k in enumerate(range(steps, 0, -1)):
        if interrupted():
            break
        eps = predict_noise(latents, schedule.timestep(k))
        predicted = predict_clean(latents, eps, schedule.alpha_bars[k])
        latents = on_step(i, schedule.timestep(k), recompose(predicted, eps, schedule.alpha_bars[k - 1]))
    return latents
