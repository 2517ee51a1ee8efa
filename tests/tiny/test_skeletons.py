# SPDX-License-Identifier: Apache-2.0
"""The true poses of sprites: they lie on their parts, and move as the parts do."""

import pytest
import torch

from dreammover_pipeline.poses import pose_pair
from dreammover_pipeline.records import Canvas
from dreammover_pipeline.tiny.skeletons import SKELETONS, pose_pictures, poses_of
from dreammover_pipeline.tiny.sprites import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_lies_on_its_part(kind):
    shapes = {part.name: part.shape for part in KINDS[kind].parts}
    assert set(SKELETONS[kind]) <= set(range(18))
    for part, (x, y) in SKELETONS[kind].values():
        # A joint may lie a little outside of what hangs on it, where the part that it hangs on covers the gap.
        assert shapes[part].distance(torch.tensor([[[x]]]), torch.tensor([[[y]]])) < 0.1


def test_points_move_with_the_pixels_that_show_them(scenes):
    first, last = poses_of(scenes, 0.0), poses_of(scenes, 1.0)
    assert torch.equal(first[..., 2], last[..., 2])
    flow = scenes.flow(0.0, 1.0)
    agreed = []
    for scene, sprite, number in first[..., 2].nonzero().tolist():
        (x, y), (x1, y1) = first[scene, sprite, number, :2].tolist(), last[scene, sprite, number, :2].tolist()
        if 0 <= x < scenes.size - 1 and 0 <= y < scenes.size - 1:
            dx, dy = flow[scene, :, round(y), round(x)].tolist()
            agreed.append(abs(x + dx - x1) + abs(y + dy - y1) < 1.5)
    assert len(agreed) > 300
    assert sum(agreed) > 0.75 * len(agreed)  # the others are hidden behind parts that move otherwise


def test_second_sprites_have_poses_where_they_are(scenes):
    slots = torch.zeros(len(scenes), 2, dtype=torch.bool)
    for group in scenes.groups:
        slots[group.scenes, group.slot] = True
    assert slots[:, 0].all()
    assert not slots[:, 1].all()
    assert torch.equal((poses_of(scenes, 0.3)[..., 2] > 0).any(2), slots)


def test_poses_are_what_the_pipeline_takes_and_their_drawing_lies_on_the_sprites(scenes):
    size = scenes.size
    first, last = (poses_of(scenes, time)[0] for time in (0.0, 1.0))
    pair = pose_pair((first, last), [(size, size)] * 2, Canvas(size, size, size, size, size, size))
    torch.testing.assert_close(pair.at(1.0)[0][pair.seen], last[..., :2][pair.seen], atol=1e-4, rtol=0)
    pictures = pose_pictures(scenes, 0.5)
    assert pictures.shape == (len(scenes), 3, size, size)
    drawn = pictures.amax(1, keepdim=True) > 0.5
    assert drawn.flatten(1).any(1).all()
    assert scenes.foreground(0.5)[drawn].float().mean() > 0.9
