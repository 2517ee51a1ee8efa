# SPDX-License-Identifier: Apache-2.0
"""Motion that is added to an interpolation in noise: the whole picture zooms, turns and shifts on its way.

Between two photos that do not show the same thing nothing moves by itself. Moved latents give the illusion that the
camera does. The first photo is moved towards the last one, and the last one back towards the first, so that both are
as they were at their own times.

Source: arXiv 2307.12560, §3, where affine transforms of the latents are added for that illusion.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .ddim import working_dtype


@dataclass(frozen=True)
class Affine:
    """How the first photo has moved when it reaches the last one.

    It is `zoom` times as large, turned clockwise by `degrees` about the picture's middle, and then shifted to the
    right and down by the shares `right` and `down` of the picture's width and height.
    """

    zoom: float
    degrees: float
    right: float
    down: float

    @classmethod
    def of(cls, values: Sequence[float] | None) -> Affine | None:
        """What four numbers stand for; None for no motion."""
        return None if values is None else cls(*map(float, values))

    def moved(self, latents: torch.Tensor, start: float, end: float) -> torch.Tensor:
        """What a picture at one time becomes at another.

        Args:
            latents: Latents of the picture, (C, h, w).
            start: The time δ at which the picture is as it is given.
            end: The time δ to which the picture is moved.

        Returns:
            (C, h, w). What comes in over an edge is the picture mirrored there.
        """
        h, w = latents.shape[-2:]
        turned, before, after = (
            self._turned(start) / self._turned(end),
            self._shift(start, h, w),
            self._shift(end, h, w),
        )
        y = torch.arange(h, dtype=torch.float64, device="cpu")[:, None] - (h - 1) / 2
        x = torch.arange(w, dtype=torch.float64, device="cpu")[None] - (w - 1) / 2
        away_x, away_y = x - after.real, y - after.imag
        # A complex product turns and scales.
        from_x = turned.real * away_x - turned.imag * away_y + before.real
        from_y = turned.imag * away_x + turned.real * away_y + before.imag
        places = torch.stack([2 * from_x / w, 2 * from_y / h], -1)[None]
        dtype = working_dtype(latents)
        return F.grid_sample(
            latents[None].to(dtype),
            places.to(latents.device, dtype),
            mode="bilinear",
            padding_mode="reflection",
            align_corners=False,
        )[0]

    def _turned(self, time: float) -> complex:
        """By what offsets from the middle are multiplied at a time, as complex numbers."""
        return self.zoom**time * cmath.exp(1j * math.radians(self.degrees) * time)

    def _shift(self, time: float, h: int, w: int) -> complex:
        """The shift at a time, in cells."""
        return time * complex(self.right * w, self.down * h)
