# SPDX-License-Identifier: Apache-2.0
"""Chance in the world: who plays in every scene, how they move, and what everything looks like.

All of it is drawn on the CPU, in the same order whatever is asked for, so that the same seed gives the same motion at
every size, on every device and at every difficulty.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sprites import KINDS, Actors

if TYPE_CHECKING:
    from .world import World

TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("smooth", "cloudy")
COLOURS = {
    "red": (0.89, 0.16, 0.14),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.98, 0.86, 0.18),
    "green": (0.22, 0.66, 0.28),
    "blue": (0.18, 0.40, 0.90),
    "purple": (0.56, 0.24, 0.74),
    "white": (0.95, 0.95, 0.95),
}
FARTHEST = 0.44  # what a world may ask of a sprite's way, as a share of the frame
MARGIN = (1 - FARTHEST) / 2  # what a sprite's centre keeps from the border at both ends, which leaves room for that
TILT = math.radians(12)  # how far off upright a sprite is, at most, halfway through its turn
SMALL, SMALL_MARGIN = 0.5, 0.17  # a second sprite's size against the first's, and its margin
CLOUDS = 5  # cells a side of the random grid that clouds are smoothed from
GREY = 0.62  # what colours are mixed with to become a ground
SLOTS = 16  # numbers kept for the parts of one sprite
DRAWS = 256  # random numbers of a scene; more than are used, so that a new use leaves the old ones alone


class Draws:
    """Uniform random numbers in [0, 1) of every scene, taken a few at a time."""

    def __init__(self, count: int, seed: int):
        rows = []
        for scene in range(count):  # a generator each, so that a scene does not depend on how many come before it
            digest = hashlib.sha256(f"{seed}/{scene}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            rows.append(torch.rand(DRAWS, generator=generator))
        self.rows, self.taken = torch.stack(rows), 0

    def take(self, number: int) -> Tensor:
        """(B, number) that nobody had yet."""
        self.taken += number
        return self.rows[:, self.taken - number : self.taken]

    def between(self, low: float, high: float, number: int) -> Tensor:
        """(B, number) from a range."""
        return low + (high - low) * self.take(number)

    def signed(self, low: float, high: float, number: int) -> Tensor:
        """(B, number) whose magnitudes are from a range and whose signs are either."""
        return self.between(low, high, number) * (self.take(number) < 0.5).to(torch.float32).mul(2).sub(1)

    def pick(self, names: tuple[str, ...], known: tuple[str, ...], number: int) -> Tensor:
        """(B, number) indices into `known` of some of `names`."""
        return torch.tensor([known.index(name) for name in names])[(self.take(number) * len(names)).long()]


@dataclass(frozen=True)
class Cast:
    """One sprite of every scene, whatever its kind."""

    kind: Tensor  # (B,) index into KINDS
    facing: Tensor  # (B,) 1 to the right, -1 to the left
    pose: Tensor  # (2, B, 4) at either end: centre x and y, angle in radians, log scale
    joints: Tensor  # (2, B, SLOTS) at either end: what joints turn from rest at full swing, radians
    share: Tensor  # (B, 2) in [0, 1]: where its way lies in the room that it has, rightwards and downwards

    @classmethod
    def draw(cls, world: World, draws: Draws, size: float, margin: float, beside: Tensor | None = None) -> Cast:
        """Draw sprites of a size that keep a margin, on the other side of the frame than those `beside`, if given."""
        kind, facing = draws.pick(world.kinds, tuple(KINDS), 1)[:, 0], draws.signed(1, 1, 1)[:, 0]
        heading = draws.between(0, 2 * math.pi, 1)
        way = draws.between(*world.translation, 1) * torch.cat([heading.cos(), heading.sin()], 1)  # (B, 2)
        share = draws.take(2)
        if beside is not None:
            share = torch.where(beside < 0.5, 1 - 0.4 * share, 0.4 * share)
        first = margin + (-way).clamp_min(0) + share * (1 - 2 * margin - way.abs())
        turn, tilt = draws.signed(0.2, 1, 1) * math.radians(world.rotation), draws.between(-TILT, TILT, 1)
        growth, stature = draws.between(-1, 1, 1) * math.log1p(world.scale), draws.between(-0.06, 0.06, 1)
        bend, rest = draws.signed(0.6, 1, SLOTS) * world.swing, draws.between(-0.2, 0.2, SLOTS) * world.swing
        ends = torch.tensor([-0.5, 0.5])[:, None, None]
        turning, scaling = tilt + ends * turn, math.log(size) + stature + ends * growth  # (2, B, 1) each
        pose = torch.cat([torch.stack([first, first + way]), turning, scaling], 2)
        return cls(kind, facing, pose, rest + ends * bend, share)

    def grouped(self, where: Tensor, slot: int, device: str | torch.device) -> list[Actors]:
        """The sprites of some scenes, those of a kind together."""
        groups = []
        for index, kind in enumerate(KINDS.values()):
            scenes = (where & (self.kind == index)).nonzero()[:, 0]
            if len(scenes):
                state = self.facing[scenes], self.pose[:, scenes], self.joints[:, scenes]
                groups.append(Actors(kind, slot, scenes.to(device), *(tensor.to(device) for tensor in state)))
        return groups


@dataclass(frozen=True)
class Look:
    """How everything is coloured."""

    names: Tensor  # (B, 5) indices into COLOURS: main and second of either sprite, then the background
    colours: Tensor  # (B, 2, 2, 3) RGB: sprite, main and second
    texture: Tensor  # (B, 2) indices into TEXTURES
    phase: Tensor  # (B, 2) where stripes and dots begin
    background: Tensor  # (B,) index into BACKGROUNDS
    ground: Tensor  # (B, 3) the background's RGB
    slopes: Tensor  # (B, 2) of a smooth background
    clouds: Tensor  # (B, 1, CLOUDS, CLOUDS) of a cloudy one

    def to(self, device: str | torch.device) -> Look:
        """The same on a device."""
        return Look(**{name: value.to(device) for name, value in vars(self).items()})


def draw_looks(world: World, draws: Draws) -> list[Look]:
    """Two looks that share no colour of a sprite, no texture, ground or kind of background where there is a choice."""
    palette = torch.tensor([list(COLOURS).index(name) for name in world.colours])
    order = palette[draws.take(len(COLOURS))[:, : len(palette)].argsort(1)]  # (B, colours), every scene's own
    textures = _two_of(world.textures, TEXTURES, draws, 2)
    backgrounds = _two_of(world.backgrounds, BACKGROUNDS, draws, 1)
    rgb = torch.tensor(list(COLOURS.values()))
    looks = []
    for skip, texture, background in zip((0, 3), textures, backgrounds, strict=True):
        names = order[:, [(skip + place) % len(palette) for place in (0, 1, 3, 4, 2)]]
        looks.append(
            Look(
                names,
                rgb[names[:, :4]].unflatten(1, (2, 2)),
                texture,
                draws.take(2),
                background[:, 0],
                0.45 * rgb[names[:, 4]] + 0.55 * GREY,
                draws.signed(0.3, 1.2, 2),
                draws.between(-0.8, 0.8, CLOUDS * CLOUDS).unflatten(1, (1, CLOUDS, CLOUDS)),
            )
        )
    return looks


def _two_of(names: tuple[str, ...], known: tuple[str, ...], draws: Draws, number: int) -> tuple[Tensor, Tensor]:
    """Twice (B, number) indices into `known` of some of `names`, the second time others unless there is but one."""
    table = torch.tensor([known.index(name) for name in names])
    first = (draws.take(number) * len(names)).long()
    other = first + 1 + (draws.take(number) * (len(names) - 1)).long()
    return table[first], table[other % len(names)]


def draw_lights(draws: Draws, change: bool) -> Tensor:
    """(2, B, 5): neutral light at both ends, or a bright one and a dim one of another colour and direction."""
    bright, dim = draws.between(0.96, 1.06, 1), draws.between(0.6, 0.78, 1)
    cast, slope = draws.signed(0.04, 0.12, 3), draws.signed(0.12, 0.36, 2)
    swap = draws.take(1) < 0.5
    first, last = (torch.cat([gain * (1 + sign * cast), sign * slope], 1) for gain, sign in ((bright, 1), (dim, -1)))
    if change:
        return torch.stack([torch.where(swap, last, first), torch.where(swap, first, last)])
    return torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).expand(2, len(swap), 5)


def captions_of(look: Look, casts: list[Cast], second: list[bool]) -> list[str]:
    """What each scene shows, in words."""
    kinds, colours = list(KINDS), list(COLOURS)
    captions = []
    for scene, (names, textures) in enumerate(zip(look.names.tolist(), look.texture.tolist(), strict=True)):
        words = [
            f"a {TEXTURES[textures[slot]]} {colours[names[2 * slot]]} and {colours[names[2 * slot + 1]]} "
            + kinds[casts[slot].kind[scene]]
            for slot in ((0, 1) if second[scene] else (0,))
        ]
        background = f"{BACKGROUNDS[look.background[scene]]} {colours[names[4]]} background"
        captions.append(f"{' and '.join(words)} over a {background}")
    return captions
