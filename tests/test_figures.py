# SPDX-License-Identifier: Apache-2.0
"""The contact sheet and the flow picture, read off their pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dreammover_pipeline.figures import CAPTION, MARGIN, SHEET_EDGE, WHEEL, contact_sheet, flow_colours, flow_picture
from dreammover_pipeline.records import BidirectionalFlow

ANGLES = [k * math.pi / 4 for k in range(8)]


def constant_flow(dx, dy, h=4, w=4):
    return torch.tensor([dx, dy], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, h, w)


def panel_pixel(picture):
    return picture.getpixel((MARGIN + 2, MARGIN + CAPTION + 2))


def wheel_pixel(picture, angle, radius):
    centre_x, centre_y = picture.width - MARGIN - WHEEL / 2, MARGIN + CAPTION + WHEEL / 2
    reach = radius * WHEEL / 2
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
        picture.getpixel(((picture.width - WHEEL) // 2 + 100, MARGIN + CAPTION + 2)),
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
    colours = np.asarray(picture)[MARGIN + CAPTION :, MARGIN:][: h * factor : factor, : w * factor : factor]
    lengths = torch.linalg.vector_norm(flow.double(), dim=1)
    full = float(np.percentile(torch.cat([lengths, lengths]).numpy(), 95))
    np.testing.assert_array_equal(colours, flow_colours(flow[0].double().numpy(), full))


@pytest.mark.parametrize(
    ("size", "count"), [((96, 96), 1), ((96, 96), 34), ((512, 512), 34), ((768, 432), 7), ((432, 768), 8), ((5, 3), 3)]
)
def test_sheets_show_every_frame_in_order_at_a_sane_size(size, count):
    greys = [40 + 5 * index for index in range(count)]
    frames = [Image.new("RGB", size, (grey, grey, 0)) for grey in greys]
    sheet = contact_sheet(frames, [index / max(1, count - 1) for index in range(count)])
    assert max(sheet.size) <= SHEET_EDGE + 500
    shown = [colour for _, colour in (sheet.getcolors(maxcolors=2**20) or []) if colour[2] == 0 and colour[0] > 0]
    assert sorted(colour[0] for colour in shown) == greys
    array = np.asarray(sheet)
    places = [tuple(np.argwhere((array == (grey, grey, 0)).all(-1))[0]) for grey in greys]
    assert places == sorted(places)


def test_frames_are_not_enlarged_and_keep_their_pixels():
    rng = np.random.default_rng(0)
    frame = Image.fromarray(rng.integers(0, 256, (96, 80, 3), dtype=np.uint8))
    sheet = contact_sheet([frame] * 3, [0, 0.5, 1])
    np.testing.assert_array_equal(np.asarray(sheet)[MARGIN : MARGIN + 96, MARGIN : MARGIN + 80], np.asarray(frame))


def test_captions_tell_times_apart():
    frame = Image.new("RGB", (96, 96), "white")
    sheets = [np.asarray(contact_sheet([frame], [time])) for time in (0, 0.25, 0.5, 1)]
    for index, sheet in enumerate(sheets):
        assert (sheet < 128).any()  # there is text
        assert not any(np.array_equal(sheet, other) for other in sheets[:index])


def test_a_sheet_needs_a_time_for_each_frame():
    with pytest.raises(ValueError, match="got 1 and 2"):
        contact_sheet([Image.new("RGB", (4, 4))], [0, 1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        contact_sheet([], [])


def test_a_few_outliers_do_not_make_the_rest_of_a_flow_pale():
    flow = constant_flow(1, 0, 8, 8).clone()
    flow[..., 0, 0] = 1000
    picture = np.asarray(flow_picture(BidirectionalFlow(flow, flow)))
    panel = picture[MARGIN + CAPTION :, MARGIN:]
    assert (panel[100, 100] == (255, 0, 0)).all()
