# SPDX-License-Identifier: Apache-2.0
"""How a flow is followed through time: exact at both ends, and what turns turns."""

import math
from itertools import product

import pytest
import torch
from support.largest import LargestTensor

from dreammover_pipeline import paths
from dreammover_pipeline.fields import cell_grid
from dreammover_pipeline.flow import agreement
from dreammover_pipeline.paths import (
    CENTRE_REACH,
    CENTRE_TOLERANCE,
    motion_paths,
    rigid_paths,
    straight_paths,
    turns_of_cells,
)
from dreammover_pipeline.records import BidirectionalFlow
from dreammover_pipeline.rigid import grid_unit

SIZE, RADIUS = 32, 10


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def coin(degrees, scale=1.0, shift=(0.0, 0.0)):
    """The flow of a coin that turns before a ground that rests; where it lies, and its cells from its middle."""
    cells = cell_grid(SIZE, SIZE, torch.zeros(1, dtype=torch.float64))[0]
    arm = cells - (SIZE - 1) / 2
    inside = arm.norm(dim=0) <= RADIUS

    def moved(angle, factor, by):
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        turned = torch.stack([cos * arm[0] - sin * arm[1], sin * arm[0] + cos * arm[1]])
        return torch.where(inside, turned - arm + torch.tensor(by).double().reshape(2, 1, 1), 0)[None]

    angle = math.radians(degrees)
    return BidirectionalFlow(moved(angle, scale, shift), moved(-angle, 1 / scale, [-x for x in shift])), inside, arm


@pytest.mark.parametrize("motion", ["straight", "rigid"])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (16, 12), (40, 70)])
def test_the_ends_are_exact(motion, size):
    flow = BidirectionalFlow(3 * randn(1, 2, *size, seed=1), 3 * randn(1, 2, *size, seed=2))
    first, second = motion_paths(flow, motion).at(times_of(0, 1))
    torch.testing.assert_close(first, torch.cat([torch.zeros_like(flow.forward), flow.forward]))
    torch.testing.assert_close(second, torch.cat([flow.backward, torch.zeros_like(flow.backward)]))


def test_straight_paths_are_shares_of_the_whole():
    flow, times = BidirectionalFlow(randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, 4, seed=2)), times_of(0.1, 0.25, 0.5)
    first, second = motion_paths(flow, "straight").at(times)
    for i, delta in enumerate(times):
        torch.testing.assert_close(first[i], delta * flow.forward[0])
        torch.testing.assert_close(second[i], (1 - delta) * flow.backward[0])


def test_what_only_shifts_goes_straight():
    flow = BidirectionalFlow(torch.ones(1, 2, 20, 24).double() * 4, torch.ones(1, 2, 20, 24).double() * -4)
    for rigid, straight in zip(
        rigid_paths(flow).at(times_of(0.3)), straight_paths(flow).at(times_of(0.3)), strict=True
    ):
        torch.testing.assert_close(rigid, straight)


@pytest.mark.parametrize("degrees", [30, 90, -120, 170])
def test_a_coin_turns_and_does_not_collapse(degrees):
    flow, inside, arm = coin(degrees)
    for delta in (0.25, 0.5, 0.8):
        on_the_way, _ = rigid_paths(flow).at(times_of(delta))
        placed = (arm + on_the_way[0])[:, inside]
        assert (placed.norm(dim=0) - arm[:, inside].norm(dim=0)).abs().max() < 1
        x, y = arm[:, inside]
        angle = torch.atan2(x * placed[1] - y * placed[0], x * placed[0] + y * placed[1])
        assert (angle - math.radians(delta * degrees)).abs().max() < 0.1
    straight, _ = straight_paths(flow).at(times_of(0.5))
    if degrees == 170:
        assert (arm + straight[0])[:, inside].norm(dim=0).max() < 1  # which is what the paper's paths do to it


def test_half_a_turn_goes_one_way_or_the_other_and_keeps_its_size():
    flow, inside, arm = coin(180)
    on_the_way, _ = rigid_paths(flow).at(times_of(0.5))
    placed = (arm + on_the_way[0])[:, inside]
    assert (placed.norm(dim=0) - arm[:, inside].norm(dim=0)).abs().max() < 1


def test_what_grows_grows_at_an_even_rate():
    flow, inside, arm = coin(0, scale=1.44)
    on_the_way, _ = rigid_paths(flow).at(times_of(0.5))
    placed = (arm + on_the_way[0])[:, inside]
    # Off by 0.010, since growth is held back a little; a coin that grew by equal amounts would be off by 0.190.
    torch.testing.assert_close(placed, 1.2 * arm[:, inside], atol=0.05, rtol=0)


@pytest.mark.parametrize("motion", ["straight", "rigid"])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 1.9), (0, 0.6), (50, 1.3)])
def test_what_is_around_a_cell_turns_and_grows_as_cells_do(motion, degrees, scale):
    flow, _, arm = coin(degrees, scale)
    way = motion_paths(flow, motion)
    within = arm.norm(dim=0) < RADIUS - 3  # where a window of the fit hardly sees the ground
    for start, end in ((0, 0.5), (0.75, 0), (1, 0), (0.25, 1)):
        before, after = (torch.complex(*(arm + moved)) for moved in way.displacements(0, times_of(start, end)))
        factor = torch.complex(*way.factor(0, start, end))
        torch.testing.assert_close(factor[within], (after / before)[within], atol=0.05, rtol=0.05)


def test_what_has_shrunk_to_a_point_still_has_a_finite_factor():
    flow, _, _ = coin(180)
    assert straight_paths(flow).factor(0, 0.5, 1).isfinite().all()


@pytest.mark.parametrize("motion", ["straight", "rigid"])
def test_what_surrounds_a_cell_turns_and_grows_by_its_factor(motion):
    """From cell to cell, places on their way differ by the factor; the coin of the last photo turns back."""
    flow, _, arm = coin(30, scale=1.2)
    moved = motion_paths(flow, motion)
    inner = arm[:, :, :-1].norm(dim=0) < RADIUS / 2
    for image, time in product((0, 1), (0.3, 0.7, 1)):
        (landed,) = moved.displacements(image, times_of(time)) + arm
        between = (landed[..., 1:] - landed[..., :-1])[..., inner]
        factor = moved.factor(image, 0, time)[..., :-1][..., inner]
        torch.testing.assert_close(factor, between, atol=0.05, rtol=0)
        still = moved.factor(image, time, time)
        torch.testing.assert_close(still, torch.tensor([1.0, 0]).double().reshape(2, 1, 1).expand_as(still))


def test_at_the_end_the_factors_of_both_motions_are_the_same():
    flow = BidirectionalFlow(1.5 * randn(1, 2, 6, 7, seed=1), 1.5 * randn(1, 2, 6, 7, seed=2))
    for image in (0, 1):
        straight, rigid = (moved(flow).factor(image, 0, 1) for moved in (straight_paths, rigid_paths))
        torch.testing.assert_close(straight, rigid)


def test_mirrored_flows_go_mirrored_ways():
    """On a grid so fine that every third cell stands for those beside it."""
    h, w = 81, 84
    flow = torch.randn(2, 2, h, w, generator=torch.Generator().manual_seed(1)) + 5
    made = rigid_paths(BidirectionalFlow.of(flow)).displacements(0, torch.tensor([0.4]))
    mirrored = rigid_paths(BidirectionalFlow.of(-flow.flip(2, 3))).displacements(0, torch.tensor([0.4]))
    torch.testing.assert_close(-mirrored.flip(2, 3), made)


def test_every_way_is_that_of_the_equation():
    """c + t (a c + b − c) + a^t (p − c) + t · rest, in complex numbers, with c the mean of what moves along."""
    h, w, time = 6, 7, 0.3
    flow = BidirectionalFlow(1.5 * randn(1, 2, h, w, seed=1), 1.5 * randn(1, 2, h, w, seed=2))
    sure = agreement(flow)
    fit, unit = turns_of_cells(flow.stacked(), sure), grid_unit(h, w)
    made = rigid_paths(flow).displacements(0, times_of(time))[0]
    cells = [complex(x, y) for y in range(h) for x in range(w)]
    turns, shifts, ways = (
        [complex(x, y) for x, y in part[0].flatten(1).T.tolist()] for part in (fit.turn, fit.shift, flow.stacked())
    )
    weights = sure[0].flatten().tolist()
    for i in (0, 10, 24, 41):
        p, a = cells[i], 1 + turns[i]
        alike = []
        for q, way, weight in zip(cells, ways, weights, strict=True):
            off = abs(way - shifts[i] - turns[i] * (q - p))
            far = abs(q - p) / (CENTRE_REACH * unit)
            alike.append(weight * math.exp(-(far**2) / 2 - (off / (CENTRE_TOLERANCE * unit)) ** 2 / 2))
        c = sum(share * q for share, q in zip(alike, cells, strict=True)) / sum(alike)
        b = p + shifts[i] - a * p
        expected = c + time * (a * c + b - c) + a**time * (p - c) + time * (ways[i] - shifts[i]) - p
        assert complex(*made[:, i // w, i % w].tolist()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pairs", [1, 10**5, 10**9])
def test_cells_may_be_taken_in_any_blocks(monkeypatch, pairs):
    flow = BidirectionalFlow(3 * randn(1, 2, 16, 40, seed=1), 3 * randn(1, 2, 16, 40, seed=2))
    expected = torch.cat(rigid_paths(flow).at(times_of(0.4)))
    monkeypatch.setattr(paths, "PAIRS_AT_ONCE", pairs)
    torch.testing.assert_close(torch.cat(rigid_paths(flow).at(times_of(0.4))), expected)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (40, 200)])
def test_the_workspace_does_not_grow_with_the_grid(size):
    flow = BidirectionalFlow(randn(1, 2, *size).float(), randn(1, 2, *size).float())
    with LargestTensor() as largest:
        rigid_paths(flow)
    assert largest.bytes < 5 * 2**20


def test_frames_do_not_depend_on_each_other():
    flow, _, _ = coin(60, shift=(2.0, 1.0))
    rigid, times = rigid_paths(flow), times_of(0.2, 0.5, 0.9)
    whole = rigid.at(times)
    for i, time in enumerate(times):
        for image, alone in enumerate(rigid.at(time[None])):
            torch.testing.assert_close(alone[0], whole[image][i], rtol=0, atol=0)
