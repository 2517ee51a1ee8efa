# SPDX-License-Identifier: Apache-2.0
"""The pose of a person in a photo: from MediaPipe's points to OpenPose's, in files and in a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dreammover_pipeline.framing import fit_points
from dreammover_pipeline.media.people import find_pose, openpose_json, openpose_points, poses_picture
from dreammover_pipeline.media.pictures import CAPTION, MARGIN, PANEL_EDGE
from dreammover_pipeline.poses import POSE_COLOURS, pose_pair
from dreammover_pipeline.records import Canvas

SIZE = (240, 160)
# The names in MediaPipe's and in OpenPose's own documentation of their orders.
EYES = [f"{side} eye{part}" for side in ("left", "right") for part in (" inner", "", " outer")]
LIMBS = ["shoulder", "elbow", "wrist", "pinky", "index", "thumb", "hip", "knee", "ankle", "heel", "foot"]
MEDIAPIPE = ["nose", *EYES, "left ear", "right ear", "mouth left", "mouth right"]
MEDIAPIPE += [f"{side} {part}" for part in LIMBS for side in ("left", "right")]
OPENPOSE = ["nose", "neck"]
OPENPOSE += [f"{side} {part}" for side in ("right", "left") for part in ("shoulder", "elbow", "wrist")]
OPENPOSE += [f"{side} {part}" for side in ("right", "left") for part in ("hip", "knee", "ankle")]
OPENPOSE += ["right eye", "left eye", "right ear", "left ear"]


def landmarks(seed=0):
    """33 points at random places of a photo, all of them seen."""
    points = torch.rand(33, 3, generator=torch.Generator().manual_seed(seed))
    points[:, 2] = (1 + points[:, 2]) / 2
    return points


def test_every_point_but_the_neck_is_the_one_of_its_name():
    found = landmarks()
    points = openpose_points(found, SIZE)
    assert points.shape == (18, 3)
    for name, point in zip(OPENPOSE, points, strict=True):
        if name != "neck":
            x, y, visibility = found[MEDIAPIPE.index(name)].tolist()
            assert point.tolist() == pytest.approx([x * 160 - 0.5, y * 240 - 0.5, visibility], abs=1e-4)


def test_the_neck_is_the_middle_of_the_shoulders_and_as_sure_as_the_less_sure_one():
    found = landmarks()
    found[MEDIAPIPE.index("left shoulder")] = torch.tensor([0.75, 0.25, 0.875])
    found[MEDIAPIPE.index("right shoulder")] = torch.tensor([0.25, 0.75, 0.625])
    assert openpose_points(found, SIZE)[1].tolist() == [79.5, 119.5, 0.625]
    found[MEDIAPIPE.index("right shoulder"), 2] = 0.25
    assert openpose_points(found, SIZE)[1].tolist() == [0, 0, 0]


def test_points_that_are_only_guessed_are_left_out():
    found = landmarks()
    found[MEDIAPIPE.index("left knee")] = torch.tensor([0.5, 1.75, 0.25])
    points = openpose_points(found, SIZE)
    assert points[OPENPOSE.index("left knee")].tolist() == [0, 0, 0]
    assert (points[:, 2] > 0).sum() == 17


def test_written_files_are_read_as_the_poses_that_were_found(tmp_path):
    poses = [openpose_points(landmarks(seed), SIZE) for seed in (0, 1)]
    poses[1][4] = 0
    files = [tmp_path / f"poses_{i}.json" for i in (0, 1)]
    for file, pose in zip(files, poses, strict=True):
        file.write_text(openpose_json(pose))
    canvas = Canvas(height=96, width=64, content_height=96, content_width=64, output_height=240, output_width=160)
    pair = pose_pair(files, [SIZE, SIZE], canvas)
    for photo, pose in enumerate(poses):
        seen = pose[:, 2] > 0
        assert torch.equal(pair.confidence[photo, 0] > 0, seen)
        expected = fit_points(pose[seen, :2], SIZE, canvas)
        torch.testing.assert_close(pair.places[photo, 0, seen], expected, atol=2e-3, rtol=0)


def test_the_picture_shows_both_photos_and_the_points_where_they_are():
    grey = torch.full((3, 2 * PANEL_EDGE, PANEL_EDGE), 0.5)
    poses = [torch.zeros(18, 3) for _ in range(2)]
    poses[0][0] = torch.tensor([200.5, 300.5, 1])
    poses[1][14] = torch.tensor([100.5, 600.5, 1])
    picture = np.asarray(poses_picture([grey, grey], poses)).astype(int)
    top, width = MARGIN + CAPTION, PANEL_EDGE // 2
    for left, number, (x, y) in ((MARGIN, 0, (100, 150)), (2 * MARGIN + width, 14, (50, 300))):
        panel = picture[top : top + PANEL_EDGE, left : left + width]
        assert panel[y, x].tolist() == list(POSE_COLOURS[number])
        others = np.abs(panel - 128).max(-1) > 1
        assert np.abs(np.argwhere(others) - [y, x]).max() < 5


def test_a_person_in_a_photo_is_found_and_nobody_where_nobody_is():
    pytest.importorskip("mediapipe.python.solutions.pose", reason="the extra 'poses' is not installed")
    data = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(data.astronaut()).movedim(-1, 0)
    pose = find_pose(photo)
    nose, right_eye, left_eye = (pose[OPENPOSE.index(name), :2] for name in ("nose", "right eye", "left eye"))
    # As somebody who looks at the photo finds them, who looks the astronaut in the face.
    torch.testing.assert_close(nose, torch.tensor([223.0, 127]), atol=8, rtol=0)
    torch.testing.assert_close(right_eye, torch.tensor([204.0, 103]), atol=8, rtol=0)
    torch.testing.assert_close(left_eye, torch.tensor([248.0, 112]), atol=8, rtol=0)
    assert find_pose(torch.zeros(3, 100, 120)) is None
