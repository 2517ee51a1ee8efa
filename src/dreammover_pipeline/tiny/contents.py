# SPDX-License-Identifier: Apache-2.0
"""What a scene of the world contains: sprites and how they move, colours, light and a caption.

Everything is drawn at random on the CPU, in the same order whatever is asked for, so that the same seed gives the same
motion at every image size, on every device and at every difficulty.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .sprites import KINDS, SpriteGroup

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
CLOUDS = 5  # side of the coarse random grid that a cloudy background is interpolated from
MOST_PARTS = 16  # a sprite has at most so many parts, and so many joint angles are kept for each
DRAWS = 256  # random numbers kept for a scene; more than are used, so that a new use leaves the earlier ones unchanged


class Draws:
    """Uniform random numbers in [0, 1) for each scene of a batch, handed out a few at a time."""

    def __init__(self, count: int, seed: int):
        rows = []
        for scene in range(count):  # one generator for each scene, so that a scene does not depend on the batch size
            digest = hashlib.sha256(f"{seed}/{scene}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            rows.append(torch.rand(DRAWS, generator=generator))
        self.rows, self.taken = torch.stack(rows), 0

    def take(self, number: int) -> Tensor:
        """The next `number` random numbers of each scene, (B, number)."""
        self.taken += number
        return self.rows[:, self.taken - number : self.taken]

    def between(self, low: float, high: float, number: int) -> Tensor:
        """Random numbers between `low` and `high`, (B, number)."""
        return low + (high - low) * self.take(number)

    def signed(self, low: float, high: float, number: int) -> Tensor:
        """Random numbers with a magnitude between `low` and `high` and a random sign, (B, number)."""
        return self.between(low, high, number) * (self.take(number) < 0.5).to(torch.float32).mul(2).sub(1)

    def pick(self, names: tuple[str, ...], known: tuple[str, ...], number: int) -> Tensor:
        """Random choices among `names`, as indices into `known`, (B, number)."""
        return torch.tensor([known.index(name) for name in names])[(self.take(number) * len(names)).long()]

    def pick_two(self, names: tuple[str, ...], known: tuple[str, ...], number: int) -> tuple[Tensor, Tensor]:
        """Two rounds of random choices among `names`, as indices into `known`, (B, number) each.

        Each choice of the second round differs from that of the first, unless there is only one name.
        """
        table = torch.tensor([known.index(name) for name in names])
        first = (self.take(number) * len(names)).long()
        other = first + 1 + (self.take(number) * (len(names) - 1)).long()
        return table[first], table[other % len(names)]


@dataclass(frozen=True)
class Sprites:
    """One sprite in each scene of a batch, whatever its kind."""

    kind: Tensor  # (B,) index into KINDS
    facing: Tensor  # (B,) 1 for a sprite that faces right, -1 for one that faces left
    pose: Tensor  # (2, B, 4) at time 0 and at time 1: centre x and y, angle in radians, logarithm of the scale
    joints: Tensor  # (2, B, MOST_PARTS) radians by which each joint is turned at time 0 and 1, where its swing is 1
    share: Tensor  # (B, 2) in [0, 1], how far right and how far down the path lies within the room that it has

    def grouped(self, where: Tensor, slot: int, device: str | torch.device) -> list[SpriteGroup]:
        """The sprites of some scenes, in one group for each kind.

        Args:
            where: which scenes' sprites are wanted, (B,) bool.
            slot: 0 if these are the scenes' first sprites, 1 if they are the second.
            device: where the tensors of the groups live.
        """
        groups = []
        for index, kind in enumerate(KINDS.values()):
            scenes = (where & (self.kind == index)).nonzero()[:, 0]
            if len(scenes):
                state = self.facing[scenes], self.pose[:, scenes], self.joints[:, scenes]
                groups.append(SpriteGroup(kind, slot, scenes.to(device), *(tensor.to(device) for tensor in state)))
        return groups


@dataclass(frozen=True)
class Look:
    """The colours and textures of everything in each scene of a batch."""

    names: Tensor  # (B, 5) indices into COLOURS: two for the first sprite, two for the second, one for the background
    colours: Tensor  # (B, 2, 2, 3) RGB of each sprite's main colour and second colour
    texture: Tensor  # (B, 2) index into TEXTURES for each sprite
    phase: Tensor  # (B, 2) offset of stripes and dots across and down, in periods
    background: Tensor  # (B,) index into BACKGROUNDS
    ground: Tensor  # (B, 3) RGB of the background
    slopes: Tensor  # (B, 2) brightness gradient of a smooth background, rightwards and downwards
    clouds: Tensor  # (B, 1, CLOUDS, CLOUDS) coarse brightness grid of a cloudy background

    def to(self, device: str | torch.device) -> Look:
        """A copy of this look on a device."""
        return Look(**{name: value.to(device) for name, value in vars(self).items()})


def draw_lights(draws: Draws, change: bool) -> Tensor:
    """The light at time 0 and at time 1.

    Args:
        draws: where the random numbers come from; as many are taken whether the light changes or not.
        change: whether one time is bright and the other dim, with another colour and another direction; otherwise the
            light is neutral at both.

    Returns:
        (2, B, 5): the gain of red, green and blue, then the slope of the gain rightwards and downwards.
    """
    bright, dim = draws.between(0.96, 1.06, 1), draws.between(0.6, 0.78, 1)
    cast, slope = draws.signed(0.04, 0.12, 3), draws.signed(0.12, 0.36, 2)
    swap = draws.take(1) < 0.5
    first, last = (torch.cat([gain * (1 + sign * cast), sign * slope], 1) for gain, sign in ((bright, 1), (dim, -1)))
    if change:
        return torch.stack([torch.where(swap, last, first), torch.where(swap, first, last)])
    return torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).expand(2, len(swap), 5)


def captions_of(look: Look, sprites: list[Sprites], has_second: list[bool]) -> list[str]:
    """One caption for each scene, which names sprites, colours, textures and background.

    Args:
        look: the colours and textures.
        sprites: the first sprites of all scenes, then the second.
        has_second: for each scene, whether its second sprite is shown.
    """
    kinds, colours = list(KINDS), list(COLOURS)
    captions = []
    for scene, (names, textures) in enumerate(zip(look.names.tolist(), look.texture.tolist(), strict=True)):
        words = [
            f"a {TEXTURES[textures[slot]]} {colours[names[2 * slot]]} and {colours[names[2 * slot + 1]]} "
            + kinds[sprites[slot].kind[scene]]
            for slot in ((0, 1) if has_second[scene] else (0,))
        ]
        background = f"{BACKGROUNDS[look.background[scene]]} {colours[names[4]]} background"
        captions.append(f"{' and '.join(words)} over a {background}")
    return captions
