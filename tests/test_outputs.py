# SPDX-License-Identifier: Apache-2.0
"""The forms that frames come in, and outputs that are put together."""

import numpy as np
import pytest
import torch
from PIL import Image

from dreammover_pipeline.outputs import DreamMoverPipelineOutput, as_output, hand_over, joined, returned
from dreammover_pipeline.ranking import Chooser


def output(frames, number=0, flagged=None, candidates=None):
    """The output of one pair, whose flow is named by a number and whose frame is at a time of its own."""
    return DreamMoverPipelineOutput(frames, [f"flow {number}"], flagged, [(number / 10,)], candidates)


def test_a_frame_is_the_same_picture_in_every_form():
    bytes_of = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 8, 32).clone()
    bytes_of[0, 1] = 7
    values = bytes_of.double().div(255).float()
    for frame in (bytes_of, values):
        before = frame.clone()
        (picture,) = as_output(frame, "pil")
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), bytes_of[0].permute(1, 2, 0).numpy())
        tensor, array = as_output(frame, "pt"), as_output(frame, "np")
        assert tensor.dtype == torch.float32
        assert array.dtype == np.float32
        assert torch.equal(tensor, values)
        assert np.array_equal(array, values.permute(0, 2, 3, 1).numpy())
        assert torch.equal(frame, before)
    (picture,) = as_output(torch.tensor([99.4, 99.6, 100.0]).div(255).view(1, 3, 1, 1), "pil")
    assert picture.getpixel((0, 0)) == (99, 100, 100)


def test_frames_of_half_precision_are_no_bytes():
    frame = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    for dtype in (torch.float16, torch.float64):
        (picture,) = as_output(frame.to(dtype), "pil")
        assert picture.getpixel((0, 0)) == (0, 128, 255)
        assert torch.equal(as_output(frame.to(dtype), "pt"), frame.to(dtype))


@pytest.mark.parametrize("form", [torch.full, np.full, "pil"])
def test_outputs_of_pairs_follow_each_other(form):
    if form == "pil":
        videos = [[[Image.new("RGB", (2, 2), (value,) * 3)]] for value in (1, 2, 3)]
    else:
        videos = [form((1, 1, 3, 2, 2), value / 4) for value in (1, 2, 3)]
    chooser = Chooser(lambda picture: 0, {})
    parts = [
        output(video, number, [[number == 1, True]], [chooser] if number == 1 else None)
        for number, video in enumerate(videos)
    ]
    whole = joined(parts)
    assert isinstance(whole.frames, type(videos[0]))
    assert len(whole.frames) == 3
    for video, expected in zip(whole.frames, videos, strict=True):
        assert np.array_equal(np.asarray(video[0]), np.asarray(expected[0][0]))
    assert whole.flow == ["flow 0", "flow 1", "flow 2"]
    assert whole.times == [(0.0,), (0.1,), (0.2,)]
    assert whole.nsfw_content_detected == [[False, True], [True, True], [False, True]]
    assert whole.candidates == [None, chooser, None]
    assert [part.blacked_out for part in (parts[0], parts[1], joined(parts[1:]), joined(parts[:2]))] == [1, 2, 2, 1]


def test_without_a_checker_and_candidates_none_are_told_of():
    parts = [output(torch.zeros(1, 1, 3, 2, 2), number) for number in (0, 1)]
    whole = joined(parts)
    assert joined(parts[:1]) is parts[0]
    assert DreamMoverPipelineOutput([], [], None, []).candidates is None
    assert whole.nsfw_content_detected is None
    assert whole.candidates is None
    assert whole.blacked_out == 0
    assert returned(whole, True) is whole
    frames, flow, flagged, times, candidates = returned(whole, False)
    assert (frames is whole.frames, flow, flagged, times, candidates) == (True, whole.flow, None, whole.times, None)


def test_an_error_carries_what_was_made_unless_that_fails_too():
    made, error = output(torch.zeros(1, 1, 3, 2, 2)), ValueError("no")
    hand_over(error, lambda: made, "gaps")
    assert error.output is made
    assert error.__notes__ == ["The gaps before this one are not lost: this error's `output` holds their frames."]
    for failure in (torch.OutOfMemoryError, RuntimeError, MemoryError):

        def fail(failure=failure):
            raise failure

        error = ValueError("no")
        hand_over(error, fail, "gaps")
        assert not hasattr(error, "output")
        assert not hasattr(error, "__notes__")
