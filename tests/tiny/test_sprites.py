# SPDX-License-Identifier: Apache-2.0
"""The shapes that sprites are made of, and the parts of each kind."""

import pytest
import torch

from dreammover_pipeline.tiny.sprites import KINDS, Box, Ellipse, Polygon

SHAPES = sorted({part.shape for kind in KINDS.values() for part in kind.parts}, key=repr)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_shape_is_measured_by_its_distance(shape):
    axis = torch.linspace(-1, 1, 401, dtype=torch.float64)
    x, y = axis[None, None], axis[None, :, None]
    distance = shape.distance(x, y)[0]
    inside = distance < 0
    assert inside.any()
    assert torch.hypot(*torch.broadcast_tensors(x, y))[0][inside].max() <= shape.reach + 1e-9
    # one unit of length away is one unit of distance, near the border at least
    slope = torch.hypot(*torch.gradient(distance, spacing=(0.005, 0.005)))
    near = distance.abs() < 0.01
    assert (slope[near] - 1).abs().median() < 0.02
    assert (slope[near] - 1).abs().quantile(0.9) < 0.2


def test_simple_shapes_have_known_distances():
    x, y = torch.tensor([0.0, 3.0, 0.5]).reshape(1, 1, 3), torch.zeros(1, 1, 1)
    assert torch.allclose(Ellipse((0, 0), (1, 1)).distance(x, y).flatten(), torch.tensor([-1.0, 2.0, -0.5]))
    assert torch.allclose(Box((0, 0), (1, 2), 0.2).distance(x, y).flatten(), torch.tensor([-1.0, 2.0, -0.5]))
    square = Polygon(((1, -1), (1, 1), (-1, 1), (-1, -1)), 0.5)
    assert torch.allclose(square.distance(x, y).flatten(), torch.tensor([-1.5, 1.5, -1.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_hangs_on_one_that_is_there(kind):
    names = [part.name for part in KINDS[kind].parts]
    assert len(set(names)) == len(names) <= 16
    assert {part.parent for part in KINDS[kind].parts} <= {"", *names}
    assert all(0 <= part.swing <= 1 for part in KINDS[kind].parts)
