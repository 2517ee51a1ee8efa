# SPDX-License-Identifier: Apache-2.0
"""How a flow is followed through time: straight, or so that what turns turns and does not shrink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .fields import cell_grid
from .flow import agreement
from .records import BidirectionalFlow
from .rigid import (
    TINY,
    Similarity,
    best_of_neighbours,
    complex_one,
    complex_product,
    fit_similarities,
    grid_unit,
)

PATH_SIGMA = 3.2  # sigma, in cells of the unit grid, of the Gaussian by which neighbours count for a path's similarity
PATH_TOLERANCES = (4.0, 2.0, 1.0)
PATH_STIFFNESS = 0.05  # stiffness in squared cells of the unit grid, less than for matches, since the flow is regular
CENTRE_REACH = 16.0  # sigma, in cells of the unit grid, of the Gaussian by which cells help to find a centre of motion
CENTRE_TOLERANCE = 1.5  # sigma, in cells of the unit grid, of how far from a cell's fit another lies that moves along
SMALLEST = 0.1  # least size, as a share of what it was, from which what is on straight paths can grow again
PAIRS_AT_ONCE = 2**17  # pairs of cells held together to find centres, so that memory does not grow with the grid

Time = float | torch.Tensor  # a number, or a tensor () or (1,) that is on the device already


@dataclass(frozen=True, eq=False)
class MotionPaths:
    """The way of every cell of both images.

    `displacements` gives, from times t (F,) in [0, 1] that an image's cells are on their way, (F, 2, h, w) in cells,
    of the first image (index 0) or the second (index 1): zero at t = 0, the flow at t = 1. `factor` gives, from two
    such times, by what the surroundings of a cell turn and grow from the first time to the second, as complex numbers
    (2, h, w) of real and imaginary part. It is None for paths that are only splatted along.
    """

    displacements: Callable[[int, torch.Tensor], torch.Tensor]
    factor: Callable[[int, Time, Time], torch.Tensor] | None = None

    def at(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement from each image to the frames at δ (F,): F^{0→δ} and F^{1→δ}, (F, 2, h, w) each."""
        return self.displacements(0, times), self.displacements(1, 1 - times)


def motion_paths(flow: BidirectionalFlow, motion: str) -> MotionPaths:
    """The paths of a name, "rigid" or "straight"."""
    return rigid_paths(flow) if motion == "rigid" else straight_paths(flow)


def straight_paths(flow: BidirectionalFlow) -> MotionPaths:
    """Every cell goes along a straight line at an even pace: F^{0→δ} = δ F^{0→1} and F^{1→δ} = (1−δ) F^{1→0}.

    Source: DreamMover §3.2.
    """
    ways = flow.stacked()

    @cache
    def turns() -> torch.Tensor:
        return turns_of_cells(ways, agreement(flow)).turn

    def shares(times: torch.Tensor) -> torch.Tensor:
        return times.to(ways).reshape(-1, 1, 1, 1)

    def factor(image: int, start: Time, end: Time) -> torch.Tensor:
        before, after = (complex_one(ways[0, 0]) + time * turns()[image] for time in (start, end))
        conjugate = torch.stack([before[0], -before[1]])
        # What turns by half a turn is a point half way through, from which nothing can grow.
        return complex_product(after[None], conjugate[None])[0] / before.square().sum(0).clamp(min=SMALLEST**2)

    return MotionPaths(lambda image, times: shares(times) * ways[image], factor)


def rigid_paths(flow: BidirectionalFlow) -> MotionPaths:
    """What moves alike moves as one: its centre straight, everything on it turning and growing about the centre.

    Around every cell p a similarity q = a p + b is fitted to the flow, a complex. The centre c is the mean of the
    cells that this similarity explains. At time t the cell is at c + t (a c + b − c) + a^t (p − c) + t · rest,
    where rest is what the similarity leaves of the cell's own flow. a^t turns at an even rate and by less than
    half a turn, the shorter way round; at exactly half a turn both ways are as short, and rounding decides between
    them.

    Source: ours; DreamMover's paths are `straight_paths`.
    """
    ways = flow.stacked()
    sure = agreement(flow)
    fit = turns_of_cells(ways, sure)
    arm = _arms(ways, sure, fit)  # p − c
    real, imaginary = (1 + fit.turn[:, :1]), fit.turn[:, 1:]
    size, angle = (real.square() + imaginary.square()).sqrt(), torch.atan2(imaginary, real)
    straight = ways - complex_product(fit.turn, arm)  # a c + b − c + rest

    def power(image: int, times: torch.Tensor, less: float = 0.0) -> torch.Tensor:
        t = times.to(ways).reshape(-1, 1, 1, 1)
        turned, grown = t * angle[image], size[image] ** t
        return torch.cat([grown * turned.cos() - less, grown * turned.sin()], 1)

    def displacements(image: int, times: torch.Tensor) -> torch.Tensor:
        t = times.to(ways).reshape(-1, 1, 1, 1)
        return t * straight[image] + complex_product(power(image, times, less=1), arm[image][None])

    def factor(image: int, start: Time, end: Time) -> torch.Tensor:
        return power(image, torch.ones_like(ways[0, 0, 0, :1]) * (end - start))[0]

    return MotionPaths(displacements, factor)


def turns_of_cells(ways: torch.Tensor, sure: torch.Tensor) -> Similarity:
    """The similarity by which the surroundings of every cell move, by the flow (2, 2, h, w) and its agreement."""
    fit = fit_similarities(ways, sure, False, PATH_SIGMA, PATH_TOLERANCES, PATH_STIFFNESS)
    return best_of_neighbours(fit, ways)


def _arms(ways: torch.Tensor, sure: torch.Tensor, fit: Similarity) -> torch.Tensor:
    """From the centre of what moves along with a cell to the cell, (2, 2, h, w).

    Cells of a coarser grid stand for all, so that time grows with the cells and not with their square.
    """
    h, w = ways.shape[-2:]
    unit = grid_unit(h, w)
    stride = max(1, round(unit))
    seen = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))
    cells = cell_grid(h, w, ways)
    places, moved, weights = (part[seen].flatten(2)[:, :, None] for part in (cells, ways, sure))  # (…, 1, m)
    arms = torch.empty_like(ways).flatten(2)
    for here in torch.arange(h * w, device=ways.device).split(max(1, PAIRS_AT_ONCE // places.shape[-1])):
        apart = places - cells.flatten(2)[..., here, None]  # (1, 2, n, m): from a cell to one seen
        turn, shift = (part.flatten(2)[..., here, None] for part in (fit.turn, fit.shift))  # (2, 2, n, 1)
        off = (moved - shift - complex_product(turn, apart)).square().sum(1, keepdim=True)
        far = apart.square().sum(1, keepdim=True)
        alike = weights * (-far / (2 * (CENTRE_REACH * unit) ** 2) - off / (2 * (CENTRE_TOLERANCE * unit) ** 2)).exp()
        alike = alike + TINY
        arms[..., here] = -(alike * apart).sum(3) / alike.sum(3)
    return arms.unflatten(2, (h, w))
