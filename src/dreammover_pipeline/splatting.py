# SPDX-License-Identifier: Apache-2.0
"""Forward warping in plain torch, with the same bits on every run, on CPU, CUDA and MPS.

A scatter-add is the obvious way to splat, but on a GPU its atomic additions happen in any order. Here every source
cell makes entries (target cell, value), the entries are sorted by target, and the run of entries of each target is
reduced by a segmented tree. That needs gathers only, so the order of additions never changes.

The conventions for coordinates and flow are those of `fields.py`.
"""

from __future__ import annotations

import torch

from .ddim import working_dtype
from .fields import cell_grid


def softmax_splat(x: torch.Tensor, flow: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward-warp x along the flow; cells that land on one place are averaged with weight exp(metric).

    Every source cell spreads bilinearly onto the four cells around its target: out(q) = Σ_p b(p, q) e^{M(p)} x(p) /
    Σ_p b(p, q) e^{M(p)}. Nothing that lands outside the grid is kept.

    Source: DreamMover Eq. (4), §3.2, after softmax splatting (arXiv 2003.05534).

    Args:
        x: The values to warp, (B, C, h, w).
        flow: Where every source cell moves, (B, 2, h, w), in cells.
        metric: M, the log of each source cell's weight, (B, 1, h, w); a constant added to M does not change the
            warped values.

    Returns:
        The warped x (B, C, h, w), zero in holes, and the summed weight Σ b e^M (B, 1, h, w), which is zero in holes
        and positive everywhere else.
    """
    b, c, h, w = x.shape
    dtype = working_dtype(x)
    target, bilinear = _bilinear_corners(flow.to(dtype), h, w)  # (B, 4·h·w) each
    order = target.argsort(dim=1, stable=True)
    target, bilinear = target.gather(1, order), bilinear.gather(1, order)
    source = order % (h * w)
    x = x.to(dtype).flatten(2).gather(2, source[:, None].expand(b, c, -1))
    metric = metric.to(dtype).flatten(1).gather(1, source)

    # Weights are taken relative to the heaviest entry of each target cell, so that they neither overflow nor vanish.
    first, reached = _run_starts(target, h * w)
    peak = _reduce_runs(metric[:, None], target, torch.maximum)[:, 0].gather(1, first)  # (B, h·w)
    weight = bilinear * (metric - peak.gather(1, target.clamp(max=h * w - 1))).exp()
    total = _reduce_runs(torch.cat([x * weight[:, None], weight[:, None]], 1), target, torch.add)
    total = total.gather(2, first[:, None].expand(b, c + 1, -1))
    splatted = torch.where(reached[:, None], total[:, :c] / total[:, c:], 0)
    weight = (total[:, c] * peak.exp()).clamp(min=torch.finfo(dtype).tiny)
    return splatted.reshape(b, c, h, w), torch.where(reached, weight, 0).reshape(b, 1, h, w)


def winner_splat(x: torch.Tensor, flow: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward-warp x so that every target cell takes the single source value of highest weight, unmixed.

    A source cell lands on the cell nearest to its target. Half cells are rounded to the right and down, so that a
    translation by half a cell leaves no holes. Of equal weights the one of lowest source index wins.

    Source: DreamMover §3.3, the winner-takes-all of the low level; on cells that collide the paper is silent.

    Args:
        x: The values to warp, (B, C, h, w).
        flow: Where every source cell moves, (B, 2, h, w), in cells.
        weight: The weight of each source cell, (B, 1, h, w), positive.

    Returns:
        The warped x (B, C, h, w) and the winners' weights (B, 1, h, w), both zero in holes.
    """
    b, c, h, w = x.shape
    dtype = working_dtype(x)
    landing = (cell_grid(h, w, flow.to(dtype)) + flow.to(dtype) + 0.5).floor()
    target = _cell_index(landing[:, 0], landing[:, 1], h, w).flatten(1)
    weight = weight.to(dtype).flatten(1)

    # Sorted by weight, heaviest first, and then by target. Both sorts are stable, so the run of a target starts with
    # its heaviest entry, and of equally heavy ones with that of lowest source index.
    by_weight = weight.argsort(dim=1, descending=True, stable=True)
    order = by_weight.gather(1, target.gather(1, by_weight).argsort(dim=1, stable=True))
    first, reached = _run_starts(target.gather(1, order), h * w)
    winner = order.gather(1, first)
    splatted = x.to(dtype).flatten(2).gather(2, winner[:, None].expand(b, c, -1))
    splatted = torch.where(reached[:, None], splatted, 0)
    return splatted.reshape(b, c, h, w), torch.where(reached, weight.gather(1, winner), 0).reshape(b, 1, h, w)


def _cell_index(x: torch.Tensor, y: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Row-major index of integer coordinates. Outside the grid it is h·w, which sorts last and is never looked up."""
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    return torch.where(inside, y * w + x, h * w).long()


def _bilinear_corners(flow: torch.Tensor, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The four cells around each source cell's target and their bilinear weights, (B, 4·h·w) each, corner-major."""
    position = cell_grid(h, w, flow) + flow
    corner = position.floor()
    right, down = (position - corner).unbind(1)
    x, y = corner.unbind(1)
    weight = torch.stack([(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down], 1)
    target = torch.stack([_cell_index(x + dx, y + dy, h, w) for dy in (0, 1) for dx in (0, 1)], 1)
    target = torch.where(weight > 0, target, h * w)  # a corner of weight zero reaches nothing
    return target.flatten(1), weight.flatten(1)


def _run_starts(target: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the sorted `target` (B, n) each cell's run begins, and whether the cell has one, (B, cells) each."""
    every_cell = torch.arange(cells, device=target.device).expand(target.shape[0], -1).contiguous()
    first = torch.searchsorted(target, every_cell).clamp(max=target.shape[1] - 1)
    return first, target.gather(1, first) == every_cell


def _reduce_runs(values: torch.Tensor, target: torch.Tensor, combine) -> torch.Tensor:
    """Combine the values (B, K, n) of each run of equal `target` (B, n); the result stands at the run's first entry.

    After the pass of stride d every entry combines the 2d entries that start with it, or those left in its run.
    """
    stride = 1
    while stride < target.shape[1]:
        same_run = (target[:, stride:] == target[:, :-stride])[:, None]
        head = values[..., :-stride]
        combined = torch.where(same_run, combine(head, values[..., stride:]), head)
        values = torch.cat([combined, values[..., -stride:]], -1)
        stride *= 2
    return values
