# SPDX-License-Identifier: Apache-2.0
"""A procedural world whose truth is known: jointed, textured sprites that move over soft backgrounds.

A scene is a pair of states, at time 0 and time 1. Between them every pose parameter (place, angle, log scale, joint
angles) runs linearly, so the true frame at any time is a drawing like its ends. Every part is rigid up to scale: a
pixel is drawn by mapping it back into the coordinates of the front-most part, textures included, and dense flow is
that map undone at one time and redone at another. It is exact, nothing is estimated.

Conventions: images (B, 3, H, W) in [0, 1]; flow (B, 2, H, W) in pixels, channel 0 dx to the right, channel 1 dy
downwards, at the pixels of the source; positions inside are shares of the frame, pixel centres at (i + ½) / size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import check_choice, check_integer, check_number
from .casting import (
    BACKGROUNDS,
    COLOURS,
    FARTHEST,
    MARGIN,
    SLOTS,
    SMALL,
    SMALL_MARGIN,
    TEXTURES,
    Cast,
    Draws,
    Look,
    captions_of,
    draw_lights,
    draw_looks,
)
from .sprites import FIXED, KINDS, Actors, Part, Place

DIFFICULTIES = ("same", "relit", "recast")
OUTLINE, DARKEST = 0.075, 0.28  # the soft dark border of parts: its width in sprite units, its brightness at the edge
STRIPE, DOT = 0.5, 0.42  # periods of the textures, sprite units
CONTRAST = 0.16  # of a background, where its field of slopes or clouds is 1


@dataclass(frozen=True)
class World:
    """What scenes are made of and how far they move."""

    size: int = 128  # pixels a side, 64 to 512; the same seed gives the same scene at every size
    kinds: tuple[str, ...] = tuple(KINDS)
    textures: tuple[str, ...] = TEXTURES
    colours: tuple[str, ...] = tuple(COLOURS)  # at least 4, so that recast finds others than the first end's
    backgrounds: tuple[str, ...] = BACKGROUNDS
    second_sprite: float = 0.0  # probability of a second, smaller sprite behind or in front
    translation: tuple[float, float] = (0.12, 0.36)  # shortest and longest way of a sprite, of the frame
    rotation: float = 52.0  # degrees between the ends, at most
    scale: float = 0.2  # the larger end against the smaller, relative, at most
    swing: float = 0.55  # radians a joint turns between the ends, at most

    def __post_init__(self):
        check_integer("size", self.size, 64)
        _check_at_most("size", self.size, 512)
        for name, known in (
            ("kinds", KINDS),
            ("textures", TEXTURES),
            ("colours", COLOURS),
            ("backgrounds", BACKGROUNDS),
        ):
            _check_names(name, getattr(self, name), tuple(known), 4 if name == "colours" else 1)
        for name, most in (("second_sprite", 1), ("rotation", 180), ("scale", 1), ("swing", 1.5)):
            check_number(name, getattr(self, name), 0)
            _check_at_most(name, getattr(self, name), most)
        if len(self.translation) != 2:
            raise ValueError(f"`translation` must be a shortest and a longest way, not {self.translation!r}")
        shortest, longest = self.translation
        check_number("translation", shortest, 0)
        check_number("translation", longest, shortest)
        _check_at_most("translation", longest, FARTHEST)

    def sample(self, count: int, seed: int, difficulty: str = "same", device: str | torch.device = "cpu") -> Scenes:
        """Draw scenes.

        Args:
            count: how many scenes, B.
            seed: decides them all; scene i is the same whatever the count, the size and the device.
            difficulty: "same", only motion; "relit", the light changes too, in strength, colour and direction;
                "recast", the same kinds in the same poses have other colours, textures and background at the other
                end, and dissolve from the one into the other.
            device: where the scenes live.

        Raises:
            ValueError: an argument out of range; it is named.
        """
        check_integer("count", count, 1)
        check_integer("seed", seed, 0)
        check_choice("difficulty", difficulty, DIFFICULTIES)
        draws = Draws(count, seed)
        large = Cast.draw(self, draws, 1, MARGIN)
        casts = [large, Cast.draw(self, draws, SMALL, SMALL_MARGIN, beside=large.share)]
        second, behind = draws.take(1)[:, 0] < self.second_sprite, draws.take(1)[:, 0] < 0.5
        looks = draw_looks(self, draws)
        lights = draw_lights(draws, difficulty == "relit")
        everyone = torch.ones(count, dtype=torch.bool)
        layers = [(1, second & behind), (0, everyone), (1, second & ~behind)]  # from back to front
        groups = [group for slot, where in layers for group in casts[slot].grouped(where, slot, device)]
        captions = [captions_of(look, casts, second.tolist()) for look in looks]
        last = 1 if difficulty == "recast" else 0
        return Scenes(
            self.size,
            list(zip(captions[0], captions[last], strict=True)),
            groups,
            tuple(look.to(device) for look in looks[: last + 1]),
            lights.to(device),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Scenes:
    """A batch of B pairs of states and everything between; made by `World.sample`."""

    size: int
    captions: list[tuple[str, str]]  # what the first and the last image show; they differ only for "recast"
    groups: list[Actors]  # from back to front
    looks: tuple[Look, ...]  # one, or those of the two ends
    lights: Tensor  # (2, B, 5) at either end: gain of red, green, blue, and its slope rightwards and downwards

    def __len__(self) -> int:
        return len(self.captions)

    def frame(self, time: float) -> Tensor:
        """The true frame.

        Args:
            time: in [0, 1]; 0 and 1 are the pair.

        Returns:
            (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: the time is out of range.
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
        """How far what is seen at `source` has moved at `target`, hidden there or not.

        Args:
            source: in [0, 1], the time whose pixels are asked about.
            target: in [0, 1].

        Returns:
            (B, 2, H, W) in pixels (dx, dy); zero on the background, which rests.

        Raises:
            ValueError: a time is out of range.
        """
        _check_time("source", source)
        _check_time("target", target)
        return self.size * self._moved(self._front(*self._grid, source), source, target)

    def visible(self, source: float, target: float) -> Tensor:
        """Where what is seen at `source` is seen at `target` too: inside the frame and behind nothing else.

        Inside means between the centres of the outermost pixels, where a bilinear lookup is defined.

        Args:
            source: in [0, 1], the time whose pixels are asked about.
            target: in [0, 1].

        Returns:
            (B, 1, H, W) bool.

        Raises:
            ValueError: a time is out of range.
        """
        _check_time("source", source)
        _check_time("target", target)
        front = self._front(*self._grid, source)
        x, y = (torch.stack(torch.broadcast_tensors(*self._grid), 1) + self._moved(front, source, target)).unbind(1)
        border = 0.5 / self.size * (1 - 1e-5)  # rounding leaves a pixel that rests inside
        inside = (torch.minimum(x, y) >= border) & (torch.maximum(x, y) <= 1 - border)
        return (inside & (self._front(x, y, target) == front))[:, None]

    def foreground(self, time: float) -> Tensor:
        """Where a sprite is seen.

        Args:
            time: in [0, 1].

        Returns:
            (B, 1, H, W) bool.

        Raises:
            ValueError: the time is out of range.
        """
        _check_time("time", time)
        return (self._front(*self._grid, time) > 0)[:, None]

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """Pixel centres, (1, 1, W) and (1, H, 1): sums of a function of each broadcast late, which is fast."""
        centres = (torch.arange(self.size, device=self.lights.device) + 0.5) / self.size
        return centres[None, None], centres[None, :, None]

    def _front(self, x: Tensor, y: Tensor, time: float) -> Tensor:
        """Number of the front-most part at each point, (B, H, W): 0 for background, each part its own."""
        front = torch.zeros((len(self), self.size, self.size), dtype=torch.long, device=x.device)
        for group in self.groups:
            seen = front[group.scenes]
            px, py = (x, y) if x.shape[0] == 1 else (x[group.scenes], y[group.scenes])
            for number, (part, place) in enumerate(group.places(time), group.slot * SLOTS + 1):
                seen = torch.where(part.shape.distance(*place.inverse(px, py)) < 0, number, seen)
            front[group.scenes] = seen
        return front

    def _moved(self, front: Tensor, source: float, target: float) -> Tensor:
        """Displacement of each pixel's part between two times, (B, 2, H, W), in shares of the frame."""
        # Row n holds (D, e) of part n's displacement D·p + e; at equal times D and e are exactly zero.
        table = self.lights.new_zeros((len(self), 1 + 2 * SLOTS, 6))
        for group in self.groups:
            pairs = zip(group.places(source), group.places(target), strict=True)
            for number, ((_, before), (_, after)) in enumerate(pairs, group.slot * SLOTS + 1):
                table[group.scenes, number] = before.displacement(after)
        rows = front.flatten(1)[:, :, None].expand(-1, -1, 6)
        a, b, c, d, e, f = table.gather(1, rows).unflatten(1, front.shape[1:]).unbind(-1)  # (B, H, W) each
        x, y = self._grid
        return torch.stack([a * x + b * y + e, c * x + d * y + f], 1)

    def _draw(self, look: Look, time: float) -> Tensor:
        """All scenes in one look, (B, 3, H, W), without lighting."""
        canvas = self._background(look).movedim(1, 0).flatten(1)  # (3, B·H·W)
        for group in self.groups:
            colours = look.colours[:, group.slot][group.scenes]  # (b, 2, 3)
            for part, place in group.places(time):
                self._paint(canvas, group, part, place, look, colours)
        return canvas.unflatten(1, (len(self), self.size, self.size)).movedim(0, 1)

    def _background(self, look: Look) -> Tensor:
        x, y = self._grid
        slopes = look.slopes[:, :, None, None]
        smooth = slopes[:, 0] * (x - 0.5) + slopes[:, 1] * (y - 0.5)
        cloudy = F.interpolate(look.clouds, (self.size, self.size), mode="bicubic", align_corners=False)[:, 0]
        is_cloudy = look.background == BACKGROUNDS.index("cloudy")
        field = torch.where(is_cloudy[:, None, None], cloudy, smooth)  # (B, H, W)
        return look.ground[:, :, None, None] * (1 + CONTRAST * field[:, None])

    def _paint(self, canvas: Tensor, group: Actors, part: Part, place: Place, look: Look, colours: Tensor) -> None:
        """Lay one part over the canvas, touching only a window around it in each scene."""
        size = self.size
        edge = min(size, math.ceil(2 * part.shape.reach * group.largest * size) + 4)
        first = (place.shift * size - edge / 2).round().long().clamp(0, size - edge)  # (b, 2), column and row
        steps = torch.arange(edge, device=canvas.device)
        column, row = first[:, :1] + steps, first[:, 1:] + steps  # (b, edge) each
        pixels = ((group.scenes[:, None, None] * size + row[:, :, None]) * size + column[:, None, :]).flatten()
        x, y = place.inverse((column[:, None, :] + 0.5) / size, (row[:, :, None] + 0.5) / size)  # (b, edge, edge)
        distance = part.shape.distance(x, y)
        cover = (0.5 - distance * (place.scale[:, None, None] * size)).clamp(0, 1).flatten()
        border = (distance / -OUTLINE).clamp(0, 1)
        shade = DARKEST + (1 - DARKEST) * border * border * (3 - 2 * border)
        colour = _colour(group, part, look, colours, x, y) * shade  # (3, b, edge, edge)
        below = canvas[:, pixels]
        canvas[:, pixels] = below + cover * (colour.flatten(1) - below)


def _colour(group: Actors, part: Part, look: Look, colours: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A part's colour before shading, broadcastable to (3, b, h, w), at points of its own coordinates."""
    if part.paint in FIXED:
        return torch.tensor(FIXED[part.paint], device=x.device)[:, None, None, None]
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


def _check_at_most(name: str, value: float, maximum: float) -> None:
    if value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, not {value}")


def _check_names(name: str, values: tuple[str, ...], known: tuple[str, ...], fewest: int) -> None:
    for value in values:
        check_choice(name, value, known)
    if len(values) < fewest or len(set(values)) < len(values):
        raise ValueError(f"`{name}` must be at least {fewest} different of {', '.join(known)}, not {values}")


def _check_time(name: str, time: float) -> None:
    check_number(name, time, 0)
    _check_at_most(name, time, 1)
