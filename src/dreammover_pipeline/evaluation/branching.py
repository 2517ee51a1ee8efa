# SPDX-License-Identifier: Apache-2.0
"""The baseline that started this line of work: interpolation in noise, from the middle frame outwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ddim import recompose
from ..fusion import slerp
from ..pipeline import DreamMoverPipeline
from ..sampling import denoise
from ..schedules import ddim_schedule

MOST_NOISE = 0.55  # share of the schedule that the middle frame is noised to
LEAST_NOISE = 0.3  # share of the schedule that the last generation of frames is noised to


def branching_slerp(
    pipe: DreamMoverPipeline,
    images: torch.Tensor,
    prompt: Sequence[str],
    times: Sequence[float],
    num_inference_steps: int,
    seed: int,
) -> torch.Tensor:
    """Clean latents of the frames between two images, without any flow.

    The middle frame is made first: the latents of the two images get the same noise, are interpolated spherically and
    are denoised, with text embeddings that are interpolated spherically, too. Then the frames on either side are made
    in the same way from the nearest frames that exist already, and so on. From generation to generation there is less
    noise, from `MOST_NOISE` of the schedule down to `LEAST_NOISE`.

    Source: Interpolating between Images with Diffusion Models (arXiv 2307.12560), without its textual inversion,
    pose guidance and choice among candidates.

    Args:
        pipe: the pipeline whose models are used, without a LoRA of the pair.
        images: (2, 3, H, W) in [0, 1], at the size that the models work at.
        prompt: what each of the two images shows.
        times: δ of the frames to make.
        num_inference_steps: number of steps of the whole schedule.
        seed: the seed of the noise.

    Returns:
        Clean latents (F, C, h, w), in the order of `times`.
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
    """The order in which frames are made, from the middle outwards.

    Returns:
        Generations of (a, t, b): the frame at time t is made from those at a and b, which an earlier generation made.
    """
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
    """One clean latent between two, which get the same noise, are interpolated as whole vectors and are denoised.

    Args:
        pipe: the pipeline whose UNet denoises.
        ends: the two clean latents, (2, C, h, w).
        way: position between them in [0, 1], 0 at the first.
        noise: the noise that both get, (C, h, w).
        prompt_embeds: text embeddings, (1, L, D).
        num_inference_steps: number of steps of the whole schedule.
        steps: number of steps of the schedule that are noised and denoised.

    Returns:
        The clean latent, (C, h, w).
    """
    schedule = ddim_schedule(pipe.scheduler, num_inference_steps, steps)
    noisy = recompose(ends, noise.expand_as(ends), schedule.alpha_bars[steps])
    mixed = slerp(*noisy.flatten(1), torch.tensor([way])).reshape(1, *noise.shape)
    prompt_embeds = prompt_embeds.to(pipe.unet.dtype)
    return denoise(mixed, lambda x, t: pipe.predict_noise(x, t, prompt_embeds), schedule, steps)[0]
