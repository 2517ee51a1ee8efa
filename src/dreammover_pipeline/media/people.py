# SPDX-License-Identifier: Apache-2.0
"""Finds the pose of a person in a photo, by MediaPipe Pose, and shows and writes what was found.

MediaPipe comes with the extra 'poses' of the package, and its wheel holds the model's weights, so no network is
needed. It finds one person in a photo, the most prominent one. The modern interface, `mediapipe.tasks`, finds several,
but its weights have to be downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..images import Size, rgb
from ..poses import LIMB_BRIGHTNESS, draw_pose
from .pictures import as_panel, panel_row, picture_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Where the points of OpenPose's COCO order, except the second, which is the neck, are among MediaPipe's 33.
FROM_MEDIAPIPE = (
    0,  # nose
    *(12, 14, 16, 11, 13, 15),  # shoulder, elbow and wrist of the right and of the left arm
    *(24, 26, 28, 23, 25, 27),  # hip, knee and ankle of the right and of the left leg
    *(5, 2, 8, 7),  # right and left eye, right and left ear
)
SHOULDERS = (11, 12)
VISIBLE = 0.5  # the least visibility of a point that counts as seen, which MediaPipe's own drawings have, too


def find_pose(photo: torch.Tensor) -> torch.Tensor | None:
    """The pose of the most prominent person in a photo, as `openpose_points` returns it; None where nobody is seen.

    Args:
        photo: The photo (C, H, W), as `decode_images` returns it.

    Raises:
        RuntimeError: MediaPipe is not installed, or not in the version that is needed.
    """
    with _detector()(static_image_mode=True) as detector:
        found = detector.process(np.asarray(picture_of(rgb(photo)))).pose_landmarks
    if found is None:
        return None
    landmarks = [(point.x, point.y, point.visibility) for point in found.landmark]
    pose = openpose_points(torch.tensor(landmarks, dtype=torch.float32, device="cpu"), photo.shape[-2:])
    return pose if pose[:, 2].any() else None


def openpose_points(landmarks: torch.Tensor, size: Size) -> torch.Tensor:
    """The 18 points of OpenPose's COCO order (18, 3): x and y in pixels of the photo, and confidence.

    The place (0, 0) is the centre of the top left pixel. Confidence is visibility. The neck is the middle of the
    shoulders, and its confidence is that of the shoulder that is seen less. A point whose visibility is below
    `VISIBLE`, such as one that MediaPipe only guesses beyond the photo's edge, is all zeros.

    Args:
        landmarks: MediaPipe's 33 points (33, 3): x and y as shares of the photo's width and height, where (0, 0) is
            the outer corner of the top left pixel, and visibility in [0, 1].
        size: Size (H, W) of the photo, in pixels.
    """
    shoulders = landmarks[list(SHOULDERS)]
    neck = torch.cat([shoulders[:, :2].mean(0), shoulders[:, 2:].amin(0)])
    nose, *others = landmarks[list(FROM_MEDIAPIPE)]
    points = torch.stack([nose, neck, *others])
    height, width = size
    places = points[:, :2] * points.new_tensor([width, height]) - 0.5
    points = torch.cat([places, points[:, 2:]], 1)
    return torch.where(points[:, 2:] >= VISIBLE, points, 0)


def openpose_json(pose: torch.Tensor) -> str:
    """The text of an OpenPose JSON file with one person, whose points are (18, 3)."""
    numbers = [round(number, 3) for number in pose.flatten().tolist()]
    return json.dumps({"version": 1.3, "people": [{"pose_keypoints_2d": numbers}]})


def poses_picture(photos: Sequence[torch.Tensor], poses: Sequence[torch.Tensor]) -> Image.Image:
    """The two photos side by side, each with its pose drawn over it.

    Args:
        photos: The two photos (C, H, W), as `decode_images` returns them.
        poses: The pose (18, 3) of a person in each photo, as `openpose_points` returns it.
    """
    panels = [_posed_panel(photo, pose) for photo, pose in zip(photos, poses, strict=True)]
    return panel_row(panels, ["first photo", "last photo"])


def _posed_panel(photo: torch.Tensor, pose: torch.Tensor) -> Image.Image:
    panel = as_panel(picture_of(rgb(photo)))
    scale = pose.new_tensor([panel.width / photo.shape[-1], panel.height / photo.shape[-2]])
    places = (pose[:, :2] + 0.5) * scale - 0.5
    drawn = draw_pose(places[None], pose[None, :, 2] > 0, panel.height, panel.width)
    covered = (drawn.amax(0) / LIMB_BRIGHTNESS).clamp(max=1)  # each colour has a channel that is 1
    ground = torch.from_numpy(np.array(panel)).movedim(-1, 0) / 255
    return picture_of(ground * (1 - covered) + drawn)


def _detector() -> Callable:
    """MediaPipe's class for poses, whose import takes seconds.

    Raises:
        RuntimeError: There is none.
    """
    try:
        from mediapipe.python.solutions.pose import Pose  # which versions from 0.10.30 on do not have
    except ImportError as error:
        raise RuntimeError(
            "finding poses needs mediapipe 0.10.14, which exists for Python 3.11 and 3.12; install it with: "
            f"pip install 'dreammover-pipeline[poses]' ({error})"
        ) from error
    return Pose
