# SPDX-License-Identifier: Apache-2.0
"""What is true of a scene at every time: its image, its dense flow, what is visible, and what is foreground.

A scene is a pair of states, one at time 0 and one at time 1. Between them every parameter of a pose (position, angle,
logarithm of the scale, joint angles) runs linearly, so the true frame at any time is drawn like the pair itself. Every
part of a sprite is rigid up to scale: a pixel is coloured by mapping it back into the coordinates of the part that is
in front there, and dense flow is that map undone at one time and redone at another. Flow is therefore exact: nothing
is estimated.

Conventions: images are (B, 3, H, W) in [0, 1]. Flow is (B, 2, H, W) in pixels, at the pixels of the source; channel 0
is dx to the right, channel 1 is dy downwards. Positions inside this module are shares of the frame's side, and the
centre of pixel i is at (i + ½) / size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import check_number
from .contents import BACKGROUNDS, MOST_PARTS, TEXTURES, Look
from .sprites import FIXED, Part, Place, SpriteGroup

OUTLINE = 0.075  # width of the soft dark border of every part, in sprite units
DARKEST = 0.28  # brightness at the outer edge of that border
STRIPE, DOT = 0.5, 0.42  # periods of the striped and of the dotted texture, in sprite units
CONTRAST = 0.16  # relative brightness change of a background where its field of slopes or clouds is 1


@dataclass(frozen=True, eq=False, repr=False)
class Scenes:
    """A batch of B scenes, as `World.sample` draws them."""

    size: int
    captions: list[tuple[str, str]]  # captions of the first and of the last image, which differ only for "recast"
    groups: list[SpriteGroup]  # sprites, from back to front
    looks: tuple[Look, ...]  # one look, or one for time 0 and one for time 1, which dissolve into each other
    lights: Tensor  # (2, B, 5) light at time 0 and at time 1, as `contents.draw_lights` returns it

    def __len__(self) -> int:
        return len(self.captions)

    def frame(self, time: float) -> Tensor:
        """The true images of all scenes at one time.

        Args:
            time: the time in [0, 1]; the images to be interpolated are those at 0 and at 1.

        Returns:
            (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: the time is outside [0, 1].
        """
        _check_time("time", time)
        weights = (1 - time, time) if len(self.looks) == 2 else (1,)
        image = sum(
            weight * self._draw(look, time) for weight, look in zip(weights, self.looks, strict=True) if weight
        )
        red, green, blue, across, down = torch.lerp(self.lights[0], self.lights[1], time).unbind(1)  # (B,) each
        x, y = self._grid
        gain = 1 + across[:, None, None] * (x - 0.5) + down[:, None, None] * (y - 0.5)  # (B, H, W)
        return (image * torch.stack([red, green, blue], 1)[:, :, None, None] * gain[:, None]).clamp(0, 1)

    def flow(self, source: float, target: float) -> Tensor:
        """How far what each pixel shows at time `source` has moved by time `target`, hidden there or not.

        Args:
            source: the time in [0, 1] of the image whose pixels are asked about.
            target: the time in [0, 1] that the pixels are followed to.

        Returns:
            (B, 2, H, W) in pixels, dx and dy; zero on the background, which does not move.

        Raises:
            ValueError: a time is outside [0, 1].
        """
        _check_time("source", source)
        _check_time("target", target)
        return self.size * self._moved(self._front(*self._grid, source), source, target)

    def visible(self, source: float, target: float) -> Tensor:
        """Which pixels of the image at time `source` are visible at time `target`: inside the frame and not hidden.

        A point is inside the frame if it lies between the centres of the outermost pixels, where bilinear
        interpolation is defined.

        Args:
            source: the time in [0, 1] of the image whose pixels are asked about.
            target: the time in [0, 1] that the pixels are followed to.

        Returns:
            (B, 1, H, W) bool.

        Raises:
            ValueError: a time is outside [0, 1].
        """
        _check_time("source", source)
        _check_time("target", target)
        front = self._front(*self._grid, source)
        x, y = (torch.stack(torch.broadcast_tensors(*self._grid), 1) + self._moved(front, source, target)).unbind(1)
        border = 0.5 / self.size * (1 - 1e-5)  # so that rounding does not push a resting pixel outside
        inside = (torch.minimum(x, y) >= border) & (torch.maximum(x, y) <= 1 - border)
        return (inside & (self._front(x, y, target) == front))[:, None]

    def foreground(self, time: float) -> Tensor:
        """Which pixels show a sprite.

        Args:
            time: the time of the image, in [0, 1].

        Returns:
            (B, 1, H, W) bool.

        Raises:
            ValueError: the time is outside [0, 1].
        """
        _check_time("time", time)
        return (self._front(*self._grid, time) > 0)[:, None]

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """x and y of the pixel centres, (1, 1, W) and (1, H, 1), which save work until they are broadcast together."""
        centres = (torch.arange(self.size, device=self.lights.device) + 0.5) / self.size
        return centres[None, None], centres[None, :, None]

    def _front(self, x: Tensor, y: Tensor, time: float) -> Tensor:
        """Number of the part that is in front at each point, (B, H, W); the background has number 0."""
        front = torch.zeros((len(self), self.size, self.size), dtype=torch.long, device=x.device)
        for group in self.groups:
            seen = front[group.scenes]
            px, py = (x, y) if x.shape[0] == 1 else (x[group.scenes], y[group.scenes])
            for number, (part, place) in enumerate(group.places(time), group.slot * MOST_PARTS + 1):
                seen = torch.where(part.shape.distance(*place.inverse(px, py)) < 0, number, seen)
            front[group.scenes] = seen
        return front

    def _moved(self, front: Tensor, source: float, target: float) -> Tensor:
        """Displacement of each pixel's part between two times, (B, 2, H, W), as shares of the frame's side."""
        # Row n holds (D, e) of part n's displacement D·p + e; at equal times D and e are exactly zero.
        table = self.lights.new_zeros((len(self), 1 + 2 * MOST_PARTS, 6))
        for group in self.groups:
            pairs = zip(group.places(source), group.places(target), strict=True)
            for number, ((_, before), (_, after)) in enumerate(pairs, group.slot * MOST_PARTS + 1):
                table[group.scenes, number] = before.displacement(after)
        rows = front.flatten(1)[:, :, None].expand(-1, -1, 6)
        a, b, c, d, e, f = table.gather(1, rows).unflatten(1, front.shape[1:]).unbind(-1)  # (B, H, W) each
        x, y = self._grid
        return torch.stack([a * x + b * y + e, c * x + d * y + f], 1)

    def _draw(self, look: Look, time: float) -> Tensor:
        """Images of all scenes with one look and without light, (B, 3, H, W)."""
        canvas = self._background(look).movedim(1, 0).flatten(1)  # (3, B·H·W)
        for group in self.groups:
            for part, place in group.places(time):
                self._paint(canvas, group, part, place, look)
        return canvas.unflatten(1, (len(self), self.size, self.size)).movedim(0, 1)

    def _background(self, look: Look) -> Tensor:
        """Backgrounds of all scenes, (B, 3, H, W)."""
        x, y = self._grid
        slopes = look.slopes[:, :, None, None]
        smooth = slopes[:, 0] * (x - 0.5) + slopes[:, 1] * (y - 0.5)
        cloudy = F.interpolate(look.clouds, (self.size, self.size), mode="bicubic", align_corners=False)[:, 0]
        is_cloudy = look.background == BACKGROUNDS.index("cloudy")
        field = torch.where(is_cloudy[:, None, None], cloudy, smooth)  # (B, H, W)
        return look.ground[:, :, None, None] * (1 + CONTRAST * field[:, None])

    def _paint(self, canvas: Tensor, group: SpriteGroup, part: Part, place: Place, look: Look) -> None:
        """Paint one part of a group's sprites over the canvas, changing only a window around it in each scene."""
        size = self.size
        edge = min(size, math.ceil(2 * part.shape.reach * group.largest * size) + 4)
        first = (place.shift * size - edge / 2).round().long().clamp(0, size - edge)  # (b, 2) column, row
        steps = torch.arange(edge, device=canvas.device)
        column, row = first[:, :1] + steps, first[:, 1:] + steps  # (b, edge) each
        pixels = ((group.scenes[:, None, None] * size + row[:, :, None]) * size + column[:, None, :]).flatten()
        x, y = place.inverse((column[:, None, :] + 0.5) / size, (row[:, :, None] + 0.5) / size)  # (b, edge, edge)
        distance = part.shape.distance(x, y)
        cover = (0.5 - distance * (place.scale[:, None, None] * size)).clamp(0, 1).flatten()
        border = (distance / -OUTLINE).clamp(0, 1)
        shade = DARKEST + (1 - DARKEST) * border * border * (3 - 2 * border)
        colour = _colour(group, part, look, x, y) * shade  # (3, b, edge, edge)
        below = canvas[:, pixels]
        canvas[:, pixels] = below + cover * (colour.flatten(1) - below)


def _colour(group: SpriteGroup, part: Part, look: Look, x: Tensor, y: Tensor) -> Tensor:
    """Colour of a part before shading at points in its own coordinates, broadcastable to (3, b, h, w)."""
    if part.paint in FIXED:
        return torch.tensor(FIXED[part.paint], device=x.device)[:, None, None, None]
    colours = look.colours[:, group.slot][group.scenes]  # (b, 2, 3)
    main, second = colours.movedim(2, 0)[..., None, None].unbind(2)  # (3, b, 1, 1) each
    if part.paint == "second":
        return second
    texture = look.texture[group.scenes, group.slot, None, None]
    u, v = look.phase[group.scenes][:, :, None, None].unbind(1)
    stripes = 0.5 + 1.6 * torch.cos(2 * math.pi * (x / STRIPE + u))
    across, down = (torch.remainder(at / DOT + phase, 1) - 0.5 for at, phase in ((x, u), (y, v)))
    dots = 0.5 + (0.3 - torch.sqrt(across * across + down * down)) * 8
    weight = torch.zeros_like(x)
    for name, pattern in (("striped", stripes), ("dotted", dots)):
        weight = torch.where(texture == TEXTURES.index(name), pattern.clamp(0, 1), weight)
    return main + weight * (second - main)


def _check_time(name: str, time: float) -> None:
    check_number(name, time, 0, maximum=1)
