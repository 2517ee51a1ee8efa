# SPDX-License-Identifier: Apache-2.0
"""What the world's sprites are made of: shapes, parts that hang on joints, and four kinds of sprite.

Lengths are in sprite units: a sprite fills about the square from -1 to 1, with x forwards (the direction that it
faces) and y downwards. Each part has its own coordinates, whose origin is its joint and whose axes are turned by the
joint's angle against those of the part that it hangs on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Point = tuple[float, float]


@dataclass(frozen=True)
class Ellipse:
    """An ellipse whose axes are parallel to the coordinate axes."""

    centre: Point
    radii: Point

    @property
    def reach(self) -> float:
        """Largest distance of a point of the shape from the origin, from above."""
        return math.hypot(*self.centre) + max(self.radii)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance to the boundary, negative inside; exact to first order near the boundary."""
        (cx, cy), (rx, ry) = self.centre, self.radii
        u, v = (x - cx) / rx, (y - cy) / ry
        length = torch.sqrt(u * u + v * v)
        slope = torch.sqrt((u / rx) ** 2 + (v / ry) ** 2).clamp_min(1e-6)
        return torch.where(length > 1e-3, length * (length - 1) / slope, -min(rx, ry))


@dataclass(frozen=True)
class Box:
    """A box with rounded corners, whose sides are parallel to the coordinate axes."""

    centre: Point
    half: Point
    corner: float

    @property
    def reach(self) -> float:
        """Largest distance of a point of the shape from the origin, from above."""
        return math.hypot(*self.centre) + math.hypot(*self.half)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance, negative inside."""
        u = (x - self.centre[0]).abs() - (self.half[0] - self.corner)
        v = (y - self.centre[1]).abs() - (self.half[1] - self.corner)
        u, v = torch.broadcast_tensors(u, v)
        outside = torch.sqrt(u.clamp_min(0) ** 2 + v.clamp_min(0) ** 2)
        return outside + torch.maximum(u, v).clamp_max(0) - self.corner


@dataclass(frozen=True)
class Polygon:
    """A convex polygon with rounded corners: all points within `corner` of it. Its corners come in clockwise order."""

    points: tuple[Point, ...]
    corner: float = 0.0

    @property
    def reach(self) -> float:
        """Largest distance of a point of the shape from the origin, from above."""
        return max(math.hypot(*point) for point in self.points) + self.corner

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance, negative inside."""
        inside = squared = None
        for (ax, ay), (bx, by) in zip(self.points, self.points[1:] + self.points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            u, v = x - ax, y - ay
            along = ((u * ex + v * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            square = (u - along * ex) ** 2 + (v - along * ey) ** 2
            plane = (u * ey - v * ex) / math.hypot(ex, ey)  # negative on the inner side of this edge
            squared = square if squared is None else torch.minimum(squared, square)
            inside = plane if inside is None else torch.maximum(inside, plane)
        distance = torch.sqrt(squared)
        return torch.where(inside > 0, distance, -distance) - self.corner


@dataclass(frozen=True)
class Part:
    """One rigid piece of a sprite."""

    name: str
    shape: Ellipse | Box | Polygon
    paint: str = "second"  # "main" and "second" are the sprite's own colours, "main" with texture; others are in FIXED
    parent: str = ""  # name of the part that this one hangs on, or empty if it hangs on the sprite itself
    joint: Point = (0.0, 0.0)  # where this part hangs, in the coordinates of its parent
    angle: float = 0.0  # angle of the joint at rest, in degrees, clockwise
    swing: float = 0.0  # how far the joint turns, as a share of the world's `swing`


@dataclass(frozen=True)
class Kind:
    """A kind of sprite."""

    unit: float  # length of one sprite unit, as a share of the frame's side
    parts: tuple[Part, ...]  # from back to front


# Colours that are the same in every scene, so that eyes, beaks and feet can be recognised.
FIXED = {
    "pale": (0.96, 0.96, 0.94),
    "dark": (0.10, 0.10, 0.12),
    "beak": (0.98, 0.66, 0.16),
    "rose": (0.92, 0.52, 0.56),
}

FISH = Kind(
    0.385,
    (
        Part("tail", Polygon(((0.1, 0), (-0.42, 0.4), (-0.42, -0.4)), 0.04), joint=(-0.62, 0), swing=0.9),
        Part("back fin", Polygon(((0.3, 0.12), (-0.32, 0.12), (-0.3, -0.2)), 0.08), joint=(0, -0.5), swing=0.3),
        Part("belly fin", Polygon(((0.14, -0.1), (-0.22, 0.2), (-0.1, -0.1)), 0.06), joint=(0.02, 0.5), swing=0.5),
        Part("body", Ellipse((0, 0), (0.78, 0.56)), "main"),
        Part("side fin", Ellipse((-0.2, 0), (0.26, 0.16)), joint=(0.12, 0.16), angle=-25, swing=1),
        Part("mouth", Ellipse((0, 0), (0.12, 0.045)), "dark", joint=(0.6, 0.2), angle=-20),
        Part("eye", Ellipse((0, 0), (0.17, 0.17)), "pale", joint=(0.42, -0.16)),
        Part("pupil", Ellipse((0.04, 0), (0.085, 0.085)), "dark", joint=(0.42, -0.16)),
    ),
)

CAT = Kind(
    0.38,
    (
        Part("tail", Box((-0.22, 0), (0.3, 0.1), 0.1), joint=(-0.3, 0.72), angle=18, swing=1),
        Part("tail tip", Box((-0.2, 0), (0.28, 0.09), 0.09), "second", "tail", (-0.44, 0), 62, 1),
        Part("left foot", Box((0, 0), (0.2, 0.11), 0.1), joint=(-0.24, 0.84)),
        Part("right foot", Box((0, 0), (0.2, 0.11), 0.1), joint=(0.28, 0.84)),
        Part("body", Ellipse((0, 0), (0.46, 0.58)), "main", joint=(0, 0.34)),
        Part("left arm", Box((0, 0.2), (0.1, 0.28), 0.1), joint=(-0.22, 0.2), angle=10, swing=0.8),
        Part("right arm", Box((0, 0.2), (0.1, 0.28), 0.1), joint=(0.24, 0.2), angle=-10, swing=0.8),
        Part(
            "left ear",
            Polygon(((0.18, 0.05), (-0.2, 0.05), (-0.1, -0.38)), 0.03),
            "second",
            "head",
            (-0.28, -0.28),
            -14,
        ),
        Part(
            "right ear", Polygon(((0.2, 0.05), (-0.18, 0.05), (0.1, -0.38)), 0.03), "second", "head", (0.28, -0.28), 14
        ),
        Part("head", Ellipse((0, 0), (0.53, 0.43)), "main", joint=(0.04, -0.42), swing=0.35),
        Part("muzzle", Ellipse((0, 0), (0.2, 0.13)), "pale", "head", (0.04, 0.21)),
        Part("nose", Polygon(((0.05, -0.03), (0, 0.03), (-0.05, -0.03)), 0.03), "rose", "head", (0.04, 0.14)),
        Part("left eye", Ellipse((0, 0), (0.09, 0.13)), "dark", "head", (-0.19, -0.06)),
        Part("right eye", Ellipse((0, 0), (0.09, 0.13)), "dark", "head", (0.25, -0.06)),
    ),
)

ROBOT = Kind(
    0.385,
    (
        Part("left leg", Box((0, 0.2), (0.14, 0.28), 0.05), "dark", joint=(-0.22, 0.5), swing=0.6),
        Part("right leg", Box((0, 0.2), (0.14, 0.28), 0.05), "dark", joint=(0.22, 0.5), swing=0.6),
        Part("left arm", Box((0, 0.26), (0.11, 0.36), 0.08), joint=(-0.54, -0.08), angle=14, swing=1),
        Part("right arm", Box((0, 0.26), (0.11, 0.36), 0.08), joint=(0.54, -0.08), angle=-14, swing=1),
        Part("antenna", Box((0, -0.1), (0.04, 0.14), 0.03), "dark", "head", (0, -0.48), swing=0.5),
        Part("bulb", Ellipse((0, 0), (0.1, 0.1)), "second", "antenna", (0, -0.24)),
        Part("body", Box((0, 0), (0.48, 0.41), 0.08), "main", joint=(0, 0.18)),
        Part("head", Box((0, -0.25), (0.42, 0.28), 0.08), joint=(0, -0.18), swing=0.3),
        Part("left eye", Ellipse((0, 0), (0.13, 0.13)), "pale", "head", (-0.18, -0.3)),
        Part("right eye", Ellipse((0, 0), (0.13, 0.13)), "pale", "head", (0.2, -0.3)),
        Part("left pupil", Ellipse((0.02, 0), (0.06, 0.06)), "dark", "head", (-0.18, -0.3)),
        Part("right pupil", Ellipse((0.02, 0), (0.06, 0.06)), "dark", "head", (0.2, -0.3)),
        Part("mouth", Box((0, 0), (0.2, 0.05), 0.03), "dark", "head", (0.01, -0.09)),
    ),
)

BIRD_TAIL = Polygon(((0.1, -0.1), (0.1, 0.12), (-0.46, 0.22), (-0.48, -0.12)), 0.05)
WING = Polygon(((0.08, -0.1), (0.08, 0.1), (-0.36, 0.24), (-0.62, 0)), 0.1)
BIRD = Kind(
    0.405,
    (
        Part("tail", BIRD_TAIL, joint=(-0.5, 0.12), angle=16, swing=0.6),
        Part("left leg", Box((0, 0.2), (0.05, 0.22), 0.04), "beak", joint=(-0.08, 0.55), swing=0.6),
        Part("right leg", Box((0, 0.2), (0.05, 0.22), 0.04), "beak", joint=(0.16, 0.55), swing=0.6),
        Part("left foot", Box((0.06, 0), (0.15, 0.055), 0.05), "beak", "left leg", (0, 0.4)),
        Part("right foot", Box((0.06, 0), (0.15, 0.055), 0.05), "beak", "right leg", (0, 0.4)),
        Part("beak", Polygon(((0.36, 0.02), (0, 0.13), (0, -0.13)), 0.03), "beak", "head", (0.28, 0.02)),
        Part("body", Ellipse((0, 0), (0.64, 0.46)), "main", joint=(-0.06, 0.2), angle=-12),
        Part("head", Ellipse((0, 0), (0.37, 0.35)), "main", joint=(0.4, -0.34), swing=0.35),
        Part("eye", Ellipse((0, 0), (0.14, 0.14)), "pale", "head", (0.11, -0.06)),
        Part("pupil", Ellipse((0.03, 0), (0.07, 0.07)), "dark", "head", (0.11, -0.06)),
        Part("wing", WING, joint=(0.12, 0.12), swing=1),
    ),
)

KINDS = {"fish": FISH, "cat": CAT, "robot": ROBOT, "bird": BIRD}


@dataclass(frozen=True)
class Place:
    """Where one part is in every scene of a batch: frame point = linear · part point + shift.

    Frame points are shares of the frame's side, part points are in sprite units.
    """

    linear: Tensor  # (b, 2, 2) a rotation, a scale and, for sprites that face left, a reflection
    shift: Tensor  # (b, 2)
    scale: Tensor  # (b,) length of one sprite unit, as a share of the frame's side

    def inner(self, joint: Point, turn: Tensor) -> Place:
        """The place of a part that hangs on this one at `joint` and is turned there by `turn`, (b,) radians."""
        return Place(_product(self.linear, _rotation(turn)), self.at(joint), self.scale)

    def at(self, point: Point) -> Tensor:
        """Where a point of this part is in the frame, (b, 2)."""
        return (self.linear * torch.tensor(point, device=self.linear.device)).sum(-1) + self.shift

    def inverse(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The part coordinates of points of the frame; x and y broadcast to (b, H, W)."""
        # The inverse of a rotation, scale and reflection is its transpose divided by the squared scale.
        (a, b), (c, d) = _entries(self.linear.mT / self.scale[:, None, None] ** 2)
        u, v = self.shift[:, :, None, None].unbind(1)
        x, y = x - u, y - v
        return a * x + b * y, c * x + d * y

    def displacement(self, after: Place) -> Tensor:
        """How points of this part move until the part is at the place `after`.

        Returns:
            (b, 6), in each row the four entries of D and the two of e: a frame point p moves by D·p + e.
        """
        inverse = self.linear.mT / self.scale[:, None, None] ** 2
        change = _product(after.linear - self.linear, inverse)
        offset = after.shift - self.shift - (change * self.shift[:, None]).sum(-1)
        return torch.cat([change.flatten(1), offset], 1)


@dataclass(frozen=True, eq=False)
class SpriteGroup:
    """Sprites of one kind, one in each of some scenes of a batch, and their motion from time 0 to time 1."""

    kind: Kind
    slot: int  # 0 if these are the first sprites of their scenes, 1 if they are the second
    scenes: Tensor  # (b,) indices of the scenes in the batch
    facing: Tensor  # (b,) 1 for a sprite that faces right, -1 for one that faces left
    pose: Tensor  # (2, b, 4) at time 0 and 1: centre x and y (shares of the side), angle (radians), log of the scale
    joints: Tensor  # (2, b, parts or more) radians by which joints are turned at time 0 and 1, where their swing is 1

    @cached_property
    def largest(self) -> float:
        """The largest scale of all these sprites, reached at time 0 or 1; kept, since reading it waits for a GPU."""
        return self.kind.unit * math.exp(self.pose[..., 3].max())

    def places(self, time: float) -> list[tuple[Part, Place]]:
        """Every part, from back to front, with its place at a time in [0, 1]."""
        x, y, angle, log_scale = torch.lerp(*self.pose, time).unbind(1)  # (b,) each
        joints = torch.lerp(*self.joints, time)
        scale = self.kind.unit * log_scale.exp()
        mirrored = torch.stack([self.facing, torch.ones_like(self.facing)], 1)[
            :, None
        ]  # (b, 1, 2), scales the columns
        root = Place(_rotation(angle) * mirrored * scale[:, None, None], torch.stack([x, y], 1), scale)
        numbers = {part.name: number for number, part in enumerate(self.kind.parts)}
        found = {"": root}

        def place(name: str) -> Place:
            if name not in found:
                part = self.kind.parts[numbers[name]]
                turn = math.radians(part.angle) + part.swing * joints[:, numbers[name]]
                found[name] = place(part.parent).inner(part.joint, turn)
            return found[name]

        return [(part, place(part.name)) for part in self.kind.parts]


def _rotation(angle: Tensor) -> Tensor:
    """Rotation matrices (b, 2, 2) that turn clockwise by `angle`, (b,) radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Product of matrices (b, 2, 2), spelt out: unlike a batched matmul's, its bits do not depend on b."""
    return (left[:, :, :, None] * right[:, None]).sum(2)


def _entries(matrix: Tensor) -> list[list[Tensor]]:
    """The four entries of matrices (b, 2, 2), row by row, each as (b, 1, 1)."""
    return [list(row[:, :, None, None].unbind(1)) for row in matrix.unbind(1)]
