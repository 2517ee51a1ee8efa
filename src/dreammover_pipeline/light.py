# SPDX-License-Identifier: Apache-2.0
"""The difference in light between two photos of one scene, found along their flow, so that they can be compared.

Light is taken to multiply every colour of a photo by a gain that changes evenly across the picture, as under a lamp
that has moved or an exposure that has changed.

Source of all of it: ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .fields import backward_warp, cell_grid
from .flow import agreement
from .records import BidirectionalFlow
from .rigid import TINY

GAIN_ROUNDS = 8  # how often the gains are fitted, each time with less weight for colours that they do not explain
WIDEST = 0.15  # difference in colour, of 1, that counts a quarter as much in the first round
NARROWING = 0.6  # factor by which `WIDEST` falls from one round to the next
NARROWEST = 0.02  # difference in colour, of 1, below which `WIDEST` does not fall
GAIN_STIFFNESS = 3e-4  # how strongly the gains are held to 1 all over, as a share of the weight of all colours
DARKEST = 0.2  # least gain that photos are brought to one light by


def light_gains(photos: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """How much brighter, colour by colour, each photo's content is in the other photo.

    The other photo's colour at p + F(p) is fitted by the photo's own colour at p times g₀ + g₁ x + g₂ y, where x and y
    run from −½ to ½ across the picture. Cells weigh by the agreement of their flow, and the less, the worse the gains
    of the round before explain them.

    Args:
        photos: The two photos, (2, 3, H, W) in [0, 1].
        flow: The flow between the two photos, on a grid of cells that covers the same picture.

    Returns:
        g₀, g₁ and g₂ of each colour of each photo, (2, 3, 3), float32 on the CPU.
    """
    size = flow.forward.shape[-2:]
    colours = F.interpolate(photos, size, mode="area").cpu().double()
    ways = flow.stacked().cpu().double()
    found = backward_warp(torch.cat([colours.flip(0), torch.ones_like(colours[:, :1])], 1), ways)
    sure = agreement(BidirectionalFlow.of(ways)) * (found[:, 3:] > 0.999)
    own = colours.flatten(2)[:, :, None] * _planes(*size, colours).flatten(1)  # (2, 3 colours, 3 planes, n)
    there = found[:, :3].flatten(2)
    even = colours.new_tensor([1.0, 0, 0])
    stiff = torch.diag(colours.new_tensor([1.0, 4, 4]))
    explained = torch.ones_like(there[:, 0])
    for done in range(GAIN_ROUNDS):
        weight = (sure.flatten(1) * explained)[:, None, None]
        total = GAIN_STIFFNESS * weight.sum(3, keepdim=True) + TINY  # 1 where no cell has any weight
        square = (own * weight) @ own.transpose(2, 3) + total * stiff
        right = (own * weight) @ there[..., None] + total * (stiff @ even)[:, None]
        gains = torch.linalg.solve(square, right)  # (2, 3, 3, 1)
        off = (there - (own * gains).sum(2)).abs().mean(1)
        width = max(NARROWEST, WIDEST * NARROWING**done)
        explained = (1 + (off / width).square()) ** -2
    return gains[..., 0].float()


def in_one_light(photos: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """Both photos as they would look half way between their two lights: each times the root of its gain.

    Args:
        photos: The two photos, (2, 3, H, W) in [0, 1].
        flow: The flow between the two photos, on a grid of cells that covers the same picture.

    Returns:
        (2, 3, H, W), which may exceed 1.
    """
    return photos * gain_maps(light_gains(photos, flow), photos.shape[-2:], photos).sqrt()


def gain_maps(gains: torch.Tensor, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """How much brighter each place of each photo is in the other photo, (2, 3, h, w), at least `DARKEST`.

    Args:
        gains: The gains of each colour of each photo, (2, 3, 3), as `light_gains` returns them.
        size: The grid (h, w) of the places, which covers the same picture.
        like: A tensor with the dtype and on the device wanted.
    """
    return torch.einsum("icb,bhw->ichw", gains.to(like), _planes(*size, like)).clamp(min=DARKEST)


def _planes(h: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """1, x and y at every cell, (3, h, w); x and y run from −½ to ½ from edge to edge."""
    x, y = ((cells + 0.5) / side - 0.5 for cells, side in zip(cell_grid(h, w, like)[0], (w, h), strict=True))
    return torch.stack([torch.ones_like(x), x, y])
