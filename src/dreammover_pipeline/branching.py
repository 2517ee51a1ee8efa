# SPDX-License-Identifier: Apache-2.0
"""Interpolation in noise: frames between any two pictures, from the middle outwards, without any correspondence.

Two frames that exist already get the same noise, are interpolated as whole vectors, and are denoised. The first two
are the photos; every generation of frames is made between those of the generations before it, with less noise.

Source: Interpolating between Images with Diffusion Models (arXiv 2307.12560), §3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from .affine import Affine
from .ddim import recompose, working_dtype
from .fusion import slerp
from .noise_training import gaussian
from .records import Schedule
from .sampling import AfterStep, PredictNoise, denoise

# A function from frames of one generation and the number of steps that they take to a context for their denoising.
AtWork = Callable[[list[int], int], AbstractContextManager[tuple[PredictNoise, AfterStep]]]


@dataclass(frozen=True)
class Branch:
    """A frame at the time `time`, which is made from its parents, the frames or photos at the times `parents`."""

    time: float
    parents: tuple[float, float]

    @property
    def way(self) -> float:
        """Where the frame lies between its parents, 0 at the first and 1 at the last."""
        first, last = self.parents
        return (self.time - first) / (last - first)


def generations(times: Sequence[float]) -> list[list[Branch]]:
    """The order in which frames are made: those of one generation lie between those of the generations before it.

    Args:
        times: The time δ of each frame, in (0, 1).

    Returns:
        The branches of each generation. The first is the frame nearest to the middle, between the photos at 0 and 1.
    """
    found, gaps = [], [(0.0, tuple(sorted(set(times))), 1.0)]
    while gaps := [gap for gap in gaps if gap[1]]:
        generation, halves = [], []
        for first, inside, last in gaps:
            i = min(range(len(inside)), key=lambda i: abs(inside[i] - (first + last) / 2))
            generation.append(Branch(inside[i], (first, last)))
            halves += [(first, inside[:i], inside[i]), (inside[i], inside[i + 1 :], last)]
        found.append(generation)
        gaps = halves
    return found


def steps_of_generations(count: int, levels: tuple[float, float], steps: int) -> list[int]:
    """How many steps of the schedule the frames of each generation are noised and denoised.

    Args:
        count: The number of generations.
        levels: The shares of the schedule for the last generation and for the first; the others lie evenly between.
        steps: The number N of steps in the schedule.
    """
    least, most = levels
    shares = [most + (least - most) * k / max(count - 1, 1) for k in range(count)]
    return [min(max(round(share * steps), 1), steps) for share in shares]


def noises(like: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Noise for one pair of parents after the other, of the shape of a latent (C, h, w)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        yield gaussian(like.shape, generator).to(like.device, working_dtype(like))


def mixed_in_noise(parents: torch.Tensor, noise: torch.Tensor, alpha_bar: float, way: float) -> torch.Tensor:
    """What a frame is denoised from: both parents with the same noise, interpolated spherically as whole vectors.

    Args:
        parents: Clean latents of the two parents, (2, C, h, w).
        noise: The noise that both parents get, (C, h, w).
        alpha_bar: ᾱ of the step that the parents are noised to.
        way: Where the frame lies between its parents, 0 at the first and 1 at the last.

    Returns:
        The noisy latent (C, h, w).
    """
    noisy = recompose(parents, noise.expand_as(parents), alpha_bar)
    where = torch.tensor([way], dtype=torch.float64, device="cpu")
    return slerp(*noisy.flatten(1), where).reshape(noise.shape)


def interpolate_in_noise(
    clean: torch.Tensor,
    times: Sequence[float],
    at_work: AtWork,
    schedule: Schedule,
    levels: tuple[float, float],
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
    candidates: int = 1,
    choose: Callable[[float, torch.Tensor], int] = lambda time, candidates: 0,
    affine: Affine | None = None,
) -> torch.Tensor:
    """Clean latents of the frames between two pictures.

    Args:
        clean: The clean latents of the two pictures, (2, C, h, w).
        times: The time δ of each frame, (F,), in (0, 1).
        at_work: Function from the indices of a generation's frames among `times`, and the number of steps that they
            take, to a context in which they are denoised. It gives what predicts their noise, and what is called after
            each step, with i from 0 over all generations.
        schedule: The DDIM schedule whose steps are taken.
        levels: The shares of the schedule that the last generation and the first one are noised by.
        seed: What decides the noise.
        interrupted: Function called before each step; if it returns True, frames that are not made yet are mixed of
            their parents.
        candidates: How often every frame is made, with other noise. The first is what it is without any others.
        choose: Function from a time and the clean latents of its candidates, (n, C, h, w), to the index of the one
            that is kept.
        affine: Motion that is added to all frames; None for none.

    Returns:
        (F, C, h, w), in the order of `times`.
    """
    clean = clean.to(working_dtype(clean))
    made, done = {0.0: clean[0], 1.0: clean[1]}, 0
    fresh = [noises(clean[0], seed + candidate) for candidate in range(candidates)]
    branches = generations(times)
    counts = steps_of_generations(len(branches), levels, len(schedule.timesteps))
    for generation, steps in zip(branches, counts, strict=True):
        parents = [
            torch.stack([_moved(made[time], affine, time, branch.time) for time in branch.parents])
            for branch in generation
        ]
        if interrupted():
            made |= {b.time: torch.lerp(*ends, b.way) for b, ends in zip(generation, parents, strict=True)}
            continue
        mixed = [
            mixed_in_noise(ends, next(fresh[candidate]), schedule.alpha_bars[steps], branch.way)
            for branch, ends in zip(generation, parents, strict=True)
            for candidate in range(candidates)
        ]
        frames = [times.index(branch.time) for branch in generation for _ in range(candidates)]
        with at_work(frames, steps) as (predict_noise, on_step):
            latents = denoise(
                torch.stack(mixed),
                predict_noise,
                schedule,
                steps,
                lambda i, timestep, x, before=done, on_step=on_step: on_step(before + i, timestep, x),
                interrupted,
            )
        for branch, some in zip(generation, latents.split(candidates), strict=True):
            made[branch.time] = some[choose(branch.time, some)]
        done += steps
    return torch.stack([made[time] for time in times])


def _moved(latents: torch.Tensor, affine: Affine | None, start: float, end: float) -> torch.Tensor:
    return latents if affine is None else affine.moved(latents, start, end)
