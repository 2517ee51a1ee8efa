# SPDX-License-Identifier: Apache-2.0
"""What the world's sprites are made of: shapes, parts hung on joints, and the kinds built of them.

Lengths are in sprite units: a sprite fills about a square from -1 to 1, x forwards (the way it faces), y downwards.
Each part has coordinates of its own with its joint as origin, turned by the joint's angle against its parent's.
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
    """An ellipse along the axes."""

    centre: Point
    radii: Point

    @property
    def reach(self) -> float:
        """Largest distance of a point of the shape from the origin, from above."""
        return math.hypot(*self.centre) + max(self.radii)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance, negative inside; first-order exact at the boundary."""
        (cx, cy), (rx, ry) = self.centre, self.radii
        u, v = (x - cx) / rx, (y - cy) / ry
        length = torch.sqrt(u * u + v * v)
        slope = torch.sqrt((u / rx) ** 2 + (v / ry) ** 2).clamp_min(1e-6)
        return torch.where(length > 1e-3, length * (length - 1) / slope, -min(rx, ry))


@dataclass(frozen=True)
class Box:
    """A box along the axes with rounded corners."""

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
    """A convex polygon, its corners in clockwise order as seen, grown all round by `corner`."""

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
    paint: str = "second"  # "main" carries the texture; "second" is plain; or a fixed colour of FIXED
    parent: str = ""  # the part it hangs on; none: the sprite itself
    joint: Point = (0.0, 0.0)  # where, in the parent's coordinates
    angle: float = 0.0  # at rest, degrees, clockwise as seen
    swing: float = 0.0  # how far the joint moves, as a share of the world's swing


@dataclass(frozen=True)
class Kind:
    """A sprite: its parts from back to front, and how large one sprite unit is as a share of the frame."""

    unit: float
    parts: tuple[Part, ...]


# Paints that are the same in every scene; they keep eyes, beaks and feet what they are.
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
    """Where one part is in every scene of a batch: frame = linear · part + shift, in shares of the frame."""

    linear: Tensor  # (b, 2, 2), a turn, a scale and perhaps a mirror
    shift: Tensor  # (b, 2)
    scale: Tensor  # (b,) of the frame, for one sprite unit

    def inner(self, joint: Point, turn: Tensor) -> Place:
        """The place of something that hangs at a joint of this part and is turned there by (b,) radians."""
        at = torch.tensor(joint, device=turn.device)
        shift = (self.linear * at).sum(-1) + self.shift
        return Place(_product(self.linear, _rotation(turn)), shift, self.scale)

    def inverse(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Part coordinates of points of the frame, which broadcast to (b, H, W)."""
        # The inverse of a turn, scale and mirror is its transpose over the squared scale.
        (a, b), (c, d) = _entries(self.linear.mT / self.scale[:, None, None] ** 2)
        u, v = self.shift[:, :, None, None].unbind(1)
        x, y = x - u, y - v
        return a * x + b * y, c * x + d * y

    def displacement(self, after: Place) -> Tensor:
        """(b, 6) rows (D, e) so that a point p of this part moves by D·p + e to where it is `after`."""
        inverse = self.linear.mT / self.scale[:, None, None] ** 2
        change = _product(after.linear - self.linear, inverse)
        offset = after.shift - self.shift - (change * self.shift[:, None]).sum(-1)
        return torch.cat([change.flatten(1), offset], 1)


@dataclass(frozen=True, eq=False)
class Actors:
    """The sprites of one kind, one in each of some scenes of a batch, at both ends of their motion."""

    kind: Kind
    slot: int  # 0 for the scenes' first sprite, 1 for their second
    scenes: Tensor  # (b,) which scenes of the batch
    facing: Tensor  # (b,) 1 to the right, -1 to the left
    pose: Tensor  # (2, b, 4) at either end: centre x and y in shares of the frame, angle in radians, log scale
    joints: Tensor  # (2, b, parts or more) at either end: what joints turn from rest at full swing, radians

    @cached_property
    def largest(self) -> float:
        """The largest scale of them all, which is at one of the ends; asked once, as it waits for the device."""
        return self.kind.unit * math.exp(self.pose[..., 3].max())

    def places(self, time: float) -> list[tuple[Part, Place]]:
        """Every part, from back to front, and where it is at a time in [0, 1]."""
        x, y, angle, log_scale = torch.lerp(*self.pose, time).unbind(1)  # (b,) each
        joints = torch.lerp(*self.joints, time)
        scale = self.kind.unit * log_scale.exp()
        mirrored = torch.stack([self.facing, torch.ones_like(self.facing)], 1)[:, None]  # (b, 1, 2), columns scaled
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
    """(b, 2, 2) that turns by (b,) radians, clockwise as seen."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product element by element: unlike a batched matmul, its bits do not depend on the batch."""
    return (left[:, :, :, None] * right[:, None]).sum(2)


def _entries(matrix: Tensor) -> list[list[Tensor]]:
    """The four entries of (b, 2, 2), each (b, 1, 1)."""
    return [list(row[:, :, None, None].unbind(1)) for row in matrix.unbind(1)]
