# SPDX-License-Identifier: Apache-2.0
"""The procedural world's truth: drawing, flow and visibility must agree with each other, not with stored pictures."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from dreammover_pipeline.fields import backward_warp
from dreammover_pipeline.tiny.sprites import KINDS, Box, Ellipse, Polygon
from dreammover_pipeline.tiny.world import BACKGROUNDS, COLOURS, DIFFICULTIES, TEXTURES, World

SEED = 7
ONE = rf"a ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) and ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
CAPTION = re.compile(rf"{ONE}(?: and {ONE})? over a ({'|'.join(BACKGROUNDS)}) ({'|'.join(COLOURS)}) background")
SHAPES = sorted({part.shape for kind in KINDS.values() for part in kind.parts}, key=repr)


@pytest.fixture(scope="module")
def scenes():
    """Scenes at 96 px, four in ten with a second sprite; every kind, texture and background among them."""
    return World(size=96, second_sprite=0.4).sample(20, SEED)


def eroded(mask, margin=2):
    """Pixels whose whole neighbourhood is in the mask; outside the frame counts as out."""
    inside = F.pad(mask.float(), [margin] * 4)
    return -F.max_pool2d(-inside, 2 * margin + 1, 1) > 0.5


def similarity(flow, mask):
    """(angle, scale, way of the sprite's middle in pixels, residual) of the one similarity that fits a flow best."""
    y, x = mask.nonzero().double().T
    dx, dy = flow[:, mask].double()
    place, target = torch.complex(x, y), torch.complex(x + dx, y + dy)
    middle = place.mean()
    turn = ((place - middle).conj() * (target - target.mean())).sum() / (place - middle).abs().square().sum()
    residual = (target - target.mean() - turn * (place - middle)).abs().max()
    return turn.angle().item(), turn.abs().item(), (target - place).mean().abs().item(), residual.item()


# ------------------------------------------------------------------ shapes


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


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("time", [0, 0.3, 1])
def test_everything_has_its_shape_and_range(difficulty, time):
    scenes = World(size=64, second_sprite=0.5).sample(6, SEED, difficulty)
    frame, flow = scenes.frame(time), scenes.flow(time, 0.6)
    assert len(scenes) == len(scenes.captions) == 6
    assert frame.shape == (6, 3, 64, 64)
    assert frame.dtype == flow.dtype == torch.float32
    assert flow.shape == (6, 2, 64, 64)
    assert scenes.visible(time, 0.6).shape == scenes.foreground(time).shape == (6, 1, 64, 64)
    assert scenes.visible(time, 0.6).dtype == scenes.foreground(time).dtype == torch.bool
    assert frame.min() >= 0
    assert frame.max() <= 1
    assert flow.isfinite().all()
    assert frame.flatten(1).std(1).min() > 0.02


def test_a_scene_is_decided_by_seed_and_index_alone():
    torch.manual_seed(1)
    world = World(size=64, second_sprite=0.5)
    many, again, few = world.sample(9, SEED), world.sample(9, SEED), world.sample(4, SEED)
    state = torch.random.get_rng_state()
    for ask in (lambda s: s.frame(0.4), lambda s: s.flow(0, 1), lambda s: s.visible(1, 0.2)):
        assert torch.equal(ask(many), ask(again))
        assert torch.equal(ask(many)[:4], ask(few))
    assert many.captions[:4] == few.captions
    assert torch.equal(torch.random.get_rng_state(), state)
    other = world.sample(9, SEED + 1)
    assert not any(torch.equal(a, b) for a, b in itertools.product(many.frame(0), other.frame(0)))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(many.frame(0), 2))


def test_a_scene_is_the_same_at_every_size():
    small, large = (World(size=size, second_sprite=0.5).sample(12, SEED) for size in (64, 192))
    assert small.captions == large.captions
    for time in (0, 0.5, 1):
        assert (F.avg_pool2d(large.frame(time), 3) - small.frame(time)).abs().mean() < 0.004
    # the middle one of three by three pixels has the small one's centre
    middle = (..., slice(1, None, 3), slice(1, None, 3))
    agree = (large.foreground(0)[middle] == small.foreground(0)).float().mean()
    assert agree > 0.999
    ground = eroded(~small.foreground(0))
    assert (large.frame(0)[middle] - small.frame(0)).abs().masked_select(ground).max() < 1e-5
    difference = (large.flow(0, 1)[middle] / 3 - small.flow(0, 1)).abs()
    assert (difference < 1e-3).float().mean() > 0.999


def test_the_frame_has_about_a_quarter_of_sprite():
    scenes = World(size=64).sample(200, SEED)
    for time in (0, 1):
        share = scenes.foreground(time).float().mean((1, 2, 3))
        assert 0.22 < share.mean() < 0.29
        assert share.min() > 0.12
        assert share.max() < 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_most_of_a_sprite_is_in_view_at_both_ends(kind):
    scenes = World(size=64, kinds=(kind,), translation=(0.36, 0.44)).sample(60, SEED)
    wide = (torch.arange(64) + 0.5) / 32 - 0.5  # a frame's half beyond the frame on every side
    for time in (0, 1):
        whole = (scenes._front(wide[None, None], wide[None, :, None], time) > 0).float().mean((1, 2)) * 4
        assert (scenes.foreground(time).float().mean((1, 2, 3)) / whole).min() > 0.6


# ------------------------------------------------------------------ motion


def test_nothing_moves_between_a_time_and_itself(scenes):
    for time in (0, 0.37, 1):
        assert scenes.flow(time, time).count_nonzero() == 0
        assert scenes.visible(time, time).all()


def test_the_background_rests(scenes):
    background = ~scenes.foreground(0.2)
    assert background.any()
    assert scenes.flow(0.2, 0.9).masked_select(background).count_nonzero() == 0
    assert (scenes.flow(0.2, 0.9).abs().sum(1, keepdim=True).masked_select(~background) > 0).float().mean() > 0.999
    # and it is hidden exactly where a sprite is in the target
    assert torch.equal(scenes.visible(0.2, 0.9)[background], ~scenes.foreground(0.9)[background])


@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (0.25, 0.75)])
def test_the_true_frame_warped_by_the_true_flow_is_the_other_frame(source, target):
    errors = {}
    for size in (96, 192):
        scenes = World(size=size, second_sprite=0.4).sample(8, SEED)
        mask = scenes.visible(source, target)
        warped = backward_warp(scenes.frame(target), scenes.flow(source, target))
        error = (warped - scenes.frame(source)).abs().mean(1, keepdim=True)
        sprite = eroded(mask & scenes.foreground(source), size // 96)
        assert sprite.float().mean() > 0.1
        errors[size] = error[sprite].mean().item()
        rests = eroded(mask & ~scenes.foreground(source) & ~scenes.foreground(target), 2)
        assert error[rests].max() < 1e-6
        unmoved = (scenes.frame(target) - scenes.frame(source)).abs().mean(1, keepdim=True)
        assert errors[size] < 0.12 * unmoved[sprite].mean()
    assert errors[96] < 0.02
    assert errors[192] < 0.65 * errors[96]  # it is interpolation's error: it goes as pixels get finer


def test_flow_there_and_back_cancels(scenes):
    for source, target in ((0, 1), (0.8, 0.3)):
        there, back = scenes.flow(source, target), scenes.flow(target, source)
        error = (there + backward_warp(back, there)).norm(dim=1, keepdim=True)
        seen = scenes.visible(source, target)
        moved = seen & scenes.foreground(source)
        assert error[moved].median() < 1e-3
        # elsewhere the lookup mixes the flows of two parts; one in a hundred lies that close to a silhouette
        assert error[moved].quantile(0.8) < 0.01
        assert error[seen & ~scenes.foreground(source)].quantile(0.95) < 1e-3


def test_what_is_visible_there_is_visible_back(scenes):
    seen = scenes.visible(0, 1)
    back = backward_warp(scenes.visible(1, 0).float(), scenes.flow(0, 1))
    assert (back[seen] > 0.5).float().mean() > 0.97
    assert (back[eroded(seen)] > 0.99).float().mean() > 0.97


def test_nothing_is_visible_outside_the_frame(scenes):
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    target = torch.stack([x, y]) + scenes.flow(0, 1)
    outside = ((target < -1e-2) | (target > 95.01)).any(1, keepdim=True)
    assert outside.any()
    assert not (outside & scenes.visible(0, 1)).any()


def test_motion_stays_within_the_worlds_limits():
    world = World(size=64, translation=(0.1, 0.3), rotation=40, scale=0.15, swing=0)
    scenes = world.sample(80, SEED)
    whole, half, mask = scenes.flow(0, 1), scenes.flow(0, 0.5), scenes.foreground(0)[:, 0]
    angles, scales = [], []
    for scene in range(len(scenes)):
        angle, scale, _, residual = similarity(whole[scene], mask[scene])
        halfway = similarity(half[scene], mask[scene])
        assert residual < 1e-3  # without swing a sprite is rigid
        assert halfway[0] == pytest.approx(angle / 2, abs=1e-4)
        assert halfway[1] == pytest.approx(math.sqrt(scale), abs=1e-4)
        angles.append(math.degrees(abs(angle)))
        scales.append(max(scale, 1 / scale))
    assert 32 < max(angles) <= 40.001
    assert min(angles) > 0.2 * 40 - 1e-3
    assert 1.1 < max(scales) <= 1.15001


def test_sprites_go_as_far_as_asked():
    still = World(size=64, translation=(0.1, 0.3), rotation=0, scale=0, swing=0).sample(80, SEED)
    flow, mask = still.flow(0, 1), still.foreground(0)
    ways = torch.stack([flow[scene][:, mask[scene, 0]].mean(1) for scene in range(80)])
    assert (flow - ways[:, :, None, None]).abs().masked_select(mask).max() < 1e-3
    assert torch.allclose(still.flow(0, 0.25), flow / 4, atol=1e-3)
    length = ways.norm(dim=1) / 64
    assert 0.1 - 1e-4 <= length.min() < 0.13
    assert 0.27 < length.max() <= 0.3 + 1e-4
    assert (ways > 0).float().mean(0).sub(0.5).abs().max() < 0.15  # in every direction


def test_limbs_swing():
    scenes = World(size=96).sample(20, SEED)
    flows, masks = scenes.flow(0, 1), scenes.foreground(0)[:, 0]
    assert min(similarity(flow, mask)[3] for flow, mask in zip(flows, masks, strict=True)) > 1


def test_parts_hang_together(scenes):
    for group, time in itertools.product(scenes.groups, (0, 0.3, 1)):
        places = {part.name: place for part, place in group.places(time)}
        for part in group.kind.parts:
            if part.parent:
                outer, inner = places[part.parent], places[part.name]
                joint = (outer.linear @ torch.tensor(part.joint)) + outer.shift
                assert torch.allclose(inner.shift, joint, atol=1e-6)
                turn = outer.linear.inverse() @ inner.linear
                away = torch.atan2(turn[:, 1, 0], turn[:, 0, 0]) - math.radians(part.angle)
                assert away.abs().max() <= part.swing * 0.55 * 0.7 + 1e-5  # half the swing and a rest that varies


def test_sprites_face_either_way():
    """The eye, the only pale thing on a fish of dark colours, is on one or the other side of its middle."""
    colours = ("red", "green", "blue", "purple")
    fishes = World(size=96, kinds=("fish",), textures=("plain",), colours=colours, rotation=0).sample(24, SEED)
    pale = fishes.frame(0).amin(1) > 0.8
    assert pale.flatten(1).any(1).all()
    x = torch.arange(96.0)
    middles = [
        (mask.float().sum((1, 2)).reciprocal() * (mask * x).sum((1, 2))) for mask in (pale, fishes.foreground(0)[:, 0])
    ]
    right = middles[0] > middles[1]
    assert 6 <= right.sum() <= 18
    assert ((middles[0] - middles[1]).abs() > 5).all()


# ------------------------------------------------------------------ captions


def test_captions_are_well_formed(scenes):
    matches = [CAPTION.fullmatch(first) for first, _ in scenes.captions]
    assert all(matches)
    assert all(first == last for first, last in scenes.captions)
    for match in matches:
        words = match.groups()
        assert words[1] != words[2]
        assert words[-1] not in words[1:3]
        assert words[5] is None or words[5] not in (words[1], words[6], words[-1])


def test_captions_tell_the_kinds():
    mixed = World(size=64, second_sprite=0.5).sample(40, SEED)
    kinds = [{word for word in caption.split() if word in KINDS} for caption, _ in mixed.captions]
    assert set().union(*kinds) == set(KINDS)
    assert {len(both) for both in kinds} == {1, 2}
    for kind in KINDS:
        pure = World(size=64, kinds=(kind,), second_sprite=0.5).sample(40, SEED)
        equal = (mixed.frame(0.5) == pure.frame(0.5)).flatten(1).all(1)
        assert equal.tolist() == [both == {kind} for both in kinds]


def test_captions_tell_colours_textures_and_backgrounds():
    scenes = World(size=96).sample(60, SEED)
    frames, masks = scenes.frame(0), scenes.foreground(0)[:, 0]
    names, table = list(COLOURS), torch.tensor(list(COLOURS.values()))
    grounds = 0.45 * table + 0.55 * 0.62
    roughness = {"smooth": [], "cloudy": []}
    for (caption, _), frame, mask in zip(scenes.captions, frames, masks, strict=True):
        texture, main, second, *_, background, ground = CAPTION.fullmatch(caption).groups()
        near = torch.cdist(frame[:, mask].T, table) < 0.1
        share = dict(zip(names, near.float().mean(0).tolist(), strict=True))
        assert share[main] > (0.15 if texture == "plain" else 0.08)
        assert share[second] > 0.04
        # eyes are white, and where red and yellow meet there is some orange
        assert sum(share[name] for name in names if name not in (main, second, "white")) < 0.04
        rest = ~eroded(mask[None, None], 0)[0, 0] & ~F.max_pool2d(mask[None].float(), 5, 1, 2)[0].bool()
        mean = frame[:, rest].mean(1)
        assert names[torch.cdist(mean[None], grounds).argmin()] == ground
        gradient = torch.stack(torch.gradient(frame.mean(0) / frame[:, rest].mean()))[:, rest]
        roughness[background].append(gradient.std(1).max().item())
    assert max(roughness["smooth"]) < min(roughness["cloudy"])


def test_a_world_shows_only_what_it_is_made_of():
    world = World(
        size=64,
        kinds=("cat", "bird"),
        textures=("striped",),
        colours=("red", "blue", "white", "green"),
        backgrounds=("smooth",),
    )
    for difficulty in DIFFICULTIES:
        for caption in itertools.chain(*world.sample(20, SEED, difficulty).captions):
            texture, main, second, kind, *_, background, ground = CAPTION.fullmatch(caption).groups()
            assert {main, second, ground} <= set(world.colours)
            assert (texture, background) == ("striped", "smooth")
            assert kind in world.kinds


# ------------------------------------------------------------------ difficulties


@pytest.mark.parametrize("difficulty", ["relit", "recast"])
def test_a_harder_pair_moves_as_the_same_pair_does(difficulty):
    world = World(size=64, second_sprite=0.5)
    same, other = world.sample(8, SEED), world.sample(8, SEED, difficulty)
    for source, target in ((0, 1), (1, 0.3)):
        assert torch.equal(same.flow(source, target), other.flow(source, target))
        assert torch.equal(same.visible(source, target), other.visible(source, target))
        assert torch.equal(same.foreground(source), other.foreground(source))
    assert (same.frame(1) - other.frame(1)).abs().mean((1, 2, 3)).min() > 0.03


def test_relit_changes_light_and_nothing_else():
    world = World(size=96)
    same, relit = world.sample(30, SEED), world.sample(30, SEED, "relit")
    assert same.captions == relit.captions
    gains = {}
    for time in (0, 0.5, 1):
        clear = (relit.frame(time) < 0.99) & (same.frame(time) > 0.3)
        gain = torch.where(clear, relit.frame(time) / same.frame(time), torch.nan)
        gains[time] = gain.nanmean((2, 3))  # (30, 3)
        # light is smooth: neighbours are lit alike, whatever they show
        assert (gain[..., 1:] - gain[..., :-1]).nan_to_num().abs().max() < 0.01
        assert (gain[:, :, 1:] - gain[:, :, :-1]).nan_to_num().abs().max() < 0.01
    ratio = gains[1].mean(1) / gains[0].mean(1)
    assert torch.maximum(ratio, 1 / ratio).min() > 1.12
    assert 5 < (ratio > 1).sum() < 25
    assert (gains[0.5] - (gains[0] + gains[1]) / 2).abs().max() < 0.06
    assert (gains[1] / gains[0] / ratio[:, None] - 1).abs().amax(1).min() > 0.03  # colour changes too


def test_recast_changes_colours_textures_and_ground():
    world = World(size=64, second_sprite=0.5)
    same, recast = world.sample(30, SEED), world.sample(30, SEED, "recast")
    assert [first for first, _ in recast.captions] == [first for first, _ in same.captions]
    assert torch.equal(recast.frame(0), same.frame(0))
    for first, last in recast.captions:
        before, after = CAPTION.fullmatch(first).groups(), CAPTION.fullmatch(last).groups()
        kinds = (3, 7)
        assert all(
            (a == b) == (place in kinds or a is None) for place, (a, b) in enumerate(zip(before, after, strict=True))
        )


def test_recast_dissolves_from_one_look_into_the_other():
    scenes = World(size=64).sample(10, SEED, "recast")
    rests = ~(F.max_pool2d(sum(scenes.foreground(time).float() for time in (0, 0.25, 1)), 5, 1, 2) > 0)
    assert rests.float().mean() > 0.2
    dissolved = 0.75 * scenes.frame(0) + 0.25 * scenes.frame(1)
    assert (scenes.frame(0.25) - dissolved).abs().masked_select(rests).max() < 1e-5
    first_look = World(size=64).sample(10, SEED).frame(0.25)
    last_look = (scenes.frame(0.25) - 0.75 * first_look) / 0.25
    assert last_look.min() > -1e-5
    assert last_look.max() < 1 + 1e-5


# ------------------------------------------------------------------ second sprite


def test_a_second_sprite_comes_as_often_as_asked():
    for probability, low, high in ((0, 0, 0), (0.3, 0.2, 0.4), (1, 1, 1)):
        captions = World(size=64, second_sprite=probability).sample(200, SEED).captions
        assert low <= sum(CAPTION.fullmatch(first)[8] is not None for first, _ in captions) / 200 <= high


def test_a_second_sprite_hides_and_is_hidden():
    alone, both = (World(size=64, second_sprite=share).sample(40, SEED) for share in (0, 1))
    first, either = alone.foreground(0), both.foreground(0)
    assert (first & ~either).sum() == 0
    added = (either & ~first).float().mean((1, 2, 3))
    assert 0.037 < added.mean() < 0.07  # a quarter of the first one's area, mostly beside it
    moved = (both.flow(0, 1) != alone.flow(0, 1)).any(1, keepdim=True)
    in_front = (moved & first).flatten(1).any(1)
    assert 8 < in_front.sum() < 32  # of the others some are behind, some beside
    shown = first & ~moved  # the first sprite where the second does not cover it at the source
    assert not (both.visible(0, 1) & ~alone.visible(0, 1) & shown).any()
    assert (alone.visible(0, 1) & ~both.visible(0, 1) & shown).flatten(1).any(1).sum() > 4
    # where it is hidden, the other sprite is what is seen there
    hidden = alone.visible(0, 1) & ~both.visible(0, 1) & shown
    changed = (both.flow(1, 0) != alone.flow(1, 0)).any(1, keepdim=True).float()
    assert (backward_warp(changed, both.flow(0, 1))[hidden] > 0).float().mean() > 0.99


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 63},
        {"size": 513},
        {"kinds": ()},
        {"kinds": ("fish", "dog")},
        {"kinds": ("fish", "fish")},
        {"textures": ("furry",)},
        {"colours": ("red", "green", "blue")},
        {"colours": ("red", "green", "blue", "mauve")},
        {"backgrounds": ()},
        {"second_sprite": 1.1},
        {"second_sprite": -0.1},
        {"translation": (0.2,)},
        {"translation": (0.3, 0.2)},
        {"translation": (-0.1, 0.2)},
        {"translation": (0.1, 0.6)},
        {"rotation": -1},
        {"rotation": 181},
        {"scale": -0.1},
        {"scale": math.nan},
        {"swing": 2},
    ],
)
def test_a_world_that_cannot_be_is_refused_by_name(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        World(**arguments)


@pytest.mark.parametrize("arguments", [{"count": 0}, {"seed": -1}, {"difficulty": "hard"}])
def test_a_sample_that_cannot_be_is_refused_by_name(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"`{name}`"):
        World(size=64).sample(**{"count": 1, "seed": 0, **arguments})


def test_a_time_beyond_the_ends_is_refused_by_name():
    scenes = World(size=64).sample(1, SEED)
    for ask, name in (
        (lambda: scenes.frame(1.1), "time"),
        (lambda: scenes.foreground(-0.1), "time"),
        (lambda: scenes.flow(-0.1, 0), "source"),
        (lambda: scenes.flow(0, math.nan), "target"),
        (lambda: scenes.visible(2, 0), "source"),
        (lambda: scenes.visible(0, 2), "target"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            ask()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_scene_is_the_same_on_another_device():
    world = World(size=96, second_sprite=0.5)
    here, there = world.sample(8, SEED, "recast"), world.sample(8, SEED, "recast", "cuda")
    assert there.frame(0).device.type == "cuda"
    assert here.captions == there.captions
    assert (here.frame(0.5) - there.frame(0.5).cpu()).abs().mean() < 1e-4
    assert ((here.flow(0, 1) - there.flow(0, 1).cpu()).abs() < 1e-2).float().mean() > 0.999
    assert (here.visible(0, 1) == there.visible(0, 1).cpu()).float().mean() > 0.999
