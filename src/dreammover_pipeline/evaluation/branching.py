# SPDX-License-Identifier: Apache-2.0
"""The baseline that started this line of work: interpolation in noise, frame by frame from the middle outwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ddim import recompose
from ..fusion import slerp
from ..pipeline import DreamMoverPipeline
from ..sampling import denoise
from ..schedules import ddim_schedule

# Shares of the schedule that frames are noised to: the first frame, the last ones.
MOST_NOISE, LEAST_NOISE = 0.55, 0.3


def branching_slerp(
    pipe: DreamMoverPipeline,
    images: torch.Tensor,
    prompt: Sequence[str],
    times: Sequence[float],
    num_inference_steps: int,
    seed: int,
) -> torch.Tensor:
    """Clean latents of the frames between two images, without any flow.

    The middle frame is made first: the two latents get the same noise, are interpolated spherically and denoised,
    on embeddings interpolated likewise. The frames on either side are made in the same way of their neighbours that
    are there already, with less noise from generation to generation, from `MOST_NOISE` of the schedule to
    `LEAST_NOISE`.

    Source: Interpolating between Images with Diffusion Models (arXiv 2307.12560), without its textual inversion,
    pose guidance and choice among candidates.

    Args:
        pipe: whose models are used, without a LoRA of the pair.
        images: (2, 3, H, W) in [0, 1], at the size the models work at.
        prompt: what the two show.
        times: δ of the frames.
        num_inference_steps: of the whole schedule.
        seed: of the noise.

    Returns:
        (F, C, h, w), in the order of `times`.
    """
    device = pipe._execution_device
    first, last = pipe.encode_images(images)
    texts, _ = pipe.encode_prompt(list(prompt), device)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    made = {0.0: first, 1.0: last}
    branches = generations(times)
    for share, branch in zip(torch.linspace(MOST_NOISE, LEAST_NOISE, len(branches)).tolist(), branches, strict=True):
        steps = max(1, round(share * num_inference_steps))
        made |= {
            t: between(
                pipe,
                torch.stack([made[a], made[b]]),
                (t - a) / (b - a),
                noise,
                slerp(*texts, torch.tensor([t])),
                num_inference_steps,
                steps,
            )
            for a, t, b in branch
        }
    return torch.stack([made[t] for t in times])


def generations(times: Sequence[float]) -> list[list[tuple[float, float, float]]]:
    """The order of branching: in each generation (neighbour, time, neighbour), whose neighbours were made before."""
    found, gaps = [], [(0.0, tuple(sorted(set(times))), 1.0)]
    while gaps := [gap for gap in gaps if gap[1]]:
        generation, halves = [], []
        for a, inside, b in gaps:
            i = min(range(len(inside)), key=lambda i: abs(inside[i] - (a + b) / 2))
            generation.append((a, inside[i], b))
            halves += [(a, inside[:i], inside[i]), (inside[i], inside[i + 1 :], b)]
        found.append(generation)
        gaps = halves
    return found


def between(
    pipe: DreamMoverPipeline,
    ends: torch.Tensor,
    way: float,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    num_inference_steps: int,
    steps: int,
) -> torch.Tensor:
    """One clean latent between two: noised alike, interpolated as whole vectors, denoised.

    Args:
        pipe: whose UNet denoises.
        ends: clean latents, (2, C, h, w).
        way: in [0, 1], 0 at the first.
        noise: (C, h, w).
        prompt_embeds: (1, L, D).
        num_inference_steps: of the whole schedule.
        steps: how many of them the noise is worth.

    Returns:
        (C, h, w).
    """
    schedule = ddim_schedule(pipe.scheduler, num_inference_steps, steps)
    noisy = recompose(ends, noise.expand_as(ends), schedule.alpha_bars[steps])
    mixed = slerp(*noisy.flatten(1), torch.tensor([way])).reshape(1, *noise.shape)
    prompt_embeds = prompt_embeds.to(pipe.unet.dtype)
    return denoise(mixed, lambda x, t: pipe.predict_noise(x, t, prompt_embeds), schedule, steps)[0]
