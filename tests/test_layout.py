# SPDX-License-Identifier: Apache-2.0
"""The frames' layout held to the fused one while noise is high."""

import math

import pytest
import torch

from dreammover_pipeline.ddim import predict_clean, recompose
from dreammover_pipeline.layout import coarse_part, hold_layout, holding_layout
from dreammover_pipeline.records import FusedFrames, Schedule

SCHEDULE = Schedule(tuple(range(1, 200, 10)), (1.0, *torch.linspace(0.99, 0.1, 20).tolist()))  # 20 steps
SHAPE = (2, 4, 8, 10)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fused(coverage=None, levels=True):
    coverage = torch.full((2, 1, 8, 10), 2.0).double() if coverage is None else coverage
    clean, eps = (randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)) if levels else (None, None)
    return FusedFrames(randn(*SHAPE, seed=3), clean, eps, coverage, torch.tensor([0.3, 0.6]))


def predicted(latents, timestep):
    return 0.3 * latents + 0.01 * timestep


def test_the_noisy_latents_stay_what_they_were():
    eps, latents, layout = (randn(*SHAPE, seed=seed) for seed in range(3))
    held = hold_layout(eps, latents, 0.4, layout, torch.rand(2, 1, 8, 10).double())
    clean = predict_clean(latents, held, 0.4)
    torch.testing.assert_close(recompose(clean, held, 0.4), latents)


def test_the_coarse_part_is_the_layouts_and_the_rest_the_predictions():
    eps, latents, layout = (randn(*SHAPE, seed=seed) for seed in range(3))
    before = predict_clean(latents, eps, 0.4)
    after = predict_clean(latents, hold_layout(eps, latents, 0.4, layout, torch.ones(2, 1, 8, 10).double()), 0.4)
    torch.testing.assert_close(after, before - coarse_part(before) + coarse_part(layout))


def test_cells_of_no_weight_are_left_to_the_prediction():
    eps, latents, layout = (randn(*SHAPE, seed=seed) for seed in range(3))
    weight = torch.ones(2, 1, 8, 10).double()
    weight[..., 5:] = 0
    held = hold_layout(eps, latents, 0.4, layout, weight)
    assert torch.equal(held[..., 5:], eps[..., 5:])
    assert not torch.isclose(held[..., :5], eps[..., :5]).any()


def test_the_coarse_part_is_a_mean_weighted_by_distance():
    x = randn(1, 1, 40, 32)  # on this grid a cell is one of the unit grid
    weights = [math.exp(-(d**2) / (2 * 0.8**2)) for d in range(-2, 3)]
    expected = (
        sum(
            a * b * float(x[0, 0, 20 + dy, 15 + dx])
            for a, dy in zip(weights, range(-2, 3), strict=True)
            for b, dx in zip(weights, range(-2, 3), strict=True)
        )
        / sum(weights) ** 2
    )
    assert float(coarse_part(x)[0, 0, 20, 15]) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(coarse_part(torch.full(SHAPE, 3.0)), torch.full(SHAPE, 3.0))


@pytest.mark.parametrize("size", [(1, 1), (2, 30), (64, 64)])
def test_any_grid_has_a_coarse_part(size):
    made = coarse_part(randn(1, 4, *size))
    assert made.shape == (1, 4, *size)
    assert made.isfinite().all()


def test_the_last_tenth_of_the_schedule_is_free():
    predict = holding_layout(predicted, fused(), SCHEDULE, 1.0)
    latents = randn(*SHAPE, seed=5)
    free = [
        step
        for step, timestep in enumerate(SCHEDULE.timesteps, 1)
        if torch.equal(predict(latents, timestep), predicted(latents, timestep))
    ]
    assert free == [1, 2]


def test_what_one_photo_alone_reaches_is_free():
    coverage = torch.full((2, 1, 8, 10), 2.0).double()
    coverage[0, :, 2:5, 3:7] = 1
    latents, timestep = randn(*SHAPE, seed=5), SCHEDULE.timesteps[15]
    made = holding_layout(predicted, fused(coverage), SCHEDULE, 1.0)(latents, timestep)
    assert torch.equal(made[0, :, 2:5, 3:7], predicted(latents, timestep)[0, :, 2:5, 3:7])


def test_nothing_is_held_without_strength_or_levels():
    assert holding_layout(predicted, fused(), SCHEDULE, 0.0) is predicted
    assert holding_layout(predicted, fused(levels=False), SCHEDULE, 1.0) is predicted


def test_frames_come_nearer_to_the_warped_photos(pipe, photos, fast):
    del fast["n_frames"], fast["detail"], fast["output_type"]
    pair = pipe.prepare(*photos, **fast)
    target = pipe.preview(pair, torch.tensor([0.5]))
    free, held = (
        pipe.render(pair, times=[0.5], output_type="latent", layout_hold=strength).frames[0] for strength in (0, 1)
    )
    assert (held - target).square().mean() < (free - target).square().mean()


def test_autocast_of_the_caller_changes_nothing():
    x = randn(*SHAPE).float()
    made = coarse_part(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coarse_part(x), made)
