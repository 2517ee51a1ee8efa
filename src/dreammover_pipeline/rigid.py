# SPDX-License-Identifier: Apache-2.0
"""Motion that is locally a similarity: a shift, a turn and a scaling, fitted robustly to the matches around each cell.

The mean of the vectors around a cell is right for what is shifted and wrong for what turns or grows, since the mean of
a turning neighbourhood is not its middle. A similarity has four numbers and knows all of it. Lengths are in cells; the
constants hold for a grid of `UNIT_GRID` cells along its shorter side and grow with the grid.

Source of all of it: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from .fields import at_once, cell_grid, values_beside
from .splatting import winner_splat

UNIT_GRID = 32
WINDOW_SIGMA = 3.0  # sigma, in cells, of the Gaussian by which matches count that lie away from a cell
WINDOW_REACH = 2.7  # largest distance, in `WINDOW_SIGMA`, of a match that counts, along the rows and the columns
# Standard deviations, in cells, of how far a match may lie from the fit before, for each time that it is made anew.
TOLERANCES = (6.0, 3.0, 2.0, 1.5)
STIFFNESS = 0.5  # how strongly turn and scaling are held back where matches lie close together, in squared cells
LEAST = 1e-6  # share of its weight that a match keeps which the fit does not explain
NEIGHBOUR_STEP = 3.0  # distance, in cells, from a cell to the next whose similarity it may take over
TINY = 1e-12
# Cells, on a CPU and elsewhere, whose windows are held together, so that the workspace does not grow with the grid.
CELLS_AT_ONCE, CELLS_AT_ONCE_ON_GPU = 128, 2048


@dataclass(frozen=True, eq=False)
class Similarity:
    """A similarity for every cell: a cell u away goes to its own place plus `shift` + `turn`·u.

    `shift` and `turn` are (B, 2, h, w). `turn` is a complex number less one, as real and imaginary part; zero neither
    turns nor scales. `residual` (B, 1, h, w) is what the similarity leaves unexplained: the squared distance of the
    cell's own vector from it, or where photos are compared the difference in colour.
    """

    shift: torch.Tensor
    turn: torch.Tensor
    residual: torch.Tensor


def grid_unit(h: int, w: int) -> float:
    """How many cells of this grid make one of a grid of `UNIT_GRID` cells."""
    return min(h, w) / UNIT_GRID


def fit_similarities(
    flow: torch.Tensor,
    weight: torch.Tensor,
    both_ways: bool = True,
    sigma: float = WINDOW_SIGMA,
    tolerances: Sequence[float] = TOLERANCES,
    stiffness: float = STIFFNESS,
) -> Similarity:
    """Fit a similarity to the matches around every cell, by iteratively reweighted least squares.

    A match weighs by a Gaussian of its distance from the cell, by its own weight, and, from the second time on, by a
    Gaussian of how far it lies from the fit before; so neighbours that move otherwise drop out.

    Args:
        flow: The flow of the first and of the second image, (2, 2, h, w).
        weight: How sure each vector is, (2, 1, h, w), ≥ 0.
        both_ways: Whether the matches of the other image count too: if a cell q of it came from p, p goes to q.
        sigma: Standard deviation of the Gaussian of the distance from the cell, in cells of the unit grid.
        tolerances: Standard deviations of the Gaussians of the distance from the fit before, in cells of the unit
            grid.
        stiffness: How strongly turn and scaling are held back, in squared cells of the unit grid.

    Returns:
        The similarities of the cells of both images.
    """
    h, w = flow.shape[-2:]
    unit = grid_unit(h, w)
    stride = max(1, round(unit))
    matches = [torch.cat([torch.zeros_like(flow), flow, weight], 1)]
    if both_ways:
        matches.append(_matches_of_the_other(flow, weight))
    reach = int(WINDOW_REACH * sigma)
    margin = reach * stride
    padded = [F.pad(each, (margin, margin, margin, margin)) for each in matches]
    fits = flow.new_empty(2, 4, h * w)  # shift and turn
    rows = max(1, at_once(flow, CELLS_AT_ONCE, CELLS_AT_ONCE_ON_GPU) // w)
    for top in range(0, h, rows):
        strips = [each[..., top : top + rows + 2 * margin, :] for each in padded]
        place, vector, given = _matches_around(strips, reach, stride)
        near = given * (-place.square().sum(1) / (2 * (sigma * unit) ** 2)).exp()
        weights = near
        for tolerance in (*tolerances, None):
            fitted, off = _least_squares(place, vector, weights, stiffness * unit**2)
            if tolerance is not None:
                explained = (off.square().sum(1) * (-0.5 / (tolerance * unit) ** 2)).exp()
                weights = near * (explained + LEAST)
        fits[..., top * w : (top + rows) * w] = fitted
    shift, turn = fits.unflatten(2, (h, w)).split(2, 1)
    return Similarity(shift, turn, (flow - shift).square().sum(1, keepdim=True))


def best_of_neighbours(fit: Similarity, flow: torch.Tensor) -> Similarity:
    """For every cell, of its own similarity and those of some cells around it, the one that its own vector fits best.

    At the edge of a thing most of a window lies on what is behind it, and so a fit there may be the background's.

    Args:
        fit: The similarities of all cells of both images.
        flow: The flow that the similarities were fitted to, (2, 2, h, w).
    """
    step = max(1, round(NEIGHBOUR_STEP * grid_unit(*flow.shape[-2:])))
    best = fit
    for shift, turn in similarities_of(fit, [(dy * step, dx * step) for dy, dx in product(range(-2, 3), repeat=2)]):
        best = nearer_fit(best, Similarity(shift, turn, (flow - shift).square().sum(1, keepdim=True)))
    return best


def similarities_of(fit: Similarity, steps: Sequence[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shift and turn (B, 2, h, w) that every cell would have if it moved as one with another cell, for each step.

    Args:
        fit: The similarities of all cells of both images.
        steps: How many cells below the cell and to the right of it the other one lies; at the edge of the grid, fewer.
    """
    cells = cell_grid(*fit.shift.shape[-2:], fit.shift)
    parts = (values_beside(part, steps) for part in (fit.shift, fit.turn, cells))
    for shift, turn, there in zip(*parts, strict=True):
        yield shift + complex_product(turn, cells - there), turn


def nearer_fit(first: Similarity, second: Similarity, gain: float = 0.0) -> Similarity:
    """Of two similarities for every cell, the second where its residual is smaller by more than `gain`."""
    better = second.residual < first.residual - gain
    return Similarity(
        torch.where(better, second.shift, first.shift),
        torch.where(better, second.turn, first.turn),
        torch.where(better, second.residual, first.residual),
    )


def similarity_flow(flow: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The flow that `fit_similarities` gives at every cell, in the place of the cell's own vector.

    Args:
        flow: The flow of the first and of the second image, (2, 2, h, w).
        weight: How sure each vector is, (2, 1, h, w), ≥ 0.

    Returns:
        (2, 2, h, w).
    """
    return fit_similarities(flow, weight).shift


def _matches_around(
    strips: Sequence[torch.Tensor], reach: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matches in the window around every cell: where they start from the cell, where they lead, how sure they are.

    Args:
        strips: Matches as `_matches_of_the_other` returns them, (2, 5, r + margins, w + margins), with margins of
            `reach` · `stride` cells on every side of the n = r·w cells that are asked about.
        reach: Neighbours on each side of a cell in its window.
        stride: Distance in cells between neighbours in a window.

    Returns:
        (2, 2, k, n), (2, 2, k, n) and (2, k, n), for k matches.
    """
    side = 2 * reach + 1
    offsets = (cell_grid(side, side, strips[0]).flatten(2) - reach) * stride  # (1, 2, side²)
    windows = [F.unfold(strip, side, dilation=stride).unflatten(1, (5, side * side)) for strip in strips]
    places = torch.cat([window[:, :2] + offsets[..., None] for window in windows], 2)
    vectors = torch.cat([window[:, 2:4] for window in windows], 2)
    return places, vectors, torch.cat([window[:, 4] for window in windows], 1)  # which is zero off the grid


def _matches_of_the_other(flow: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The other image's matches turned round, each at the cell nearest to its start; of several the surest stays.

    Returns:
        (2, 5, h, w): how far from the cell a match starts, where it leads, how sure it is; zeros where there is none.
    """
    other, sure = flow.flip(0), weight.flip(0)
    start = cell_grid(*flow.shape[-2:], flow) + other
    landed, found = winner_splat(torch.cat([start, -other], 1), other, sure)
    beside = landed[:, :2] - cell_grid(*flow.shape[-2:], flow)
    there = found > 0
    return torch.cat([torch.where(there, beside, 0), torch.where(there, landed[:, 2:], 0), found], 1)


def _least_squares(
    place: torch.Tensor, vector: torch.Tensor, weights: torch.Tensor, stiffness: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarities that explain vectors (2, 2, k, n) at places best, (2, 4, n), and what they leave of each."""
    weights = weights[:, None]
    total = weights.sum(2, keepdim=True) + TINY
    mean_place, mean_vector = ((weights * x).sum(2, keepdim=True) / total for x in (place, vector))
    arm, moved = place - mean_place, vector - mean_vector
    weighted = weights * arm
    spread = (weighted * arm).sum((1, 2), keepdim=True)
    along = (weighted * moved).sum((1, 2), keepdim=True)
    across = (weighted[:, 0] * moved[:, 1] - weighted[:, 1] * moved[:, 0]).sum(1)[:, None, None]
    turn = torch.cat([along, across], 1) / (spread + stiffness * total)
    shift = mean_vector - complex_product(turn, mean_place)
    return torch.cat([shift, turn], 1)[:, :, 0], moved - complex_product(turn, arm)


def complex_one(like: torch.Tensor) -> torch.Tensor:
    """The complex number 1 for every element of a real tensor (…), as real and imaginary part, (2, …)."""
    return torch.stack([torch.ones_like(like), torch.zeros_like(like)])


def complex_product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The product of two fields of complex numbers, whose real and imaginary parts lie along axis 1."""
    (a, b), (x, y) = first.split(1, 1), second.split(1, 1)
    return torch.cat([a * x - b * y, a * y + b * x], 1)
