# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint's models and tokenizer, untrained."""

import torch

from dreammover_pipeline.tiny import models, recipes
from dreammover_pipeline.tiny.world import World

QUICK = recipes.PRESETS["quick"]
CPU = torch.device("cpu")


def test_every_word_of_the_world_is_one_token(tokenizer):
    for word in models.WORDS:
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
    assert len({tokenizer(word).input_ids[1] for word in models.WORDS}) == len(models.WORDS)


def test_captions_survive_the_tokenizer_and_fit_its_limit(tokenizer):
    scenes = World(size=64, second_sprite=0.5).sample(200, 0, "recast")
    captions = {caption for ends in scenes.captions for caption in ends}
    assert max(len(caption.split()) for caption in captions) > 12  # some have two sprites
    for caption in captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    other = tokenizer("a zebra's photo").input_ids
    assert tokenizer.unk_token_id not in other[1:-1]  # unknown words are spelt


def test_attention_stands_at_the_latent_grid_half_and_a_quarter_of_it():
    unet = models.build_unet(QUICK.sizes, QUICK.world.size)
    lengths = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: lengths.update({name: output.shape[1]}),
                with_kwargs=True,
            )
    unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 24, QUICK.sizes.text_width))
    up = {int(name.split(".")[1]): length for name, length in lengths.items() if name.startswith("up_blocks")}
    assert up == {1: 4 * 4, 2: 8 * 8, 3: 16 * 16}


def test_normalised_latents_have_unit_variance_and_images_stay_the_same():
    vae = models.initialised(lambda: models.build_vae(QUICK.sizes, 64), 0)
    images = recipes.from_bytes(recipes.draw_images(QUICK.world, 256, 1, CPU)[0][::8])
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        models.normalise_latents(vae, images)
        after = vae.encode(images).latent_dist
        latents = after.mean * vae.config.scaling_factor
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # the noise of the posterior shrinks along with its mean
    shrunk = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    torch.testing.assert_close((after.std / before.std).mean((0, 2, 3)), shrunk, atol=1e-4, rtol=1e-3)
