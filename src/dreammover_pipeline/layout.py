# SPDX-License-Identifier: Apache-2.0
"""The frames' layout held to the fused one while noise is high.

Deep inversion redraws what breaks where things were warped, and at high noise it also redraws what was right. What
both photos show at a place is known there: for as long as the noise is high, the coarse part of the clean latents that
the UNet predicts is exchanged for that of the fused layout, and only what is finer is left to the UNet.

Source of all of it: ours; DreamMover lets the layout go after fusing it.
"""

from __future__ import annotations

import torch

from .ddim import predict_clean
from .fields import blurred
from .records import FusedFrames, Schedule
from .rigid import grid_unit
from .sampling import PredictNoise

HELD_SHARE = 0.1  # share of the schedule's steps, at the clean end, in which the layout is no longer held
COARSE_SIGMA = 0.8  # sigma, in cells of the unit grid, of the Gaussian whose mean is the coarse part of latents


def holding_layout(
    predict_noise: PredictNoise, fused: FusedFrames, schedule: Schedule, strength: float
) -> PredictNoise:
    """A prediction of noise that keeps the frames' layout at all steps but the last of the schedule.

    Args:
        predict_noise: Function from latents (F, C, h, w) and a timestep to their noise ε.
        fused: The frames, with the layout to hold; without levels nothing is held.
        schedule: The DDIM schedule whose timesteps are asked for.
        strength: Share of the coarse part that is exchanged, in [0, 1].

    Returns:
        A function like `predict_noise`.
    """
    if not strength or fused.clean is None:
        return predict_noise
    alpha_bars = dict(zip(schedule.timesteps, schedule.alpha_bars[1:], strict=True))
    last_held = HELD_SHARE * len(schedule.timesteps)
    held = {timestep for step, timestep in enumerate(schedule.timesteps, 1) if step > last_held}
    seen = (fused.coverage == 2).to(fused.clean.dtype)
    weight = strength * seen * coarse_part(seen)  # fades out towards places that one photo alone reaches

    def predict(latents: torch.Tensor, timestep: int) -> torch.Tensor:
        eps = predict_noise(latents, timestep)
        if timestep not in held:
            return eps
        return hold_layout(eps, latents, alpha_bars[timestep], fused.clean, weight)

    return predict


def hold_layout(
    eps: torch.Tensor, latents: torch.Tensor, alpha_bar: float, layout: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The noise by which the coarse part of the predicted clean latents is that of a layout.

    Args:
        eps: The predicted noise, (F, C, h, w).
        latents: The noisy latents that it was predicted in, (F, C, h, w).
        alpha_bar: ᾱ at the step of the noisy latents.
        layout: The clean latents whose coarse part is wanted, (F, C, h, w).
        weight: How much of the coarse part is exchanged in each cell, (F, 1, h, w) in [0, 1].

    Returns:
        ε, (F, C, h, w), that gives the changed clean latents with the same noisy ones.
    """
    change = weight * coarse_part(layout - predict_clean(latents, eps, alpha_bar))
    return eps - (alpha_bar / (1 - alpha_bar)) ** 0.5 * change


def coarse_part(x: torch.Tensor) -> torch.Tensor:
    """The Gaussian mean around every cell of (F, C, h, w), the edge's values continued beyond the edge."""
    # On a grid of few cells a cell is coarse already.
    return blurred(x, COARSE_SIGMA * max(1, grid_unit(*x.shape[-2:])))
