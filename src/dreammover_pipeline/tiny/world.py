# SPDX-License-Identifier: Apache-2.0
"""A procedural world whose truth is known: jointed, textured sprites that move over soft backgrounds.

`World` says what scenes are made of and draws them at random; `scenes` holds what is then true of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs import check_choice, check_integer, check_number
from .contents import (
    BACKGROUNDS,
    CLOUDS,
    COLOURS,
    MOST_PARTS,
    TEXTURES,
    Draws,
    Look,
    Sprites,
    captions_of,
    draw_lights,
)
from .scenes import Scenes
from .sprites import KINDS, SpriteGroup

DIFFICULTIES = ("same", "relit", "recast")
FARTHEST = 0.44  # longest path that a world may ask of a sprite's centre, as a share of the frame's side
MARGIN = (1 - FARTHEST) / 2  # distance that a sprite's centre keeps from the border, which leaves room for that path
TILT = math.radians(12)  # largest angle from upright that a sprite has halfway between its first and last angle
SMALL, SMALL_MARGIN = 0.5, 0.17  # a second sprite's size relative to the first's, and the margin that its centre keeps
GREY = 0.62  # brightness of the grey that a colour is mixed with to become a background


@dataclass(frozen=True)
class World:
    """What scenes are made of and how far their sprites move."""

    size: int = 128  # side of the images in pixels, 64 to 1024; the same seed gives the same scene at every size
    kinds: tuple[str, ...] = tuple(KINDS)
    textures: tuple[str, ...] = TEXTURES
    colours: tuple[str, ...] = tuple(COLOURS)  # at least 4, so that "recast" finds colours that the first image lacks
    backgrounds: tuple[str, ...] = BACKGROUNDS
    second_sprite: float = 0.0  # probability of a second, smaller sprite behind or in front of the first
    translation: tuple[float, float] = (0.12, 0.36)  # shortest and longest path of a sprite, as shares of the frame
    rotation: float = 52.0  # largest angle that a sprite turns by between time 0 and time 1, in degrees
    scale: float = 0.2  # how much larger a sprite may be at one time than at the other, as a share of its size
    swing: float = 0.55  # largest angle that a joint turns by between time 0 and time 1, in radians

    def __post_init__(self):
        check_integer("size", self.size, 64, 1024)
        for name, known in (
            ("kinds", KINDS),
            ("textures", TEXTURES),
            ("colours", COLOURS),
            ("backgrounds", BACKGROUNDS),
        ):
            _check_names(name, getattr(self, name), tuple(known), 4 if name == "colours" else 1)
        for name, most in (("second_sprite", 1), ("rotation", 180), ("scale", 1), ("swing", 1.5)):
            check_number(name, getattr(self, name), 0, maximum=most)
        if len(self.translation) != 2:
            raise ValueError(
                f"`translation` must be the shortest and the longest path of a sprite, not {self.translation!r}"
            )
        shortest, longest = self.translation
        check_number("translation", shortest, 0)
        check_number("translation", longest, shortest, maximum=FARTHEST)

    def sample(self, count: int, seed: int, difficulty: str = "same", device: str | torch.device = "cpu") -> Scenes:
        """Draw scenes at random.

        Args:
            count: how many scenes to draw, B.
            seed: what decides every scene; scene number i is the same whatever the count, the image size and the
                device.
            difficulty: "same" for motion alone; "relit" for light that changes, too, in strength, colour and
                direction; "recast" for a last image that has the same kinds in the same poses but other colours,
                textures and background, and into which the first one dissolves.
            device: where the tensors of the scenes live.

        Raises:
            ValueError: an argument is out of its range; the message names the argument.
        """
        check_integer("count", count, 1)
        check_integer("seed", seed, 0)
        check_choice("difficulty", difficulty, DIFFICULTIES)
        draws = Draws(count, seed)
        large = self._draw_sprites(draws, 1, MARGIN)
        sprites = [large, self._draw_sprites(draws, SMALL, SMALL_MARGIN, beside=large.share)]
        has_second, is_behind = draws.take(1)[:, 0] < self.second_sprite, draws.take(1)[:, 0] < 0.5
        looks = self._draw_looks(draws)
        lights = draw_lights(draws, difficulty == "relit")
        captions = [captions_of(look, sprites, has_second.tolist()) for look in looks]
        last = 1 if difficulty == "recast" else 0
        return Scenes(
            self.size,
            list(zip(captions[0], captions[last], strict=True)),
            _from_back_to_front(sprites, has_second, is_behind, device),
            tuple(look.to(device) for look in looks[: last + 1]),
            lights.to(device),
        )

    def _draw_sprites(self, draws: Draws, size: float, margin: float, beside: Tensor | None = None) -> Sprites:
        """Draw one sprite for each scene.

        Args:
            draws: where the random numbers come from.
            size: the size of the sprites, relative to the size of their kind.
            margin: distance that their centres keep from the border at time 0 and 1, as a share of the frame's side.
            beside: the `share` of sprites that are there already, (B, 2); the new ones are put into the other half of
                the frame.
        """
        kind, facing = draws.pick(self.kinds, tuple(KINDS), 1)[:, 0], draws.signed(1, 1, 1)[:, 0]
        heading = draws.between(0, 2 * math.pi, 1)
        path = draws.between(*self.translation, 1) * torch.cat([heading.cos(), heading.sin()], 1)  # (B, 2)
        share = draws.take(2)
        if beside is not None:
            share = torch.where(beside < 0.5, 1 - 0.4 * share, 0.4 * share)
        first = margin + (-path).clamp_min(0) + share * (1 - 2 * margin - path.abs())
        turn, tilt = draws.signed(0.2, 1, 1) * math.radians(self.rotation), draws.between(-TILT, TILT, 1)
        growth, stature = draws.between(-1, 1, 1) * math.log1p(self.scale), draws.between(-0.06, 0.06, 1)
        bend, rest = draws.signed(0.6, 1, MOST_PARTS) * self.swing, draws.between(-0.2, 0.2, MOST_PARTS) * self.swing
        ends = torch.tensor([-0.5, 0.5])[:, None, None]
        turning, scaling = tilt + ends * turn, math.log(size) + stature + ends * growth  # (2, B, 1) each
        pose = torch.cat([torch.stack([first, first + path]), turning, scaling], 2)
        return Sprites(kind, facing, pose, rest + ends * bend, share)

    def _draw_looks(self, draws: Draws) -> list[Look]:
        """Draw two looks for each scene.

        The two share no colour of a sprite, no texture, and no colour or kind of background, where there is a choice.
        """
        palette = torch.tensor([list(COLOURS).index(name) for name in self.colours])
        order = palette[draws.take(len(COLOURS))[:, : len(palette)].argsort(1)]  # (B, colours), shuffled in each scene
        textures = draws.pick_two(self.textures, TEXTURES, 2)
        backgrounds = draws.pick_two(self.backgrounds, BACKGROUNDS, 1)
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


def _from_back_to_front(
    sprites: list[Sprites], has_second: Tensor, is_behind: Tensor, device: str | torch.device
) -> list[SpriteGroup]:
    """The first and the second sprites of all scenes, in groups that are painted one over the other."""
    everywhere = torch.ones(len(has_second), dtype=torch.bool)
    layers = [(1, has_second & is_behind), (0, everywhere), (1, has_second & ~is_behind)]
    return [group for slot, where in layers for group in sprites[slot].grouped(where, slot, device)]


def _check_names(name: str, values: tuple[str, ...], known: tuple[str, ...], fewest: int) -> None:
    for value in values:
        check_choice(name, value, known)
    if len(values) < fewest or len(set(values)) < len(values):
        raise ValueError(
            f"`{name}` must hold at least {fewest} of {', '.join(known)}, each of them once, but it is {values}"
        )
