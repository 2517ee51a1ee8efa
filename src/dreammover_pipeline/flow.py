# SPDX-License-Identifier: Apache-2.0
"""Dense correspondence: a flow matched from features, and smoothed where it is unsure.

The conventions for coordinates and flow are those of `fields.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .ddim import working_dtype
from .fields import backward_warp, cell_grid, distances
from .records import BidirectionalFlow

# Rows of the similarity matrix held at once: at 512² a block is 1024 × 4096 float32, 16 MiB.
MATCH_ROWS = 1024
SMOOTHING_RADIUS = 2  # radius in cells of the window that a pass of `smooth_flow` averages over
SMOOTHING_SIGMA = 1.5  # standard deviation in cells of the Gaussian that weights this window
REST_DOUBT = 1.5  # round-trip error in cells beyond which a match is doubtful
REST_WEIGHT = 0.5  # least weight of a cell that was found to rest
DOUBT = 1e-3  # weight of a cell whose match does not lead back to it at all, so that every window has a mean


_precision_lock = threading.RLock()  # the settings are the whole process's, so that threads take turns to change them


@contextmanager
def exact_matmul(device_type: str) -> Iterator[None]:
    """Compute matrix products in full float32 while the context lasts.

    The caller's autocast, TF32 or bf16 setting would lower their precision; in bf16, 45 % of the matches change. Other
    threads that ask for the same wait, since the one that leaves last would put back what it found on entering.
    """
    with _precision_lock, _full_float32(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    """Have no backend multiply matrices in less than float32 while the context lasts."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # since torch 2.9 every backend has a setting of its own
        backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        settings = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, setting in zip(backends, settings, strict=True):
                backend.fp32_precision = setting
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def unit_features(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features on the latent grid, each of length 1, so that their products are cosine similarities.

    Args:
        features: UNet features of the first and the second image, (2, C', h', w').
        size: Size (h, w) of the latent grid; the features are upsampled to it bilinearly (align_corners=False).

    Returns:
        The features of every cell of the latent grid, (2, C', h·w).
    """
    features = F.interpolate(features.to(working_dtype(features)), size=size, mode="bilinear", align_corners=False)
    return F.normalize(features.flatten(2), dim=1)


def match_features(
    features: torch.Tensor, size: tuple[int, int], bias: Callable[[slice], torch.Tensor] | None = None
) -> BidirectionalFlow:
    """Match every cell of each image with the most similar cell of the other, by cosine similarity.

    F^{0→1}(p) = argmax_q cos(f⁰(p), f¹(q)) − p, and F^{1→0} is the argmax over the other axis of the same matrix. Of
    equal similarities the one of lowest index wins. The matrix is computed in blocks of rows, so memory stays bounded.

    Source: DreamMover Eq. (5), §3.2. Official code differs: a Python loop over the cells, one way at a time.

    Args:
        features: UNet features of the first and the second image, (2, C', h', w').
        size: Size (h, w) of the latent grid, to which `unit_features` upsamples the features.
        bias: Function from a slice of the first image's cells to what is added to their similarities, (cells in the
            slice, h·w).

    Returns:
        The flow in both directions on the latent grid, in cells.
    """
    h, w = size
    first, second = unit_features(features, size)
    with exact_matmul(features.device.type):
        forward, backward = _mutual_argmax(first.T, second, bias)
    cells = cell_grid(h, w, first).flatten(2)  # (1, 2, h·w)
    return BidirectionalFlow(
        (cells[:, :, forward] - cells).reshape(1, 2, h, w),
        (cells[:, :, backward] - cells).reshape(1, 2, h, w),
    )


def distance_bias(size: tuple[int, int], penalty: float, like: torch.Tensor) -> Callable[[slice], torch.Tensor] | None:
    """A bias for `match_features` that prefers, of places that look alike, the nearer one.

    From the similarity of a match, `penalty` times its distance is subtracted, the distance measured in shorter sides
    of the grid. Where features tell places apart this changes little; on surfaces that look the same everywhere it
    decides the match.

    Source: ours; DreamMover matches without regard to distance.

    Args:
        size: Size (h, w) of the latent grid.
        penalty: What is subtracted from the cosine similarity of a match that lies one shorter side of the grid away,
            ≥ 0.
        like: A tensor on the device that the bias is to be on; the bias has its dtype too, or float32 if that is a
            half precision.

    Returns:
        A function from a slice of the first image's cells, in row-major order, to their bias, (cells in the slice,
        h·w); None if `penalty` is 0.
    """
    if not penalty:
        return None
    cells = cell_grid(*size, like.to(working_dtype(like)))[0].flatten(1) / min(size)  # (2, h·w)

    def bias(rows: slice) -> torch.Tensor:
        return -penalty * distances(cells[:, rows], cells)

    return bias


def join_features(blocks: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Join the features of several blocks; their cosine similarity is the mean of the blocks' cosine similarities.

    Source: ours; DreamMover matches the features of one block.

    Args:
        blocks: The features of each block for the first and the second image, (2, C', h', w') each, of any size.
        size: Size (h, w) of the latent grid, to which `unit_features` upsamples the features of every block.

    Returns:
        The joined features, (2, ΣC', h, w).
    """
    return torch.cat([unit_features(x, size) for x in blocks], 1).unflatten(2, size)


def round_trip_error(flow: BidirectionalFlow) -> torch.Tensor:
    """How far a cell's match is from leading back to it: |F(p) + F'(p + F(p))|, F' being the flow the other way.

    Args:
        flow: The flow between the two images, in both directions.

    Returns:
        The error in cells at each cell of the first and of the second image, (2, 1, h, w); infinite where p + F(p)
        lies outside the grid.
    """
    there, back = flow.stacked(), flow.reversed().stacked()
    found = backward_warp(torch.cat([back, torch.ones_like(back[:, :1])], 1), there)
    error = torch.hypot(*(there + found[:, :2]).split(1, 1))
    return torch.where(found[:, 2:] > 0.999, error, torch.inf)


# A function from the flow of both images (2, 2, h, w) and how sure each vector is (2, 1, h, w) to another such flow.
Regulariser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def regularise(
    flow: BidirectionalFlow,
    passes: int,
    regulariser: Regulariser,
    rests: torch.Tensor | None = None,
    hold: Callable[[torch.Tensor], torch.Tensor] = lambda stacked: stacked,
    trust: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
) -> BidirectionalFlow:
    """Let cells whose match agrees with its own match speak for their neighbours.

    On a surface without texture the argmax is noise that no match back confirms; there the flow is carried in from
    where it is sure.

    Source: ours; DreamMover uses the argmax as it is.

    Args:
        flow: The flow in both directions.
        passes: Number of passes of smoothing, 0 … ; the agreement is found anew before each.
        regulariser: What carries the flow on in each pass: `neighbourhood_mean`, or `rigid.similarity_flow`.
        rests: Cells that rest, (2, 1, h, w) bool, as `resting_cells` finds them. They begin with no flow, and the
            first pass trusts them by at least `REST_WEIGHT`.
        hold: Function from a flow (2, 2, h, w) to the flow with what is known put in; it is applied before the first
            pass and after each.
        trust: Function from the agreement of cells, (2, 1, h, w), to how sure they are.

    Returns:
        The regular flow in both directions, in fractions of cells.
    """
    stacked = flow.stacked()
    if rests is not None:
        stacked = torch.where(rests, 0, stacked)
    stacked = hold(stacked)
    for done in range(passes):
        weight = agreement(BidirectionalFlow.of(stacked))
        if rests is not None and done == 0:
            weight = torch.where(rests, weight.clamp(min=REST_WEIGHT), weight)
        stacked = hold(regulariser(stacked, trust(weight)))
    return BidirectionalFlow.of(stacked)


def smooth_flow(flow: BidirectionalFlow, passes: int) -> BidirectionalFlow:
    """`regularise` by the mean of the 5×5 around every cell, weighted by distance and agreement.

    Args:
        flow: The flow in both directions.
        passes: Number of passes of smoothing, 0 … .
    """
    return regularise(flow, passes, neighbourhood_mean)


def resting_cells(features: torch.Tensor, flow: BidirectionalFlow, tolerance: float) -> torch.Tensor | None:
    """Cells whose match is doubtful and that look as well like the same place in the other image: they rest.

    A match is doubtful if the way back from it ends more than `REST_DOUBT` cells away. The cell then rests unless the
    match is more similar than the same place by more than `tolerance`. On smooth ground, where the argmax is noise,
    nearly every place is as similar as the match.

    Source: ours.

    Args:
        features: UNet features of the first and the second image, (2, C', h', w').
        flow: The bare matches in both directions, in whole cells.
        tolerance: By how much in cosine similarity a match may be better than the same place for the cell to rest; 0
            for no cell.

    Returns:
        (2, 1, h, w) bool; None for no cell.
    """
    if not tolerance:
        return None
    h, w = flow.forward.shape[-2:]
    first, second = unit_features(features, (h, w))
    index = torch.arange(h * w, device=first.device)
    rests = []
    for own, other, way in ((first, second, flow.forward), (second, first, flow.backward)):
        dx, dy = way[0].flatten(1).round().long()
        here, there = ((own * other[:, cells]).sum(0) for cells in (index, index + dx + dy * w))
        rests.append(there - here < tolerance)
    doubtful = round_trip_error(flow) > REST_DOUBT
    return torch.stack(rests).unflatten(1, (h, w))[:, None] & doubtful


def agreement(flow: BidirectionalFlow) -> torch.Tensor:
    """How far to trust each cell's match: exp(−e²/2) + 0.001, e the round-trip error in cells; (2, 1, h, w)."""
    return (-round_trip_error(flow).square() / 2).exp() + DOUBT


def neighbourhood_mean(flow: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean flow of the 5×5 cells around each cell, weighted by a Gaussian of the distance and by `weight`.

    Args:
        flow: The flow to average, (B, 2, h, w).
        weight: The weight of each cell, (B, 1, h, w), ≥ 0.

    Returns:
        The mean flow, (B, 2, h, w); NaN where the weights of all 5×5 cells are zero.
    """
    side = 2 * SMOOTHING_RADIUS + 1
    offsets = cell_grid(side, side, flow).flatten(2) - SMOOTHING_RADIUS  # (1, 2, side²)
    near = (-offsets.square().sum(1) / (2 * SMOOTHING_SIGMA**2)).exp()[..., None]  # (1, side², 1)
    windows = F.unfold(torch.cat([flow, weight], 1), side, padding=SMOOTHING_RADIUS)
    dx, dy, weight = windows.unflatten(1, (3, side * side)).unbind(1)  # (B, side², h·w); outside the grid, weight is 0
    weight = weight * near
    mean = torch.stack([(part * weight).sum(1) / weight.sum(1) for part in (dx, dy)], 1)
    return mean.unflatten(2, flow.shape[-2:])


def _mutual_argmax(
    rows: torch.Tensor, columns: torch.Tensor, bias: Callable[[slice], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The argmax of each row and of each column of rows (n, C') @ columns (C', m) + bias, without holding the sum."""
    best_column = torch.empty(rows.shape[0], dtype=torch.long, device=rows.device)
    best_value = rows.new_full((columns.shape[1],), -torch.inf)
    best_row = torch.zeros(columns.shape[1], dtype=torch.long, device=rows.device)
    for start in range(0, rows.shape[0], MATCH_ROWS):
        block = slice(start, min(start + MATCH_ROWS, rows.shape[0]))
        similarity = rows[block] @ columns
        if bias is not None:
            similarity = similarity + bias(block)
        best_column[block] = similarity.argmax(1)
        value, row = similarity.max(0)
        better = value > best_value  # strictly, so that of equal values the one of lowest index is kept
        best_row = torch.where(better, row + start, best_row)
        best_value = torch.where(better, value, best_value)
    return best_column, best_row
