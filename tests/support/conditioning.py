# SPDX-License-Identifier: Apache-2.0
"""A ControlNet that was never trained, and poses for it."""

import torch
from diffusers import ControlNetModel


def person(x, y):
    """An upright person (18, 3) whose neck is at a place."""
    points = torch.zeros(18, 3)
    points[:5] = torch.tensor([[0, -9, 1], [0, 0, 1], [-5, 0, 1], [-9, 4, 1], [-9, 12, 1]])
    points[:5, :2] += torch.tensor([x, y])
    return points.tolist()


POSES = (person(20, 24), person(44, 30))


def random_controlnet(unet, seed=1):
    """A ControlNet made from a UNet, whose additions are not zero, as they are before any training."""
    net = ControlNetModel.from_unet(unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            block.weight.copy_(0.2 * torch.randn(block.weight.shape, generator=generator))
    return net.eval()
