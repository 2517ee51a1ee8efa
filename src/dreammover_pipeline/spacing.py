# SPDX-License-Identifier: Apache-2.0
"""Frames spread over time so that neighbours differ equally, as far as warping alone tells."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .inputs import frame_times

PREVIEWS = 65  # moments at which a pair is looked at to spread its frames evenly, both ends among them
POOLED = 2  # latent cells a side that are averaged before previews are compared


def even_times(n_frames: int, previews: torch.Tensor) -> tuple[float, ...]:
    """Spread frames so that each differs from the next as much as any other does from its own, as previews have it.

    The difference of two previews is the root mean square of what their latents, averaged over squares of `POOLED`
    cells a side, differ by. It is summed up from the first image on; the frames stand where the sum reaches i/(n+1)
    of the whole, interpolated linearly between previews. Previews that are all alike leave the frames where they are.

    Source: ours.

    Args:
        n_frames: how many frames, n.
        previews: (P, C, h, w), at equal distances in time from δ = 0 to δ = 1; h and w at least `POOLED`.

    Returns:
        δ of each frame, strictly ascending and in (0, 1).
    """
    linear = frame_times(n_frames, None)
    steps = F.avg_pool2d(previews, POOLED).double().cpu().diff(dim=0).square().mean((1, 2, 3)).sqrt()
    travelled = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    if travelled[-1] == 0:
        return linear
    targets = torch.tensor(linear, dtype=torch.float64) * travelled[-1]
    after = torch.searchsorted(travelled, targets).clamp(1, len(steps))
    within = (targets - travelled[after - 1]) / steps[after - 1]
    return tuple(((after - 1 + within) / len(steps)).tolist())
