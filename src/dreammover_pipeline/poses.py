# SPDX-License-Identifier: Apache-2.0
"""Poses of people: read from arrays or OpenPose's files, put on the canvas, interpolated in time, and drawn.

A pose is 18 points in OpenPose's COCO order: nose, neck, then shoulder, elbow and wrist of the right and of the left
arm, hip, knee and ankle of the right and of the left leg, right and left eye, right and left ear. Right and left are
the person's own. A point that is seen in both photos moves on a straight line between them, as in Wang & Golland 2023
(arXiv 2307.12560), whose ControlNet takes the drawing of the interpolated pose.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .framing import fit_points
from .images import Size
from .inputs import check_input_file
from .records import POSE_POINTS, Canvas, PosePair

# Where each of the 18 points is among the 25 of OpenPose's BODY_25, which has the hips' middle and the feet, too.
FROM_BODY_25 = (*range(8), *range(9, 15), *range(15, 19))
# Source of the five constants that follow: the drawing of poses in version 1.1 of ControlNet and in controlnet_aux,
# whose pictures the models of OpenPose poses expect.
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # shoulders and arms
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # sides and legs
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # neck and face
)
POSE_COLOURS = (  # colours of the 18 points; the first 17 are those of the limbs, too
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
LIMB_BRIGHTNESS = 0.6
STICK = 4  # half the width of a limb and the radius of a point, in pixels of a picture of `STICK_SIDE`
STICK_SIDE = 512  # shorter side, in pixels, of the picture that `STICK` is for


def pose_pair(poses: object, sizes: Sequence[Size], canvas: Canvas, name: str = "poses") -> PosePair:
    """The `poses` argument of one pair, on its canvas.

    Args:
        poses: The pose of the first and of the last photo. Each is an array (18, 3) of one person or (P, 18, 3) of P
            people, x and y in pixels of the photo, where (0, 0) is the centre of the top left pixel, and confidence in
            [0, 1], 0 for a point that is not seen; or the path of an OpenPose JSON file of 18 or 25 points. A person
            has the same place in both.
        sizes: Size (H, W) of each of the two photos, in pixels.
        canvas: The canvas that both photos are put on.
        name: Name of the checked argument, for error messages.

    Raises:
        TypeError, ValueError: The argument is not what it may be, a file cannot be read, the two have different
            numbers of people, or no point is seen in both.
    """
    both = people_of_photos(poses, sizes, name)
    places = [
        fit_points(points[..., :2].flatten(0, 1), size, canvas).unflatten(0, points.shape[:2])
        for points, size in zip(both, sizes, strict=True)
    ]
    return PosePair(torch.stack(places), both[..., 2])


def people_of_photos(poses: object, sizes: Sequence[Size], name: str = "poses") -> torch.Tensor:
    """The `poses` argument of one pair as one tensor (2, P, 18, 3), x and y in pixels of each photo, and confidence.

    Args and errors are those of `pose_pair`.
    """
    if not isinstance(poses, list | tuple) or len(poses) != 2:
        what = f"{len(poses)} entries" if isinstance(poses, list | tuple) else f"a {type(poses).__name__}"
        raise TypeError(f"`{name}` must be a pair, the pose in the first photo and the pose in the last, not {what}")
    first, last = (_people(poses[photo], sizes[photo], photo, name) for photo in (0, 1))
    if len(first) != len(last):
        raise ValueError(
            f"`{name}` must have the same people in the same order in both photos, but has {len(first)} in img0 and "
            f"{len(last)} in img1"
        )
    both = torch.stack([first, last])
    if not (both[..., 2] > 0).all(0).any():
        raise ValueError(
            f"`{name}` must have a point that is seen in both photos, with a confidence above 0, but none is"
        )
    return both


def draw_pose(places: torch.Tensor, seen: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture of poses as ControlNet's models of OpenPose poses expect it.

    The ground is black. Every limb is a filled ellipse between its two points at 60 % of its colour, and over the
    limbs every point is a disc in its full colour; a limb one of whose points is absent is left out. A later person
    covers an earlier one. Widths grow with the picture's shorter side. Unlike the drawings that those models were
    trained on, edges are smooth and places are not rounded to whole pixels, so that what moves does not jump.

    Source: version 1.1 of ControlNet and controlnet_aux, for all figures and colours.

    Args:
        places: The points (P, 18, 2) of P people, x and y in pixels of the picture, where (0, 0) is the centre of the
            top left pixel.
        seen: Which of the points there are, (P, 18) bool.
        height: Height of the picture, in pixels.
        width: Width of the picture, in pixels.

    Returns:
        The picture (3, height, width) in [0, 1], float32, on the device of the places.
    """
    like = {"dtype": torch.float32, "device": places.device}
    pixels = torch.arange(width, **like)[None], torch.arange(height, **like)[:, None]
    colours = torch.tensor(POSE_COLOURS, **like) / 255
    radius = STICK * min(height, width) / STICK_SIDE
    picture = torch.zeros(3, height, width, **like)
    for person, there in zip(places.tolist(), seen.tolist(), strict=True):
        for (start, end), colour in zip(LIMBS, colours[: len(LIMBS)], strict=True):
            if there[start] and there[end]:
                distance = _limb_distance(person[start], person[end], radius, *pixels)
                picture = _painted(picture, distance, LIMB_BRIGHTNESS * colour)
        for (x, y), is_there, colour in zip(person, there, colours, strict=True):
            if is_there:
                picture = _painted(picture, torch.hypot(pixels[0] - x, pixels[1] - y) - radius, colour)
    return picture


def _people(pose: object, size: Size, photo: int, name: str) -> torch.Tensor:
    """The people in one photo as (P, 18, 3), float32 on the CPU; x and y are 0 where a point is not seen.

    Args:
        pose: The entry of the argument for this photo.
        size: Size (H, W) of the photo, in pixels.
        photo: 0 for the first photo, 1 for the last.
        name: Name of the checked argument, for error messages.

    Raises:
        TypeError, ValueError: The entry is not what it may be.
    """
    part = f"`{name}[{photo}]`"
    in_file = isinstance(pose, str | os.PathLike)
    if in_file:
        pose = _people_in_file(pose, part)
    form = f"{part} must be the path of an OpenPose JSON file or hold numbers, (18, 3) or (people, 18, 3)"
    try:
        values = torch.as_tensor(pose, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{form}, not {pose!r}") from error
    except OverflowError as error:
        raise ValueError(f"{part} must be finite, but holds a number that is too large") from error
    people = values[None] if values.ndim == 2 else values
    if people.ndim != 3 or people.shape[1:] != (POSE_POINTS, 3) or not len(people):
        raise ValueError(f"{form}, not {tuple(values.shape)}")
    if not people.isfinite().all():
        raise ValueError(
            f"{part} must be finite, but holds {people[~people.isfinite()][0]}; "
            "a point that is not seen has a confidence of 0"
        )
    if in_file:  # in which OpenPose itself writes confidences that are somewhat larger than 1
        people = torch.cat([people[..., :2], people[..., 2:].clamp(max=1)], -1)
    places, confidence = people[..., :2], people[..., 2]
    wrong = confidence[(confidence < 0) | (confidence > 1)]
    if len(wrong):
        raise ValueError(f"{part} must have confidences in [0, 1] behind x and y, but one is {wrong[0]:g}")
    _check_places(places[confidence > 0], size, photo, part)
    return torch.where(confidence[..., None] > 0, people, 0)


def _check_places(places: torch.Tensor, size: Size, photo: int, part: str) -> None:
    """Raise ValueError where points that are seen (k, 2) can be in no pixels of their photo.

    A point may lie outside, since detectors guess what is cut off, but not farther than the photo is long.
    """
    height, width = size
    shape = f"img{photo}, which has {width}×{height} pixels (width × height)"
    far = ((places < -max(size)) | (places > places.new_tensor([width, height]) + max(size))).any(1)
    if far.any():
        x, y = places[far][0].tolist()
        raise ValueError(
            f"{part} must be in pixels of its photo, but a point is at ({x:g}, {y:g}), far outside {shape}"
        )
    if len(places) > 1 and max(size) > 1 and ((places >= 0) & (places <= 1)).all():
        raise ValueError(
            f"{part} must be in pixels of its photo, but all its points are between 0 and 1 in {shape}; multiply "
            "shares of the sides by these"
        )


def _people_in_file(path: str | os.PathLike, part: str) -> list[list[list[float]]]:
    """The people in an OpenPose JSON file, each as 18 lists of x, y and confidence.

    Raises:
        ValueError: There is no regular file, it is no JSON, or it does not hold poses of 18 or 25 points.
    """
    check_input_file(path, part, "an OpenPose JSON file")
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{part} cannot be read as an OpenPose JSON file: {error}") from error
    people = content.get("people") if isinstance(content, dict) else None
    if not isinstance(people, list) or not people:
        raise ValueError(f"{part} must be an OpenPose JSON file with a list `people` of at least one person")
    poses = []
    for i, person in enumerate(people):
        numbers = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
        count = len(numbers) if isinstance(numbers, list) else 0
        if count not in (3 * POSE_POINTS, 3 * 25):
            raise ValueError(
                f"{part} must have `pose_keypoints_2d` of 18 or 25 points, 3 numbers each, for everybody in `people`, "
                f"but person {i} has {count} numbers"
            )
        points = [numbers[k : k + 3] for k in range(0, count, 3)]
        poses.append(points if len(points) == POSE_POINTS else [points[k] for k in FROM_BODY_25])
    return poses


def _limb_distance(
    start: Sequence[float], end: Sequence[float], radius: float, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Signed distance of pixels to the edge of a limb, negative inside; exact to first order near the edge.

    Args:
        start: Where the limb begins, x and y; it ends a long axis of the ellipse.
        end: Where the limb ends, x and y.
        radius: Half the limb's width, in pixels.
        x: Places of the columns of pixels, (1, W).
        y: Places of the rows of pixels, (H, 1).
    """
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    cos, sin = (dx / length, dy / length) if length else (1.0, 0.0)
    half = max(length / 2, 0.5)  # a limb that is seen from its end is at least a pixel long
    right, down = x - (start[0] + end[0]) / 2, y - (start[1] + end[1]) / 2
    along, across = (right * cos + down * sin) / half, (down * cos - right * sin) / radius
    level = torch.hypot(along, across)
    slope = torch.hypot(along / half, across / radius).clamp(min=1e-6)
    return torch.where(level > 1e-3, level * (level - 1) / slope, -min(half, radius))


def _painted(picture: torch.Tensor, distance: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """A picture (3, H, W) with a shape over it, given by its signed distance in pixels; its edge is a pixel wide."""
    return torch.lerp(picture, colour[:, None, None], (0.5 - distance).clamp(0, 1))
