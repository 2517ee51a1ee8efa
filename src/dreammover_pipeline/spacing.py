# SPDX-License-Identifier: Apache-2.0
"""Frames spread over time so that neighbours differ equally, as far as warping alone tells."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .inputs import frame_times

PREVIEWS = 65  # number of previews, both ends included, that are compared to spread a pair's frames evenly
POOLED = 2  # side, in latent cells, of the squares that are averaged before previews are compared


def even_times(n_frames: int, previews: torch.Tensor) -> tuple[float, ...]:
    """Spread frames over time so that the difference between neighbours is always the same, judged by previews.

    The difference between two previews is the root mean square of the difference between their latents, averaged over
    squares of `POOLED` cells a side. The differences between consecutive previews are summed from the first image on;
    frame i stands where the sum reaches i/(n+1) of the total, interpolated linearly between previews. If all previews
    are equal, frame i stands at i/(n+1).

    Source: ours.

    Args:
        n_frames: Number n of in-between frames.
        previews: Latents of P previews at equal distances in time from δ = 0 to δ = 1, (P, C, h, w); h and w are at
            least `POOLED`.

    Returns:
        The time δ of each frame, strictly ascending and in (0, 1).
    """
    linear = frame_times(n_frames, None)
    steps = F.avg_pool2d(previews, POOLED).cpu().double().diff(dim=0).square().mean((1, 2, 3)).sqrt()
    travelled = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    if travelled[-1] == 0:
        return linear
    targets = travelled.new_tensor(linear) * travelled[-1]
    after = torch.searchsorted(travelled, targets).clamp(1, len(steps))
    within = (targets - travelled[after - 1]) / steps[after - 1]
    return tuple(((after - 1 + within) / len(steps)).tolist())
