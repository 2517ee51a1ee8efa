# SPDX-License-Identifier: Apache-2.0
"""Flows refined on the photos."""

import math
from dataclasses import replace
from functools import reduce
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support import naive

from dreammover_pipeline import refinement, search
from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.records import BidirectionalFlow
from dreammover_pipeline.refinement import (
    FROM_FEATURES,
    WITHIN_A_CELL,
    Windows,
    aligned_flow,
    refined_flow,
)
from dreammover_pipeline.rigid import nearer_fit, similarities_of
from dreammover_pipeline.search import most_alike

TOLERANCE = 0.06


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def texture(places, seed=0):
    """Smooth colours at places (2, …) in pixels, (3, …) in [0, 1]; equal places have equal colours."""
    waves = randn(3, 12, 2, seed=seed) * 0.25
    phases = randn(3, 12, seed=seed + 1) * 3
    angles = torch.einsum("ckd,d...->ck...", waves, places) + phases.reshape(3, 12, *[1] * (places.ndim - 1))
    return 0.5 + 0.4 * angles.sin().mean(1)


def moved_pair(h, w, degrees, scale, shift, cell=4, seed=0):
    """Two photos of one texture that moves by a similarity about the middle, and the flow between them in cells."""
    turn = scale * torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]).double()
    shift = torch.tensor(shift, dtype=torch.float64)

    def carried(places, middle, unit, back=False):
        middle, way = middle.reshape(2, 1, 1), (shift * unit).reshape(2, 1, 1)
        (a, b), (x, y) = turn, places - middle - (way if back else 0)
        if back:
            a, b = a / turn.square().sum(), -b / turn.square().sum()
        return torch.stack([a * x - b * y, b * x + a * y]) + middle + (0 if back else way)

    pixels = cell_grid(h * cell, w * cell, shift)[0]
    middle = torch.tensor([w * cell - 1, h * cell - 1]).double() / 2
    photos = torch.stack([texture(pixels, seed), texture(carried(pixels, middle, cell, back=True), seed)])
    cells = cell_grid(h, w, shift)[0]
    middle = torch.tensor([w - 1, h - 1]).double() / 2
    ways = torch.stack([carried(cells, middle, 1), carried(cells, middle, 1, back=True)]) - cells
    return photos, ways


def inside(ways, margin=1.0):
    """Which cells are carried to a place well inside the other photo, (2, h, w)."""
    h, w = ways.shape[-2:]
    x, y = (cell_grid(h, w, ways) + ways).unbind(1)
    return (x > margin) & (x < w - 1 - margin) & (y > margin) & (y < h - 1 - margin)


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1.0), (12, 1.0), (-8, 1.12)])
def test_the_photos_tell_the_motion_to_a_fraction_of_a_cell(degrees, scale):
    photos, truth = moved_pair(20, 24, degrees, scale, (2.3, -1.4))
    rough = BidirectionalFlow.of(truth.round() + (randn(*truth.shape, seed=2) * 0.5).clamp(-1, 1))
    made = refined_flow(rough, photos, TOLERANCE).stacked()
    seen = inside(truth)
    before, after = ((ways - truth).norm(dim=1)[seen] for ways in (rough.stacked(), made))
    assert before.mean() > 0.5
    assert after.mean() < 0.1
    assert after.quantile(0.95) < 0.25


@pytest.mark.parametrize("seed", [0, 3])
def test_what_has_gone_far_and_turned_is_found_wherever_it_is(seed):
    """By 60° and a third of the picture, from a flow that says that all rests."""
    photos, truth = moved_pair(24, 24, 60, 1.0, (8, 0), seed=seed)
    made = refined_flow(BidirectionalFlow.of(torch.zeros_like(truth)), photos, TOLERANCE).stacked()
    seen = inside(truth, 2.5)
    after = (made - truth).norm(dim=1)[seen]
    assert truth.norm(dim=1)[seen].mean() > 8
    assert after.quantile(0.9) < 0.25
    _, turn, matched = most_alike(photos, (24, 24), FROM_FEATURES.half)
    degrees = torch.atan2(turn[:, 1], 1 + turn[:, 0]).rad2deg()
    for image, expected in enumerate((60, -60)):
        found = degrees[image][matched[image, 0]]
        assert len(found) > 50
        assert float(found.median()) == pytest.approx(expected)


def test_what_is_known_of_a_part_of_a_large_thing_reaches_the_rest_of_it():
    """The whole has turned by more than is searched for, and features have found a third of it."""
    photos, truth = moved_pair(40, 40, 110, 1.0, (0, 0))
    away = (cell_grid(40, 40, truth)[0] - 19.5).norm(dim=0)
    begun = torch.where(away <= 7, truth, 0)
    made = refined_flow(BidirectionalFlow.of(begun), photos, TOLERANCE).stacked()
    off = (made - truth).norm(dim=1)[:, away <= 19]
    assert (off < 0.5).double().mean() > 0.95


def test_smooth_ground_hidden_in_either_photo_goes_nowhere():
    """What a thing has left and what it has come to look alike and are both lost, which is no reason to swap them."""
    ground = torch.full((3, 96, 96), 0.5, dtype=torch.float64)
    thing = texture(cell_grid(32, 32, ground)[0])
    photos = ground.repeat(2, 1, 1, 1)
    photos[0, :, 8:40, 8:40], photos[1, :, 56:88, 56:88] = thing, thing
    made = refined_flow(BidirectionalFlow.of(torch.zeros(2, 2, 24, 24).double()), photos, TOLERANCE).stacked()
    way = torch.tensor([12.0, 12.0]).double().reshape(2, 1, 1).expand(2, 4, 4)
    torch.testing.assert_close(made[0, :, 4:8, 4:8], way, atol=0.1, rtol=0)
    torch.testing.assert_close(made[1, :, 16:20, 16:20], -way, atol=0.1, rtol=0)
    assert made[0, :, 16:20, 16:20].norm(dim=0).max() < 3
    assert made[1, :, 4:8, 4:8].norm(dim=0).max() < 3


def test_places_that_look_alike_are_not_told_apart():
    """A chequered photo looks the same wherever it has gone by two fields, so a wrong flow finds nothing elsewhere."""
    x, y = cell_grid(96, 96, torch.zeros(1).double())[0]
    photo = 0.5 + 0.3 * (x * torch.pi / 8).sin() * (y * torch.pi / 8).sin()
    _, _, matched = most_alike(photo.expand(2, 3, -1, -1), (24, 24), FROM_FEATURES.half)
    assert not matched[..., 6:18, 6:18].any()


def test_of_two_things_that_look_alike_one_at_most_is_found_in_the_other_photo():
    ground = torch.full((3, 96, 96), 0.5, dtype=torch.float64)
    thing = texture(cell_grid(32, 32, ground)[0])
    photos = ground.repeat(2, 1, 1, 1)
    photos[0, :, 8:40, 8:40] = photos[0, :, 56:88, 56:88] = photos[1, :, 8:40, 56:88] = thing
    _, _, matched = most_alike(photos, (24, 24), FROM_FEATURES.half)
    first, second = (matched[0, 0, part, part] for part in (slice(5, 7), slice(17, 19)))
    assert (first | second).any()
    assert not (first & second).any()


def test_a_search_among_fewer_places_finds_the_same_motion(monkeypatch):
    photos, truth = moved_pair(24, 24, 0, 1.0, (8, 2))
    monkeypatch.setattr(search, "SEARCHED_PLACES", 24 * 24 // 4)
    made = refined_flow(BidirectionalFlow.of(torch.zeros_like(truth)), photos, TOLERANCE).stacked()
    assert (made - truth).norm(dim=1)[inside(truth, 5)].quantile(0.9) < 0.25
    turned, _ = moved_pair(24, 24, 40, 1.0, (4, 2))
    shift, turn, _ = most_alike(turned, (24, 24), FROM_FEATURES.half)
    # What is around a place moves as one with it: a cell above it moves by a turn of the way up less.
    above = (shift[..., ::2, :] - shift[..., 1::2, :])[..., 1::2]
    torch.testing.assert_close(above, torch.stack([turn[:, 1], -turn[:, 0]], 1)[..., 1::2, 1::2])


def test_light_that_changes_between_the_photos_makes_no_difference():
    photos, truth = moved_pair(20, 24, 8, 1.0, (2.3, -1.4))
    x = torch.linspace(-0.5, 0.5, 24 * 4).double()
    lit = torch.stack([photos[0], photos[1] * (1.2 + 0.3 * x)])
    rough = BidirectionalFlow.of(truth.round())
    made = refined_flow(rough, lit, TOLERANCE).stacked()
    assert (made - truth).norm(dim=1)[inside(truth)].mean() < 0.1


def test_photos_of_different_things_leave_the_flow_nearly_as_it_was():
    _, truth = moved_pair(20, 24, 8, 1.0, (2.3, -1.4))
    pixels = cell_grid(80, 96, truth)[0]
    photos = torch.stack([texture(pixels).round(), texture(pixels, seed=7).round()])
    made = refined_flow(BidirectionalFlow.of(truth), photos, TOLERANCE).stacked()
    assert (made - truth).norm(dim=1)[inside(truth)].mean() < 0.1


def test_what_looks_the_same_everywhere_rests():
    flow = BidirectionalFlow.of(randn(2, 2, 10, 12) * 0.5)
    made = refined_flow(flow, torch.full((2, 3, 40, 48), 0.5).double(), TOLERANCE).stacked()
    torch.testing.assert_close(made, torch.zeros_like(made), atol=1e-6, rtol=0)


def test_the_two_photos_are_treated_alike():
    photos, truth = moved_pair(12, 10, 8, 1.0, (1.3, -0.4))
    rough = BidirectionalFlow.of(truth.round())
    made = refined_flow(rough, photos, TOLERANCE).stacked()
    swapped = refined_flow(rough.reversed(), photos.flip(0), TOLERANCE).stacked()
    torch.testing.assert_close(swapped, made.flip(0))


def test_cells_worked_on_a_few_at_a_time_give_the_same_flow(monkeypatch):
    photos, truth = moved_pair(12, 10, 8, 1.0, (1.3, -0.4))
    rough = BidirectionalFlow.of(truth.round())
    made = refined_flow(rough, photos, TOLERANCE).stacked()
    monkeypatch.setattr(refinement, "WINDOWS_AT_ONCE", 7)
    torch.testing.assert_close(refined_flow(rough, photos, TOLERANCE).stacked(), made)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3)])
def test_any_grid_gives_a_finite_flow(size):
    photos = torch.rand(2, 3, 8 * size[0], 8 * size[1], generator=torch.Generator().manual_seed(0))
    flow = BidirectionalFlow.of(100 * torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(1)) - 50)
    assert refined_flow(flow, photos, 1.0).stacked().isfinite().all()


def test_windows_are_compared_as_the_loop_compares_them():
    photos = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    windows = Windows.of(photos, (6, 5), FROM_FEATURES)
    shift, turn = randn(2, 2, 6, 5), 0.2 * randn(2, 2, 6, 5, seed=1)
    made = windows.compared(shift, turn).residual
    for image, row, column in ((0, 0, 0), (0, 3, 2), (1, 5, 4), (1, 2, 0)):
        expected = naive.window_difference(
            photos[image], photos[1 - image], (row, column), (6, 5), shift[image], turn[image]
        )
        assert float(made[image, 0, row, column]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("turn", [0, 0.1 + 0.3j])
def test_a_step_is_that_of_the_linearised_window(turn):
    """Without outliers and damping, where colours change linearly, one step finds the shift and keeps the turn."""
    h, w, middle, shift, factor = 10, 14, 6 + 5j, 0.4 - 0.2j, 1 + turn
    x, y = (cell_grid(4 * h, 4 * w, torch.zeros(1).double())[0] + 0.5) / 4 - 0.5

    def ramp(places):
        return torch.stack([places.real, places.imag, places.real + places.imag]) / 100

    def as_field(values):
        return torch.view_as_real(values).movedim(-1, 0).expand(2, -1, -1, -1)

    pixels, cells = torch.complex(x, y), torch.complex(*cell_grid(h, w, x)[0])
    photos = torch.stack([ramp(pixels), ramp((pixels - middle - shift) / factor + middle)])
    ways, turns = as_field(factor * (cells - middle) + middle + shift - cells), torch.full_like(cells, turn)
    windows = Windows.of(photos, (h, w), replace(FROM_FEATURES, steps=1))
    beside = as_field(torch.full_like(cells, 0.2 - 0.3j))
    begun = windows.compared(ways + beside, as_field(turns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "DAMPING", 1e-9)
        patch.setattr(refinement, "OUTLIER", 1e6)
        made = windows.stepped(begun, torch.ones(2, 1, h, w, dtype=torch.bool))
    inner = (0, slice(None), slice(4, 6), slice(5, 8))
    torch.testing.assert_close(made.shift[inner], ways[inner], atol=1e-4, rtol=0)
    torch.testing.assert_close(made.turn[inner], as_field(turns)[inner], atol=1e-4, rtol=0)


def test_no_step_is_longer_and_no_round_leads_further_than_it_may():
    """On even slopes that have moved by (5, 4) cells, all steps lead the same way."""
    x, y = cell_grid(48, 56, torch.zeros(1).double())[0] / 4
    photos = torch.stack([torch.stack([x, y, x + y]), torch.stack([x - 5, y - 4, x + y - 9])]) / 100
    still, everywhere = torch.zeros(2, 2, 12, 14).double(), torch.ones(2, 1, 12, 14, dtype=torch.bool)
    ways = []
    for reach in (replace(FROM_FEATURES, steps=1), FROM_FEATURES):
        windows = Windows.of(photos, (12, 14), reach)
        ways.append(windows.stepped(windows.compared(still, still), everywhere).shift)
    assert ways[0].abs().max() == pytest.approx(FROM_FEATURES.longest)
    assert 1 < ways[1].norm(dim=1).max() <= FROM_FEATURES.furthest
    x, y = x - 6, y - 5  # and what grows to three times its size
    photos = torch.stack([torch.stack([x, y, x + y]), torch.stack([x, y, x + y]) / 3]) / 100
    windows = Windows.of(photos, (12, 14), FROM_FEATURES)
    turn = windows.stepped(windows.compared(still, still), everywhere).turn
    scale = torch.hypot(1 + turn[:, 0], turn[:, 1])[:, 4:7, 5:8]
    assert scale[0].max() == pytest.approx(refinement.SCALES[1])
    assert scale[1].min() == pytest.approx(refinement.SCALES[0], abs=0.01)


def test_a_window_without_texture_takes_no_step():
    windows = Windows.of(torch.full((2, 3, 24, 20), 0.3).double(), (6, 5), FROM_FEATURES)
    shift, turn = randn(2, 2, 6, 5), 0.1 * randn(2, 2, 6, 5, seed=1)
    fit = windows.compared(shift, turn)
    stepped = windows.stepped(fit, torch.ones(2, 1, 6, 5, dtype=torch.bool))
    for part in ("shift", "turn", "residual"):
        torch.testing.assert_close(getattr(stepped, part), getattr(fit, part))


def test_only_chosen_cells_take_steps_and_only_to_smaller_differences():
    photos, truth = moved_pair(12, 10, 8, 1.0, (1.3, -0.4))
    windows = Windows.of(photos, (12, 10), FROM_FEATURES)
    fit = windows.compared(truth.round(), torch.zeros_like(truth))
    chosen = randn(2, 1, 12, 10) > 0
    made = windows.stepped(fit, chosen)
    assert torch.equal(made.shift.where(~chosen, 0), fit.shift.where(~chosen, 0))
    assert (made.residual <= fit.residual).all()
    assert made.residual[chosen].mean() < 0.5 * fit.residual[chosen].mean()
    torch.testing.assert_close(windows.compared(made.shift, made.turn).residual, made.residual)


def test_rest_is_compared_like_any_other_similarity():
    photos = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    windows = Windows.of(photos, (6, 5), FROM_FEATURES)
    still = torch.zeros(2, 2, 6, 5).double()
    torch.testing.assert_close(windows.resting().residual, windows.compared(still, still).residual)


@pytest.mark.parametrize("reach", [FROM_FEATURES, WITHIN_A_CELL])
def test_the_best_of_the_neighbours_is_that_of_asking_them_one_by_one(reach):
    photos = torch.rand(2, 3, 36, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    windows = Windows.of(photos, (9, 10), reach)
    fit = windows.compared(randn(2, 2, 9, 10), 0.2 * randn(2, 2, 9, 10, seed=1))
    steps = [
        (down * by, right * by)
        for by in reach.neighbours
        for down, right in product((-1, 0, 1), repeat=2)
        if down or right
    ]
    one_by_one = [windows.compared(*similarity) for similarity in similarities_of(fit, steps)]
    best = reduce(nearer_fit, one_by_one)
    made, inner = windows.of_neighbours(fit), (..., slice(4, 5), slice(4, 6))  # whose neighbours are all on the grid
    for part in ("shift", "turn", "residual"):
        torch.testing.assert_close(getattr(made, part)[inner], getattr(best, part)[inner])
    assert (made.residual > best.residual - 1e-9).all()


def test_a_photo_of_any_number_of_pixels_a_cell_is_compared_alike():
    photos, truth = moved_pair(12, 10, 8, 1.0, (1.3, -0.4))
    finer = F.interpolate(photos, scale_factor=2, mode="nearest")
    rough = BidirectionalFlow.of(truth.round())
    made, again = (refined_flow(rough, two, TOLERANCE).stacked() for two in (photos, finer))
    torch.testing.assert_close(again, made)


def test_autocast_of_the_caller_changes_nothing():
    photos, truth = moved_pair(12, 10, 8, 1.0, (1.3, -0.4))
    photos, rough = photos.float(), BidirectionalFlow.of(truth.round().float())
    made = refined_flow(rough, photos, TOLERANCE).stacked()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(refined_flow(rough, photos, TOLERANCE).stacked(), made)


@pytest.mark.parametrize("brighter", [1, 1.4])
def test_a_flow_is_aligned_with_finer_detail(brighter):
    """Two photos of one texture, moved by (1.3, −0.6) cells; the flow begins a third of a cell off."""
    moved = torch.tensor([1.3, -0.6]).double().reshape(1, 2, 1, 1)
    truth = torch.cat([moved, -moved]).expand(2, 2, 12, 12)

    def photos(pixels):
        places = (cell_grid(12 * pixels, 12 * pixels, torch.zeros(1).double())[0] + 0.5) * 8 / pixels
        return torch.stack([texture(places), texture(places - 8 * moved[0])])

    light = torch.tensor([1, brighter]).double().reshape(2, 1, 1, 1)
    made = aligned_flow(BidirectionalFlow.of(truth + 0.3), [light * photos(8), light * photos(16)]).stacked()
    assert (made - truth)[..., 3:9, 3:9].abs().max() < 0.02


def test_a_flow_is_not_aligned_where_the_photos_show_different_things():
    pixels = cell_grid(96, 96, torch.zeros(1).double())[0]
    photos = torch.stack([texture(pixels).round(), texture(pixels, seed=7).round()])
    flow = BidirectionalFlow.of(0.3 * randn(2, 2, 12, 12))
    assert (aligned_flow(flow, [photos]).stacked() == flow.stacked()).float().mean() > 0.9
