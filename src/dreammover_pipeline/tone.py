# SPDX-License-Identifier: Apache-2.0
"""The tone that the VAE takes from a photo, faded out over the frames beside the photo.

What is made has been through the VAE, and the photos at the ends of a video have not. What the VAE does to the tone
of a picture would therefore be seen as a jump at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

TONE_CELLS = 8  # squares that tone is averaged over, along the shorter side of a picture
FADE = 0.25  # how far from an end, in δ, its tone is still added


def tone_difference(photo: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """By how much a photo is brighter than its reconstruction, averaged over coarse cells, colour by colour.

    Source: ours.

    Args:
        photo: (1, 3, H, W) in [0, 1].
        reconstructed: the same, through the VAE.

    Returns:
        (1, 3, a, b); a cell is about a square, the shorter of a and b is at most `TONE_CELLS`.
    """
    size = photo.shape[-2:]
    side = max(1.0, min(size) / TONE_CELLS)
    return F.adaptive_avg_pool2d(photo - reconstructed, [round(length / side) for length in size])


def fade_weights(time: float) -> tuple[float, float]:
    """How much of the tone of either end a frame at δ gets: 1 at that end, falling linearly to 0 `FADE` away."""
    return max(0.0, 1 - time / FADE), max(0.0, 1 - (1 - time) / FADE)


def with_tone(frame: torch.Tensor, tones: Sequence[torch.Tensor], time: float) -> torch.Tensor:
    """A frame with as much of the ends' tone as is due at its time.

    Args:
        frame: (1, 3, H, W) in [0, 1].
        tones: what `tone_difference` gives of the first and of the last image; none for the frame as it is.
        time: its δ.

    Returns:
        (1, 3, H, W) in [0, 1]; the frame itself where no tone is due.
    """
    for tone, weight in zip(tones, fade_weights(time), strict=False):
        if weight:
            frame = frame + weight * F.interpolate(tone, frame.shape[-2:], mode="bicubic")
    return frame.clamp(0, 1)
