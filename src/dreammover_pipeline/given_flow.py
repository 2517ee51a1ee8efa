# SPDX-License-Identifier: Apache-2.0
"""A flow that the user brings instead of a match by features: checked, put on the latent grid, and smoothed.

It comes as two arrays, (2, H, W) each, in pixels of two pictures that may differ in size. Both pictures are put on the
canvas by `framing.fit`, so a displacement leads from where its pixel is put to where its end is put.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from .fields import cell_grid
from .flow import DOUBT, Regulariser, regularise
from .framing import fit_points, unfit_points
from .images import Size
from .records import BidirectionalFlow, Canvas
from .steering import Steering, regularise_steered

LONGEST_WAY = 1_000_000  # longest displacement in pixels; no photo is as long, and far longer ones overflow if squared


@dataclass(frozen=True, eq=False)
class GivenFlow:
    """A flow of the user's on the latent grid; `known` (2, 1, h, w) is false where it is only filled in."""

    flow: BidirectionalFlow
    known: torch.Tensor

    def to(self, device: torch.device) -> GivenFlow:
        """The same flow on another device."""
        return GivenFlow(BidirectionalFlow.of(self.flow.stacked().to(device)), self.known.to(device))


def given_flow(pair: object, sizes: tuple[Size, Size], canvas: Canvas, cell: int, name: str = "`flow`") -> GivenFlow:
    """The flow of two arrays on the latent grid.

    A cell moves like its centre, between whose four nearest pixels the flow is interpolated. If one of them is
    unknown, the cell moves like the mean of the known pixels in it, so that a few tracks are flow enough. Cells
    without a known pixel take over what is known around them.

    Args:
        pair: The flow from the first picture to the second and back, (2, H, W) each, dx and dy in pixels; NaN where
            nothing is known.
        sizes: Size (H, W) of each of the two pictures, in pixels.
        canvas: Where both pictures are put.
        cell: Side of a latent cell in pixels of the canvas.
        name: What error messages call the pair.

    Raises:
        TypeError, ValueError: The pair is not what it may be, or in one direction it knows nothing of what is shown.
    """
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        what = f"{len(pair)} entries" if isinstance(pair, list | tuple) else f"a {type(pair).__name__}"
        raise TypeError(f"{name} must be a pair of arrays, the flow forward and the flow backward, not {what}")
    ways = []
    for direction, array, own, other in zip(("forward", "backward"), pair, sizes, reversed(sizes), strict=True):
        part = f"the {direction} part of {name}"
        way = _on_grid(_checked_field(array, own, part), own, other, canvas, cell)
        if way.isnan().all():
            raise ValueError(f"{part} must be known somewhere, but it is NaN in all that is shown of its photo")
        ways.append(way)
    stacked = torch.stack(ways).to(torch.float32)
    known = ~stacked.isnan().any(1, keepdim=True)
    return GivenFlow(BidirectionalFlow.of(_filled(stacked.nan_to_num(), known)), known)


def called_flow(function: Callable, photos: torch.Tensor, canvas: Canvas, cell: int) -> GivenFlow:
    """The flow that a function of the user's finds between the two photos, on the latent grid.

    Args:
        function: Function called with the two photos, (3, H, W) each, that returns the flow from the first to the
            second and back, (2, H, W) each, in their pixels; NaN where nothing is known.
        photos: The two photos on their canvas, (2, 3, H, W) in [0, 1].
        canvas: Where the photos are put.
        cell: Side of a latent cell in pixels of the canvas.

    Raises:
        TypeError, ValueError: What the function returned is no such flow.
    """
    whole = replace(canvas, content_height=canvas.height, content_width=canvas.width)
    size = (canvas.height, canvas.width)
    return given_flow(function(photos[0], photos[1]), (size, size), whole, cell, "what `flow` returned")


def smoothed_flow(
    given: GivenFlow, passes: int, regulariser: Regulariser, steering: Steering | None
) -> BidirectionalFlow:
    """`regularise` for a flow of the user's: what is only filled in counts as little as a match without a way back.

    Args:
        given: The flow of the user's.
        passes: Number of passes of smoothing, 0 … .
        regulariser: What carries the flow on in each pass: `neighbourhood_mean`, or `similarity_flow`.
        steering: What the user says of the match besides the flow; None where that is nothing.
    """

    def trust(weight: torch.Tensor) -> torch.Tensor:
        return torch.where(given.known, weight, DOUBT)

    if steering is None:
        return regularise(given.flow, passes, regulariser, trust=trust)
    return regularise_steered(given.flow, steering, passes, regulariser, trust=trust)


def _checked_field(value: object, size: Size, name: str) -> torch.Tensor:
    """One direction of a flow as (2, H, W), float32 on the CPU, with both of dx and dy NaN where one of them is.

    Raises:
        TypeError, ValueError: The value is no such array, is of another size, or holds an infinite number.
    """
    if not isinstance(value, np.ndarray | torch.Tensor):
        raise TypeError(f"{name} must be a numpy array or a torch tensor, not a {type(value).__name__}")
    expected = (2, *size)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} must be {expected}, the dx and the dy of every pixel of its photo, not {tuple(value.shape)}"
        )
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be dense, not {value.layout}")
        real = not value.is_complex() and value.dtype != torch.bool
    else:
        real = value.dtype.kind in "fiu"
    if not real:
        raise TypeError(f"{name} must hold real numbers, not {value.dtype}")
    if isinstance(value, torch.Tensor):
        field = value.detach().to("cpu", torch.float32)
    else:
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            field = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
    longest = field.nan_to_num(0, torch.inf, -torch.inf).abs().max()
    if longest > LONGEST_WAY:
        raise ValueError(
            f"{name} must hold displacements of at most {LONGEST_WAY} pixels, and NaN where they are unknown, "
            f"not {longest:g}"
        )
    return torch.where(field.isnan().any(0), torch.nan, field)


def _on_grid(field: torch.Tensor, own: Size, other: Size, canvas: Canvas, cell: int) -> torch.Tensor:
    """A direction of a flow on the latent grid, (2, h, w) in cells, float64; NaN in cells without a known pixel.

    Args:
        field: The flow (2, H, W) in pixels.
        own: Size (H, W) of the picture that the flow starts from.
        other: Size (H, W) of the picture that the flow leads to.
        canvas: Where both pictures are put.
        cell: Side of a latent cell in pixels of the canvas.
    """
    h, w = canvas.height // cell, canvas.width // cell
    exact = torch.zeros(0, dtype=torch.float64, device="cpu")

    def moved(places: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
        """Displacements (k, 2) in pixels of the pictures, that start at places (k, 2), in cells."""
        ways = ways.to(exact)
        return (fit_points(places + ways, other, canvas) - fit_points(places, own, canvas)) / cell

    centres = (cell_grid(h, w, exact)[0].flatten(1).T + 0.5) * cell - 0.5
    last = exact.new_tensor([own[1] - 1, own[0] - 1])
    centres = unfit_points(centres, own, canvas).clamp(min=0).minimum(last)  # the canvas continues the edge's pixels
    normalised = ((2 * centres + 1) / (last + 1) - 1).to(field)[None, None]
    found = F.grid_sample(field[None], normalised, padding_mode="border", align_corners=False)[0, :, 0].T
    result = moved(centres, found)
    unknown = result.isnan().any(1)
    if unknown.any():
        column, row = _cells_along(own, canvas, cell)
        inside = ((row >= 0) & (row < h))[:, None] & (column >= 0) & (column < w)
        index = row.clamp(0, h - 1)[:, None] * w + column.clamp(0, w - 1)  # (H, W), of the cell that a pixel lies in
        wanted = inside & unknown[index] & ~field[0].isnan()
        y, x = wanted.nonzero().unbind(1)
        ways = moved(torch.stack([x, y], 1).to(exact), field[:, y, x].T)
        total = exact.new_zeros(h * w, 3).index_add(0, index[wanted], F.pad(ways, (0, 1), value=1.0))
        result = torch.where(unknown[:, None], total[:, :2] / total[:, 2:], result)
    return result.T.unflatten(1, (h, w))


def _cells_along(size: Size, canvas: Canvas, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of cells that each column of an image's pixels lies in, (W,), and the row of each row, (H,)."""
    along = torch.arange(max(size), dtype=torch.float64, device="cpu")
    cells = ((fit_points(along[:, None].expand(-1, 2), size, canvas) + 0.5) / cell).floor().long()
    return cells[: size[1], 0], cells[: size[0], 1]


def _filled(flow: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """A flow (2, 2, h, w) whose unknown cells take the mean of what is known in the smallest blocks that know any.

    Blocks are of 2×2 cells, of 4×4 and so on, and are interpolated between their middles.
    """
    if known.all():
        return flow
    share = F.avg_pool2d(known.to(flow), 2, ceil_mode=True)
    mean = F.avg_pool2d(flow * known, 2, ceil_mode=True) / torch.where(share > 0, share, 1)
    coarse = _filled(mean, share > 0)
    return torch.where(known, flow, F.interpolate(coarse, flow.shape[-2:], mode="bilinear", align_corners=False))
