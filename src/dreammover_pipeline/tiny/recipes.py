# SPDX-License-Identifier: Apache-2.0
"""What is trained on what, for how long: three recipes, and the training images of all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .models import Sizes
from .world import World

SCENES = 64  # drawn at once
TIMES = 4  # frames taken of each


@dataclass(frozen=True)
class Plan:
    """How one network is trained."""

    steps: int
    batch: int  # images a step
    muon_rate: float  # peak learning rates
    adamw_rate: float
    decay: float  # share of the steps on which the rates fall to zero
    average: float  # of the weights, per step
    evaluate: int  # steps between evaluations


@dataclass(frozen=True)
class Recipe:
    """One whole training."""

    world: World
    sizes: Sizes
    vae: Plan
    unet: Plan
    images: int  # encoded once for the UNet, in shards; a multiple of `shard`
    shard: int
    crop: int  # pixels a side of what the VAE sees, but for its last fifth
    pool: int  # images the VAE's crops come from
    pool_steps: int  # steps after which they are replaced
    held_out: int  # scenes that everything is measured on
    sheet: int  # samples on a sheet
    save_seconds: float  # at most between two writings of the state
    seed: int = field(default=0, kw_only=True)


PRESETS = {
    # Seconds, for tests: nothing worth looking at comes of it.
    "quick": Recipe(
        world=World(size=64),
        sizes=Sizes(vae_channels=(8, 8, 16), unet_channels=(8, 16, 16, 16), heads=(1, 1, 2, 2), text_width=16),
        vae=Plan(12, 4, 3e-3, 2.5e-3, 0.6, 0.7, 6),
        unet=Plan(12, 8, 4e-3, 2e-3, 0.65, 0.7, 6),
        images=512,
        shard=256,
        crop=32,
        pool=256,
        pool_steps=8,
        held_out=4,
        sheet=1,
        save_seconds=0,
    ),
    # Two hours on two cores.
    "cpu": Recipe(
        world=World(),
        sizes=Sizes(heads=(1, 4, 4, 4)),  # one head on the latent grid takes a fifth off a step against two
        vae=Plan(9_000, 16, 3e-3, 2.5e-3, 0.6, 0.996, 1_000),
        unet=Plan(5_000, 32, 4e-3, 2e-3, 0.65, 0.998, 500),
        images=24_576,
        shard=1_024,
        crop=48,
        pool=2_048,
        pool_steps=2_000,
        held_out=64,
        sheet=16,
        save_seconds=120,
    ),
    # Half an hour on an H200, the start of the machine included.
    "gpu": Recipe(
        world=World(second_sprite=0.15),
        sizes=Sizes(vae_channels=(32, 64, 96), unet_channels=(64, 96, 128, 128), heads=(4, 4, 4, 4)),
        vae=Plan(9_000, 64, 3e-3, 2.5e-3, 0.6, 0.998, 1_000),
        unet=Plan(16_000, 256, 4e-3, 2e-3, 0.65, 0.999, 1_600),
        images=131_072,
        shard=4_096,
        crop=64,
        pool=8_192,
        pool_steps=1_500,
        held_out=128,
        sheet=24,
        save_seconds=60,
    ),
}


def seed_of(*parts: str | int) -> int:
    """A seed of its own for everything random, in [0, 2⁵³).

    Each step of the training draws from a generator seeded by the stage and the step's number. The number in a saved
    state is therefore the state of all random generators, on whatever device it is taken up again.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 11


def draw_images(world: World, count: int, seed: int, device: torch.device) -> tuple[Tensor, list[str]]:
    """Training images: frames at four times of every scene, a quarter of the scenes under changing light.

    Args:
        world: to draw from.
        count: how many, a multiple of 256.
        seed: decides them all.
        device: where they are drawn.

    Returns:
        (count, 3, H, W) uint8 and a caption each.
    """
    images, captions = [], []
    for part in range(count // (SCENES * TIMES)):
        scenes = world.sample(SCENES, seed_of(seed, part), "relit" if part % 4 == 3 else "same", device)
        offset = torch.rand((), generator=torch.Generator().manual_seed(seed_of(seed, part, "times"))).item()
        for i in range(TIMES):
            images.append(scenes.frame((i + offset) / TIMES).mul(255).round().to(torch.uint8))
            captions += [first for first, _ in scenes.captions]
    return torch.cat(images), captions


def from_bytes(images: Tensor) -> Tensor:
    """(…) uint8 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
