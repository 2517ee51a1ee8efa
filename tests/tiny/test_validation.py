# SPDX-License-Identifier: Apache-2.0
"""What is measured during training."""

import math
from dataclasses import replace

import pytest
import torch

from dreammover_pipeline.ddim import recompose
from dreammover_pipeline.flow import cell_grid
from dreammover_pipeline.tiny import models, validation
from dreammover_pipeline.tiny.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs():
    return validation.held_out_pairs(World(size=64), "same", 12, CPU)


def test_perfect_features_have_full_pck(pairs):
    cells = cell_grid(64, 64, pairs.flow)[..., 2::4, 2::4]  # pixels
    first = cells + pairs.flow[0][..., 2::4, 2::4]  # where each cell of the first image is in the last one
    first = torch.where(pairs.seen[0][..., 2::4, 2::4], first, -1000.0)
    forward_only = replace(pairs, seen=torch.stack([pairs.seen[0], torch.zeros_like(pairs.seen[1])]))
    frequencies = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) / 8
    places = torch.cat([first, cells.expand_as(first)])  # (2n, 2, h, w)
    phases = torch.einsum("fc,nchw->nfhw", frequencies, places)
    assert validation.pck(torch.cat([phases.cos(), phases.sin()], 1), forward_only, 16) == {".1": 100, ".05": 100}


def test_features_of_noise_have_the_pck_of_chance(pairs):
    noise = torch.randn(24, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    found = validation.pck(noise, pairs, 16)
    # a disc's share of the frame: a little less, since some discs are cut off, or more on a coarse grid
    assert found[".1"] == pytest.approx(100 * math.pi * 0.1**2, abs=2)
    assert found[".05"] == pytest.approx(100 * math.pi * 0.05**2, abs=1)


def test_psnr_is_that_of_the_mask():
    truth = torch.zeros(2, 3, 8, 8)
    images = truth.clone()
    images[:, :, :4] = 0.2  # 0.1 on the scale of [0, 1]
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, :4] = True
    assert validation.psnr(images, truth, mask) == pytest.approx(20, abs=1e-3)  # the second image does not count
    assert validation.psnr(images, truth, torch.ones_like(mask)) == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)


def test_noise_is_added_as_diffusers_does():
    scheduler = models.build_scheduler()
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    timesteps = torch.tensor([0, 500, 999])
    ours = recompose(latents, noise, scheduler.alphas_cumprod[timesteps])
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, timesteps))
