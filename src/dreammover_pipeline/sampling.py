# SPDX-License-Identifier: Apache-2.0
"""Two loops over a plain callable: into the noise, and back out of it.

`predict_noise(latents, timestep) -> eps` may be a UNet, a UNet with reference attention, or a lambda in a test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ddim import predict_clean, recompose, working_dtype
from .records import Inversion, Schedule

PredictNoise = Callable[[torch.Tensor, int], torch.Tensor]


def invert(
    clean: torch.Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> Inversion:
    """Deterministic DDIM inversion of a pair, from the clean latents to step `steps`, keeping the whole path.

    From step k−1 to k the noise is predicted at (z_{k−1}, τ_k).

    Source: DreamMover Eq. (2), §3.1. Official code differs: it inverts three times, to 14, 30 and 30 steps; here the
    shallower states are a prefix of the one path.

    Args:
        clean: z_0 of the two images, (2, C, h, w).
        predict_noise: ε at (latents (2, C, h, w), timestep); called `steps` + 1 times, the last for ε at step T.
        schedule: the schedule to climb.
        steps: T, 1 … len(schedule.timesteps).
        on_step: called after each prediction.

    Returns:
        The path and the noise at its end.
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
    # Models leave a memory format behind on which rounding depends, and a saved pair has none.
    return Inversion(torch.stack(path).contiguous(), eps.contiguous(), schedule)


def denoise(
    latents: torch.Tensor,
    predict_noise: PredictNoise,
    schedule: Schedule,
    steps: int,
    on_step: Callable[[int, int, torch.Tensor], torch.Tensor] = lambda i, timestep, latents: latents,
    interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Deterministic DDIM from step `steps` down to the clean end.

    Source: DreamMover Eq. (2), §3.1 and §3.4.

    Args:
        latents: z_T, (F, C, h, w).
        predict_noise: ε at (latents (F, C, h, w), timestep); called `steps` times.
        schedule: the schedule to descend.
        steps: T, 1 … len(schedule.timesteps).
        on_step: called after each step with (i from 0, timestep, latents); what it returns goes on.
        interrupted: asked before each step; True leaves the latents as they are.

    Returns:
        z_0, (F, C, h, w).
    """
    latents = latents.to(working_dtype(latents))
    for i, k in enumerate(range(steps, 0, -1)):
        if interrupted():
            break
        eps = predict_noise(latents, schedule.timestep(k))
        predicted = predict_clean(latents, eps, schedule.alpha_bars[k])
        latents = on_step(i, schedule.timestep(k), recompose(predicted, eps, schedule.alpha_bars[k - 1]))
    return latents
