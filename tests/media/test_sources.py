# SPDX-License-Identifier: Apache-2.0
"""Pictures of where frames take their detail from, read off their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dreammover_pipeline.media.colours import LEGEND_EDGE, PHOTO_COLOURS, source_colours, source_legend
from dreammover_pipeline.media.pictures import CAPTION, MARGIN, PANEL_EDGE
from dreammover_pipeline.media.sources import sources_map, sources_picture
from dreammover_pipeline.records import Canvas, FrameSources

WHITE = (255, 255, 255)
CANVAS = Canvas(32, 64, 32, 64, 320, 640)


def sources_of(first, taken, h=8, w=16, time=0.5):
    """A frame of which everything comes from the photos alike."""
    shares = torch.tensor([first, 1 - first]).reshape(2, 1, 1).expand(2, h, w)
    return FrameSources(time, shares, torch.full((1, h, w), taken))


def colours_of(picture):
    return {colour for _, colour in picture.getcolors()}


@pytest.mark.parametrize(("first", "colour"), [(1.0, PHOTO_COLOURS[0]), (0.0, PHOTO_COLOURS[1])])
def test_what_comes_from_one_photo_has_exactly_its_colour(first, colour):
    assert colours_of(sources_map(sources_of(first, 1.0), CANVAS, (384, 192))) == {tuple(colour)}


@pytest.mark.parametrize("first", [0.0, 0.3, 1.0])
def test_what_diffusion_made_is_white_whatever_the_photos(first):
    assert colours_of(sources_map(sources_of(first, 0.0), CANVAS, (384, 192))) == {WHITE}


def test_colours_mix_by_the_shares_and_pale_with_what_is_taken():
    last = np.linspace(0, 1, 9)
    full = source_colours(np.stack([1 - last, last]), np.ones(9)).astype(float)
    expected = (1 - last)[:, None] * PHOTO_COLOURS[0] + last[:, None] * PHOTO_COLOURS[1]
    np.testing.assert_allclose(full, expected, atol=0.5)
    half = source_colours(np.stack([1 - last, last]), np.full(9, 0.5))
    np.testing.assert_allclose(half, (expected + 255) / 2, atol=0.5)


def test_less_taken_is_brighter():
    for first in (0.0, 0.5, 1.0):
        taken = np.linspace(0, 1, 6)
        colours = source_colours(np.stack([np.full(6, first), np.full(6, 1 - first)]), taken)
        assert (np.diff(colours.astype(float).sum(-1)) < 0).all()


def test_the_legend_has_the_colours_of_the_map():
    legend = source_legend()
    for x, first in ((0, 1.0), (LEGEND_EDGE - 1, 0.0)):
        (colour,) = colours_of(sources_map(sources_of(first, 1.0), CANVAS, (10, 10)))
        assert legend.getpixel((x, CAPTION)) == colour
        assert legend.getpixel((x, CAPTION + LEGEND_EDGE - 1)) == WHITE


def test_padding_is_cut_off_and_places_lie_on_their_pixels():
    sources, canvas = sources_of(1.0, 0.0, h=8, w=8), Canvas(32, 32, 32, 24, 320, 240)  # 6 of 8 columns are content
    sources.taken[:, :, 7:] = 1
    assert colours_of(sources_map(sources, canvas, (240, 320))) == {WHITE}
    sources.taken[:, :, :3] = 1
    row = np.asarray(sources_map(sources, canvas, (240, 320)))[160]
    assert (row[:100] == PHOTO_COLOURS[0]).all()
    assert (row[140:] == 255).all()


def test_a_frame_stands_beside_its_map_and_both_have_the_frames_aspect():
    frame = Image.new("RGB", (640, 320), "navy")
    picture = sources_picture([frame], [sources_of(1.0, 1.0)], CANVAS)
    top, second = MARGIN + 2 * CAPTION, 2 * MARGIN + PANEL_EDGE
    for left, colour in ((MARGIN, (0, 0, 128)), (second, tuple(PHOTO_COLOURS[0]))):
        panel = picture.crop((left, top, left + PANEL_EDGE, top + PANEL_EDGE // 2))
        assert colours_of(panel) == {colour}
        assert picture.getpixel((left, top + PANEL_EDGE // 2)) == WHITE


def test_some_frames_are_shown_spread_evenly():
    frames = [Image.new("RGB", (64, 64), (0, 0, 10 * k)) for k in range(7)]
    sources = [sources_of(0.5, 1.0, time=(k + 1) / 8) for k in range(7)]

    def shown(**rows):
        picture = np.asarray(sources_picture(frames, sources, Canvas(32, 32, 32, 32, 64, 64), **rows))
        column = picture[:, MARGIN + PANEL_EDGE // 2]
        return sorted({int(blue) // 10 for red, _, blue in column if red == 0})

    assert shown() == [1, 3, 5]
    assert shown(rows=1) == [3]
    assert shown(rows=9) == list(range(7))


@pytest.mark.parametrize(
    ("frames", "sources", "rows", "reason"),
    [
        (0, 0, 3, "at least one frame"),
        (2, 1, 3, "2 frames and sources of 1 came"),
        (1, 0, 3, "1 frames and sources of 0 came"),
        (1, 1, 0, "`rows` must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(frames, sources, rows, reason):
    with pytest.raises(ValueError, match=reason):
        sources_picture([Image.new("RGB", (8, 8))] * frames, [sources_of(1.0, 1.0)] * sources, CANVAS, rows)


def test_the_edge_beside_the_padding_is_no_darker():
    sources = sources_of(0.5, 1.0)
    expected = colours_of(sources_map(sources, CANVAS, (384, 192)))
    shares = sources.shares.clone()
    shares[:, 5:] = shares[:, :, 11:] = 0  # as where nothing of the photos is: beyond the picture
    padded = Canvas(32, 64, 18, 42, 180, 420)  # the picture ends in the fifth row of places and in the eleventh column
    assert colours_of(sources_map(FrameSources(0.5, shares, sources.taken), padded, (384, 192))) == expected
