# SPDX-License-Identifier: Apache-2.0
"""Poses of people, from a user's arrays and files to points on the canvas and their drawing."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from support.errors import refuses

from dreammover_pipeline.framing import fit_points
from dreammover_pipeline.poses import FROM_BODY_25, LIMBS, POSE_COLOURS, PosePair, draw_pose, pose_pair
from dreammover_pipeline.records import Canvas

SIZES = (120, 180), (200, 100)  # of the second photo much is cropped: it is upright, and the canvas is not
CANVAS = Canvas(height=64, width=96, content_height=60, content_width=90, output_height=120, output_width=180)


def people(count, size, seed=0):
    """Poses inside a photo of this size, all points seen, (count, 18, 3)."""
    poses = torch.rand(count, 18, 3, generator=torch.Generator().manual_seed(seed))
    return poses * torch.tensor([size[1] - 1, size[0] - 1, 0.5]) + torch.tensor([0, 0, 0.5])


def both(count=2):
    return people(count, SIZES[0]), people(count, SIZES[1], seed=1)


def pair_of(poses):
    return pose_pair(poses, SIZES, CANVAS)


def seen_at(*points):
    """One person of whom only these points are there, by their numbers: the places (1, 18, 2), and which there are."""
    places, seen = torch.zeros(1, 18, 2), torch.zeros(1, 18, dtype=torch.bool)
    for number, place in points:
        places[0, number], seen[0, number] = torch.tensor(place), True
    return places, seen


def file_of(folder, pose):
    """A file of a pose (P, 18 or 25, 3), as OpenPose writes it."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    persons = [{"pose_keypoints_2d": person.flatten().tolist(), "face_keypoints_2d": []} for person in pose]
    path.write_text(json.dumps({"version": 1.3, "people": persons}))
    return path


# ── Onto the canvas and through time ───────────────────────────────────────────────────────────────────────────────


def test_every_point_is_put_where_its_photo_is_put():
    poses = both()
    pair = pair_of(poses)
    for photo, (pose, size) in enumerate(zip(poses, SIZES, strict=True)):
        for person in (0, 1):
            expected = fit_points(pose[person, :, :2], size, CANVAS)
            torch.testing.assert_close(pair.places[photo, person], expected, atol=1e-4, rtol=0)
        assert torch.equal(pair.confidence[photo], pose[..., 2])


def test_points_move_straight_and_evenly_from_the_first_photo_to_the_last():
    pair = pair_of(both())
    assert torch.equal(pair.at(0)[0], pair.places[0])
    assert torch.equal(pair.at(1)[0], pair.places[1])
    for time in (0.25, 0.5, 0.9):
        places, seen = pair.at(time)
        torch.testing.assert_close(places, (1 - time) * pair.places[0] + time * pair.places[1], atol=1e-4, rtol=0)
        assert seen.all()


def test_the_way_back_is_the_way_there():
    first, last = both()
    there = pose_pair((first, last), SIZES, CANVAS)
    back = pose_pair((last, first), SIZES[::-1], CANVAS)
    torch.testing.assert_close(there.at(0.3)[0], back.at(0.7)[0], atol=1e-4, rtol=0)


def test_the_order_of_people_is_kept():
    first, last = both()
    straight, swapped = pair_of((first, last)), pair_of((first.flip(0), last.flip(0)))
    assert torch.equal(swapped.at(0.3)[0], straight.at(0.3)[0].flip(0))


def test_a_point_that_one_photo_lacks_is_absent_throughout():
    first, last = both()
    first[0, 3, 2] = last[1, 5, 2] = 0
    last[1, 5, :2] = 1e9  # no matter where it is said to be
    pair = pair_of((first, last))
    for time in (0, 0.5, 1):
        places, seen = pair.at(time)
        assert places.isfinite().all()
        assert (~seen).nonzero().tolist() == [[0, 3], [1, 5]]


def test_all_forms_of_a_pose_are_the_same(tmp_path):
    first, last = both(1)
    expected = pair_of((first, last))
    assert expected.places.dtype == torch.float32
    wide = [torch.full((1, 25, 3), 7.0) for _ in range(2)]
    for long, pose in zip(wide, (first, last), strict=True):
        long[:, FROM_BODY_25] = pose
    forms = [
        (first[0], last[0]),
        (first.double().numpy(), last[0].double().numpy()),
        [first.tolist(), last.requires_grad_()],
        (file_of(tmp_path, first), str(file_of(tmp_path, last))),
        [file_of(tmp_path, pose) for pose in wide],
    ]
    for form in forms:
        pair = pair_of(form)
        assert torch.equal(pair.places, expected.places)
        assert torch.equal(pair.confidence, expected.confidence)
        assert not pair.places.requires_grad


def test_the_25_points_of_openpose_are_mapped_by_their_names():
    """By the names in OpenPose's own documentation of its two orders."""
    sides = [f"{side} {part}" for side in "RL" for part in ("shoulder", "elbow", "wrist")]
    legs = [f"{side} {part}" for side in "RL" for part in ("hip", "knee", "ankle")]
    face = ["R eye", "L eye", "R ear", "L ear"]
    coco = ["nose", "neck", *sides, *legs, *face]
    body_25 = ["nose", "neck", *sides, "middle of the hips", *legs, *face, *(f"foot {i}" for i in range(6))]
    assert [body_25[i] for i in FROM_BODY_25] == coco


# ── Refusals ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("poses", [None, 3, "pose.json", people(1, SIZES[0]), [people(1, SIZES[0])], ()])
def test_what_is_no_pair_is_refused(poses):
    refuses(TypeError, "poses", pair_of, poses)


@pytest.mark.parametrize("shape", [(18, 2), (17, 3), (25, 3), (0, 18, 3), (1, 1, 18, 3), (3,)])
def test_other_shapes_are_refused(shape):
    pose = people(1, SIZES[0])
    refuses(ValueError, r"poses\[1\]", pair_of, (pose, np.ones(shape)))


@pytest.mark.parametrize("pose", [None, {"people": []}, [[None] * 3] * 18, [[1, 2, "x"]] * 18])
def test_what_holds_no_numbers_is_refused(pose):
    refuses(TypeError, r"poses\[0\]", pair_of, (pose, people(1, SIZES[1])))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("column", [0, 2])
def test_numbers_that_are_not_finite_are_refused(value, column):
    pose = people(1, SIZES[0]).tolist()
    pose[0][4][column] = value
    refuses(ValueError, r"poses\[0\]", pair_of, (pose, people(1, SIZES[1])))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_confidence_outside_its_range_is_refused(value):
    pose = people(1, SIZES[1])
    pose[0, 4, 2] = value
    with pytest.raises(
        ValueError, match=re.escape(f"`poses[1]` must have confidences in [0, 1] behind x and y, but one is {value:g}")
    ):
        pair_of((people(1, SIZES[0]), pose))


def test_other_numbers_of_people_are_refused():
    with pytest.raises(ValueError, match=r"`poses` must have the same people .* 2 in img0 and 3 in img1"):
        pair_of((people(2, SIZES[0]), people(3, SIZES[1])))


def test_poses_without_a_point_in_common_are_refused():
    first, last = both(1)
    first[:, ::2, 2] = last[:, 1::2, 2] = 0
    refuses(ValueError, "poses", pair_of, (first, last))


def test_places_that_are_not_in_pixels_of_the_photo_are_refused():
    first, last = both(1)
    shares = first / torch.tensor([SIZES[0][1], SIZES[0][0], 1])
    with pytest.raises(ValueError, match=r"`poses\[0\]` .* between 0 and 1 in img0, which has 180×120 pixels"):
        pair_of((shares, last))
    first[0, 0, 0] = 361
    with pytest.raises(ValueError, match=r"`poses\[0\]` .* \(361, .* far outside img0, which has 180×120 pixels"):
        pair_of((first, last))
    first[0, 0, 0] = 359  # a detector's guess of what is cut off
    pair_of((first, last))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        '{"people": []}',
        '{"people": {}}',
        '{"people": [3]}',
        '{"people": [{}]}',
        '{"people": [{"pose_keypoints_2d": 3}]}',
        '{"people": [{"pose_keypoints_2d": [1, 2, 1]}]}',
        '{"people": [{"pose_keypoints_2d": [' + ", ".join(["NaN"] * 54) + "]}]}",
        '{"people": [{"pose_keypoints_2d": [' + "9" * 5000 + ", 1" * 53 + "]}]}",
    ],
)
def test_files_without_poses_are_refused(text, tmp_path):
    path = tmp_path / "pose.json"
    path.write_text(text)
    refuses(ValueError, r"poses\[1\]", pair_of, (people(1, SIZES[0]), path))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd\x00")
    for path, fault in ((tmp_path, "is a folder"), (tmp_path / "none", "no existing file"), (tmp_path / "binary", "")):
        with pytest.raises(ValueError, match=rf"`poses\[0\]` .*{fault}"):
            pair_of((path, people(1, SIZES[1])))


def test_a_record_of_other_shapes_is_refused():
    refuses(ValueError, "confidence", PosePair, torch.zeros(2, 1, 18, 2), torch.zeros(1, 18))
    refuses(ValueError, "places", PosePair, torch.zeros(2, 2, 18, 2), torch.zeros(2, 1, 18))


# ── The drawing ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", range(18))
def test_a_point_alone_is_a_disc_of_its_colour(number):
    picture = draw_pose(*seen_at((number, (40, 25))), 512, 512)
    assert picture.dtype == torch.float32
    lit = (picture.amax(0) > 0).nonzero()
    assert (lit - torch.tensor([25, 40])).float().norm(dim=1).max() < 5
    assert (picture[:, 25, 40] * 255).tolist() == pytest.approx(POSE_COLOURS[number], abs=1e-3)
    area = picture.sum() / (torch.tensor(POSE_COLOURS[number]) / 255).sum()
    assert area == pytest.approx(torch.pi * 4**2, rel=0.02)


@pytest.mark.parametrize("limb", range(17))
def test_a_limb_is_a_dim_ellipse_between_its_points(limb):
    start, end = LIMBS[limb]
    dim = [0.6 * part for part in POSE_COLOURS[limb]]
    slanting = draw_pose(*seen_at((start, (100, 100)), (end, (160, 180))), 512, 512)
    assert (slanting[:, 140, 130] * 255).tolist() == pytest.approx(dim, abs=1e-3)
    assert (slanting[:, 100, 100] * 255).tolist() == pytest.approx(POSE_COLOURS[start], abs=1e-3)
    assert (slanting[:, 180, 160] * 255).tolist() == pytest.approx(POSE_COLOURS[end], abs=1e-3)
    level = draw_pose(*seen_at((start, (100, 140)), (end, (200, 140))), 512, 512)
    shares = [1, 1, 1, 1, 0.5, 0, 0]
    for way in (1, -1):
        column = torch.stack([level[:, 140 + way * distance, 150] for distance in range(7)])
        assert (column * 255).tolist() == [pytest.approx([share * part for part in dim], abs=0.1) for share in shares]


def test_the_whole_ellipse_has_its_area():
    both_ends = draw_pose(*seen_at((1, (100, 100)), (2, (160, 180))), 512, 512)
    ends = draw_pose(*seen_at((1, (100, 100))), 512, 512) + draw_pose(*seen_at((2, (160, 180))), 512, 512)
    limb = torch.where(ends.amax(0) > 0, 0, both_ends).sum() / 0.6  # red alone
    covered = 2 * 4 * 50 * 0.0425  # of the ellipse's area by the two discs, about
    assert limb == pytest.approx(torch.pi * 4 * 50 - covered, rel=0.05)


def test_limbs_run_from_absent_points_nowhere():
    places, seen = seen_at((1, (100, 100)), (2, (160, 180)), (3, (60, 50)))
    seen[0, 2] = False
    picture = draw_pose(places, seen, 512, 512)
    assert picture[:, 140, 130].tolist() == picture[:, 180, 160].tolist() == [0, 0, 0]
    assert torch.equal(draw_pose(places, torch.zeros(1, 18, dtype=torch.bool), 64, 96), torch.zeros(3, 64, 96))


def test_a_later_person_covers_an_earlier_one():
    red, blue = seen_at((0, (30, 30))), seen_at((12, (30, 30)))
    places, seen = (torch.cat(parts) for parts in zip(red, blue, strict=True))
    assert torch.equal(draw_pose(places, seen, 64, 64), draw_pose(*blue, 64, 64))
    assert torch.equal(draw_pose(places.flip(0), seen.flip(0), 64, 64), draw_pose(*red, 64, 64))


def test_a_drawing_moves_and_grows_with_its_points():
    pose = people(1, (180, 180))[..., :2] + 40
    seen = torch.ones(1, 18, dtype=torch.bool)
    picture = draw_pose(pose, seen, 256, 320)
    moved = draw_pose(pose + torch.tensor([7.0, -3.0]), seen, 256, 320)
    torch.testing.assert_close(moved, picture.roll((-3, 7), (1, 2)), atol=1e-3, rtol=0)
    mirrored = draw_pose(torch.tensor([319.0, 0]) + pose * torch.tensor([-1.0, 1.0]), seen, 256, 320)
    torch.testing.assert_close(mirrored, picture.flip(2), atol=1e-3, rtol=0)
    twice = draw_pose(2 * pose + 0.5, seen, 512, 640)
    smaller = torch.nn.functional.avg_pool2d(twice, 2)
    assert (smaller - picture).abs().mean() < 0.002
    assert picture.min() == 0
    assert picture.max() <= 1


def test_points_beyond_the_picture_and_limbs_of_no_length_are_drawn():
    picture = draw_pose(*seen_at((1, (-50, 30)), (2, (610, 30)), (3, (610, 30))), 512, 512)
    assert picture.isfinite().all()
    assert (picture[:, 30, 280] * 255).tolist() == pytest.approx([0.6 * 255, 0, 0], abs=1e-3)
    assert picture[:, 60].max() == 0


def test_files_may_have_confidences_above_one_as_openpose_writes_them(tmp_path):
    first, last = both(1)
    first[0, 3, 2] = 1.40701
    for name, person in (("0.json", first[0]), ("1.json", last[0])):
        content = {"people": [{"pose_keypoints_2d": person.flatten().tolist()}]}
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"confidences in \[0, 1\]"):
        pair_of((first, last))
    first[0, 3, 2] = 1
    read = pair_of([tmp_path / "0.json", tmp_path / "1.json"])
    expected = pair_of((first, last))
    assert torch.equal(read.places, expected.places)
    assert torch.equal(read.confidence, expected.confidence)
