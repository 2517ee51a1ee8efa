# SPDX-License-Identifier: Apache-2.0
"""Methods that are told the truth of a pair: they follow it, and it helps."""

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from dreammover_pipeline.evaluation.case import EvaluationCase
from dreammover_pipeline.evaluation.ceilings import true_paths
from dreammover_pipeline.evaluation.methods import METHODS
from dreammover_pipeline.evaluation.metrics import psnr
from dreammover_pipeline.evaluation.suites import Pair, world_suite
from dreammover_pipeline.paths import motion_paths

# Frames are upsampled, since detail is looked up along given paths as they are, but along those of a flow aligned.
SHORT = {"num_inference_steps": 6, "inversion_steps": 2, "feature_step": 2, "lora_steps": 0, "detail": "upsampled"}


class Shift:
    """Everything moves by one vector, (dx, dy) in pixels, at an even pace, and nothing is ever hidden."""

    def __init__(self, dx, dy, size):
        self.way = torch.tensor([dx, dy], dtype=torch.float32).reshape(1, 2, 1, 1).expand(1, 2, size, size)

    def flow(self, source, target):
        return (target - source) * self.way

    def visible(self, source, target):
        return torch.ones(1, 1, *self.way.shape[-2:], dtype=torch.bool)


@pytest.fixture
def world_case(tiny_pipe):
    suite = world_suite("same", 1, 3, 128, seed=7)
    return EvaluationCase(tiny_pipe, suite.load(suite.pairs[0]), 0, SHORT)


def shifting_case(pipe, size, settings=SHORT):
    """Noise that moves by four pixels to the right and eight upwards, in four even steps."""
    wide = torch.rand(3, size + 8, size + 8, generator=torch.Generator().manual_seed(0))
    seen = [wide[:, 2 * k : size + 2 * k, 4 - k : size + 4 - k] for k in range(5)]
    pair = Pair("shift", (seen[0], seen[4]), ("", ""), (0.25, 0.5, 0.75), torch.stack(seen[1:4]), Shift(4, -8, size))
    return EvaluationCase(pipe, pair, 0, settings)


@pytest.mark.parametrize("changes", [{}, {"motion": "straight", "guidance_scale": 2.0}, {"fusion": "direct"}])
def test_along_the_paths_of_its_own_flow_a_pair_is_rendered_as_ever(pipe, changes):
    case = shifting_case(pipe, 64, SHORT | changes)
    prepared = case.prepared()
    frames, flow = case.render_along(prepared, motion_paths(prepared.flow, case.setting("motion")))
    torch.testing.assert_close(frames, case.render(prepared)[0], rtol=0, atol=1e-6)
    assert flow is prepared.flow


def test_the_true_way_is_the_worlds_at_the_centres_of_cells(world_case):
    motion, cells = world_case.pair.motion, world_case.prepared().flow.forward
    times = torch.tensor([0.0, 0.3, 1.0])
    first, second = true_paths(world_case, cells).at(times)
    for i, time in enumerate(times.tolist()):
        torch.testing.assert_close(4 * first[i], motion.flow(0, time)[0, :, 2::4, 2::4], atol=1e-4, rtol=0)
        torch.testing.assert_close(4 * second[i], motion.flow(1, time)[0, :, 2::4, 2::4], atol=1e-4, rtol=0)
    assert not first[0].any()
    assert not second[2].any()


@pytest.mark.parametrize("name", ["true_path", "true_visibility"])
def test_the_true_way_of_what_only_shifts_is_straight(pipe, name):
    case = shifting_case(pipe, 64)
    frames = METHODS["true_flow_straight"](case)[0]
    torch.testing.assert_close(METHODS[name](case)[0], frames, atol=1e-5, rtol=0)


def test_what_cannot_be_seen_leaves_the_grid(world_case):
    motion, pixels = world_case.pair.motion, world_case.ends[0]
    for way, image in zip(true_paths(world_case, pixels, only_seen=True).at(torch.tensor([0.5])), (0, 1), strict=True):
        seen = motion.visible(image, 0.5).expand_as(way)
        assert torch.equal(way[seen], motion.flow(image, 0.5)[seen])
        assert (way[~seen] >= 128).all()
        assert not seen.all()


def test_splats_along_the_true_way_are_the_true_frames_of_what_shifts_by_whole_pixels(pipe):
    case = shifting_case(pipe, 64)
    frames, flow = METHODS["true_splat"](case)
    inside = (..., slice(8, -8), slice(8, -8))  # pixels that both images show
    torch.testing.assert_close(frames[inside], case.pair.truth[inside], atol=1e-5, rtol=0)
    assert torch.equal(8 * flow.forward, Shift(4, -8, 8).way)


def test_what_is_hidden_in_a_frame_does_not_show_there(pipe):
    """A black image that is hidden all the time lies over a white one."""
    motion = Shift(0, 0, 64)
    motion.visible = lambda source, target: torch.full((1, 1, 64, 64), source == 1)
    pair = Pair("hidden", (torch.zeros(3, 64, 64), torch.ones(3, 64, 64)), ("", ""), (0.25, 0.5), None, motion)
    assert (METHODS["true_splat"](EvaluationCase(pipe, pair, 0, SHORT))[0] == 1).all()


def test_the_more_is_true_the_better_the_frames_of_the_embedded_checkpoint(world_case):
    def quality(name):
        return psnr(METHODS[name](world_case)[0], world_case.pair.truth)

    names = ["true_flow_straight", "true_path", "true_visibility", "true_splat"]
    qualities = [quality(name) for name in names]
    assert qualities == sorted(qualities)
    assert quality("pixel_splat") < quality("true_splat")
