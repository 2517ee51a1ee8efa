# SPDX-License-Identifier: Apache-2.0
"""Coordinates, the backward warp, and flow on other grids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import naive

from dreammover_pipeline.fields import (
    backward_warp,
    cell_grid,
    distances,
    flow_at_cell_centres,
    pixel_flow,
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


@pytest.mark.parametrize("steps", [[(0, 0)], [(2, -1)], [(-9, 9), (0, 1), (1, 0)]])
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
