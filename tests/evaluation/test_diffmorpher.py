# SPDX-License-Identifier: Apache-2.0
"""The rival that interpolates everything: exact at the photos, and the UNet is as before afterwards."""

from functools import partial

import pytest
import torch
from support.fitting import add_user_lora
from support.snapshot import snapshot

pytest.importorskip("skimage")
pytest.importorskip("cv2")

from dreammover_pipeline.evaluation.case import UNREPORTED, EvaluationCase
from dreammover_pipeline.evaluation.diffmorpher import (
    diffmorpher,
    interpolated_attention,
    interpolated_lora,
    interpolated_noise,
)
from dreammover_pipeline.evaluation.methods import METHODS
from dreammover_pipeline.evaluation.metrics import psnr
from dreammover_pipeline.evaluation.suites import world_suite
from dreammover_pipeline.lora import LoraFit, fit_pair_lora, pair_lora
from dreammover_pipeline.progress import reported_stage
from dreammover_pipeline.sampling import denoise, invert
from dreammover_pipeline.schedules import ddim_schedule
from dreammover_pipeline.settings import PrepareSettings

SETTINGS = PrepareSettings(
    num_inference_steps=4, inversion_steps=1, feature_step=1, lora_steps=2, lora_rank=3, lora_learning_rate=1e-2
)
PROMPT = ("a fish", "a cat")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    return randn(2, 3, 64, 64).sigmoid()


def morphed(pipe, images, *times, settings=SETTINGS, stages=UNREPORTED):
    with torch.no_grad():
        return diffmorpher(pipe, images, PROMPT, torch.tensor(times), settings, 0, stages)


def reconstructed(pipe, images, settings):
    """Each photo inverted and denoised by itself, with a LoRA of its own."""
    schedule = ddim_schedule(pipe.scheduler, settings.num_inference_steps, settings.num_inference_steps)
    fit = LoraFit(settings.lora_steps, settings.lora_rank, settings.lora_learning_rate)
    found = []
    with torch.no_grad():
        for image, text in zip(pipe.encode_images(images), PROMPT, strict=True):
            both, texts = image.expand(2, -1, -1, -1), pipe.encode_prompt([text, text], "cpu")[0]
            lora = fit_pair_lora(pipe.unet, both, texts, pipe.scheduler.alphas_cumprod, fit, 0)
            predict = partial(pipe.predict_noise, prompt_embeds=texts)
            with pair_lora(pipe.unet, lora, 1.0):
                noisy = invert(both, predict, schedule, settings.num_inference_steps).path[-1]
                found.append(denoise(noisy, predict, schedule, settings.num_inference_steps)[0])
    return torch.stack(found)


def test_at_the_ends_it_is_the_photos_own_inversion_denoised(pipe, images):
    frames = morphed(pipe, images, 0.0, 1.0)
    torch.testing.assert_close(frames, reconstructed(pipe, images, SETTINGS), atol=1e-4, rtol=1e-4)


def test_near_the_photos_it_reproduces_them_about_as_well_as_inversion_does(tiny_pipe):
    suite = world_suite("same", 1, 1, 64)
    images = torch.stack(suite.load(suite.pairs[0]).images)
    settings = PrepareSettings(num_inference_steps=6, inversion_steps=1, feature_step=1, lora_steps=4)
    frames = morphed(tiny_pipe, images, 0.01, 0.99, settings=settings)
    own = reconstructed(tiny_pipe, images, settings)
    for i in (0, 1):
        near, best = (psnr(tiny_pipe.decode_latents(x[i : i + 1]).detach(), images[i : i + 1]) for x in (frames, own))
        assert near > best - 1


def test_frames_do_not_depend_on_each_other_and_do_on_time(pipe, images):
    frames = morphed(pipe, images, 0.2, 0.7)
    for i, delta in enumerate((0.2, 0.7)):
        torch.testing.assert_close(morphed(pipe, images, delta)[0], frames[i])
    assert not torch.allclose(frames[0], frames[1], atol=1e-2)


def test_the_unet_is_as_before_afterwards(pipe, images):
    add_user_lora(pipe.unet)
    before, drawn = snapshot(pipe.unet), torch.get_rng_state()
    morphed(pipe, images, 0.5)
    assert snapshot(pipe.unet) == before
    assert torch.equal(torch.get_rng_state(), drawn)


# Of the UNet's calls: two fits of 2 steps, 2·5 predictions of the inversion, and 3 at each of 4 steps of denoising.
@pytest.mark.parametrize("call", [1, 3, 6, 14, 15, 16, 17, 25])
def test_the_unet_is_as_before_after_an_exception(pipe, images, call):
    add_user_lora(pipe.unet)
    calls = []

    def fail(module, inputs):
        calls.append(module)
        if len(calls) == call:
            raise KeyError("enough")

    hook = pipe.unet.register_forward_pre_hook(fail)
    before = snapshot(pipe.unet)
    with pytest.raises(KeyError, match="enough"):
        morphed(pipe, images, 0.5)
    assert snapshot(pipe.unet) == before
    hook.remove()


def test_the_fits_tell_of_their_progress(pipe, images):
    told = []
    morphed(pipe, images, 0.5, stages=partial(reported_stage, lambda *state: told.append(state)))
    assert told == 2 * [("Fitting LoRA", done, 2) for done in range(3)]


def test_without_steps_there_is_no_lora(pipe, images):
    without = morphed(
        pipe,
        images,
        0.5,
        settings=PrepareSettings(num_inference_steps=4, inversion_steps=1, feature_step=1, lora_steps=0),
    )
    assert not torch.allclose(without, morphed(pipe, images, 0.5), atol=1e-3)


def test_the_change_that_a_lora_makes_is_interpolated():
    first, last = (
        {"q.lora_A.weight": randn(3, 5, seed=seed), "q.lora_B.weight": randn(7, 3, seed=seed + 1)} for seed in (0, 2)
    )
    changes = [lora["q.lora_B.weight"] @ lora["q.lora_A.weight"] for lora in (first, last)]
    for delta in (0.0, 0.3, 1.0):
        mixed = interpolated_lora(first, last, delta)
        made = mixed["q.lora_B.weight"] @ mixed["q.lora_A.weight"]
        torch.testing.assert_close(made, (1 - delta) * changes[0] + delta * changes[1])
    assert interpolated_lora(None, None, 0.5) is None


def test_noise_is_the_photos_at_the_ends_and_has_interpolated_statistics_between():
    noisy = torch.stack([randn(4, 8, 8), 1.5 * randn(4, 8, 8, seed=1) + torch.arange(4.0).reshape(4, 1, 1)])
    frames = interpolated_noise(noisy, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(frames[[0, 2]], noisy)
    for statistic in (torch.Tensor.mean, torch.Tensor.std):
        first, last = (statistic(x, (1, 2)) for x in noisy)
        torch.testing.assert_close(statistic(frames[1], (1, 2)), 0.75 * first + 0.25 * last)


def naive_attention(attn, queries, keys, values):
    """Softmax attention of (L, C) by loops over heads."""
    heads = []
    for q, k, v in zip(*(x.chunk(attn.heads, -1) for x in (queries, keys, values)), strict=True):
        heads.append((q @ k.T * attn.scale).softmax(-1) @ v)
    return attn.to_out[0](torch.cat(heads, -1))


def test_self_attention_of_a_frame_is_on_the_interpolated_keys_and_values(pipe):
    unet, text = pipe.unet, randn(1, 24, 32)
    latents = [randn(1, 4, 16, 16, seed=seed) for seed in (0, 1, 2)]
    attn = unet.up_blocks[3].attentions[1].transformer_blocks[0].attn1
    tokens, made = [], []
    handles = [
        attn.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0][0])),
        attn.register_forward_hook(lambda module, inputs, output: made.append(output[0])),
    ]
    with torch.no_grad(), interpolated_attention(unet) as attention:
        for i in (0, 1):
            with attention.recorded(i):
                unet(latents[i], 301, text)
        with attention.replaced(0.3):
            unet(latents[2], 301, text)
        mixed = [0.7 * project(tokens[0]) + 0.3 * project(tokens[1]) for project in (attn.to_k, attn.to_v)]
        torch.testing.assert_close(made[2], naive_attention(attn, attn.to_q(tokens[2]), *mixed), atol=1e-5, rtol=1e-5)
    for handle in handles:
        handle.remove()


def test_only_self_attention_of_up_blocks_is_touched_and_only_when_it_is_to_be(pipe):
    unet, text = pipe.unet, randn(1, 24, 32)
    latents = randn(1, 4, 16, 16)
    before = snapshot(unet)
    with torch.no_grad():
        plain = unet(latents, 301, text).sample
        with interpolated_attention(unet) as attention:
            for i in (0, 1):
                with attention.recorded(i):
                    unet(randn(1, 4, 16, 16, seed=i + 5), 301, text)
            assert {name.partition(".")[0] for name in attention.of_photos[0]} == {"up_blocks"}
            assert {name.split(".")[-2] for name in attention.of_photos[1]} == {"attn1"}
            with attention.replaced(None):
                assert torch.equal(unet(latents, 301, text).sample, plain)
            with attention.replaced(0.5):
                assert not torch.allclose(unet(latents, 301, text).sample, plain, atol=1e-3)
            assert torch.equal(unet(latents, 301, text).sample, plain)
    assert snapshot(unet) == before


def test_the_method_takes_the_settings_of_the_case(pipe):
    suite = world_suite("recast", 1, 2, 64)
    pair = suite.load(suite.pairs[0])
    settings = {"num_inference_steps": 4, "lora_steps": 2, "inversion_steps": 2, "feature_step": 1}
    case = EvaluationCase(pipe, pair, 3, settings)
    frames, flow = METHODS["diffmorpher"](case)
    assert flow is None
    with torch.no_grad():
        expected = diffmorpher(
            pipe, torch.stack(pair.images), pair.prompt, case.times, PrepareSettings.of(settings), 3, UNREPORTED
        )
    assert torch.equal(frames, case.decode(expected))
