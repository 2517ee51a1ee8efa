# SPDX-License-Identifier: Apache-2.0
"""Text embeddings that are fitted to two photos."""

import pytest
import torch
from support.errors import refuses
from support.fitting import FIT, add_user_lora
from support.snapshot import snapshot

from dreammover_pipeline.embeddings import EmbeddingFit, fit_embeddings
from dreammover_pipeline.lora import fit_pair_lora


@pytest.fixture
def negative(pair):
    return pair[1][:1].flip(1)


def test_the_fit_predicts_the_noise_better_and_leaves_the_unet_alone(unet, pair, negative, alphas_cumprod):
    clean, texts = pair
    before = snapshot(unet)

    def error(embeds, away):
        generator, total = torch.Generator().manual_seed(9), 0.0
        for timestep in range(50, 1000, 100):
            noise = torch.randn(clean.shape, generator=generator)
            alpha_bar = alphas_cumprod[timestep]
            noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
            for text in (embeds, away.expand_as(embeds)):
                with torch.no_grad():
                    predicted = unet(noisy, torch.tensor(timestep), text).sample
                total += (predicted - noise).square().mean().item()
        return total

    fitted = fit_embeddings(unet, clean, texts, negative, alphas_cumprod, EmbeddingFit(60, 3e-2), seed=0)
    assert [embeds.shape for embeds in fitted] == [texts.shape, negative.shape]
    assert error(*fitted) < error(texts, negative)
    assert snapshot(unet) == before
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_seed_decides_it_and_without_a_negative_one_none_is_fitted(unet, pair, negative, alphas_cumprod):
    clean, texts = pair
    fit = EmbeddingFit(2, 1e-2)
    first, again, other = (
        fit_embeddings(unet, clean, texts, negative, alphas_cumprod, fit, seed) for seed in (0, 0, 1)
    )
    assert all(torch.equal(*both) for both in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert fit_embeddings(unet, clean, texts, None, alphas_cumprod, fit, seed=0)[1] is None


@pytest.mark.parametrize(
    ("steps", "learning_rate", "name"),
    [(0, 1e-3, "steps"), (1.5, 1e-3, "steps"), (1, 0, "learning_rate"), (1, float("nan"), "learning_rate")],
)
def test_numbers_that_are_none_are_refused(steps, learning_rate, name):
    refuses((TypeError, ValueError), f"{name}`", EmbeddingFit, steps, learning_rate)


def test_a_step_is_one_of_the_model_as_it_is_used_and_leaves_what_came_alone(unet, pair, negative, alphas_cumprod):
    clean, texts = pair
    given = [tensor.clone() for tensor in (clean, texts, negative)]
    add_user_lora(unet)
    told, checkpointed = [], []
    handle = unet.register_forward_pre_hook(lambda module, _: checkpointed.append(module.is_gradient_checkpointing))

    def fitted(**more):
        fit = EmbeddingFit(1, 1e-2)
        return fit_embeddings(
            unet, clean, texts, negative, alphas_cumprod, fit, 0, **more, on_step=lambda: told.append(1)
        )

    plain, scaled = fitted(), fitted(cross_attention_kwargs={"scale": 0.0})
    assert len(told) == 2
    assert checkpointed
    assert not any(checkpointed)
    assert not any(tensor.requires_grad for tensor in plain)
    velocity = fitted(prediction_type="v_prediction", gradient_checkpointing=True)
    assert checkpointed[-1]
    handle.remove()
    assert not torch.allclose(plain[0], scaled[0], atol=1e-3)
    assert not torch.allclose(plain[0], velocity[0], atol=1e-3)
    assert all(torch.equal(*both) for both in zip((clean, texts, negative), given, strict=True))


def test_in_half_precision_steps_add_up_that_are_too_small_for_it(unet, pair, alphas_cumprod):
    clean, texts = pair
    start = texts.sign().bfloat16()
    steps = EmbeddingFit(3, 1.5e-3)  # next to 1, numbers in bfloat16 are at least 0.0039 apart
    fitted = fit_embeddings(unet.bfloat16(), clean, start, start[:1], alphas_cumprod, steps, seed=0)
    for embeds, before in zip(fitted, (start, start[:1]), strict=True):
        assert embeds.dtype == torch.bfloat16
        assert (embeds != before).any()


@pytest.mark.parametrize("diverging", [0, 1])
def test_a_fit_that_diverges_is_an_error_that_names_its_learning_rate(unet, pair, negative, alphas_cumprod, diverging):
    starts = [pair[1].clone(), negative.clone()]
    starts[diverging][0, 0, 0] = torch.nan
    with pytest.raises(
        RuntimeError, match=r"^the fit of the text embeddings diverged .*; lower `embedding_learning_rate`"
    ):
        fit_embeddings(unet, pair[0], *starts, alphas_cumprod, EmbeddingFit(1, 1e-2), seed=0)


def test_what_one_image_shows_does_not_change_the_text_of_the_other(unet, pair, alphas_cumprod):
    clean, texts = pair
    one, other = (
        fit_embeddings(unet, images, texts, None, alphas_cumprod, EmbeddingFit(1, 2e-2), seed=0)[0]
        for images in (clean, torch.stack([clean[0], -clean[1]]))
    )
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-3)
    assert 0.018 < (one - texts).abs().median() < 0.022  # the first step of AdamW is as long as the learning rate


def test_of_many_images_each_is_fitted_with_its_own_text(unet, alphas_cumprod):
    generator = torch.Generator().manual_seed(0)
    clean, texts = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 24, 32, generator=generator)
    fitted, away = fit_embeddings(unet, clean, texts, texts[:1], alphas_cumprod, EmbeddingFit(3, 1e-2), seed=0)
    assert away.shape == (1, 24, 32)
    assert ((fitted - texts).abs().amax((1, 2)) > 5e-3).all()  # AdamW's decay alone would change them by 1e-3
    lora = [
        fit_pair_lora(unet, clean, embeds, alphas_cumprod, FIT, seed=0)
        for embeds in (texts, torch.cat([texts[:2], texts[2:] + 1]))
    ]
    assert any(not torch.equal(lora[0][name], lora[1][name]) for name in lora[0])


def test_a_prepared_pair_keeps_them_and_guidance_leads_away_from_the_negative_one(pipe, photos, fast, tmp_path):
    preparing = {name: fast[name] for name in ("num_inference_steps", "inversion_steps", "feature_step")}
    preparing |= {"prompt": "a fish", "lora_steps": 0}

    def seeded():
        return torch.Generator().manual_seed(0)

    plain = pipe.prepare(*photos, **preparing)
    assert plain.negative_embeds is None
    pair = pipe.prepare(*photos, **preparing, embedding_steps=2, embedding_learning_rate=0.1, generator=seeded())
    assert not torch.equal(pair.prompt_embeds, plain.prompt_embeds)
    assert not torch.equal(pair.prompt_embeds[0], pair.prompt_embeds[1])

    pipe.save_pair(pair, tmp_path / "pair.safetensors")
    loaded = pipe.load_pair(tmp_path / "pair.safetensors")
    rendering = {"n_frames": 2, "output_type": "latent", "guidance_scale": 3.0}
    frames = pipe.render(pair, **rendering).frames
    assert torch.equal(pipe.render(loaded, **rendering).frames, frames)
    assert not torch.allclose(pipe.render(pair, **rendering, negative_prompt="").frames, frames, atol=1e-4)
    text_encoder, pipe.text_encoder = pipe.text_encoder, None
    assert torch.equal(pipe.render(pair, **rendering).frames, frames)
    pipe.text_encoder = text_encoder
    explicit = pipe.render(pair, **rendering, negative_prompt_embeds=pair.negative_embeds).frames
    assert torch.equal(explicit, frames)
    whole = pipe(
        *photos,
        **preparing,
        **rendering,
        embedding_steps=2,
        embedding_learning_rate=0.1,
        generator=seeded(),
    ).frames
    assert torch.equal(whole, frames)


def test_a_lora_is_fitted_with_the_fitted_embeddings(pipe, photos, fast):
    fit = {"lora_steps": 2, "prompt": "a fish"}
    words, embeds = (
        pipe.fit_lora(
            *photos,
            **fit,
            embedding_steps=steps,
            embedding_learning_rate=0.1,
            generator=torch.Generator().manual_seed(0),
            adapter_name=f"after_{steps}",
        )
        for steps in (0, 2)
    )
    assert any(not torch.equal(words[name], embeds[name]) for name in words)
