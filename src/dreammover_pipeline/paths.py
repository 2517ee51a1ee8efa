# SPDX-License-Identifier: Apache-2.0
"""How a flow is followed through time: straight, or so that what turns turns and does not shrink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .fields import cell_grid
from .flow import agreement
from .records import BidirectionalFlow
from .rigid import fit_similarities, grid_unit

PATH_SIGMA = 3.2  # cells of the unit grid; of the Gaussian by which neighbours count for the similarity of a path
PATH_TOLERANCES = (4.0, 2.0, 1.0, 1.0)
CENTRE_REACH = 16.0  # cells of the unit grid; how far away a cell may help to find the centre of what moves as one
CENTRE_TOLERANCE = 1.5  # cells of the unit grid; how far from a cell's fit another one may lie that moves along
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class MotionPaths:
    """The way of every cell of both images.

    `displacements` gives, from times t (F,) in [0, 1] that an image's cells are on their way, (F, 2, h, w) in cells,
    of the first image (index 0) or the second (index 1): zero at t = 0, the flow at t = 1.
    """

    displacements: Callable[[int, torch.Tensor], torch.Tensor]

    def at(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement from each image to the frames at δ (F,): F^{0→δ} and F^{1→δ}, (F, 2, h, w) each."""
        return self.displacements(0, times), self.displacements(1, 1 - times)


def straight_paths(flow: BidirectionalFlow) -> MotionPaths:
    """Every cell goes along a straight line at an even pace: F^{0→δ} = δ F^{0→1} and F^{1→δ} = (1−δ) F^{1→0}.

    Source: DreamMover §3.2.
    """
    ways = flow.stacked()
    return MotionPaths(lambda image, t: t.to(ways).reshape(-1, 1, 1, 1) * ways[image])


def rigid_paths(flow: BidirectionalFlow) -> MotionPaths:
    """What moves alike moves as one: its centre straight, everything on it turning and growing about the centre.

    Around every cell p a similarity q = a p + b is fitted to the flow, a complex. The centre c is the mean of the cells
    that this similarity explains. At time t the cell is at c + t (a c + b − c) + a^t (p − c) + t · rest, where rest is
    what the similarity leaves of the cell's own flow; a^t turns at an even rate, by less than half a turn.

    Source: ours; DreamMover's paths are `straight_paths`.
    """
    ways = flow.stacked()
    h, w = ways.shape[-2:]
    sure = agreement(flow)
    fit = fit_similarities(ways, sure, both_ways=False, sigma=PATH_SIGMA, tolerances=PATH_TOLERANCES)
    a = torch.complex(1 + fit.turn[:, 0], fit.turn[:, 1])  # (2, h, w)
    arm = torch.complex(*_centre_offsets(ways, sure, fit.shift, fit.turn).unbind(1))  # p − c
    moved = torch.complex(*ways.unbind(1))
    explained = torch.complex(*fit.shift.unbind(1))
    centre_moves = explained - (a - 1) * arm  # a c + b − c
    turn = a.log()

    def displacements(image: int, times: torch.Tensor) -> torch.Tensor:
        t = times.to(ways).reshape(-1, 1, 1)
        turned = torch.exp(t * turn[image]) * arm[image]
        x = t * centre_moves[image] + turned - arm[image] + t * (moved - explained)[image]
        return torch.stack([x.real, x.imag], 1)

    return MotionPaths(displacements)


def _centre_offsets(ways: torch.Tensor, sure: torch.Tensor, shift: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """From the centre of what moves along with a cell to the cell, (2, 2, h, w)."""
    h, w = ways.shape[-2:]
    unit = grid_unit(h, w)
    stride = max(1, round(unit))
    cells = cell_grid(h, w, ways)[0]
    seen = (slice(None), slice(stride // 2, None, stride), slice(stride // 2, None, stride))
    x, y = cells[seen].flatten(1)[:, None]  # (1, m) each: some of the cells stand for all
    offsets = []
    for image in range(2):
        px, py = cells.flatten(1)[..., None]  # (n, 1) each
        ux, uy = x - px, y - py
        vx, vy = ways[image][seen].flatten(1)[:, None]
        (sx, sy), (re, im) = shift[image].flatten(1)[..., None], turn[image].flatten(1)[..., None]
        off = (vx - sx - re * ux + im * uy).square() + (vy - sy - im * ux - re * uy).square()
        alike = (
            sure[image][seen].flatten(1)
            * (-(ux.square() + uy.square()) / (2 * (CENTRE_REACH * unit) ** 2)).exp()
            * (-off / (2 * (CENTRE_TOLERANCE * unit) ** 2)).exp()
        ) + TINY
        total = alike.sum(1)
        offsets.append(-torch.stack([(alike * ux).sum(1), (alike * uy).sum(1)]) / total)
    return torch.stack(offsets).unflatten(2, (h, w))
