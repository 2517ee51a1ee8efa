# SPDX-License-Identifier: Apache-2.0
"""The true poses of the world's sprites, in the form that the pipeline takes poses of people in.

Each kind of sprite has up to 18 points on its parts, in OpenPose's places: a fish's back fin, say, is where a person
has the left arm. They are chosen so that OpenPose's limbs lie along the parts that turn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..poses import POSE_POINTS, draw_pose
from .scenes import Scenes
from .sprites import KINDS, Point

# By the number that a point has in OpenPose's order: the part that it lies on, and where, in the part's coordinates.
SKELETONS: dict[str, dict[int, tuple[str, Point]]] = {
    "fish": {
        0: ("mouth", (0.1, 0)),
        1: ("body", (0.1, 0)),
        2: ("side fin", (0, 0)),
        3: ("side fin", (-0.2, 0)),
        4: ("side fin", (-0.44, 0)),
        5: ("back fin", (0.1, 0.12)),
        6: ("back fin", (-0.3, -0.2)),
        8: ("belly fin", (0.04, -0.05)),
        9: ("belly fin", (-0.22, 0.2)),
        11: ("tail", (0, 0)),
        12: ("tail", (-0.42, -0.38)),
        13: ("tail", (-0.42, 0.38)),
        14: ("eye", (0, 0)),
    },
    "cat": {
        0: ("nose", (0, 0)),
        1: ("body", (0, -0.4)),
        2: ("right arm", (0, 0)),
        3: ("right arm", (0, 0.2)),
        4: ("right arm", (0, 0.44)),
        5: ("left arm", (0, 0)),
        6: ("left arm", (0, 0.2)),
        7: ("left arm", (0, 0.44)),
        8: ("tail", (0, 0)),
        9: ("tail tip", (0, 0)),
        10: ("tail tip", (-0.42, 0)),
        11: ("body", (0, 0.5)),
        12: ("left foot", (0, 0)),
        13: ("right foot", (0, 0)),
        14: ("right eye", (0, 0)),
        15: ("left eye", (0, 0)),
        16: ("right ear", (0.1, -0.34)),
        17: ("left ear", (-0.1, -0.34)),
    },
    "robot": {
        0: ("mouth", (0, 0)),
        1: ("head", (0, 0)),
        2: ("right arm", (0, 0)),
        3: ("right arm", (0, 0.28)),
        4: ("right arm", (0, 0.56)),
        5: ("left arm", (0, 0)),
        6: ("left arm", (0, 0.28)),
        7: ("left arm", (0, 0.56)),
        8: ("right leg", (0, 0)),
        9: ("right leg", (0, 0.22)),
        10: ("right leg", (0, 0.44)),
        11: ("left leg", (0, 0)),
        12: ("left leg", (0, 0.22)),
        13: ("left leg", (0, 0.44)),
        14: ("right eye", (0, 0)),
        15: ("left eye", (0, 0)),
        16: ("antenna", (0, 0)),
        17: ("bulb", (0, 0)),
    },
    "bird": {
        0: ("beak", (0.34, 0.02)),
        1: ("body", (0.3, -0.2)),
        2: ("wing", (0, 0)),
        3: ("wing", (-0.3, 0)),
        4: ("wing", (-0.6, 0)),
        5: ("tail", (0, 0)),
        6: ("tail", (-0.46, 0.05)),
        8: ("right leg", (0, 0)),
        9: ("right foot", (0, 0)),
        10: ("right foot", (0.18, 0)),
        11: ("left leg", (0, 0)),
        12: ("left foot", (0, 0)),
        13: ("left foot", (0.18, 0)),
        14: ("eye", (0, 0)),
        16: ("head", (-0.1, -0.3)),
    },
}


def poses_of(scenes: Scenes, time: float) -> Tensor:
    """The true poses of all sprites at one time.

    Args:
        scenes: the scenes.
        time: the time of the scenes, in [0, 1].

    Returns:
        (B, 2, 18, 3): for the first and for the second sprite of each scene x and y in pixels, where (0, 0) is the
        centre of the top left pixel, and 1, also for a point that is hidden by another part; all 0 for a point that
        the kind does not have, and for a second sprite that is not there.
    """
    poses = scenes.lights.new_zeros(len(scenes), 2, POSE_POINTS, 3)
    names = {kind: name for name, kind in KINDS.items()}
    for group in scenes.groups:
        places = {part.name: place for part, place in group.places(time)}
        for number, (part, point) in SKELETONS[names[group.kind]].items():
            place = places[part].at(point) * scenes.size - 0.5
            poses[group.scenes, group.slot, number] = F.pad(place, (0, 1), value=1.0)
    return poses


def pose_pictures(scenes: Scenes, time: float) -> Tensor:
    """The true poses of all scenes at one time, drawn as a ControlNet takes them, (B, 3, H, W) in [0, 1]."""
    size = scenes.size
    return torch.stack([draw_pose(pose[..., :2], pose[..., 2] > 0, size, size) for pose in poses_of(scenes, time)])
