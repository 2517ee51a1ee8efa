# SPDX-License-Identifier: Apache-2.0
"""The world's difficulties, its second sprites, and the arguments that it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.drawn import CAPTION, SEED

from dreammover_pipeline.flow import backward_warp
from dreammover_pipeline.tiny.world import World

# --- difficulties


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


# --- second sprites


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


# --- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 63},
        {"size": 1025},
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
