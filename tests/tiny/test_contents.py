# SPDX-License-Identifier: Apache-2.0
"""What scenes contain is what their captions say."""

import itertools

import torch
import torch.nn.functional as F
from support.drawn import CAPTION, SEED, eroded

from dreammover_pipeline.tiny.contents import COLOURS
from dreammover_pipeline.tiny.sprites import KINDS
from dreammover_pipeline.tiny.world import DIFFICULTIES, World


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
