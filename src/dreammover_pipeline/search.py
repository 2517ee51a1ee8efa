# SPDX-License-Identifier: Apache-2.0
"""Places of one photo that look most like places of the other, wherever they are and however they have turned.

Source: ours; what is found must be unlike all other places, as in Lowe 2004.
"""

from __future__ import annotations

import math

import torch

from .fields import blurred, cell_grid, lattice, sampled_around
from .rigid import complex_product

SEARCHED_PLACES = 2048  # largest number of a photo's places that are compared with each of the other photo's
SEARCHED_TURNS = range(-60, 61, 20)  # degrees by which a window may have turned where it is found
SEARCH_RADIUS = 2  # places from the middle to the edge of a window that is looked for
SEARCH_BLUR = 0.5  # sigma, in steps between searched cells, of the blur by which few places see all of a window
SEARCH_RETURN = 1.5  # how far, in steps between searched cells, the way there and back may end from where it began
DISTINCT = 0.7  # largest squared difference of the best place, as a share of that of the best place elsewhere
ELSEWHERE = 2.5  # distance, in steps between searched cells, beyond which a place is elsewhere than the best one
ROUNDED = 1e-4  # squared difference of two windows below which it is the rounding of their product


def most_alike(
    photos: torch.Tensor, size: tuple[int, int], half: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every cell the place of the other photo whose surroundings are most like its own, of all places and turns.

    On a grid of more than `SEARCHED_PLACES` cells every second or third is looked for, in windows as much larger, and
    stands for those around it.

    Args:
        photos: The two photos, (2, 3, H, W) in [0, 1].
        size: Size (h, w) of the grid of cells.
        half: Distance in cells from the middle of a cell's window to its edge.

    Returns:
        Shift and turn (2, 2, h, w), and (2, 1, h, w) bool: whether the other photo finds the cell from there, and no
        other place is nearly as much alike.
    """
    h, w = size
    stride = math.ceil(math.sqrt(h * w / SEARCHED_PLACES))
    rows, columns = (torch.arange(min(stride // 2, n - 1), n, stride, device=photos.device) for n in (h, w))
    cells = cell_grid(h, w, photos)
    middles = cells[0][:, rows[:, None], columns].flatten(1)  # (2, n)
    photos = blurred(photos, SEARCH_BLUR * stride * photos.shape[-1] / w)
    angles = photos.new_tensor(list(SEARCHED_TURNS)).deg2rad()
    # Each photo turns half the way, so that both are treated alike.
    windows = [
        _windows(photo, middles, angle, size, stride * half)
        for photo, angle in zip(photos, (-angles / 2, angles / 2), strict=True)
    ]
    found = _found(windows, middles, angles, stride)
    # Every cell moves as one with the place that stands for it.
    row, column = (
        (torch.arange(n, device=photos.device) // stride).clamp(max=len(some) - 1)
        for n, some in ((h, rows), (w, columns))
    )

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(2, (len(rows), len(columns)))[..., row[:, None], column]

    shift, turn, matched = map(spread, found)
    return shift + complex_product(turn, cells - spread(middles[None])), turn, matched


def _windows(
    photo: torch.Tensor, middles: torch.Tensor, angles: torch.Tensor, size: tuple[int, int], half: float
) -> torch.Tensor:
    """The weighted colours of the windows around places (2, n), turned by t angles, (3·s, t, n) for s samples."""
    offsets = half * lattice(SEARCH_RADIUS, SEARCH_RADIUS, photo)
    weight = (-offsets.square().sum(1) / half**2).exp()
    turns = torch.stack([angles.cos() - 1, angles.sin()])
    n, t = middles.shape[1], len(angles)
    seen, _ = sampled_around(photo, middles.repeat(1, t), turns.repeat_interleave(n, 1), offsets, size)
    return (weight[:, None] * seen).flatten(0, 1).unflatten(1, (t, n))


def _least_differences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The squared difference of each of n windows from each of the other photo's, at its best turn, (n, n)."""
    # |a − b|² = |a|² + |b|² − 2 a·b, as one product.
    squares = [each.square().sum(0, keepdim=True) for each in (first, second)]
    ones = torch.ones_like(squares[0])
    left = torch.cat([-2 * first, squares[0], ones]).movedim(0, 2)  # (t, n, 3·s + 2)
    right = torch.cat([second, ones, squares[1]]).movedim(0, 1)  # (t, 3·s + 2, n)
    least = left[0] @ right[0]
    for one, other in zip(left[1:], right[1:], strict=True):
        torch.minimum(least, one @ other, out=least)
    return least.clamp_(min=ROUNDED)


def _found(
    windows: list[torch.Tensor], middles: torch.Tensor, angles: torch.Tensor, stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best match of every place in the other photo.

    Args:
        windows: The weighted colours of the windows of each photo, as `_windows` gives them.
        middles: The n places in each photo, (2, n).
        angles: By how much the second photo's window is turned against the first's, (t,).
        stride: Steps between the places, in cells.

    Returns:
        Shift and turn (2, 2, n), and (2, 1, n) bool: whether the way back ends where it began, and no other place is
        nearly as much alike.
    """
    difference = _least_differences(*windows)
    index = [difference.argmin(1), difference.argmin(0)]
    points = middles.T
    near = torch.cdist(points, points) <= ELSEWHERE * stride  # `cdist` rounds, but no place is 2.5 steps away
    shifts, turns, matched = [], [], []
    for image, way in enumerate((difference, difference.T)):
        there, back = index[image], index[1 - image]
        least = way.amin(1)
        elsewhere = way.masked_fill(near[there], torch.inf).amin(1)
        returned = torch.hypot(*(points[back[there]] - points).T) <= SEARCH_RETURN * stride
        matched.append(returned & (least < DISTINCT * elsewhere))
        shifts.append(points[there] - points)
        apart = (windows[image] - windows[1 - image][..., there]).square().sum(0)  # (t, n)
        angle = angles[apart.argmin(0)] * (1 - 2 * image)
        turns.append(torch.stack([angle.cos() - 1, angle.sin()], 1))
    return torch.stack(shifts).mT, torch.stack(turns).mT, torch.stack(matched)[:, None]
