# SPDX-License-Identifier: Apache-2.0
"""Points and masks, from a user's pixels to the flow."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.pages import EXAMPLES, printed

from dreammover_pipeline import flow as flow_module
from dreammover_pipeline.cli.main import main
from dreammover_pipeline.evaluation.metrics import endpoint_errors
from dreammover_pipeline.fields import cell_grid, pixel_flow
from dreammover_pipeline.flow import agreement, match_features, neighbourhood_mean, smooth_flow
from dreammover_pipeline.framing import fit, fit_points
from dreammover_pipeline.images import load_masks
from dreammover_pipeline.records import Canvas
from dreammover_pipeline.steering import (
    BRIGHT_SHARE,
    REACH,
    STRENGTH,
    TOLERANCE,
    Steering,
    cells_of,
    cells_that_move,
    check_points_inside,
    expected_places,
    match_bias,
    point_pairs,
    steered_flow,
)
from dreammover_pipeline.storage import read_pair
from dreammover_pipeline.tiny.world import World

EVERYTHING = torch.ones(2, 1, 6, 7, dtype=torch.bool)
NO_POINTS = torch.zeros(0, 2, 2)
ONE = [((20, 24), (44, 36))]  # the blob of the `photos`


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points_of(*points):
    return torch.tensor(points, dtype=torch.float64).reshape(-1, 2, 2)


def assert_same_flow(actual, expected):
    assert torch.equal(actual.forward, expected.forward)
    assert torch.equal(actual.backward, expected.backward)


# ── Where the points expect the rest ───────────────────────────────────────────────────────────────────────────────


def turned(places, shift, angle, scale):
    x, y = places.unbind(1)
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    return torch.stack([a * x - b * y + shift[0], b * x + a * y + shift[1]], 1)


@pytest.mark.parametrize(("angle", "scale"), [(0, 1), (0.7, 1), (-1.2, 1.3)])
def test_points_of_one_turn_shift_and_scaling_move_everything_so(angle, scale):
    cells, points = randn(20, 2) * 10, randn(4, 2, seed=1) * 10
    motion = {"shift": (3, -2), "angle": angle, "scale": scale}
    found = expected_places(cells, points, turned(points, **motion), stiffness=0)
    torch.testing.assert_close(found, turned(cells, **motion), rtol=0, atol=1e-10)


def test_the_nearer_point_counts_more():
    points, matches = torch.tensor([[0.0, 0], [40, 0]]), torch.tensor([[0.0, 5], [40, -5]])
    shift = (expected_places(points, points, matches, 1e9) - points)[:, 1]
    assert 4.9 < shift[0] < 5
    assert -5 < shift[1] < -4.9


def test_expected_places_solve_the_weighted_least_squares():
    """Per cell, by a general solver: unknowns (a, b) of the turn, tied to (1, 0) by the stiffness."""
    cells, points, matches = randn(5, 2) * 5, randn(3, 2, seed=1) * 5, randn(3, 2, seed=2) * 5
    for cell in cells:
        weight = 1 / (1 + (points - cell).square().sum(1))
        weight /= weight.sum()
        centre, goal = weight @ points, weight @ matches
        rows, values = [torch.eye(2, dtype=torch.float64) * 2.0], [torch.tensor([2.0, 0.0], dtype=torch.float64)]
        for point, match, share in zip(points, matches, weight, strict=True):
            x, y = point - centre
            rows.append(torch.stack([torch.stack([x, -y]), torch.stack([y, x])]) * share.sqrt())
            values.append((match - goal) * share.sqrt())
        a, b = torch.linalg.lstsq(torch.cat(rows), torch.cat(values)[:, None]).solution[:, 0]
        x, y = cell - centre
        expected = goal + torch.stack([a * x - b * y, b * x + a * y])
        torch.testing.assert_close(expected_places(cell[None], points, matches, 4.0)[0], expected, rtol=0, atol=1e-9)


def test_one_point_only_shifts_and_close_ones_hardly_turn():
    cells = randn(9, 2) * 8
    alone = expected_places(cells, torch.tensor([[2.0, 3]]).double(), torch.tensor([[5.0, 1]]).double(), 4.0)
    torch.testing.assert_close(alone - cells, torch.tensor([[3.0, -2]]).double().expand(9, 2), rtol=0, atol=1e-12)
    close = torch.tensor([[2.0, 3], [2.2, 3]]).double()
    crossed = torch.tensor([[5.0, 1], [5.0, 1.2]]).double()  # by itself a right angle
    shift = expected_places(cells, close, crossed, 4.0) - cells
    assert (shift - torch.tensor([3.0, -2]).double()).abs().max() < 0.2


# ── The prior ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bias_is_the_loop():
    h, w, side = 6, 7, 6
    features = randn(2, 5, h, w)
    points, moves = randn(3, 2, 2, seed=1).abs() * 3, torch.rand(2, 1, h, w, generator=torch.manual_seed(0)) > 0.2
    cells = cell_grid(h, w, features)[0].flatten(1).T
    unit = F.normalize(features.flatten(2), dim=1)
    stiffness = (TOLERANCE * side) ** 2

    def one_way(image, start, end):
        own, other = points[:, image], points[:, 1 - image]
        near = 0.0
        for point in own:
            column, row = point.round().long().tolist()
            alike = float(unit[image][:, start] @ unit[image][:, row * w + column])
            distance = float((cells[start] - point).norm())
            near = max(near, max(0.0, alike) * math.exp(-(distance**2) / (2 * (REACH * side) ** 2)))
        place = expected_places(cells[start : start + 1], own, other, stiffness)[0]
        return near * math.exp(-(float((place - cells[end]).norm()) ** 2) / (2 * (TOLERANCE * side) ** 2))

    expected = torch.full((h * w, h * w), -torch.inf, dtype=torch.float64)
    for p in range(h * w):
        for q in range(h * w):
            if moves[0].flatten()[p] and moves[1].flatten()[q]:
                expected[p, q] = STRENGTH / 2 * (one_way(0, p, q) + one_way(1, q, p))
    bias = match_bias(features, Steering(points, moves))
    torch.testing.assert_close(bias(slice(0, h * w)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(bias(slice(5, 11)), expected[5:11], rtol=0, atol=1e-12)


def stripes(h=16, w=16, period=4, dx=2):
    """A texture that repeats, moved by half of its period: as much to the left as to the right."""
    pattern = 3 + randn(6, h, 1) + randn(6, 1, period, seed=1).repeat(1, 1, w // period)
    return torch.stack([pattern, pattern.roll(dx, 2)])


@pytest.mark.parametrize("dx", [2, -2])
def test_a_point_decides_between_matches_that_look_alike(dx):
    features = stripes()
    everything = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    assert match_features(features, (16, 16)).forward[0, 0, 8, 4:12].abs().max() > 2  # the lowest index, far away
    steered = steered_flow(features, Steering(points_of(((8, 8), (8 + dx, 8))), everything), 0)
    around = slice(7, 10), slice(6, 11)
    assert (steered.forward[0, 0][around] == dx).all()
    assert (steered.forward[0, 1][around] == 0).all()
    assert (steered.backward[0, 0][around] == -dx).all()


def test_a_point_says_little_of_what_looks_unlike_it():
    """A thing that looks alike all over, on a background of which every cell is known: the point moves the thing."""
    h = w = 16
    background = randn(40, h, w)
    things = torch.zeros(2, 1, h, w, dtype=torch.bool)
    things[0, :, 5:10, 5:9] = True
    things[1, :, 5:10, 7:11] = True
    thing = randn(40, 1, 1, seed=3)
    features = torch.where(things, thing, background)
    steering = Steering(points_of(((6, 7), (8, 7))), torch.ones_like(things))
    forward = steered_flow(features, steering, 0).forward[0]
    assert (forward[:, things[0, 0]] == torch.tensor([[2.0], [0]])).float().mean() > 0.9
    rests = ~things[0, 0] & ~things[1, 0]
    assert (forward[:, rests] == 0).all()


def test_nothing_said_is_the_flow_of_features_alone():
    features = randn(2, 8, 6, 7)
    expected = smooth_flow(match_features(features, (6, 7)), 2)
    assert_same_flow(steered_flow(features, Steering(NO_POINTS, EVERYTHING), 2), expected)


def test_swapped_images_give_the_reversed_flow():
    features, points = randn(2, 8, 6, 7), randn(3, 2, 2, seed=1).abs() * 3
    moves = torch.rand(2, 1, 6, 7, generator=torch.manual_seed(1)) > 0.3
    flow = steered_flow(features, Steering(points, moves), 2)
    swapped = steered_flow(features.flip(0), Steering(points.flip(1), moves.flip(0)), 2).reversed()
    torch.testing.assert_close(flow.stacked(), swapped.stacked(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 1024])
def test_the_size_of_a_block_does_not_matter(rows, monkeypatch):
    features, steering = randn(2, 8, 6, 7), Steering(points_of(((1, 2), (4, 3))), EVERYTHING)
    whole = steered_flow(features, steering, 1)
    monkeypatch.setattr(flow_module, "MATCH_ROWS", rows)
    assert_same_flow(steered_flow(features, steering, 1), whole)


@pytest.mark.parametrize("passes", [0, 1, 5])
def test_the_points_own_cells_have_exactly_their_flow(passes):
    points = points_of(((1.2, 2.4), (4.75, 3.25)), ((5, 5), (0, 0)))
    flow = steered_flow(randn(2, 8, 6, 7), Steering(points, EVERYTHING), passes)
    torch.testing.assert_close(flow.forward[0, :, 2, 1], torch.tensor([3.55, 0.85]).double())
    torch.testing.assert_close(flow.backward[0, :, 3, 5], torch.tensor([-3.55, -0.85]).double())
    assert flow.forward[0, :, 5, 5].tolist() == [-5, -5]
    assert flow.backward[0, :, 0, 0].tolist() == [5, 5]


def test_smoothing_carries_a_point_to_its_neighbours():
    """Random features agree hardly anywhere; the point's cell counts as sure, though its match lies between cells."""
    steering = Steering(points_of(((3, 3), (4.5, 3.5))), EVERYTHING)
    rough, once, smooth = (steered_flow(randn(2, 30, 6, 7), steering, passes) for passes in (0, 1, 3))
    errors = [
        (flow.forward[0, :, 2:5, 2:5] - torch.tensor([1.5, 0.5])[:, None, None]).norm(dim=0).mean()
        for flow in (rough, smooth)
    ]
    assert errors[1] < errors[0] / 2
    weight = agreement(rough)
    assert weight[0, 0, 3, 3] < 0.9
    weight[0, 0, 3, 3] = 1
    expected = neighbourhood_mean(rough.forward, weight[:1])
    expected[0, :, 3, 3] = torch.tensor([1.5, 0.5])
    torch.testing.assert_close(once.forward, expected, rtol=0, atol=1e-12)


# ── The mask ───────────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(h=8, w=10):
    """Cells that move: a block of 4×3 cells that is two cells further right in the second image."""
    moves = torch.zeros(2, 1, h, w, dtype=torch.bool)
    moves[0, :, 2:6, 2:5] = moves[1, :, 2:6, 4:7] = True
    return moves


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("rest_tolerance", [0, 2.5])  # by the latter all rests that is doubtful
def test_outside_the_mask_nothing_moves_and_inside_matches_are_inside(passes, rest_tolerance):
    moves = blocks()
    flow = steered_flow(randn(2, 8, 8, 10), Steering(NO_POINTS, moves), passes, rest_tolerance=rest_tolerance)
    cells = cell_grid(8, 10, flow.forward)
    for way, own, other in ((flow.forward, moves[0], moves[1]), (flow.backward, moves[1], moves[0])):
        assert (way[0, :, ~own[0]] == 0).all()
        if passes == 0:
            x, y = (cells + way)[0][:, own[0]].long()
            assert other[0][y, x].all()


def test_what_rests_does_not_speak_for_what_moves():
    moves = blocks()
    first = randn(30, 8, 10)
    flow = steered_flow(torch.stack([first, first.roll(2, 2)]), Steering(NO_POINTS, moves), 3)
    there = torch.tensor([2.0, 0]).double()[:, None]
    torch.testing.assert_close(flow.forward[0][:, moves[0, 0]], there.expand(2, 12), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.backward[0][:, moves[1, 0]], -there.expand(2, 12), rtol=0, atol=1e-9)


def test_the_mask_prevails_over_a_point():
    flow = steered_flow(randn(2, 8, 8, 10), Steering(points_of(((0, 0), (3, 3)), ((9, 7), (5, 4))), blocks()), 2)
    assert (flow.forward[0, :, 0, 0] == 0).all()
    assert (flow.forward[0, :, 7, 9] == 0).all()
    assert flow.stacked().isfinite().all()


def test_a_cell_moves_if_enough_of_it_is_bright():
    masks = torch.zeros(2, 3, 16, 24)
    bright = math.ceil(BRIGHT_SHARE * 64)
    masks[0, :, 0, 8:15] = 1
    masks[0, :, 8:16, 16:24] = 0.6
    masks[0, 0, 8:16, 0:8] = 1  # pure red is darker than half grey
    masks[1] = 0.4
    masks[1, :, 7, 0:bright] = 0.5
    masks[1, :, 9, 8 : 8 + bright - 1] = 1
    moves = cells_that_move(masks, (16, 24), 8)
    assert moves[0, 0].tolist() == [[False, True, False], [False, False, True]]
    assert moves[1, 0].tolist() == [[True, False, False], [False, False, False]]


def test_a_mask_that_is_bright_on_padding_only_is_dark():
    masks = torch.zeros(2, 3, 16, 16)
    masks[0] = 1
    masks[1, :, :, 8:] = 1
    with pytest.raises(ValueError, match=r"^`mask\[3\]` lets nothing move in img1, where it is dark all over; "):
        cells_that_move(masks, (16, 7), 8, "mask[3]")


# ── From a photo's pixels to cells ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("canvas", [Canvas(64, 88, 60, 85, 480, 680), Canvas(96, 96, 95, 96, 333, 335)])
@pytest.mark.parametrize("size", [(64, 64), (480, 640), (640, 480), (101, 300), (300, 101), (60, 95)])
def test_points_go_where_fit_puts_the_pixels(size, canvas):
    """A picture of its own coordinates is fitted; a place, mapped, must show the coordinates that it had."""
    height, width = size
    grid = cell_grid(height, width, torch.zeros(1, dtype=torch.float64))[0] / max(size)
    fitted = fit(torch.cat([grid, grid[:1]]), canvas)[:2] * max(size)
    places = fit_points(
        torch.rand(200, 2, generator=torch.manual_seed(0)) * torch.tensor([width, height]), size, canvas
    )
    inside = (places > 4).all(1) & (places < torch.tensor([canvas.content_width, canvas.content_height]) - 5).all(1)
    assert inside.sum() > 20
    original = torch.rand(200, 2, generator=torch.manual_seed(0)) * torch.tensor([width, height])
    at = (2 * places[inside] + 1) / torch.tensor([canvas.width, canvas.height]) - 1
    shown = F.grid_sample(fitted[None], at[None, None].double(), align_corners=False)[0, :, 0].T
    torch.testing.assert_close(shown.float(), original[inside], rtol=0, atol=0.02 * max(1, max(size) / 90))


def test_cells_have_integer_centres():
    points = points_of(((3.5, 3.5), (11.5, 19.5)), ((-0.5, 7.5), (31.5, 0)))
    assert cells_of(points, (24, 32), 8).tolist() == [[[0, 0], [1, 2]], [[-0.5, 0.5], [3.5, -0.4375]]]


def test_a_point_that_is_cut_away_is_refused_and_one_just_outside_goes_to_the_edge():
    assert cells_of(points_of(((33, 0), (0, -6))), (24, 32), 8)[0].tolist() == [[3.5, -0.4375], [-0.4375, -0.5]]
    with pytest.raises(ValueError, match=r"^`points\[1\]` lies in a part of img1 that is cut away, since"):
        cells_of(points_of(((0, 0), (0, 0)), ((0, 0), (40, 3))), (24, 32), 8)


def test_each_place_must_lie_in_its_own_photo():
    sizes = (64, 48), (32, 200)
    check_points_inside(points_of(((47, 63), (199, 31)), ((-0.5, -0.5), (199.5, 31.5))), sizes)
    for wrong, message in (
        (((48, 60), (0, 0)), "img0, which has 48×64"),
        (((0, 0), (48, 60)), "img1, which has 200×32"),
    ):
        with pytest.raises(ValueError, match=rf"^`points\[1\]` is at \(48, 60\) in {message}"):
            check_points_inside(points_of(((0, 0), (0, 0)), wrong), sizes)


# ── Arguments ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given", [[((1, 2), (3, 4))], [[[1, 2], [3, 4]]], np.array([[[1, 2], [3, 4]]]), torch.tensor([[[1, 2], [3, 4]]])]
)
def test_points_of_any_kind(given):
    assert point_pairs(given).tolist() == [[[1, 2], [3, 4]]]


@pytest.mark.parametrize("given", [None, [], ()])
def test_no_points(given):
    assert point_pairs(given).shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"points": "eye"}, TypeError, r"^`points` must be a sequence of \(\(x0, y0\), \(x1, y1\)\), .* not 'eye'"),
        ({"points": [(1, 2), (3, 4)]}, ValueError, r"^`points` must be .* of shape \(2, 2\), not \(k, 2, 2\)"),
        ({"points": [((1, 2), (3,))]}, TypeError, "^`points` must be a sequence"),
        ({"points": [((1, 2), (3, math.nan))]}, ValueError, "^`points` must be finite, but hold nan"),
        (
            {"points": [*ONE, ((1, 64), (3, 4))]},
            ValueError,
            r"^`points\[1\]` is at \(1, 64\) in img0, which has 64×64 pixels",
        ),
        ({"points": [((1, 6), (-1, 4))]}, ValueError, r"^`points\[0\]` is at \(-1, 4\) in img1"),
        ({"mask": 3}, TypeError, "^mask is a int"),
        ({"mask": torch.ones(64, 60)}, ValueError, r"^`mask` has 60×64 pixels .* but img0 has 64×64"),
        ({"mask": [torch.ones(64, 64), torch.ones(9, 9)]}, ValueError, "^`mask` has 9×9 pixels .* but img1 has 64×64"),
        ({"mask": [torch.ones(64, 64)] * 3}, ValueError, "^`mask` must be one image, or two, .*; 3 came"),
        ({"mask": torch.zeros(64, 64)}, ValueError, "^`mask` lets nothing move in img0, where it is dark all over"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_runs(pipe, photos, fast, arguments, error, reason):
    ran = []
    for model in (pipe.vae.encoder, pipe.text_encoder, pipe.unet):
        model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=reason):
        pipe(*photos, **fast, **arguments)
    with pytest.raises(error, match=reason):
        pipe.prepare(*photos, lora_steps=0, **arguments)
    assert not ran


def test_a_batch_has_one_entry_per_pair(pipe, photos, fast):
    mask = torch.zeros(64, 64)
    mask[:48, 8:] = 1
    fast |= {"n_frames": 1, "num_inference_steps": 3, "inversion_steps": 2}
    batch = [photos[0]] * 3, [photos[1]] * 3
    steered = {"points": [None, ONE, ONE], "mask": [[mask, mask], None, mask]}
    flows = pipe(*batch, **fast, **steered).flow
    for flow, points, one in zip(flows, *steered.values(), strict=True):
        alone = pipe(*photos, **fast, points=points, mask=one).flow[0]
        assert_same_flow(flow, alone)
    for name in ("points", "mask"):
        with pytest.raises(ValueError, match=f"^`{name}` has 2 entries for 3 pairs of images$"):
            pipe(*batch, **fast, **{name: [None] * 2})
        fault = f"^`{name}` must be a list here, with one entry for each pair of images, not a str$"
        with pytest.raises(TypeError, match=fault):
            pipe(*batch, **fast, **{name: "all"})
    with pytest.raises(ValueError, match=r"^`points\[2\]\[0\]` is at \(99, 0\) in img0"):
        pipe(*batch, **fast, points=[None, ONE, [((99, 0), (0, 0))]])
    with pytest.raises(ValueError, match=r"^`mask\[1\]` has 2×2 pixels"):
        pipe(*batch, **fast, mask=[None, torch.ones(2, 2), None])


# ── The pipeline ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_given_changes_nothing(pipe, photos, fast):
    del fast["n_frames"], fast["detail"], fast["output_type"]
    plain = pipe.prepare(*photos, **fast).flow
    assert_same_flow(pipe.prepare(*photos, **fast, points=[], mask=None).flow, plain)
    assert_same_flow(pipe.prepare(*photos, **fast, mask=Image.new("L", (64, 64), "white")).flow, plain)
    steered = pipe.prepare(*photos, **fast, points=ONE).flow
    assert not torch.equal(steered.forward, plain.forward)


def test_points_are_in_the_pixels_of_photos_of_any_size(pipe, photos, fast):
    """The first photo twice as large, the last one with a border that is cut away: the same cells, the same flow."""
    del fast["n_frames"], fast["detail"], fast["output_type"]
    first, last = photos[0].resize((128, 128)), Image.new("RGB", (100, 64))
    last.paste(photos[1], (18, 0))
    points = [((40.5, 48.5), (44 + 18, 36))]
    flow = pipe.prepare(first, last, **fast, points=points, height=64).flow
    assert flow.forward[0, :, 3, 2].tolist() == pytest.approx([3, 1.5])  # 24 and 12 pixels of 8
    assert flow.backward[0, :, 4, 5].tolist() == pytest.approx([-3, -1.5])
    with pytest.raises(ValueError, match=r"^`points\[0\]` lies in a part of img1 that is cut away"):
        pipe.prepare(first, last, **fast, points=[((5, 5), (2, 30))], height=64)
    masks = [Image.new("L", photo.size, "black") for photo in (first, last)]
    masks[0].paste("white", (0, 0, 128, 64))
    masks[1].paste("white", (18, 32, 82, 64))
    moved = pipe.prepare(first, last, **fast, mask=masks, height=64, photo_tolerance=0).flow
    assert (moved.forward[0, :, 4:] == 0).all()
    assert (moved.backward[0, :, :4] == 0).all()
    assert (moved.forward[0, 1, :4] > 0).all()
    one = pipe.prepare(first, last, **fast, mask=masks[0], height=64).flow
    assert (one.backward[0, :, 4:] == 0).all()


def test_masks_are_read_like_photos(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("1", (5, 4), 1).save(path)
    (mask,) = load_masks(path, [(4, 5), (7, 7)])
    assert torch.equal(mask, torch.ones(3, 4, 5))
    assert load_masks(None, [(4, 5), (4, 5)]) is None


@pytest.fixture(scope="module")
def scene():
    """A pair of the world on which features alone go wrong."""
    return World(size=128).sample(1, 15, "recast")


def test_a_few_true_points_lower_the_flow_error_where_features_fail(tiny_pipe, scene):
    photos = scene.frame(0)[0], scene.frame(1)[0]
    seen = (scene.foreground(0) & scene.visible(0, 1))[0, 0]
    inner = (F.avg_pool2d(seen[None, None].float(), 5, 1, 2)[0, 0] > 0.99).nonzero()
    row, column = inner.float().mean(0)
    order = torch.atan2(inner[:, 0] - row, inner[:, 1] - column).argsort()
    places = inner[order[:: len(order) // 3]][:3]  # in three directions from the middle
    truth = scene.flow(0, 1)[0]
    points = [((int(x), int(y)), tuple((torch.stack([x, y]) + truth[:, y, x]).tolist())) for y, x in places]
    settings = {"lora_steps": 0, "inversion_steps": 4, "feature_step": 4}
    mask = [scene.foreground(time)[0].float() for time in (0, 1)]

    def errors(**steering):
        pair = tiny_pipe.prepare(*photos, scene.captions[0], **settings, **steering)
        found = []
        for field, (source, target) in zip(pixel_flow(pair.flow, pair.canvas), ((0, 1), (1, 0)), strict=True):
            sprite, visible = scene.foreground(source)[0], scene.visible(source, target)[0]
            found.append(
                [endpoint_errors(field, scene.flow(source, target), visible & s).mean() for s in (sprite, ~sprite)]
            )
        return torch.tensor(found).mean(0).tolist()

    alone, steered, masked = errors(), errors(points=points), errors(points=points, mask=mask)
    assert alone[0] > 8  # pixels, two cells: features fail here, and the refinement finds only some of what they miss
    assert steered[0] < alone[0] / 2
    assert masked[0] < alone[0] / 2
    assert masked[1] < alone[1] / 2


# ── Page and command line ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_runs_as_printed(tmp_path, monkeypatch, restored_logging):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(EXAMPLES)
    session = {}
    for block in printed("docs/points.md", "python"):
        exec(compile(block, "points.md", "exec"), session)
    assert len(session["frames"]) == 1
    assert session["tracks"].flow.forward[0, :, 12, 25].tolist() == pytest.approx([5 / 4, 1], abs=0.5)  # the eye
    assert not torch.equal(session["own"].flow.forward, session["tracks"].flow.forward)
    assert (session["pair"].flow.forward[0, :, -1] == 0).all()
    (command,) = "".join(printed("docs/points.md", "bash")).splitlines()
    _, *arguments = shlex.split(command)
    assert main([*arguments, "--quiet", "--save-pair", "fish.safetensors"]) == 0
    flow = read_pair("fish.safetensors", "cpu")[0].flow
    assert flow.forward[0, :, 12, 25].tolist() == pytest.approx([5 / 4, 1])  # the eye, in cells of 4 pixels
    assert (flow.forward[0, :, -1] == 0).all()


FISH = [str(EXAMPLES / "fish" / name) for name in ("0.png", "1.png")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--points", "[[[1,2],[3,4]"], "--points holds no JSON that can be read: .*; write [[[x0, y0], "),
        (["--points", "no.json"], "'no.json', the file of --points, cannot be read: it is no existing file"),
        (["--points", os.devnull], "cannot be read: it is a pipe, a socket or a device"),
        (
            ["--points", "[[[1,2],[3,1e999]]]"],
            "holds no JSON that can be read: the number 1e999 is not finite",
        ),
        (["--points", f"[[[1,2],[3,{'9' * 200}]]]"], "`points` must be finite"),
        (["--points", "[[1,2],[3,4]]"], "`points` must be a sequence of ((x0, y0), (x1, y1))"),
        (["--points", "[[[1,2],[300,4]]]"], "`points[0]` is at (300, 4) in img1, which has 128×128 pixels"),
        (["--mask", "no.png"], "mask (no.png) is no existing file"),
        (["--mask", FISH[0], "--mask", FISH[1], "--mask", FISH[1]], "`mask` must be one image, or two"),
    ],
)
def test_errors_of_the_command_read_like_sentences(capsys, tmp_path, restored_logging, options, reason):
    command = ["interpolate", *FISH, "--model", "tiny", "--device", "cpu", "-o", str(tmp_path / "a.gif"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(re.escape(reason).replace(r"\.\*", ".*"), error), error


def test_a_video_never_replaces_what_steers_it(capsys, tmp_path, restored_logging):
    points = tmp_path / "steer.gif"
    points.write_text(json.dumps([[[1, 2], [3, 4]]]))
    for option in ("--points", "--mask"):
        assert main(["interpolate", *FISH, "-o", str(points), option, str(points)]) == 2
        assert "would replace" in capsys.readouterr().err
