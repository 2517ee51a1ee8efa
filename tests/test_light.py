# SPDX-License-Identifier: Apache-2.0
"""The difference in light between two photos."""

import pytest
import torch

from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.light import DARKEST, gain_maps, in_one_light, light_gains
from dreammover_pipeline.records import BidirectionalFlow

SIZE = (16, 24)
STILL = BidirectionalFlow(torch.zeros(1, 2, *SIZE), torch.zeros(1, 2, *SIZE))


def picture(seed=0):
    """A photo of four pixels a cell, even within each cell, (3, 64, 96) in [0.2, 0.7]."""
    cells = 0.2 + 0.5 * torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return cells.repeat_interleave(4, 1).repeat_interleave(4, 2)


def gain(even, right, down):
    """even + right · x + down · y at every pixel, x and y from −½ to ½, (H, W)."""
    x, y = cell_grid(64, 96, torch.zeros(1))[0]
    return even + right * ((x + 0.5) / 96 - 0.5) + down * ((y + 0.5) / 64 - 0.5)


def test_photos_in_one_light_have_no_gain_and_stay_as_they_are():
    photos = torch.stack([picture(), picture()])
    expected = torch.tensor([1.0, 0, 0]).expand(2, 3, 3)
    torch.testing.assert_close(light_gains(photos, STILL), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(in_one_light(photos, STILL), photos, atol=1e-6, rtol=0)


def test_a_gain_that_changes_across_the_picture_is_found():
    first = picture()
    photos = torch.stack([first, first * gain(1.3, 0.2, -0.4)])
    found = light_gains(photos, STILL)  # slopes are held back by a tenth at most
    torch.testing.assert_close(found[0], torch.tensor([1.3, 0.2, -0.4]).expand(3, 3), atol=0.04, rtol=0)
    made = in_one_light(photos, STILL)
    before, after = ((two[0] - two[1]).abs().mean() for two in (photos, made))
    assert after < before / 10


def test_no_place_is_darkened_beyond_a_limit_however_steep_the_gain():
    gains = torch.tensor([0.3, 1.0, 0]).expand(2, 3, 3)  # below zero at the left edge
    maps = gain_maps(gains, SIZE, picture())
    assert maps.min() == pytest.approx(DARKEST)
    assert maps.max() == pytest.approx(0.3 + 0.5, abs=0.05)


def test_every_colour_has_a_gain_of_its_own():
    first = picture()
    factors = torch.tensor([0.7, 1.0, 1.4]).reshape(3, 1, 1)
    found = light_gains(torch.stack([first, first * factors]), STILL)
    torch.testing.assert_close(found[0, :, 0], factors.flatten(), atol=0.01, rtol=0)
    torch.testing.assert_close(found[1, :, 0], 1 / factors.flatten(), atol=0.01, rtol=0)


def test_what_has_changed_its_colour_does_not_decide():
    first = picture()
    second = first * gain(1.2, 0, 0)
    second[:, 16:32, 32:56] = picture(seed=1)[:, 16:32, 32:56]
    found = light_gains(torch.stack([first, second]), STILL)
    assert found[0, :, 0].tolist() == pytest.approx([1.2] * 3, abs=0.03)


def test_the_flow_says_what_is_compared():
    first = picture()
    second = first.roll(8, 2) * gain(1.25, 0, 0)
    way = torch.zeros(1, 2, *SIZE)
    way[:, 0] = 2
    found = light_gains(torch.stack([first, second]), BidirectionalFlow(way, -way))
    assert found[0, :, 0].tolist() == pytest.approx([1.25] * 3, abs=0.02)


def test_flows_that_agree_nowhere_give_finite_gains():
    away = torch.full((1, 2, *SIZE), 1000.0)
    photos = torch.stack([picture(), picture(seed=1)])
    assert in_one_light(photos, BidirectionalFlow(away, away)).isfinite().all()
