# SPDX-License-Identifier: Apache-2.0
"""The difference in tone that the VAE makes to a photo, faded out over the frames beside the photo.

In-between frames have been decoded by the VAE, and the photos at the two ends of a video have not. The change that the
VAE makes to the tone of a picture would therefore be seen as a jump at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

TONE_CELLS = 8  # number of squares, along the shorter side of a picture, over each of which tone is averaged
FADE = 0.25  # distance in δ from an end of the video over which the tone of its photo is faded out


def tone_difference(photo: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """By how much a photo is brighter than its reconstruction, averaged over coarse cells, colour by colour.

    Source: ours.

    Args:
        photo: The photo, (1, 3, H, W) in [0, 1].
        reconstructed: The photo encoded and decoded by the VAE, (1, 3, H, W) in [0, 1].

    Returns:
        The difference in each coarse cell, (1, 3, a, b). A cell is about a square; the smaller of a and b is at most
        `TONE_CELLS`.
    """
    size = photo.shape[-2:]
    side = max(1.0, min(size) / TONE_CELLS)
    return F.adaptive_avg_pool2d(photo - reconstructed, [round(length / side) for length in size])


def fade_weights(time: float) -> tuple[float, float]:
    """How much of the first and of the last photo's tone difference is added to a frame at δ.

    A weight is 1 at the photo's end of the video and falls linearly to 0 at the distance `FADE` from that end.
    """
    return max(0.0, 1 - time / FADE), max(0.0, 1 - (1 - time) / FADE)


def with_tone(frame: torch.Tensor, tones: Sequence[torch.Tensor], time: float) -> torch.Tensor:
    """Add to a frame as much of the photos' tone differences as its time calls for.

    Args:
        frame: The frame, (1, 3, H, W) in [0, 1].
        tones: The results of `tone_difference` for the first and for the last photo, or an empty sequence to add
            nothing.
        time: The time δ of the frame.

    Returns:
        The frame with the tone added, (1, 3, H, W), clamped to [0, 1].
    """
    for tone, weight in zip(tones, fade_weights(time), strict=False):
        if weight:
            frame = frame + weight * F.interpolate(tone, frame.shape[-2:], mode="bicubic")
    return frame.clamp(0, 1)
