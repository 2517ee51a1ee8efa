# SPDX-License-Identifier: Apache-2.0
"""Contact sheets, cross-fades and comparisons, read off their pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from dreammover_pipeline.media.pictures import CAPTION, MARGIN, SHEET_EDGE, comparison, contact_sheet, crossfade


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
    with pytest.raises(ValueError, match="1 frames and 2 times came"):
        contact_sheet([Image.new("RGB", (4, 4))], [0, 1])
    with pytest.raises(ValueError, match="0 frames and 0 times came"):
        contact_sheet([], [])


def test_a_crossfade_is_the_weighted_mean_and_ends_with_the_photos():
    rng = np.random.default_rng(0)
    first, last = (Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(2))
    times = [0, 0.25, 0.5, 1]
    for time, frame in zip(times, crossfade(first, last, times), strict=True):
        exact = (1 - time) * np.asarray(first, float) + time * np.asarray(last, float)
        np.testing.assert_allclose(np.asarray(frame), exact, atol=0 if time in (0, 1) else 1)


def test_a_crossfade_refuses_other_times_and_sizes():
    photo = Image.new("RGB", (4, 4))
    for time in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`times` must lie in \[0, 1\]"):
            crossfade(photo, photo, [0.5, time])
    with pytest.raises(ValueError, match="one size"):
        crossfade(photo, Image.new("RGB", (5, 4)), [0.5])


@pytest.mark.parametrize("size", [(160, 90), (40, 60), (1000, 560)])
def test_a_comparison_shows_every_videos_frames_at_once_pixel_by_pixel(size):
    rng = np.random.default_rng(0)
    videos = {
        title: [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(3)]
        for title in ("one", "two", "three")
    }
    frames = comparison(videos)
    assert len(frames) == 3
    caption = 20 if size[1] < 500 else round(20 * 20 / 12)  # text grows with the frames
    top, step = MARGIN + caption, size[0] + MARGIN
    for index, frame in enumerate(frames):
        assert frame.size == (3 * step + MARGIN, top + size[1] + MARGIN)
        pixels = np.asarray(frame)
        for column, video in enumerate(videos.values()):
            left = MARGIN + column * step
            assert (pixels[MARGIN:top, left : left + size[0]] < 128).any()  # the title
            np.testing.assert_array_equal(pixels[top : top + size[1], left : left + size[0]], np.asarray(video[index]))


def test_a_comparison_needs_videos_of_one_length_and_size():
    frame, wide = Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))
    with pytest.raises(ValueError, match=r"got {'a': 1, 'b': 2}"):
        comparison({"a": [frame], "b": [frame] * 2})
    with pytest.raises(ValueError, match="at least one video"):
        comparison({})
    with pytest.raises(ValueError, match=r"got \[\(4, 4\), \(5, 4\)\]"):
        comparison({"a": [frame], "b": [wide]})


def test_titles_have_room_over_narrow_pictures():
    photo = Image.new("RGB", (20, 200), "grey")
    (picture,) = comparison({"a title that needs room": [photo], "another title that needs room": [photo]})
    pixels = np.asarray(picture)
    assert (pixels[:, -MARGIN + 1 :] == 255).all()
    above = pixels[MARGIN : MARGIN + CAPTION].min((0, 2)) < 128
    assert above[: picture.width // 3].any()
    gaps = np.diff(np.flatnonzero(above))
    assert (gaps > MARGIN).sum() == 1  # between the titles
