# SPDX-License-Identifier: Apache-2.0
"""Pictures of a pair's flow, read off their pixels."""

import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dreammover_pipeline.media.colours import LEGEND_EDGE, VIRIDIS, flow_colours
from dreammover_pipeline.media.correspondences import (
    MATCHED,
    ORANGE,
    PANEL_EDGE,
    confidence_picture,
    correspondence_lines,
    flow_picture,
    matches_picture,
    occlusion_picture,
)
from dreammover_pipeline.media.pictures import CAPTION, MARGIN
from dreammover_pipeline.paths import motion_paths
from dreammover_pipeline.records import BidirectionalFlow, Canvas
from dreammover_pipeline.settings import arguments

TOP = MARGIN + 2 * CAPTION  # of panels under a headline and their titles
ANGLES = [k * math.pi / 4 for k in range(8)]


def constant_flow(dx, dy, h=4, w=4):
    return torch.tensor([dx, dy], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, h, w)


def panel_pixel(picture):
    return picture.getpixel((MARGIN + 2, TOP + 2))


def wheel_pixel(picture, angle, radius):
    centre_x, centre_y = picture.width - MARGIN - LEGEND_EDGE / 2, TOP + LEGEND_EDGE / 2
    reach = radius * LEGEND_EDGE / 2
    return picture.getpixel((int(centre_x + reach * math.cos(angle)), int(centre_y + reach * math.sin(angle))))


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("part", [0.4, 0.95])
def test_a_direction_has_the_colour_the_wheel_shows_there(angle, part):
    forward = constant_flow(5 * part * math.cos(angle), 5 * part * math.sin(angle))
    picture = flow_picture(BidirectionalFlow(forward, constant_flow(0, -5)))
    np.testing.assert_allclose(panel_pixel(picture), wheel_pixel(picture, angle, part), atol=16)


def test_directions_differ_and_hues_turn_clockwise_from_red_at_the_right():
    colours = [tuple(flow_colours(constant_flow(math.cos(a), math.sin(a))[0].numpy(), 1)[0, 0]) for a in ANGLES]
    assert len(set(colours)) == len(ANGLES)
    np.testing.assert_allclose(colours[::2], [(255, 0, 0), (128, 255, 0), (0, 255, 255), (128, 0, 255)], atol=3)


def test_longer_vectors_are_more_saturated():
    colours = flow_colours(np.stack([np.linspace(0, 3, 7), np.zeros(7)])[:, None], 3)[0]
    assert (np.diff(colours[:, 1].astype(int)) < 0).all()
    assert tuple(colours[0]) == (255, 255, 255)
    assert tuple(colours[-1]) == (255, 0, 0)


def test_both_flows_share_one_scale():
    picture = flow_picture(BidirectionalFlow(constant_flow(1, 0), constant_flow(4, 0)))
    forward, backward = (
        panel_pixel(picture),
        picture.getpixel(((picture.width - LEGEND_EDGE) // 2 + 100, TOP + 2)),
    )
    np.testing.assert_allclose([forward, backward], [(255, 191, 191), (255, 0, 0)], atol=2)


def test_no_flow_is_white():
    picture = flow_picture(BidirectionalFlow(constant_flow(0, 0), constant_flow(0, 0)))
    assert panel_pixel(picture) == (255, 255, 255)
    assert np.isfinite(np.asarray(picture)).all()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (12, 12), (16, 40), (64, 64), (500, 700)])
def test_flow_pictures_have_a_visible_size_and_square_cells(h, w):
    flow = torch.rand(1, 2, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    picture = flow_picture(BidirectionalFlow(flow, -flow))
    assert 300 < max(picture.size) < 2000
    factor = max(1, 384 // max(h, w))
    colours = np.asarray(picture)[TOP:, MARGIN:][: h * factor : factor, : w * factor : factor]
    lengths = torch.linalg.vector_norm(flow.double(), dim=1)
    full = float(np.percentile(torch.cat([lengths, lengths]).numpy(), 95))
    np.testing.assert_array_equal(colours, flow_colours(flow[0].double().numpy(), full))


def test_a_few_outliers_do_not_make_the_rest_of_a_flow_pale():
    flow = constant_flow(1, 0, 8, 8).clone()
    flow[..., 0, 0] = 1000
    picture = np.asarray(flow_picture(BidirectionalFlow(flow, flow)))
    panel = picture[TOP:, MARGIN:]
    assert (panel[100, 100] == (255, 0, 0)).all()


def canvas_of(content, side=64, output=None):
    """A square canvas with a picture of (height, width) on it."""
    return Canvas(side, side, *content, *(output or content))


def panel_of(picture, size, index=0):
    """The pixels of the panels of one size (width, height), the first or the second of a row."""
    left = MARGIN + index * (size[0] + MARGIN)
    return np.asarray(picture)[TOP : TOP + size[1], left : left + size[0]]


def cell_colours(picture, h, w, index=0):
    """The colour of each cell in a panel without a photo."""
    factor = PANEL_EDGE // max(h, w)
    return panel_of(picture, (w * factor, h * factor), index)[factor // 2 :: factor, factor // 2 :: factor]


def random_flow(h=6, w=8, reach=2, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    fields = []
    for _ in range(2):
        dx = np.clip(x + rng.integers(-reach, reach + 1, (h, w)), 0, w - 1) - x
        dy = np.clip(y + rng.integers(-reach, reach + 1, (h, w)), 0, h - 1) - y
        fields.append(torch.from_numpy(np.stack([dx, dy])[None]).float())
    return BidirectionalFlow(*fields)


def round_trips(flow):
    """(2,h,w) distances between each cell and its match's match, for whole-cell flow inside the grid."""
    found = []
    for there, back in ((flow.forward[0], flow.backward[0]), (flow.backward[0], flow.forward[0])):
        error = np.zeros(there.shape[1:])
        for y, x in np.ndindex(*error.shape):
            dx, dy = (int(part) for part in there[:, y, x])
            bx, by = (int(part) for part in back[:, y + dy, x + dx])
            error[y, x] = math.hypot(dx + bx, dy + by)
        found.append(error)
    return np.stack(found)


def test_padding_is_left_out_of_the_flow():
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0, 5:] = flow[:, 1, :, 5:] = 3  # of the padding
    picture = flow_picture(BidirectionalFlow(flow, flow), canvas_of((36, 40)))
    size = 5 * (PANEL_EDGE // 5), round(4.5 * (PANEL_EDGE // 5))
    assert (panel_of(picture, size) == 255).all()
    assert (panel_of(flow_picture(BidirectionalFlow(flow, flow)), (PANEL_EDGE, PANEL_EDGE)) != 255).any()


@pytest.mark.parametrize(
    ("content", "output"), [((64, 64), (64, 64)), ((36, 64), (360, 640)), ((64, 44), (64, 44)), ((58, 64), (29, 32))]
)
@pytest.mark.parametrize("move", [(1, 0), (-2, 1), (0.5, -2)])
def test_a_line_joins_a_cells_place_in_one_photo_with_its_matchs_place_in_the_other(content, output, move):
    canvas = canvas_of(content, output=output)
    flow = BidirectionalFlow(constant_flow(*move, 8, 8), constant_flow(-move[0], -move[1], 8, 8))
    photo = Image.new("RGB", output[::-1], "grey")
    picture = np.asarray(correspondence_lines(photo, photo, flow, 1, canvas)).astype(int)
    panel = [round(side * PANEL_EDGE / max(output)) for side in output[::-1]]
    # the first of evenly spread points; its cell's centre in pixels of the canvas, of the photo, of the panel
    cell = [
        int(part * math.floor(side / 8 + 0.5)) for part, side in zip((0.75488, 0.56984), content[::-1], strict=True)
    ]
    start, end = (
        [(part + 0.5) * 8 / side * length for part, side, length in zip(place, content[::-1], panel, strict=True)]
        for place in (cell, np.add(cell, move))
    )
    coloured = picture.max(-1) - picture.min(-1) > 100
    columns = np.flatnonzero(coloured.any(0))
    rows = [np.flatnonzero(coloured[:, column]).mean() for column in (columns[0], columns[-1])]
    reach = 3  # from a dot's centre to where it is still coloured
    expected = [MARGIN + start[0] - reach, 2 * MARGIN + panel[0] + end[0] + reach - 1]
    np.testing.assert_allclose([columns[0], columns[-1]], expected, atol=1)
    np.testing.assert_allclose(rows, [TOP + start[1] - 0.5, TOP + end[1] - 0.5], atol=1.2)


def turning_flow(degrees, side=32):
    """The flow of a turn about the middle of the grid, and of the turn back."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    fields = []
    for angle in (math.radians(degrees), -math.radians(degrees)):
        turned = [math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y]
        fields.append(torch.from_numpy(np.stack([turned[0] - x, turned[1] - y])[None]))
    return BidirectionalFlow(*fields)


@pytest.mark.parametrize("motion", ["rigid", "straight"])
def test_a_line_is_the_way_that_the_frames_take(motion):
    """At a share of the way from one photo to the other it is where the path is at that time."""
    flow = turning_flow(80)
    photo = Image.new("RGB", (64, 64), "grey")
    picture = np.asarray(correspondence_lines(photo, photo, flow, 1, motion=motion)).astype(int)
    cell = np.array([int(0.75488 * 32), int(0.56984 * 32)])
    coloured = picture.max(-1) - picture.min(-1) > 100
    for time in (0, 0.25, 0.5, 0.75, 1):
        moved = motion_paths(flow, motion).displacements(0, torch.tensor([time]))[0, :, cell[1], cell[0]].numpy()
        x, y = (cell + moved + 0.5) / 32 * PANEL_EDGE
        column = MARGIN + time * (PANEL_EDGE + MARGIN) + x
        assert np.flatnonzero(coloured[:, round(column)]).mean() == pytest.approx(TOP + y - 0.5, abs=1.5)


def test_a_way_bends_only_where_things_turn_and_frames_take_rigid_paths():
    photo = Image.new("RGB", (64, 64), "grey")

    def lines(flow, motion):
        return np.asarray(correspondence_lines(photo, photo, flow, motion=motion)).astype(int)

    turning, shifting = turning_flow(60), BidirectionalFlow(constant_flow(2, 1, 32, 32), constant_flow(-2, -1, 32, 32))
    assert (np.abs(lines(turning, "rigid") - lines(turning, "straight")) > 100).any()
    assert (np.abs(lines(shifting, "rigid") - lines(shifting, "straight")) < 30).all()


@pytest.mark.parametrize("picture", [correspondence_lines, matches_picture])
def test_pictures_show_the_way_that_frames_take_by_default(picture):
    assert inspect.signature(picture).parameters["motion"].default == arguments()["motion"].default


def test_lines_are_as_many_as_asked_for_and_spread():
    still = BidirectionalFlow(torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32))
    photo = Image.new("RGB", (128, 128), "grey")
    few, many = (np.asarray(correspondence_lines(photo, photo, still, n)).astype(int) for n in (8, 64))
    panels = [panel_of(picture, (PANEL_EDGE, PANEL_EDGE)) for picture in (few, many)]
    drawn = [(np.ptp(panel, axis=-1) > 60) for panel in panels]
    assert 4 * drawn[0].sum() < drawn[1].sum()
    quarters = [part for half in np.split(drawn[0], 2) for part in np.split(half, 2, axis=1)]
    assert all(quarter.any() for quarter in quarters)


@pytest.mark.parametrize("move", [(0, 0), (-7, 0)], ids=["no match back", "outside"])
def test_what_is_not_matched_gets_a_ring_and_no_line(move):
    flow = BidirectionalFlow(constant_flow(*move, 8, 8), constant_flow(2, 0, 8, 8))
    photo = Image.new("RGB", (64, 64), "grey")
    picture = np.asarray(correspondence_lines(photo, photo, flow)).astype(int)
    assert (np.ptp(picture, axis=-1) < 10).all()
    first, last = (panel_of(picture, (PANEL_EDGE, PANEL_EDGE), index) for index in (0, 1))
    assert first.min() < 30
    assert first.max() > 225
    assert (last == 128).all()


def test_a_match_in_the_padding_is_none():
    flow = BidirectionalFlow(constant_flow(0, 2, 8, 8), constant_flow(0, -2, 8, 8))
    photo = Image.new("RGB", (64, 40), "grey")
    lined, unlined = (
        np.ptp(np.asarray(correspondence_lines(photo, photo, flow, 1, canvas)).astype(int), axis=-1).max() > 100
        for canvas in (canvas_of((40, 64)), canvas_of((24, 64)))  # the point's match is in row 4, or in row 3
    )
    assert lined
    assert not unlined


def test_lines_need_photos_of_one_size_and_at_least_one_point():
    flow = random_flow()
    photo, wide = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))
    with pytest.raises(ValueError, match=r"\(8, 8\) and \(9, 8\)"):
        correspondence_lines(photo, wide, flow)
    with pytest.raises(ValueError, match="`lines` must be at least 1, not 0"):
        correspondence_lines(photo, photo, flow, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_photos_of_any_mode_are_taken_and_left_as_they_are(mode):
    photo = Image.new("RGB", (30, 20), "orange").convert(mode)
    before = photo.copy()
    picture = matches_picture(photo, photo, random_flow())
    assert picture.mode == "RGB"
    assert (photo.mode, photo.tobytes()) == (before.mode, before.tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_confidence_is_the_round_trip_agreement_of_either_photos_cells(dtype):
    flow = random_flow()
    shown = BidirectionalFlow(flow.forward.to(dtype), flow.backward.to(dtype))
    picture = confidence_picture(shown)
    agreement = np.exp(-(round_trips(flow) ** 2) / 2)
    assert agreement.min() < 0.1 < 0.9 < agreement.max()
    for index, expected in enumerate(agreement):
        colours = np.stack([np.interp(expected, np.linspace(0, 1, 5), channel) for channel in VIRIDIS.T], -1)
        np.testing.assert_allclose(cell_colours(picture, 6, 8, index), colours, atol=1)
    legend = np.asarray(picture)[TOP : TOP + LEGEND_EDGE, picture.width - MARGIN - LEGEND_EDGE + 2]
    np.testing.assert_array_equal(legend[[0, -1]], VIRIDIS[[-1, 0]])


def test_occlusion_marks_the_cells_of_either_photo_whose_match_has_another_match():
    flow = random_flow()
    picture = occlusion_picture(flow)
    for index, error in enumerate(round_trips(flow)):
        expected = np.where((error > MATCHED)[..., None], ORANGE, 255)
        assert len(np.unique(expected.reshape(-1, 3), axis=0)) == 2
        np.testing.assert_array_equal(cell_colours(picture, 6, 8, index), expected)


@pytest.mark.parametrize(("beyond", "colour"), [(0.4, 255), (0.6, ORANGE)])
def test_a_match_is_inside_as_far_as_the_outermost_cells_reach(beyond, colour):
    still = torch.zeros(1, 2, 4, 4)
    flow = still.clone()
    flow[:, 0, :, 3] = flow[:, 1, 3] = beyond
    colours = cell_colours(occlusion_picture(BidirectionalFlow(flow, still)), 4, 4)
    assert (colours[:3, :3] == 255).all()
    assert (colours[3] == colour).all()
    assert (colours[:, 3] == colour).all()


def test_photos_show_through_in_grey_on_cells_of_their_own_place():
    photo = Image.new("RGB", (64, 36), (0, 0, 200))
    photo.paste((255, 255, 0), (32, 0, 64, 36))
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, 0, 2, :4] = 4  # where no match comes back from
    picture = occlusion_picture(BidirectionalFlow(flow, torch.zeros(1, 2, 8, 8)), (photo, photo), canvas_of((36, 64)))
    panel = panel_of(picture, (PANEL_EDGE, 216)).astype(int)
    marked = np.ptp(panel, axis=-1) > 50
    np.testing.assert_array_equal(np.flatnonzero(marked[:, 0])[[0, -1]], [96, 143])  # cell 2 of 4.5 in 216 pixels
    np.testing.assert_array_equal(np.flatnonzero(marked[120])[[0, -1]], [0, 191])
    unmarked = panel[:48]
    assert (np.ptp(unmarked, axis=-1) == 0).all()
    assert (unmarked[0, -1] > unmarked[0, 0] + 20).all()


def test_matches_are_the_three_pictures_in_one():
    photos = Image.new("RGB", (64, 48), "navy"), Image.new("RGB", (64, 48), "olive")
    flow, canvas = random_flow(8, 8), canvas_of((48, 64))
    rows = [
        correspondence_lines(*photos, flow, canvas=canvas),
        confidence_picture(flow, photos, canvas),
        occlusion_picture(flow, photos, canvas),
    ]
    picture = matches_picture(*photos, flow, canvas)
    top = 0
    for row in rows:
        np.testing.assert_array_equal(np.asarray(picture.crop((0, top, row.width, top + row.height))), np.asarray(row))
        top += row.height
    assert picture.size == (max(row.width for row in rows), top)


def test_text_has_room_over_narrow_pictures():
    photo, tall = Image.new("RGB", (20, 200), "grey"), random_flow(20, 2, 1)
    for picture in (flow_picture(tall), matches_picture(photo, photo, tall), occlusion_picture(tall)):
        pixels = np.asarray(picture)
        assert (pixels < 128).any()
        assert (pixels[:, -MARGIN + 1 :] == 255).all()
