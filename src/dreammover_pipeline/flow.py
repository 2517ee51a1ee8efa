# SPDX-License-Identifier: Apache-2.0
"""Dense correspondence from features, and the backward warp.

Conventions, here and everywhere: flow is (B, 2, h, w) in cells of its own grid; channel 0 is dx (columns, to the
right), channel 1 dy (rows, downwards); the flow at a cell of the source says by how much it moves. Cell centres have
integer coordinates (`align_corners=True`), so an integer flow moves values exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .ddim import working_dtype
from .records import BidirectionalFlow

# Rows of the similarity matrix held at once: at 512² a block is 1024 × 4096 float32, 16 MiB.
MATCH_ROWS = 1024


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


@contextmanager
def _exact_matmul(device_type: str) -> Iterator[None]:
    """Full float32 products, whatever autocast, TF32 or bf16 setting the caller has: in bf16 45 % of matches move."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # since torch 2.9 every backend has a setting of its own
        backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        attribute, exact = "fp32_precision", "ieee"
        settings = [backend.fp32_precision for backend in backends]
    else:
        backends, attribute, exact = [torch.backends.cuda.matmul], "allow_tf32", False
        settings = [torch.backends.cuda.matmul.allow_tf32]
    try:
        for backend in backends:
            setattr(backend, attribute, exact)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            setattr(backend, attribute, setting)


def match_features(features: torch.Tensor, size: tuple[int, int]) -> BidirectionalFlow:
    """Match every cell of each image with the most similar cell of the other, by cosine similarity.

    F^{0→1}(p) = argmax_q cos(f⁰(p), f¹(q)) − p, and F^{1→0} the argmax over the other axis of the same matrix. Ties
    go to the lowest index. One matrix product, in row blocks, so memory stays bounded.

    Source: DreamMover Eq. (5), §3.2. Official code differs: a Python loop over the cells, one way at a time.

    Args:
        features: (2, C', h', w'), first and second image.
        size: (h, w) of the latent grid; the features are upsampled to it bilinearly (align_corners=False).

    Returns:
        The flow both ways on the latent grid, in cells.
    """
    h, w = size
    features = F.interpolate(features.to(working_dtype(features)), size=size, mode="bilinear", align_corners=False)
    first, second = F.normalize(features.flatten(2), dim=1)  # (C', h·w) each
    with _exact_matmul(features.device.type):
        forward, backward = _mutual_argmax(first.T, second)
    cells = cell_grid(h, w, features).flatten(2)  # (1, 2, h·w)
    return BidirectionalFlow(
        (cells[:, :, forward] - cells).reshape(1, 2, h, w),
        (cells[:, :, backward] - cells).reshape(1, 2, h, w),
    )


def _mutual_argmax(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax over each row and over each column of rows (n, C') @ columns (C', m), without holding the product."""
    best_column = torch.empty(rows.shape[0], dtype=torch.long, device=rows.device)
    best_value = rows.new_full((columns.shape[1],), -torch.inf)
    best_row = torch.zeros(columns.shape[1], dtype=torch.long, device=rows.device)
    for start in range(0, rows.shape[0], MATCH_ROWS):
        similarity = rows[start : start + MATCH_ROWS] @ columns
        best_column[start : start + MATCH_ROWS] = similarity.argmax(1)
        value, row = similarity.max(0)
        better = value > best_value  # strictly: an equal value further down never replaces a lower index
        best_row = torch.where(better, row + start, best_row)
        best_value = torch.where(better, value, best_value)
    return best_column, best_row
