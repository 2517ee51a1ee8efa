# SPDX-License-Identifier: Apache-2.0
"""Three recipes of a training (what is trained on what, for how long) and the drawing of training images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .models import Sizes
from .scenes import Scenes
from .world import World

SCENES = 64  # scenes that are drawn at once
TIMES = 4  # training images that are taken from each scene


@dataclass(frozen=True)
class Plan:
    """How one network is trained."""

    steps: int  # training steps in all
    batch: int  # images in a step
    muon_rate: float  # peak learning rate of Muon
    adamw_rate: float  # peak learning rate of AdamW
    decay: float  # share of the steps over which both learning rates fall to zero
    average: float  # share of the weights' moving average that each step keeps
    evaluate: int  # steps between two evaluations


@dataclass(frozen=True)
class Recipe:
    """Everything that decides one whole training."""

    world: World  # what the training images show
    sizes: Sizes  # how large the models are
    vae: Plan  # how the autoencoder is trained
    unet: Plan  # how the UNet and its text encoder are trained
    images: int  # training images of the UNet, each encoded once; a multiple of `shard`
    shard: int  # images in one file of latents, a multiple of 256
    crop: int  # side in pixels of the crops that the VAE is trained on, except in the last fifth of its steps
    pool: int  # images that crops are taken from, a multiple of 256
    pool_steps: int  # training steps after which the images of the pool are replaced
    held_out: int  # scenes that every evaluation measures on
    sheet: int  # pictures on a sheet of samples
    save_seconds: float  # longest time between two writings of the training's state
    mirrored: bool = field(default=False, kw_only=True)  # whether the UNet sees every training image mirrored, too
    seed: int = field(default=0, kw_only=True)  # decides weights, images and noise


PRESETS = {
    # Takes seconds, for tests; its models are too small to be of any use.
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
    # Takes two hours on two cores.
    "cpu": Recipe(
        world=World(),
        sizes=Sizes(heads=(1, 4, 4, 4)),  # one head on the latent grid makes a step a fifth shorter than two heads
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
    # Nearly what the shipped checkpoint was trained by, with 5620 and 2660 steps, in seven minutes on an H200 where
    # steps were captured as CUDA graphs; this program does not capture them.
    "gpu": Recipe(
        world=World(second_sprite=0.1),
        sizes=Sizes(vae_channels=(32, 64, 96), unet_channels=(32, 64, 144, 144), heads=(1, 4, 4, 4), text_width=64),
        vae=Plan(5_600, 64, 3e-3, 2.5e-3, 0.5, 0.997, 800),
        unet=Plan(2_700, 256, 4e-3, 2e-3, 0.6, 0.9985, 450),
        images=49_152,
        shard=4_096,
        crop=64,
        pool=8_192,
        pool_steps=1_400,
        held_out=128,
        sheet=24,
        save_seconds=60,
        mirrored=True,
    ),
}


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2⁵³) for one random purpose, which `parts` name.

    Each training step draws from a generator that is seeded by the stage and the step's number. The step number in a
    saved state is therefore the state of all random generators, on whatever device the training goes on.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 11


def draw_images(world: World, count: int, seed: int, device: torch.device) -> tuple[Tensor, list[str]]:
    """Draw training images: four times of every scene, and changing light in a quarter of the scenes.

    Args:
        world: the world that scenes are drawn from.
        count: number of images, a multiple of 256.
        seed: what decides all images.
        device: the device that the images are drawn on.

    Returns:
        Images (count, 3, H, W) uint8, and a caption for each.
    """
    images, captions = [], []
    for scenes, time in drawn_moments(world, count, seed, device):
        images.append(to_bytes(scenes.frame(time)))
        captions += [first for first, _ in scenes.captions]
    return torch.cat(images), captions


def drawn_moments(world: World, count: int, seed: int, device: torch.device) -> Iterator[tuple[Scenes, float]]:
    """The scenes that training images show, each with a time: as many moments as make `count` images of `draw_images`.

    Args:
        world: the world that scenes are drawn from.
        count: number of images, a multiple of 256.
        seed: what decides all scenes and times.
        device: the device that the scenes live on.
    """
    for part in range(count // (SCENES * TIMES)):
        scenes = world.sample(SCENES, seed_of(seed, part), "relit" if part % 4 == 3 else "same", device)
        offset = torch.rand((), generator=torch.Generator().manual_seed(seed_of(seed, part, "times"))).item()
        for i in range(TIMES):
            yield scenes, (i + offset) / TIMES


def to_bytes(images: Tensor) -> Tensor:
    """Images of any shape in [0, 1] as uint8."""
    return images.mul(255).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Images of any shape, uint8, as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
