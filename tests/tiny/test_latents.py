# SPDX-License-Identifier: Apache-2.0
"""The latents that the UNet is trained on."""

import math
from dataclasses import replace

import torch

from dreammover_pipeline.tiny import models, recipes
from dreammover_pipeline.tiny.latents import LatentShards
from dreammover_pipeline.tiny.recipes import draw_images, from_bytes, seed_of
from dreammover_pipeline.tiny.validation import encode


def test_a_mirrored_recipe_has_every_picture_both_ways_round(tmp_path):
    recipe = replace(recipes.PRESETS["quick"], images=256, shard=256)
    vae = models.build_vae(recipe.sizes, recipe.world.size)
    loaded = {}
    for mirrored in (False, True):
        shards = LatentShards(replace(recipe, mirrored=mirrored), tmp_path / str(mirrored), vae, 0)
        assert shards.make(math.inf)
        loaded[mirrored] = shards.load(torch.device("cpu"))
    (plain, captions), (both, repeated) = loaded[False], loaded[True]
    assert torch.equal(both[:256], plain)
    assert torch.equal(repeated, captions.repeat(2, 1))
    images, _ = draw_images(recipe.world, 256, seed_of(recipe.seed, "latents", 0), vae.device)
    torch.testing.assert_close(both[256:], encode(vae, from_bytes(images.flip(-1))).half())
