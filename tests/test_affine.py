# SPDX-License-Identifier: Apache-2.0
"""Motion that is added to interpolation in noise."""

from contextlib import nullcontext

import pytest
import torch

from dreammover_pipeline.affine import Affine
from dreammover_pipeline.branching import interpolate_in_noise
from dreammover_pipeline.records import Schedule


def smooth(seed=0, h=24, w=32):
    noise = torch.randn(1, 4, h // 8, w // 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(noise, (h, w), mode="bicubic")[0]


def slopes(h=24, w=32):
    """A picture between whose cells bilinear interpolation is exact."""
    x, y = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (w, h))
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w), x - y[:, None], 1 - x + 2 * y[:, None]])


def inside(latents):
    return latents[:, 8:-8, 8:-8]


MOTION = Affine(1.1, 12.0, 0.05, -0.04)


def test_nothing_moves_where_no_time_passes():
    assert torch.allclose(MOTION.moved(smooth(), 0.3, 0.3), smooth(), atol=1e-9)
    assert torch.allclose(Affine(1.0, 0.0, 0.0, 0.0).moved(smooth(), 0.0, 1.0), smooth(), atol=1e-9)


def test_a_shift_to_the_right_and_down_moves_cells_there():
    moved = Affine(1.0, 0.0, 4 / 32, 3 / 24).moved(smooth(), 0.0, 1.0)
    assert torch.allclose(moved[:, 3:, 4:], smooth()[:, :-3, :-4], atol=1e-9)


def test_what_comes_in_over_an_edge_is_the_picture_mirrored_there():
    moved = Affine(1.0, 0.0, 4 / 32, -3 / 24).moved(smooth(), 0.0, 1.0)
    assert torch.allclose(moved[:, :-3, :4], smooth()[:, 3:, :4].flip(-1), atol=1e-9)
    assert torch.allclose(moved[:, -3:, 4:], smooth()[:, -3:, :-4].flip(-2), atol=1e-9)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_picture_is_moved_in_float32_at_least(given, kept):
    moved = MOTION.moved(smooth().to(given), 0.0, 1.0)
    assert moved.dtype == kept
    assert torch.equal(moved, MOTION.moved(smooth().to(given).to(kept), 0.0, 1.0))


def test_a_quarter_turn_is_clockwise():
    square = smooth(h=16, w=16)
    moved = Affine(1.0, 90.0, 0.0, 0.0).moved(square, 0.0, 1.0)
    assert torch.allclose(moved, square.rot90(-1, (-2, -1)), atol=1e-9)


def test_a_zoom_brings_places_away_from_the_middle():
    moved = Affine(2.0, 0.0, 0.0, 0.0).moved(smooth(h=33, w=33), 0.0, 1.0)
    assert torch.allclose(moved[:, 16, ::2], smooth(h=33, w=33)[:, 16, 8:25], atol=1e-9)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_a_shift_goes_at_an_even_pace(start, end):
    moved = Affine(1.0, 0.0, 8 / 32, -4 / 24).moved(smooth(), start, end)
    assert torch.allclose(moved[:, :-2, 4:], smooth()[:, 2:, :-4], atol=1e-9)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_a_turn_goes_at_an_even_pace(start, end):
    square = smooth(h=16, w=16)
    moved = Affine(1.0, 180.0, 0.0, 0.0).moved(square, start, end)
    assert torch.allclose(moved, square.rot90(-1, (-2, -1)), atol=1e-9)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_a_zoom_multiplies_by_the_same_factor_in_equal_times(start, end):
    moved = Affine(4.0, 0.0, 0.0, 0.0).moved(smooth(h=33, w=33), start, end)
    assert torch.allclose(moved[:, 16, ::2], smooth(h=33, w=33)[:, 16, 8:25], atol=1e-9)


def test_ways_join_and_lead_back():
    there = MOTION.moved(slopes(), 0.0, 0.4)
    assert torch.allclose(inside(MOTION.moved(there, 0.4, 0.9)), inside(MOTION.moved(slopes(), 0.0, 0.9)), atol=1e-9)
    assert torch.allclose(inside(MOTION.moved(there, 0.4, 0.0)), inside(slopes()), atol=1e-9)


def test_frames_between_a_picture_and_its_moved_self_are_it_on_its_way():
    """With a model that changes nothing at hardly any noise, the two parents of every frame agree."""
    schedule = Schedule((1, 2), (1.0, 1 - 1e-6, 1 - 2e-6))
    ends = torch.stack([slopes(), MOTION.moved(slopes(), 0.0, 1.0)])

    def at_work(frames, steps):
        return nullcontext((lambda x, timestep: torch.zeros_like(x), lambda i, timestep, x: x))

    made = interpolate_in_noise(ends, (0.25, 0.5), at_work, schedule, (0.5, 0.5), seed=0, affine=MOTION)
    for time, latents in zip((0.25, 0.5), made, strict=True):
        # The noise that is left has a standard deviation of 0.001; a cell's shift changes a channel by up to 0.17.
        assert torch.allclose(inside(latents), inside(MOTION.moved(slopes(), 0.0, time)), atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"affine": (1.0, 0.0, 0.0, 0.0)}, ValueError, "`affine` needs `method`"),
        ({"method": "noise", "affine": (1.0, 0.0)}, TypeError, "`affine` must be four numbers"),
        ({"method": "noise", "affine": (0.0, 0.0, 0.0, 0.0)}, ValueError, "`affine` must be finite and above 0"),
        ({"method": "noise", "affine": (1.0, float("nan"), 0.0, 0.0)}, ValueError, "`affine` must be finite"),
    ],
)
def test_what_makes_no_sense_is_refused(pipe, photos, fast, wrong, error, message):
    with pytest.raises(error, match=message):
        pipe(*photos, **fast | wrong)


def test_it_moves_the_frames_and_not_the_photos(pipe, photos, fast):
    settings = fast | {"method": "noise", "lora_steps": 0, "n_frames": 1, "include_inputs": True, "output_type": "pt"}

    def frames(**more):
        return pipe(*photos, **settings, **more, generator=torch.Generator().manual_seed(0)).frames[0]

    still, moved = frames(), frames(affine=(1.2, 20.0, 0.1, 0.0))
    assert torch.equal(still[[0, 2]], moved[[0, 2]])
    assert not torch.allclose(still[1], moved[1], atol=1e-3)
