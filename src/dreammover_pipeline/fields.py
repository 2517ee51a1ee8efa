# SPDX-License-Identifier: Apache-2.0
"""Geometry of flow fields on grids: coordinates, looking up where a flow points, and the same flow on another grid.

Conventions, here and everywhere: flow is (B, 2, h, w) in cells of its own grid; channel 0 is dx (columns, to the
right), channel 1 dy (rows, downwards); the flow at a cell of the source says by how much it moves. Cell centres have
integer coordinates (`align_corners=True`), so an integer flow moves values exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .ddim import working_dtype
from .records import BidirectionalFlow, Canvas


def cell_grid(h: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """(1, 2, h, w) coordinates (x, y) of every cell, in the dtype and on the device of `like`."""
    y, x = torch.meshgrid(
        torch.arange(h, device=like.device, dtype=like.dtype),
        torch.arange(w, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x, y])[None]


def backward_warp(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Look every cell up where the flow points: out(p) = x(p + flow(p)), bilinear, zero outside the grid.

    Source: DreamMover §3.2, the warp inside the importance metric of Eq. (4).

    Args:
        x: (B, C, h, w).
        flow: (B, 2, h, w) in cells.

    Returns:
        (B, C, h, w).
    """
    h, w = x.shape[-2:]
    dtype = working_dtype(x)
    # Cells have integer centres; grid_sample's edge-based coordinates express that on grids of one cell too.
    target = cell_grid(h, w, flow.to(dtype)) + flow.to(dtype)
    extent = torch.tensor([w, h], device=x.device, dtype=dtype).reshape(1, 2, 1, 1)
    normalised = ((2 * target + 1) / extent - 1).movedim(1, -1)  # (B, h, w, 2)
    return F.grid_sample(x.to(dtype), normalised, mode="bilinear", padding_mode="zeros", align_corners=False)


def upsampled_flow(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Flow of cells as flow of a finer grid's cells, bilinear.

    Args:
        flow: (B, 2, h, w) in cells of the coarse grid.
        size: (H, W) of the fine grid, which covers the same picture.

    Returns:
        (B, 2, H, W) in cells of the fine grid.
    """
    scale = torch.tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).reshape(1, 2, 1, 1).to(flow)
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=False) * scale


def flow_at_cell_centres(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Flow of pixels as flow of cells: a cell moves like the one pixel that its centre lies in.

    Args:
        flow: (B, 2, H, W) in pixels.
        size: (h, w) of the cells' grid, which covers the same picture.

    Returns:
        (B, 2, h, w) in cells.
    """
    (h, w), (height, width) = size, flow.shape[-2:]
    row = ((torch.arange(h) + 0.5) * height / h).long()
    column = ((torch.arange(w) + 0.5) * width / w).long()
    pixels_per_cell = torch.tensor([width / w, height / h], device=flow.device).reshape(1, 2, 1, 1)
    return flow[..., row[:, None], column] / pixels_per_cell


def pixel_flow(flow: BidirectionalFlow, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow of latent cells as flow of the output's pixels: a pixel moves like the cell its centre lies in.

    Nearest, not bilinear: a matched cell knows nothing finer, and blending across an edge would invent motion.

    Args:
        flow: the flow both ways, in cells of the whole canvas.
        canvas: where the picture sits on the canvas, and at which size it is put out.

    Returns:
        The flow forward and the flow backward, (1, 2, H, W) each, in pixels of the output.
    """
    h, w = flow.forward.shape[-2:]
    row = (torch.arange(canvas.output_height) + 0.5) * (canvas.content_height / canvas.output_height)
    column = (torch.arange(canvas.output_width) + 0.5) * (canvas.content_width / canvas.output_width)
    row, column = (row * h / canvas.height).long(), (column * w / canvas.width).long()
    pixels_per_cell = torch.tensor(
        [
            canvas.width / w * canvas.output_width / canvas.content_width,
            canvas.height / h * canvas.output_height / canvas.content_height,
        ],
        device=flow.forward.device,
    ).reshape(1, 2, 1, 1)
    forward, backward = (field[..., row[:, None], column] for field in (flow.forward, flow.backward))
    return forward * pixels_per_cell, backward * pixels_per_cell
