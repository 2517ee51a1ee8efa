# SPDX-License-Identifier: Apache-2.0
"""Two-level fusion of a pair's latents at step T: layout is averaged, detail never.

Layout is the predicted clean latents, detail the predicted noise.

Shapes: a pair's tensors are (2, C, h, w), first and second image; `times` (F,) holds the δ in (0, 1) of the frames
asked for; results are (F, C, h, w). `metric` (2, 1, h, w) is the importance of every cell of the two images, the log
of its weight where several cells land on one place. Frames do not depend on each other, so `times` may be cut into
pieces.
"""

from __future__ import annotations

import torch

from .ddim import working_dtype
from .fields import backward_warp
from .flow import round_trip_error
from .paths import MotionPaths
from .records import BidirectionalFlow
from .splatting import softmax_splat, winner_splat


def photometric_error(pair: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """How far each cell is from the cell of the other image it flows to: mean over channels of |x − backwarp(x', F)|.

    Source: DreamMover §3.2, the brightness constancy inside the metric of Eq. (4).

    Args:
        pair: The latents of the two images, (2, C, h, w).
        flow: The flow between the two images, in both directions.

    Returns:
        The error at each cell of the first and of the second image, (2, 1, h, w), ≥ 0.
    """
    matched = backward_warp(pair.flip(0), flow.stacked())
    return (pair.to(matched.dtype) - matched).abs().mean(1, keepdim=True)


def photometric_importance(
    clean: torch.Tensor, flow: BidirectionalFlow, alpha: float = 10.0, limit: float = 10.0
) -> torch.Tensor:
    """Splat metric by brightness constancy: M = clip(−α · mean_c |x − backwarp(x', F)|, −limit, limit).

    Source: DreamMover Eq. (4), §3.2: the metric of the softmax splat, on the predicted clean latents.

    Args:
        clean: The predicted clean latents z_{T→0} of the two images, (2, C, h, w).
        flow: The flow between the two images, in both directions.
        alpha: The factor α; the larger it is, the less weight a cell gets that differs from its match.
        limit: The largest value that |M| may take.

    Returns:
        M, the log of each cell's weight, (2, 1, h, w).
    """
    return (-alpha * photometric_error(clean, flow)).clamp(-limit, limit)


def agreement_importance(flow: BidirectionalFlow, limit: float = 10.0) -> torch.Tensor:
    """Splat metric by agreement of the two flows: M = −min(|F + F'∘F|, limit), F' the flow the other way, in cells.

    Source: ours, after the flow consistency of softmax splatting (arXiv 2003.05534 and its successors); DreamMover
    uses `photometric_importance`, under which a background that rests, and therefore matches itself exactly,
    outweighs whatever moves in front of it.

    Args:
        flow: The flow between the two images, in both directions.
        limit: The largest value that |M| may take, which it takes in cells whose match lies outside the grid.

    Returns:
        M, the log of each cell's weight, (2, 1, h, w).
    """
    return -round_trip_error(flow).clamp(max=limit)


def fuse_high_level(
    pair: torch.Tensor, paths: MotionPaths, metric: torch.Tensor, times: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layout: both images splatted to δ and averaged by time, (1−δ) σ(z⁰, F^{0→δ}) + δ σ(z¹, F^{1→δ}).

    A cell that only one image reaches takes that image's value alone; a cell that neither image reaches takes the
    average by time of the two unwarped latents.

    Source: DreamMover Eq. (7), §3.3; on holes the paper is silent.

    Args:
        pair: The predicted clean latents z_{T→0} of the two images, (2, C, h, w).
        paths: The path of every cell of both images through time.
        metric: The importance of each cell of the two images, (2, 1, h, w).
        times: The time δ of each frame, (F,).

    Returns:
        The frames' clean latents z^δ_{T→0} (F, C, h, w) and their coverage (F, 1, h, w), the number of images that
        reach a cell.
    """
    frames = len(times)
    times = times.to(pair.device, working_dtype(pair))
    splatted, reached = [], []
    for x, m, f in zip(pair, metric, paths.at(times), strict=True):
        warped, weight = softmax_splat(x.expand(frames, -1, -1, -1), f, m.expand(frames, -1, -1, -1))
        splatted.append(warped)
        reached.append(weight > 0)
    # A cell that one image does not reach takes the other's value for it, and a cell that neither reaches takes the
    # two unwarped values; Eq. (7) then holds in every cell.
    first = torch.where(reached[0], splatted[0], torch.where(reached[1], splatted[1], pair[0]))
    second = torch.where(reached[1], splatted[1], torch.where(reached[0], splatted[0], pair[1]))
    coverage = reached[0].to(first.dtype) + reached[1].to(first.dtype)
    return torch.lerp(first, second, times.reshape(-1, 1, 1, 1)), coverage


def fuse_low_level(eps: torch.Tensor, paths: MotionPaths, metric: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Detail: every cell takes one value of one image, ε^δ = WTA(ε⁰, ε¹); nothing is averaged.

    Each image's noise is warped so that a cell keeps, of the values that land on it, the one of highest importance.
    Between the two images the one of higher time-weighted importance wins, (1−δ) e^{M⁰} against δ e^{M¹}; a draw goes
    to the first image. A cell that neither image reaches takes the unwarped noise of the image nearer in time (the
    second at δ = ½).

    Source: DreamMover §3.3, the winner-takes-all of the low level. Official code differs: see `select_unwarped`.

    Args:
        eps: The noise ε_T of the two images at step T, (2, C, h, w).
        paths: The path of every cell of both images through time.
        metric: The importance of each cell of the two images, (2, 1, h, w).
        times: The time δ of each frame, (F,).

    Returns:
        The frames' noise ε^δ, (F, C, h, w).
    """
    frames = len(times)
    times = times.to(eps.device, working_dtype(eps))
    delta = times.reshape(-1, 1, 1, 1)
    (first, weight0), (second, weight1) = (
        winner_splat(x.expand(frames, -1, -1, -1), f, m.exp().expand(frames, -1, -1, -1))
        for x, m, f in zip(eps, metric, paths.at(times), strict=True)
    )
    weight0, weight1 = (1 - delta) * weight0, delta * weight1
    winner = torch.where(weight0 >= weight1, first, second)
    nearer = torch.where(delta < 0.5, eps[0], eps[1]).to(winner.dtype)
    return torch.where((weight0 > 0) | (weight1 > 0), winner, nearer)


def fuse_direct(
    latents: torch.Tensor, paths: MotionPaths, metric: torch.Tensor, times: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-level fusion: the noisy latents themselves are splatted and averaged, which blurs their noise.

    Source: DreamMover Eq. (6), §3.3: the form the paper argues against, kept for its ablation.

    Args:
        latents: The noisy latents z_T of the two images, (2, C, h, w).
        paths: The path of every cell of both images through time.
        metric: The importance of each cell of the two images, (2, 1, h, w).
        times: The time δ of each frame, (F,).

    Returns:
        The frames' noisy latents z^δ_T (F, C, h, w) and their coverage (F, 1, h, w), the number of images that reach
        a cell.
    """
    return fuse_high_level(latents, paths, metric, times)


def select_unwarped(latents: torch.Tensor, flow: BidirectionalFlow, times: torch.Tensor) -> torch.Tensor:
    """Mix the noisy latents as the released code does: each cell is that of one of the two *unwarped* z_T.

    The image of larger weight wins, the first in a draw. A weight is clip(0.3 − error, 0.001, 1), with the
    `photometric_error` of the noisy latents, times 1−δ for the first image and δ for the second. The UNet then
    predicts the noise for Eq. (8) from this mix.

    Source: DreamMover §3.3, as its released code has it, to compare with `fuse_low_level`.

    Args:
        latents: The noisy latents z_T of the two images, (2, C, h, w).
        flow: The flow between the two images, in both directions.
        times: The time δ of each frame, (F,).

    Returns:
        The mixed latents of each frame, (F, C, h, w).
    """
    delta = times.to(latents.device, working_dtype(latents)).reshape(-1, 1, 1, 1)
    weight = (0.3 - photometric_error(latents, flow)).clamp(0.001, 1)
    return torch.where((1 - delta) * weight[0] >= delta * weight[1], latents[0], latents[1])


def slerp(first: torch.Tensor, second: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation along the last axis; linear between vectors that are nearly parallel or opposite.

    Args:
        first: The vectors at δ = 0, (…, D).
        second: The vectors at δ = 1, (…, D).
        times: The time δ of each frame, (F,).

    Returns:
        The interpolated vectors of each frame, (F, …, D).
    """
    dtype = working_dtype(first)
    a, b = first.to(dtype), second.to(dtype)
    delta = times.to(a.device, dtype).reshape(-1, *[1] * a.ndim)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1)
    angle = cosine.acos()
    parallel = cosine.abs() > 1 - 1e-6
    sine = torch.where(parallel, 1, angle.sin())
    arc = (((1 - delta) * angle).sin() * a + (delta * angle).sin() * b) / sine
    return torch.where(parallel, torch.lerp(a, b, delta), arc)
