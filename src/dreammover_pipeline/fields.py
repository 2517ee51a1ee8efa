# SPDX-License-Identifier: Apache-2.0
"""Geometry of flow fields on grids: coordinates, looking up where a flow points, and the same flow on another grid.

Conventions in the whole package: flow is (B, 2, h, w) in cells of its own grid; channel 0 is dx (columns, to the
right), channel 1 is dy (rows, downwards); the flow at a source cell says by how much that cell moves. Cell centres
have integer coordinates (`align_corners=True`), so an integer flow moves values exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .ddim import working_dtype
from .records import BidirectionalFlow, Canvas


def cell_grid(h: int, w: int, like: torch.Tensor) -> torch.Tensor:
    """The coordinates (x, y) of every cell, (1, 2, h, w), in the dtype and on the device of `like`."""
    y, x = torch.meshgrid(
        torch.arange(h, device=like.device, dtype=like.dtype),
        torch.arange(w, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x, y])[None]


def backward_warp(x: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Take every cell's value from where the flow points: out(p) = x(p + flow(p)), bilinear, zero outside the grid.

    Source: DreamMover §3.2, the warp inside the importance metric of Eq. (4).

    Args:
        x: The values to look up, (B, C, h, w).
        flow: The displacement from each cell to the place it is looked up at, (B, 2, h, w), in cells.

    Returns:
        The values found, (B, C, h, w).
    """
    h, w = x.shape[-2:]
    dtype = working_dtype(x)
    # Cells have integer centres. Coordinates relative to the grid's edges (align_corners=False) can express that even
    # on a grid of one cell.
    target = between_edges(cell_grid(h, w, flow.to(dtype)) + flow.to(dtype), (h, w))
    return F.grid_sample(
        x.to(dtype), target.movedim(1, -1), mode="bilinear", padding_mode="zeros", align_corners=False
    )


def between_edges(places: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Places (B, 2, …) in cells of a grid (h, w), as coordinates that run from −1 to 1 from edge to edge."""
    # The extents are numbers, since a GPU would have to be waited for until it has a tensor of them.
    extents = zip(places.split(1, 1), reversed(size), strict=True)
    return torch.cat([(2 * place + 1) / extent - 1 for place, extent in extents], 1)


def sampled(images: torch.Tensor, places: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of images (B, C, H, W) at places (B, 2, n, s) in cells of a grid (h, w), and which lie on the images.

    Returns:
        Bilinear values (B, C, n, s), the edge's beyond the edge; and (B, 1, n, s) bool.
    """
    there = between_edges(places, size)
    return looked_up(images, there.movedim(1, -1)), (there.abs() < 1).all(1, keepdim=True)


def looked_up(images: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Bilinear values of images at places that are told by the images' edges; beyond an edge, the edge's values.

    Args:
        images: (B, C, H, W).
        there: x and y of the places, (B, n, s, 2), from −1 at the left and upper edge to 1 at the right and lower one.

    Returns:
        (B, C, n, s).
    """
    if images.device.type in ("cpu", "cuda"):
        return F.grid_sample(images, there, mode="bilinear", padding_mode="border", align_corners=False)
    # MPS knows "border" only since torch 2.13. The centres of the outermost pixels have the edge's values.
    h, w = images.shape[-2:]
    x, y = (place.clamp(1 / n - 1, 1 - 1 / n) for place, n in zip(there.unbind(-1), (w, h), strict=True))
    return F.grid_sample(images, torch.stack([x, y], -1), mode="bilinear", padding_mode="zeros", align_corners=False)


def sampled_around(
    image: torch.Tensor, middle: torch.Tensor, turn: torch.Tensor, offsets: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of an image around places, at offsets that are turned and scaled there, and which lie on the image.

    Args:
        image: The image, (C, H, W).
        middle: The places that are looked around, (2, m) in cells of a grid (h, w).
        turn: What the offsets are multiplied by at each place, as complex numbers less one, (2, m).
        offsets: The offsets from a place, (s, 2) in cells, alike for all places.
        size: Size (h, w) of the grid, which covers the same picture as the image.

    Returns:
        Bilinear values (C, s, m), the edge's beyond the edge; and (s, m) bool.
    """
    (h, w), (x, y), (real, imaginary) = size, between_edges(middle[None], size)[0], turn
    ones = torch.ones_like(offsets[:, :1])
    # One matrix product, to coordinates relative to the edges.
    to_x = torch.stack([x, 2 / w * (1 + real), -2 / w * imaginary])
    to_y = torch.stack([y, 2 / h * imaginary, 2 / h * (1 + real)])
    there = (torch.cat([ones, offsets], 1) @ torch.cat([to_x, to_y], 1)).unflatten(1, (2, -1))  # (s, 2, m)
    values = looked_up(image[None], there.movedim(1, 2)[None])
    inside = there.abs() < 1 - 1e-5  # what lies on the edge itself is off the image, however it is rounded
    return values[0], inside[:, 0] & inside[:, 1]


def lattice(radius: int, density: int, like: torch.Tensor) -> torch.Tensor:
    """The places (s, 2) of samples around a middle in cells, s = (2 · radius + 1)².

    Args:
        radius: Number of samples on each side of the middle.
        density: Number of samples to a cell.
        like: A tensor on the device and of the dtype that the places are to have.
    """
    side = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device) / density
    return torch.stack(torch.meshgrid(side, side, indexing="xy"), 2).flatten(0, 1)


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How far places (2, n) are from places (2, m), (n, m)."""
    # `torch.cdist` rounds where it multiplies matrices, and where it does not, it keeps a GPU busy for long.
    return torch.hypot(first[0, :, None] - second[0], first[1, :, None] - second[1])


def at_once(like: torch.Tensor, few: int, many: int) -> int:
    """How many things are worked on together: few on a CPU, many elsewhere, where few would take as long."""
    return few if like.device.type == "cpu" else many


def values_beside(x: torch.Tensor, steps: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """For every cell of (…, h, w), the values of other cells, a tensor (…, h, w) for each step to one.

    Args:
        x: The values of the cells, (…, h, w).
        steps: How far below and how far to the right of a cell the other one lies; at the edge of the grid, less far.
    """
    h, w = x.shape[-2:]
    far = max(abs(by) for step in steps for by in step)
    row, column = (torch.arange(-far, n + far, device=x.device).clamp(0, n - 1) for n in (h, w))
    wider = x[..., row[:, None], column]
    return [wider[..., far + down :, far + right :][..., :h, :w] for down, right in steps]


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The Gaussian mean around every cell of (…, h, w), the edge's values continued beyond the edge.

    Args:
        x: The values of the cells, (…, h, w).
        sigma: Standard deviation of the Gaussian, in cells.
    """
    h, w = x.shape[-2:]
    reach = round(3 * sigma)
    weights = [math.exp(-(distance**2) / (2 * sigma**2)) for distance in range(-reach, reach + 1)]
    weights = [weight / sum(weights) for weight in weights]
    padded = F.pad(x.reshape(1, -1, h, w), (reach,) * 4, mode="replicate")
    # Slices rather than a convolution, whose precision the caller's settings may lower.
    rows = weights[0] * padded[..., :h, :]
    for i, weight in enumerate(weights[1:], 1):
        rows.add_(padded[..., i : i + h, :], alpha=weight)
    means = weights[0] * rows[..., :w]
    for i, weight in enumerate(weights[1:], 1):
        means.add_(rows[..., i : i + w], alpha=weight)
    return means.reshape(x.shape)


def quantile(x: torch.Tensor, share: float) -> torch.Tensor:
    """The value that a share of all values of a tensor does not exceed, interpolated between two of them.

    This is `torch.quantile`, which since torch 2.14 asks for float64, also on devices that have none.

    Args:
        x: The values, of any shape.
        share: The share, in [0, 1].

    Returns:
        A single number, ().
    """
    ordered = x.flatten().sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def upsampled_flow(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Flow on a coarse grid as flow on a finer grid, interpolated bilinearly.

    Args:
        flow: Flow on the coarse grid, (B, 2, h, w), in cells of that grid.
        size: Size (H, W) of the fine grid, which covers the same picture.

    Returns:
        Flow on the fine grid, (B, 2, H, W), in cells of that grid.
    """
    scale = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).reshape(1, 2, 1, 1)
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=False) * scale


def flow_at_cell_centres(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Flow of pixels as flow of cells: a cell moves like the one pixel that its centre lies in.

    Args:
        flow: Flow of the pixels, (B, 2, H, W), in pixels.
        size: Size (h, w) of the grid of cells, which covers the same picture.

    Returns:
        Flow of the cells, (B, 2, h, w), in cells.
    """
    (h, w), (height, width) = size, flow.shape[-2:]
    row = (_centres(h, flow.device) * height / h).long()
    column = (_centres(w, flow.device) * width / w).long()
    pixels_per_cell = flow.new_tensor([width / w, height / h]).reshape(1, 2, 1, 1)
    return flow[..., row[:, None], column] / pixels_per_cell


def pixel_flow(flow: BidirectionalFlow, canvas: Canvas) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow of latent cells as flow of the output's pixels: a pixel moves like the cell that its centre lies in.

    The flow is not interpolated: matches are no finer than a cell, and blending across an edge would invent motion.

    Args:
        flow: The flow between the two images in both directions, in latent cells of the whole canvas.
        canvas: Where the picture sits on the canvas, and the size that frames are returned at.

    Returns:
        The forward flow and the backward flow, (1, 2, H, W) each, in pixels of the output.
    """
    h, w = flow.forward.shape[-2:]
    device = flow.forward.device
    row = _centres(canvas.output_height, device) * (canvas.content_height / canvas.output_height)
    column = _centres(canvas.output_width, device) * (canvas.content_width / canvas.output_width)
    row, column = (row * h / canvas.height).long(), (column * w / canvas.width).long()
    pixels_per_cell = flow.forward.new_tensor(
        [
            canvas.width / w * canvas.output_width / canvas.content_width,
            canvas.height / h * canvas.output_height / canvas.content_height,
        ]
    ).reshape(1, 2, 1, 1)
    forward, backward = (field[..., row[:, None], column] for field in (flow.forward, flow.backward))
    return forward * pixels_per_cell, backward * pixels_per_cell


def _centres(cells: int, device: torch.device) -> torch.Tensor:
    """The centres of cells along one side, 0.5, 1.5 and so on, (cells,), float32."""
    return torch.arange(cells, dtype=torch.float32, device=device) + 0.5
