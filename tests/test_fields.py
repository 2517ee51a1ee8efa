# SPDX-License-Identifier: Apache-2.0
"""Coordinates, the backward warp, and flow on other grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import naive
from support.elsewhere import DEVICE, elsewhere

from dreammover_pipeline.fields import (
    backward_warp,
    blurred,
    cell_grid,
    distances,
    flow_at_cell_centres,
    lattice,
    looked_up,
    pixel_flow,
    quantile,
    sampled,
    sampled_around,
    upsampled_flow,
    values_beside,
)
from dreammover_pipeline.records import BidirectionalFlow, Canvas


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def constant_flow(h, w, dx, dy):
    return torch.tensor([dx, dy], dtype=torch.float64).reshape(1, 2, 1, 1).expand(1, 2, h, w)


def test_cell_grid_is_x_then_y():
    grid = cell_grid(2, 3, torch.zeros(1, dtype=torch.float64))
    assert grid.dtype == torch.float64
    assert grid.tolist() == [[[[0, 1, 2], [0, 1, 2]], [[0, 0, 0], [1, 1, 1]]]]


@pytest.mark.parametrize(("h", "w"), [(5, 7), (6, 4), (1, 6), (6, 1), (1, 1)])
def test_backward_warp_is_the_loop(h, w):
    x, flow = randn(2, 3, h, w), 3 * randn(2, 2, h, w, seed=1)
    torch.testing.assert_close(backward_warp(x, flow), naive.backward_warp(x, flow), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, -1), (2, 1), (-3, 2), (9, 0), (0, -9)])
def test_backward_warp_by_whole_cells_looks_up_those_cells_and_zeros_outside(dx, dy):
    h, w = 6, 8
    x = randn(1, 2, h, w)
    padded = F.pad(x, (10, 10, 10, 10))
    expected = padded[..., 10 + dy : 10 + dy + h, 10 + dx : 10 + dx + w]
    torch.testing.assert_close(backward_warp(x, constant_flow(h, w, dx, dy)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_backward_warp_works_in_float32_at_least(given, kept):
    x, flow = randn(1, 3, 5, 6).to(given), randn(1, 2, 5, 6, seed=1)
    warped = backward_warp(x, flow)
    assert warped.dtype == kept
    assert torch.equal(warped, backward_warp(x.to(kept), flow))


def test_backward_warp_leaves_its_inputs_alone():
    x, flow = randn(1, 3, 5, 6), randn(1, 2, 5, 6, seed=1)
    before = x.clone(), flow.clone()
    backward_warp(x, flow)
    assert all(map(torch.equal, (x, flow), before))


@pytest.mark.parametrize("size", [(4, 6), (1, 3)])
def test_sampled_values_are_those_at_the_places_and_the_edges_beyond(size):
    h, w = size
    images, places = randn(2, 3, 9, 5), (torch.rand(2, 2, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 - 0.5)
    places = places.double() * torch.tensor([w, h]).reshape(1, 2, 1, 1)  # up to half a picture beyond every edge
    values, seen = sampled(images, places, size)
    assert (values.shape, seen.shape) == ((2, 3, 4, 5), (2, 1, 4, 5))
    for b in range(2):
        for at in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
            x, y = places[(b, slice(None), *at)].tolist()
            expected = torch.tensor(naive.colour_at(images[b], complex(x, y), size), dtype=torch.float64)
            torch.testing.assert_close(values[(b, slice(None), *at)], expected, rtol=0, atol=1e-12)
            assert seen[(b, 0, *at)] == (-0.5 < x < w - 0.5 and -0.5 < y < h - 0.5)


EDGES = [(-0.5, 1.0), (3.5, 1.0), (1.0, -0.5), (1.0, 5.5)]  # of a grid of 6 × 4 cells


def test_what_lies_on_the_edge_is_off_the_images():
    edges = torch.tensor(EDGES, dtype=torch.float64).T
    assert not sampled(randn(1, 1, 6, 4), edges[None, ..., None], (6, 4))[1].any()
    here = torch.zeros(1, 2, dtype=torch.float64)
    assert not sampled_around(randn(1, 6, 4), edges, torch.zeros_like(edges), here, (6, 4))[1].any()


def test_places_are_looked_up_alike_on_a_device_that_cannot_continue_the_edge():
    images, there = randn(2, 3, 4, 5).float(), randn(2, 6, 7, 2, seed=1).float()
    assert (there.abs() > 1).any(-1).float().mean() > 0.3
    with elsewhere():
        found = looked_up(images.to(DEVICE), there.to(DEVICE)).held
    torch.testing.assert_close(found, looked_up(images, there), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (6, 3)])
def test_sampled_around_places_are_the_values_at_turned_and_scaled_offsets(size):
    h, w = size
    image, offsets, turn = randn(3, 8, 9), randn(5, 2, seed=1), randn(2, 7, seed=2) / 2
    middle = torch.rand(2, 7, generator=torch.Generator().manual_seed(3)).double() * torch.tensor([[w], [h]]) - 0.5
    values, inside = sampled_around(image, middle, turn, offsets, size)
    assert (values.shape, inside.shape) == ((3, 5, 7), (5, 7))
    assert 0.1 < inside.double().mean() < 0.9
    for s, offset in enumerate(offsets.tolist()):
        for m in range(7):
            place = complex(*middle[:, m]) + complex(*offset) * (1 + complex(*turn[:, m]))
            expected = torch.tensor(naive.colour_at(image, place, size), dtype=torch.float64)
            torch.testing.assert_close(values[:, s, m], expected, rtol=0, atol=1e-12)
            assert inside[s, m] == (-0.5 < place.real < w - 0.5 and -0.5 < place.imag < h - 0.5)


def test_a_lattice_has_as_many_samples_to_a_cell_as_it_is_told():
    places = lattice(2, 4, torch.zeros(1, dtype=torch.float64))
    assert places.dtype == torch.float64
    side = [-0.5, -0.25, 0, 0.25, 0.5]
    assert sorted(map(tuple, places.tolist())) == [(x, y) for x in side for y in side]


@pytest.mark.parametrize("sigma", [0.5, 1.3])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 1, 4)])
def test_blurred_is_the_gaussian_mean_up_to_three_deviations_away(shape, sigma):
    x = randn(*shape)
    (h, w), reach = shape[-2:], round(3 * sigma)
    expected, total = torch.zeros_like(x), 0
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            weight = math.exp(-(down**2 + right**2) / (2 * sigma**2))
            row, column = (torch.arange(n).add(by).clamp(0, n - 1) for n, by in ((h, down), (w, right)))
            expected, total = expected + weight * x[..., row[:, None], column], total + weight
    torch.testing.assert_close(blurred(x, sigma), expected / total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (5, 7, 11)])
def test_a_quantile_is_that_of_numpy(shape, share):
    x = randn(*shape)
    assert float(quantile(x, share)) == pytest.approx(np.quantile(x.numpy(), share), abs=1e-12)


@pytest.mark.parametrize("steps", [[(0, 0)], [(2, -1)], [(-3, 1)], [(-9, 9), (0, 1), (1, 0)]])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 1)])
def test_values_beside_a_cell_are_those_of_other_cells_within_the_field(steps, shape):
    x = randn(*shape)
    h, w = shape[-2:]
    for (down, right), made in zip(steps, values_beside(x, steps), strict=True):
        assert made.shape == x.shape
        for row in range(h):
            for column in range(w):
                there = min(max(row + down, 0), h - 1), min(max(column + right, 0), w - 1)
                assert torch.equal(made[..., row, column], x[(..., *there)])


def test_distances_are_exact_and_zero_from_a_place_to_itself():
    places, others = 30 * randn(2, 40).float(), randn(2, 3).float()
    assert torch.equal(distances(places, places).diagonal(), torch.zeros(40))
    expected = (places.double()[:, :, None] - others.double()[:, None]).norm(dim=0)
    torch.testing.assert_close(distances(places, others).double(), expected, rtol=1e-6, atol=0)


def test_upsampled_flow_is_in_cells_of_the_finer_grid():
    fine = upsampled_flow(torch.ones(1, 2, 4, 8), (16, 16))
    assert fine.shape == (1, 2, 16, 16)
    assert fine[:, 0].unique() == 2
    assert fine[:, 1].unique() == 4


def test_upsampled_flow_lies_where_the_coarse_flow_lay_in_the_picture():
    """A flow by which every cell says how far it is from the left and the upper edge, as the finer cells do."""
    coarse = cell_grid(5, 4, torch.zeros(1, dtype=torch.float64)) + 0.5
    fine = cell_grid(10, 12, coarse) + 0.5
    inner = slice(1, -1), slice(1, -1)  # beyond the middles of the outermost cells nothing is known
    torch.testing.assert_close(upsampled_flow(coarse, (10, 12))[..., *inner], fine[..., *inner], rtol=0, atol=1e-12)


def test_a_cell_takes_the_flow_of_the_pixel_at_its_centre_unmixed():
    x, y = cell_grid(12, 24, torch.zeros(1))[0]
    position = torch.stack([x, y])[None]  # a flow by which every pixel says where it is
    cells = flow_at_cell_centres(position, (4, 6))
    assert cells.shape == (1, 2, 4, 6)
    assert (cells[0, 0, 0] * 4).tolist() == [2, 6, 10, 14, 18, 22]  # cells of 4 × 3 pixels
    assert (cells[0, 1, :, 0] * 3).tolist() == [1, 4, 7, 10]


def test_cells_of_flow_become_pixels_without_mixing():
    forward = torch.zeros(1, 2, 2, 2)
    forward[0, :, 0, 1] = torch.tensor([1.0, 0.5])
    flow = BidirectionalFlow(forward, -forward)
    there, back = pixel_flow(flow, Canvas(64, 64, 64, 64, 64, 64))
    assert torch.equal(back, -there)
    expected = torch.zeros(1, 2, 64, 64)
    expected[0, 0, :32, 32:], expected[0, 1, :32, 32:] = 32, 16
    assert torch.equal(there, expected)


def test_flow_leaves_a_padded_canvas_at_the_scale_of_the_output():
    """Content 48 × 64 of a 64 × 80 canvas, put out at 96 × 192: 2 × as high, 3 × as wide."""
    canvas = Canvas(64, 80, 48, 64, 96, 192)
    flow = torch.zeros(1, 2, 8, 10)
    flow[:, 0], flow[:, 1] = 1, 2  # cells of 8 pixels
    flow[..., 6:, :] = flow[..., 8:] = 99  # in the padding
    there, _ = pixel_flow(BidirectionalFlow(flow, flow), canvas)
    assert there.shape == (1, 2, 96, 192)
    assert torch.equal(there[:, 0].unique(), torch.tensor([24.0]))
    assert torch.equal(there[:, 1].unique(), torch.tensor([32.0]))
