# SPDX-License-Identifier: Apache-2.0
"""The pipeline as its users call it; what diffusers' own suites demand of a pipeline is among it."""

import gc
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from support.pages import EXAMPLES
from support.snapshot import snapshot

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.fusion import slerp


def close(a, b, tolerance=1e-4):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def usual():
    """Frames that several tests compare with, by the name of their call, each made when first asked for."""
    return {}


@pytest.fixture
def usual_frames(new_pipe, photos, fast, usual):
    """The frames of the short call; never to be changed."""
    if "short" not in usual:
        pipe = new_pipe()
        usual["short"] = pipe(*photos, **fast).frames
    return usual["short"]


# ── Signature and outputs ──────────────────────────────────────────────────────────────────────────────────────────


def test_call_signature_holds_the_papers_defaults_but_for_nine():
    parameters = inspect.signature(DreamMoverPipeline.__call__).parameters
    order = """
        self img0 img1 prompt height width n_frames times easing method noise_levels affine
        candidates rank_by choices num_inference_steps inversion_steps feature_step feature_block
        distance_penalty rest_tolerance flow_smoothing flow_fit photo_tolerance flow points mask
        poses attention_blocks fusion motion importance layout_hold detail guidance_scale
        controlnet_conditioning_scale control_guidance_start control_guidance_end negative_prompt
        lora_steps lora_rank lora_learning_rate embedding_steps embedding_learning_rate lora_scale
        frame_batch_size include_inputs endpoints generator prompt_embeds negative_prompt_embeds
        control_images output_type return_dict cross_attention_kwargs clip_skip callback_on_step_end
        callback_on_step_end_tensor_inputs
    """
    assert list(parameters) == order.split()
    paper = {
        "n_frames": 32,
        "num_inference_steps": 50,
        "inversion_steps": 30,
        "feature_step": 14,
        "attention_blocks": (2, 3),
        "fusion": "two_level",
        "guidance_scale": 1.0,
        "lora_steps": 80,
        "lora_rank": 16,
        "lora_learning_rate": 5e-4,
        "lora_scale": 1.0,
    }
    ours = {"feature_block": (1, 1, 2), "distance_penalty": 0.1, "rest_tolerance": 0.15, "flow_smoothing": 1}
    ours |= {"photo_tolerance": 0.1, "motion": "rigid", "importance": "agreement", "layout_hold": 1.0}
    ours |= {"detail": "photos"}
    expected = paper | ours
    assert {name: parameters[name].default for name in expected} == expected


def test_output_types_agree(pipe, photos, fast):
    pt = pipe(*photos, **fast).frames
    array = pipe(*photos, **fast | {"output_type": "np"}).frames
    pil = pipe(*photos, **fast | {"output_type": "pil"}).frames
    latent = pipe(*photos, **fast | {"output_type": "latent"}).frames
    assert pt.shape == (1, 3, 3, 64, 64)
    assert array.shape == (1, 3, 64, 64, 3)
    assert latent.shape == (1, 3, 4, 8, 8)
    assert isinstance(pil, list)
    assert len(pil) == 1
    assert [frame.size for frame in pil[0]] == [(64, 64)] * 3
    assert np.array_equal(pt[0].permute(0, 2, 3, 1).numpy(), array[0])
    assert np.array_equal(np.asarray(pil[0][1]), (array[0][1] * 255).round().astype(np.uint8))
    assert 0 <= float(pt.min()) < float(pt.max()) <= 1
    assert close(pipe.decode_latents(latent[0]), pt[0])


def test_tuple_and_dict_outputs_are_the_same(pipe, photos, fast):
    output = pipe(*photos, **fast)
    frames, flow, flagged, times, candidates = pipe(*photos, **fast, return_dict=False)
    assert torch.equal(output.frames, frames)
    assert torch.equal(output.flow[0].forward, flow[0].forward)
    assert output.flow[0].forward.shape == (1, 2, 8, 8)
    assert flagged is None
    assert output.nsfw_content_detected is None
    assert candidates is None
    assert output.times == times == [(0.25, 0.5, 0.75)]


def test_frames_lie_where_n_frames_or_times_say(pipe, photos, fast, usual_frames):
    three = usual_frames[0]
    assert close(pipe(*photos, **fast | {"times": [0.25, 0.5, 0.75], "n_frames": 99}).frames[0], three)
    assert close(pipe(*photos, **fast | {"times": (0.75, 0.25)}).frames[0], three[[2, 0]])


def test_prepare_then_render_is_the_call(pipe, photos, fast):
    prepared = pipe.prepare(
        *photos,
        prompt="a fish",
        num_inference_steps=5,
        inversion_steps=3,
        feature_step=2,
        lora_steps=2,
        generator=torch.Generator().manual_seed(5),
    )
    whole = pipe(*photos, **fast | {"lora_steps": 2, "detail": "photos"}, generator=torch.Generator().manual_seed(5))
    assert torch.equal(pipe.render(prepared, n_frames=3, output_type="pt").frames, whole.frames)
    again = pipe.render(prepared, times=[0.5], output_type="pt").frames[0]
    assert close(again[0], whole.frames[0][1])


def test_include_inputs_puts_the_very_pixels_at_the_ends(pipe, fast):
    generator = np.random.default_rng(0)
    first, last = (Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)) for _ in "01")
    frames = pipe(first, last, **fast | {"output_type": "pil"}, include_inputs=True).frames[0]
    assert len(frames) == 5
    assert [frame.size for frame in frames] == [(70, 50)] * 5
    assert np.array_equal(np.asarray(frames[0]), np.asarray(first))
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(last))
    latent = pipe(first, last, **fast | {"output_type": "latent"}, include_inputs=True).frames[0]
    pair = pipe.prepare(
        first,
        last,
        **{name: fast[name] for name in ("num_inference_steps", "inversion_steps", "feature_step", "lora_steps")},
    )
    assert torch.equal(latent[[0, -1]], pair.inversion.path[0])
    assert latent.shape[0] == 5


@pytest.mark.parametrize(
    ("sizes", "asked", "expected"),
    [
        (((64, 64), (64, 64)), {}, (64, 64)),
        (((90, 60), (90, 60)), {}, (90, 60)),
        (((61, 97), (200, 50)), {}, (61, 97)),
        (((90, 60), (64, 64)), {"height": 72, "width": 80}, (72, 80)),
        (((90, 60), (64, 64)), {"height": 90}, (90, 60)),
    ],
)
def test_frames_come_back_at_the_first_images_size_or_the_size_asked_for(pipe, fast, sizes, asked, expected):
    images = [np.full((*size, 3), 99, np.uint8) for size in sizes]
    assert tuple(pipe(*images, **fast, **asked).frames.shape[-2:]) == expected


def test_the_checkpoints_own_numbers_are_used(tiny_pipe, fast):
    images = [EXAMPLES / "fish" / f"{i}.png" for i in (0, 1)]
    output = tiny_pipe(*images, **fast | {"num_inference_steps": 3, "inversion_steps": 1, "feature_step": 1})
    assert output.frames.shape == (1, 3, 3, 128, 128)
    assert output.flow[0].forward.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("name", ["fish", "robot", "cat", "bird"])
def test_the_method_beats_a_cross_fade_on_the_embedded_checkpoint(tiny_pipe, name):
    """Against the true frame half-way, on a pair it has never seen and without a LoRA: by far more than rounding.

    Inverted as deeply as README's demo, in half as many steps. At the default depth a model this small redraws parts
    of other animals.
    """

    def read(file):
        pixels = np.array(Image.open(EXAMPLES / name / file))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def psnr(image):
        return float(-10 * (image - read("0.500.png")).square().mean().log10())

    photos = [EXAMPLES / name / f"{i}.png" for i in (0, 1)]
    steps = {"num_inference_steps": 25, "inversion_steps": 5, "feature_step": 5}
    prepared = tiny_pipe.prepare(*photos, **steps, lora_steps=0)
    middle = tiny_pipe.render(prepared, times=[0.5], output_type="pt").frames[0, 0]
    assert psnr(middle) > psnr((read("0.png") + read("1.png")) / 2) + 1.5


# ── Batches ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pair_does_not_depend_on_its_batch(pipe, photos, fast):
    first, last = photos
    arguments = fast | {"lora_steps": 1}
    batch = pipe(
        [first, last, first],
        [last, first, last],
        **arguments | {"prompt": ["a fish", "a cat", ("a fish", "a robot")]},
        generator=torch.Generator().manual_seed(1),
    )
    assert batch.frames.shape == (3, 3, 3, 64, 64)
    assert len(batch.flow) == 3
    for i, (images, prompt) in enumerate([((first, last), "a fish"), ((last, first), "a cat")]):
        alone = pipe(*images, **arguments | {"prompt": prompt}, generator=torch.Generator().manual_seed(1))
        assert torch.equal(alone.frames[0], batch.frames[i])
    listed = pipe([first], [last], **arguments, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(listed.frames[0], batch.frames[0])


@pytest.mark.parametrize(("output_type", "error"), [("pt", RuntimeError), ("pil", KeyboardInterrupt)])
def test_pairs_that_are_made_survive_one_that_fails_later(pipe, photos, fast, output_type, error):
    fast["output_type"] = output_type

    def fail(pipe, i, timestep, tensors):
        calls.append(i)
        if len(calls) > failing * fast["inversion_steps"]:
            raise error("a pair fails")
        return {}

    firsts, lasts = [photos[0], photos[1], photos[0]], [photos[1], photos[0], photos[0]]
    whole = pipe(firsts, lasts, **fast)
    calls, failing = [], 2
    with pytest.raises(error, match="a pair fails") as caught:
        pipe(firsts, lasts, **fast, callback_on_step_end=fail)
    made = caught.value.output
    assert made.times == whole.times[:2]
    assert len(made.flow) == len(made.frames) == 2
    for video, expected in zip(made.frames, whole.frames, strict=False):
        for frame, other in zip(video, expected, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(other))
    calls, failing = [], 0
    with pytest.raises(error, match="a pair fails") as caught:
        pipe(firsts, lasts, **fast, callback_on_step_end=fail)
    assert not hasattr(caught.value, "output")


def test_a_batch_of_different_sizes_comes_back_as_lists(pipe, fast):
    images = [np.full((*size, 3), 99, np.uint8) for size in ((64, 64), (48, 80))]
    videos = pipe(images, images, **fast | {"output_type": "pil"}).frames
    assert [video[0].size for video in videos] == [(64, 64), (80, 48)]
    with pytest.raises(ValueError, match="different sizes"):
        pipe(images, images, **fast)


def test_arrays_with_a_batch_axis_are_batches(pipe, photos, fast):
    stacked = np.stack([np.asarray(photo) for photo in photos])
    assert pipe(stacked, stacked[::-1].copy(), **fast).frames.shape[0] == 2


# ── Cost and memory, by counting ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def calls(pipe, monkeypatch):
    """Batch sizes of every call of the UNet, the VAE's encoder and decoder, and the text encoder."""
    counted = {"unet": [], "encoder": [], "decoder": [], "text_encoder": []}
    modules = {
        "unet": pipe.unet,
        "encoder": pipe.vae.encoder,
        "decoder": pipe.vae.decoder,
        "text_encoder": pipe.text_encoder,
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: counted[name].append(
                len(args[0] if args else next(iter(kwargs.values())))
            ),
            with_kwargs=True,
        )
    return counted


@pytest.mark.parametrize(("frames", "batch", "fit"), [(5, 2, 3), (4, 4, 0), (1, 1, 0)])
def test_models_run_exactly_as_often_as_the_method_needs(pipe, photos, fast, calls, frames, batch, fit):
    pipe(*photos, **fast | {"n_frames": frames, "frame_batch_size": batch, "lora_steps": fit})
    steps, batches = 3, -(-frames // batch)
    pair_calls = fit + (steps + 1) + 1  # fit, one inversion and ε at its end, features
    assert sum(calls["unet"]) == 2 * (pair_calls + steps) + steps * frames
    assert len(calls["unet"]) == pair_calls + steps * batches
    # The photos lead the first batch of a step, and what is held at once does not grow with the frames.
    assert max(calls["unet"]) == 2 + -(-frames // batches)
    assert calls["encoder"] == [2]
    assert calls["decoder"] == [1] * frames
    assert calls["text_encoder"] == [1]


def test_detail_of_the_photos_takes_no_call_of_the_unet(pipe, photos, fast, calls):
    pipe(*photos, **fast | {"detail": "photos", "include_inputs": True})
    assert sum(calls["unet"]) == 2 * (3 + 1 + 1 + 3) + 3 * 3
    assert calls["decoder"] == [1] * (3 + 2)  # the photos too, to see how far the VAE can be trusted


def test_no_references_are_computed_where_none_are_looked_at(pipe, photos, fast, calls):
    pipe(*photos, **fast | {"attention_blocks": ()})
    assert sum(calls["unet"]) == 2 * (3 + 1 + 1) + 3 * 3


def test_the_released_fusion_asks_for_its_noise_once_more(pipe, photos, fast, calls):
    pipe(*photos, **fast | {"fusion": "two_level_unwarped"})
    assert sum(calls["unet"]) == 2 * (3 + 1 + 1 + 4) + 4 * 3


def test_guidance_doubles_the_frames_and_nothing_else(pipe, photos, fast, calls):
    pipe(*photos, **fast | {"guidance_scale": 3.0})
    assert sum(calls["unet"]) == 2 * (3 + 1 + 1) + 2 * 3 * (2 + 3)


def test_frames_are_the_same_for_every_batch_size(pipe, photos, fast, calls):
    preparing = {name: fast[name] for name in ("prompt", "num_inference_steps", "inversion_steps", "feature_step")}
    pair = pipe.prepare(*photos, **preparing, lora_steps=0)
    for guidance in (1.0, 4.0):
        arguments = {"n_frames": 5, "guidance_scale": guidance, "detail": "upsampled", "output_type": "pt"}
        results, counts = [], []
        for size in (None, 1, 2, 5):
            calls["unet"].clear()
            results.append(pipe.render(pair, **arguments, frame_batch_size=size).frames)
            counts.append(len(calls["unet"]) / fast["inversion_steps"])
        assert counts == [1, 5, 3, 1]
        assert all(close(result, results[0]) for result in results)


# ── Options that change the method ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "option",
    [
        {"fusion": "two_level_unwarped"},
        {"fusion": "direct"},
        {"attention_blocks": ()},
        {"attention_blocks": (1, 2, 3)},
        {"feature_block": 2},
        {"feature_block": 1},
        {"distance_penalty": 0},
        {"flow_smoothing": 0},
        {"flow_fit": "mean"},
        {"photo_tolerance": 0.1},
        {"layout_hold": 0},
        {"motion": "straight", "points": [((20, 24), (44, 36)), ((10, 24), (44, 46)), ((20, 14), (54, 36))]},
        {"importance": "photometric"},
        {"feature_step": 3},
        {"inversion_steps": 4},
        {"lora_steps": 2},
        {"prompt": "a cat"},
        {"prompt": ("a fish", "a robot")},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "negative_prompt": "a robot"},
    ],
    ids=str,
)
def test_every_option_does_something(pipe, photos, fast, usual, option):
    reference = fast | ({"guidance_scale": 4.0} if "negative_prompt" in option else {})
    reference |= {"points": option["points"]} if "points" in option else {}  # without them nothing turns here
    reference |= {"photo_tolerance": 0}  # these photos are so plain that the same flow is refined out of any other
    arguments = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if (name := str(reference)) not in usual:
        usual[name] = pipe(*photos, **reference | arguments).frames
    changed = pipe(*photos, **reference | option | arguments).frames
    assert changed.isfinite().all()
    assert not close(usual[name], changed, 1e-5)


def test_guidance_leads_from_the_one_prediction_past_the_other(pipe):
    denoiser, generator = pipe._models().denoiser, torch.Generator().manual_seed(0)
    denoiser.guidance_scale = 3.0
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    towards, away = torch.randn(2, 2, 24, 32, generator=generator)
    with torch.no_grad():
        guided = denoiser.predict_noise(latents, 301, towards, away)
        there, here = (denoiser.predict_noise(latents, 301, text) for text in (towards, away))
    assert not close(there, here, 1e-3)
    assert close(guided, here + 3 * (there - here), 1e-4)


def test_guidance_towards_and_away_from_the_same_text_is_no_guidance(pipe, photos, fast, usual_frames):
    guided = pipe(*photos, **fast | {"guidance_scale": 5.0, "negative_prompt": "a fish"}).frames
    assert close(guided, usual_frames, 1e-3)


def test_two_equal_prompts_are_one(pipe, photos, fast, usual_frames):
    assert torch.equal(pipe(*photos, **fast | {"prompt": ("a fish", "a fish")}).frames, usual_frames)


def test_frames_between_two_prompts_get_interpolated_embeddings(pipe, photos, fast):
    seen = []

    def keep(pipeline, i, timestep, tensors):
        seen.append(tensors["prompt_embeds"])
        return {}

    pipe(
        *photos,
        **fast | {"prompt": ["a fish", "a robot"]},
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    ends, _ = pipe.encode_prompt(["a fish", "a robot"], torch.device("cpu"))
    assert close(seen[0], slerp(*ends, torch.tensor([0.25, 0.5, 0.75])), 1e-6)


def test_under_guidance_photos_and_frames_are_asked_with_their_own_text_and_away_from_the_negative_one(
    pipe, photos, fast
):
    asked = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    guided = {"prompt": ["a fish", "a robot"], "guidance_scale": 3.0, "negative_prompt": "a cat"}
    pipe(*photos, **fast | guided)
    ends, _ = pipe.encode_prompt(["a fish", "a robot"], torch.device("cpu"))
    (away,), _ = pipe.encode_prompt("a cat", torch.device("cpu"))
    own = torch.cat([ends, slerp(*ends, torch.tensor([0.25, 0.5, 0.75]))])
    for latents, texts in asked[-fast["inversion_steps"] :]:
        assert close(texts, torch.cat([away.expand_as(own), own]), 1e-6)
        assert torch.equal(*latents.chunk(2))


def test_embeddings_may_replace_prompts(pipe, photos, fast):
    wordless = {name: value for name, value in fast.items() if name != "prompt"}
    embeds, negative = pipe.encode_prompt("a fish", torch.device("cpu"), 1, True, "a cat")
    expected = pipe(*photos, **fast | {"guidance_scale": 2.0, "negative_prompt": "a cat"}).frames
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": 2.0}
    assert torch.equal(pipe(*photos, **wordless, **given).frames, expected)
    two, _ = pipe.encode_prompt(["a fish", "a cat"], torch.device("cpu"))
    expected = pipe(*photos, **fast | {"prompt": ("a fish", "a cat")}).frames
    assert torch.equal(pipe(*photos, **wordless, prompt_embeds=two).frames, expected)


def test_clip_skip_takes_an_earlier_layer(pipe):
    with torch.no_grad():
        plain, _ = pipe.encode_prompt("a fish", torch.device("cpu"))
        whole, _ = pipe.encode_prompt("a fish", torch.device("cpu"), clip_skip=0)
        skipped, _ = pipe.encode_prompt("a fish", torch.device("cpu"), clip_skip=1)
    assert close(plain, whole, 1e-5)
    assert not close(plain, skipped, 1e-3)


def test_long_prompts_are_cut_with_a_warning(pipe, caplog):
    pipe.encode_prompt("a fish " * 40, torch.device("cpu"))
    assert "left out" in caplog.text


def test_texts_are_embedded_without_peft(pipe, monkeypatch):
    expected, _ = pipe.encode_prompt("a fish", torch.device("cpu"))
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", False)
    for module in ("peft", "peft.tuners.tuners_utils"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    assert torch.equal(pipe.encode_prompt("a fish", torch.device("cpu"))[0], expected)


# ── Callbacks and interruption ─────────────────────────────────────────────────────────────────────────────────────


def test_callback_sees_every_step_and_only_the_tensors_asked_for(pipe, photos, fast):
    steps = []

    def record(pipeline, i, timestep, tensors):
        steps.append((i, timestep, sorted(tensors)))
        return tensors

    pipe(
        *photos,
        **fast | {"guidance_scale": 2.0},
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
    )
    assert [step[0] for step in steps] == list(range(pipe.num_timesteps)) == [0, 1, 2]
    assert [step[1] for step in steps] == [401, 201, 1]
    assert all(step[2] == ["latents", "negative_prompt_embeds", "prompt_embeds"] for step in steps)


def test_a_callback_that_returns_something_else_is_named(pipe, photos, fast):
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dictionary of tensors or None, not int"):
        pipe(*photos, **fast, callback_on_step_end=lambda *_: 1)


@pytest.mark.parametrize(
    ("replace", "error", "fault"),
    [
        (lambda latents: latents[:1], ValueError, r"'latents' as \(3, 4, 8, 8\), not \(1, 4, 8, 8\)"),
        (lambda latents: None, TypeError, "a tensor as 'latents', not NoneType"),
        (lambda latents: latents.numpy(), TypeError, "a tensor as 'latents', not ndarray"),
    ],
)
def test_a_callback_that_returns_other_latents_is_named(pipe, photos, fast, replace, error, fault):
    with pytest.raises(error, match=f"`callback_on_step_end` must return {fault}"):
        pipe(*photos, **fast, callback_on_step_end=lambda *step: {"latents": replace(step[3]["latents"])})


def test_latents_of_a_callback_are_taken_in_the_precision_of_the_others(pipe, photos, fast):
    arguments = fast | {"output_type": "latent"}
    rounded = pipe(*photos, **arguments, callback_on_step_end=lambda *step: {"latents": step[3]["latents"].bfloat16()})
    assert rounded.frames.dtype == torch.float32
    assert close(rounded.frames, pipe(*photos, **arguments).frames, 0.2)


def test_a_callback_that_changes_embeddings_in_place_changes_nothing_else(pipe, photos, fast):
    preparing = {name: fast[name] for name in ("prompt", "num_inference_steps", "inversion_steps", "feature_step")}
    pair = pipe.prepare(*photos, **preparing, lora_steps=0)
    away = torch.ones(1, *pair.prompt_embeds.shape[1:])

    def change(pipeline, i, timestep, tensors):
        for tensor in tensors.values():
            tensor.mul_(0.5)

    pipe.render(
        pair,
        n_frames=2,
        guidance_scale=2.0,
        negative_prompt_embeds=away,
        output_type="latent",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"],
    )
    assert torch.equal(pair.prompt_embeds, pipe.prepare(*photos, **preparing, lora_steps=0).prompt_embeds)
    assert torch.equal(away, torch.ones_like(away))


@pytest.mark.parametrize("method", ["flow", "noise"])
def test_a_callback_may_end_guidance(pipe, photos, fast, method):
    """Without negative embeddings it is what it is with a scale of 1, but for rounding."""

    def ending(pipeline, i, timestep, tensors):
        return {"negative_prompt_embeds": None}

    def neutral(pipeline, i, timestep, tensors):
        pipeline._guidance_scale = 1.0

    arguments = fast | {"output_type": "latent", "guidance_scale": 3.0, "negative_prompt": "fog", "method": method}
    arguments["n_frames"] = 1  # since in noise every generation of frames begins with embeddings of its own
    ended, unguided = (
        pipe(*photos, **arguments, callback_on_step_end=callback, generator=torch.Generator().manual_seed(0))
        for callback in (ending, neutral)
    )
    assert close(ended.frames, unguided.frames)


def test_callback_may_replace_latents_and_guidance(pipe, photos, fast):
    def zero_at_the_end(pipeline, i, timestep, tensors):
        pipeline._guidance_scale += 1.0
        if i == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    arguments = fast | {"output_type": "latent", "guidance_scale": 2.0}
    output = pipe(*photos, **arguments, callback_on_step_end=zero_at_the_end)
    assert output.frames.abs().sum() == 0
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_interrupting_skips_the_steps_left(pipe, photos, fast, usual_frames):
    fired = []

    def stop(pipeline, i, timestep, tensors):
        fired.append(i)
        pipeline._interrupt = i == 1
        return tensors

    output = pipe(*photos, **fast, callback_on_step_end=stop)
    assert fired == [0, 1]
    assert output.frames.shape == (1, 3, 3, 64, 64)
    assert not usual_frames.equal(output.frames)


# ── Everything is afterwards as it was ─────────────────────────────────────────────────────────────────────────────


def test_what_a_call_works_with_is_gone_with_it(pipe, photos, fast):
    """And with it the models of a pipeline that is deleted, which nobody needs to collect."""
    gc.collect()
    gc.disable()
    try:
        pipe(*photos, **fast)
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "Denoiser"]
    finally:
        gc.enable()


def test_a_pipeline_can_be_pickled_after_a_call(pipe, photos, fast):
    expected = pipe(*photos, **fast).frames
    again = pickle.loads(pickle.dumps(pipe))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(*photos, **fast).frames, expected)


def test_threads_leave_the_settings_of_bars_alone(pipe, photos, fast):
    pipe.set_progress_bar_config(mininterval=10)
    seen = []
    pipe(*photos, **fast, callback_on_step_end=lambda *step: seen.append(dict(step[0]._progress_bar_config)))
    assert seen
    assert all(config == {"mininterval": 10} for config in seen)
    assert pipe._progress_bar_config == {"mininterval": 10}


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def fail_after(calls: int):
    def hook(module, args, output):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Stop

    return hook


@pytest.mark.parametrize("stage", [0, 2, 4, 6, 7, 9], ids=lambda n: f"UNet call {n}")
def test_a_call_that_fails_anywhere_leaves_the_unet_as_it_was(pipe, photos, fast, usual_frames, stage):
    pipe.unet.requires_grad_(True)
    before = snapshot(pipe.unet)
    handle = pipe.unet.register_forward_hook(fail_after(stage))
    with pytest.raises(Stop):
        pipe(*photos, **fast | {"lora_steps": 2})
    handle.remove()
    assert snapshot(pipe.unet) == before
    assert torch.equal(pipe(*photos, **fast).frames, usual_frames)


def test_a_call_leaves_everything_as_it_was(pipe, photos, fast):
    pipe.unet.train()
    before = snapshot(pipe.unet)
    dtypes = {name: getattr(pipe, name).dtype for name in ("unet", "vae", "text_encoder")}
    scheduler = dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist()
    pipe(*photos, **fast | {"lora_steps": 1})
    assert snapshot(pipe.unet) == before
    assert {name: getattr(pipe, name).dtype for name in dtypes} == dtypes
    assert (dict(pipe.scheduler.config), pipe.scheduler.timesteps.tolist()) == scheduler


# ── Seeds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_generator_decides_and_the_global_one_is_left_alone(pipe, photos, fast):
    arguments = fast | {"lora_steps": 2, "output_type": "latent"}

    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        frames = pipe(*photos, **arguments, generator=torch.Generator().manual_seed(seed)).frames
        assert torch.equal(torch.get_rng_state(), before)
        return frames

    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(0, 1), run(3, 1))


def test_without_a_generator_the_global_one_decides(pipe, photos, fast):
    arguments = fast | {"lora_steps": 2, "output_type": "latent"}
    torch.manual_seed(0)
    first, second = pipe(*photos, **arguments).frames, pipe(*photos, **arguments).frames
    torch.manual_seed(0)
    assert torch.equal(pipe(*photos, **arguments).frames, first)
    assert not torch.equal(first, second)


# ── Schedulers, precisions, components ─────────────────────────────────────────────────────────────────────────────


def test_any_scheduler_may_be_set_later(pipe, photos, fast, usual_frames):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe(*photos, **fast).frames, usual_frames)


def test_v_prediction_is_turned_into_noise_at_the_networks_own_timestep(components, photos, fast):
    components["scheduler"] = DDIMScheduler.from_config(components["scheduler"].config, prediction_type="v_prediction")
    pipe = DreamMoverPipeline(**components, requires_safety_checker=False)
    latents, embeds = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 32)
    with torch.no_grad():
        eps = pipe.predict_noise(latents, 501, embeds)
        v = pipe.unet(latents, 501, embeds).sample
    alpha_bar = pipe.scheduler.alphas_cumprod[501]
    assert close(eps, alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * latents, 1e-5)
    assert pipe(*photos, **fast | {"lora_steps": 1}).frames.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.03)])
def test_half_precision(tiny_pipe, dtype, tolerance):
    """Frames as diffusion makes them, since the photos' detail covers much of what a precision does to these."""
    images = [EXAMPLES / "fish" / f"{i}.png" for i in (0, 1)]
    arguments = {"n_frames": 2, "num_inference_steps": 20, "inversion_steps": 8, "feature_step": 6, "lora_steps": 3}
    # Few pixels, since many processors compute in float16 forty times more slowly than in float32.
    arguments |= {"height": 32, "width": 32, "output_type": "pt", "detail": "upsampled"}
    expected = tiny_pipe(*images, **arguments, generator=torch.Generator().manual_seed(0)).frames
    frames = tiny_pipe.to(dtype)(*images, **arguments, generator=torch.Generator().manual_seed(0)).frames
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert (frames - expected).abs().mean() < tolerance


def test_a_text_encoder_of_another_precision_is_no_obstacle(pipe, photos, fast):
    pipe.text_encoder.to(torch.bfloat16)
    assert pipe(*photos, **fast).frames.isfinite().all()


def test_an_overflowing_vae_is_run_again_in_float32(pipe, photos, fast, caplog):
    # group norm divides the factor out again, so float32 sees the same pictures and float16 overflows on the way
    for module in (pipe.vae.decoder.conv_in, pipe.vae.encoder.conv_in):
        module.weight.data *= 2e5
        module.bias.data *= 2e5
    expected = pipe(*photos, **fast).frames
    pipe.to(torch.float16)
    pipe.unet.to(torch.float32)
    frames = pipe(*photos, **fast).frames
    assert frames.isfinite().all()
    assert (frames - expected).abs().mean() < 0.02
    assert pipe.vae.dtype == torch.float16
    pipe(*photos, **fast)
    assert caplog.text.count("overflowed") == 1


def test_a_unet_that_overflows_is_an_error_in_words(pipe, photos, fast):
    pipe.unet.conv_out.bias.data[0] = torch.inf
    with pytest.raises(RuntimeError, match=r"overflowed in torch.float32; lower `lora_scale`"):
        pipe(*photos, **fast)


def test_a_tiny_autoencoder_will_do(components, photos, fast):
    components["vae"] = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=4,
    ).eval()
    pipe = DreamMoverPipeline(**components, requires_safety_checker=False)
    assert pipe(*photos, **fast).frames.shape == (1, 3, 3, 64, 64)


@pytest.mark.parametrize("flags", [True, False])
def test_the_safety_checker_is_honoured(components, safety_checker, photos, fast, flags):
    checker, extractor = safety_checker
    checker.concept_embeds_weights.data.fill_(-2.0 if flags else 2.0)  # cosines lie within ±1
    checker.special_care_embeds_weights.data.fill_(2.0)
    components.update(safety_checker=checker, feature_extractor=extractor)
    pipe = DreamMoverPipeline(**components)
    output = pipe(*photos, **fast, include_inputs=True)
    assert output.nsfw_content_detected == [[False, *[flags] * 3, False]]
    assert (float(output.frames[0, 1:-1].max()) == 0) == flags
    assert float(output.frames[0, 0].max()) > 0.5
    lazy = pipe(*photos, **fast | {"output_type": "lazy"}, include_inputs=True)
    (found,) = lazy.nsfw_content_detected
    assert list(found) == [False] * 5  # before they are made
    pictures = [*lazy.frames[0]]
    assert found[:] == [False, *[flags] * 3, False]
    assert (pictures[2].getbbox() is None) == flags


def test_a_safety_checker_needs_its_extractor_and_its_absence_is_mentioned(components, safety_checker, caplog):
    with pytest.raises(ValueError, match="feature_extractor"):
        DreamMoverPipeline(**components | {"safety_checker": safety_checker[0]})
    DreamMoverPipeline(**components)
    assert "without a safety checker" in caplog.text


def test_every_component_may_be_missing(components):
    nothing = dict.fromkeys(components)
    text = DreamMoverPipeline(
        **nothing | {name: components[name] for name in ("tokenizer", "text_encoder")}, requires_safety_checker=False
    )
    embeds, _ = text.encode_prompt("a fish", torch.device("cpu"))
    assert embeds.shape == (1, 24, 32)
    DreamMoverPipeline(**nothing, requires_safety_checker=False)


@pytest.mark.parametrize("feature", ["freeu", "fused_qkv", "attention_slicing", "vae_slicing", "layerwise_casting"])
def test_diffusers_switches_work(pipe, photos, fast, feature):
    # prepared beforehand: matching random features has near ties, which the least rounding decides otherwise
    prepared = pipe.prepare(*photos, num_inference_steps=6, inversion_steps=4, feature_step=2, lora_steps=0)
    expected = pipe.render(prepared, n_frames=3, detail="upsampled", output_type="pt").frames
    if feature == "freeu":
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    elif feature == "fused_qkv":
        pipe.fuse_qkv_projections()
    elif feature == "attention_slicing":
        pipe.enable_attention_slicing()
    elif feature == "vae_slicing":
        pipe.vae.enable_slicing()
    else:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = snapshot(pipe.unet) if feature != "layerwise_casting" else None
    assert pipe(*photos, **fast).frames.isfinite().all()
    frames = pipe.render(prepared, n_frames=3, detail="upsampled", output_type="pt").frames
    assert close(frames, expected) == (feature in ("fused_qkv", "attention_slicing", "vae_slicing"))
    if before:
        assert snapshot(pipe.unet) == before


def test_inside_autocast_no_lora_acts_on_the_next_pair(tiny_pipe):
    assert all(parameter.requires_grad for parameter in tiny_pipe.unet.parameters())  # autocast copies no others
    settings = {"num_inference_steps": 4, "inversion_steps": 2, "feature_step": 1, "output_type": "latent"}
    settings |= {"n_frames": 1, "lora_steps": 2, "lora_learning_rate": 0.05, "flow": "features"}
    first, last = ([str(EXAMPLES / name / f"{i}.png") for i in (0, 1)] for name in ("robot", "cat"))

    def made(pairs, seeds, **changes):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            photos = [list(side) for side in zip(*pairs, strict=True)]
            return tiny_pipe(*photos, generator=generators, **settings | changes).frames

    alone = made([last], [1])[0]
    assert torch.equal(made([first, last], [0, 1])[1], alone)
    assert not close(made([last], [1], lora_steps=0)[0], alone, 0.1)


def test_a_vae_that_overflows_in_a_callers_autocast_is_run_again_in_float32(pipe, caplog):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.vae.decoder.conv_in.weight.data *= 3e4
    expected = pipe.decode_latents(latents)
    for dtype in (torch.float32, torch.float16):
        pipe.vae.to(dtype)
        with torch.autocast("cpu", dtype=torch.float16):
            decoded = pipe.decode_latents(latents)
        assert close(decoded, expected, 0.02)
        assert pipe.vae.dtype == dtype
    assert "overflowed" in caplog.text


def test_callbacks_of_diffusers_act_as_there(pipe, photos, fast):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    guided = {"guidance_scale": 5.0, "negative_prompt": "a cat"}
    seen = []

    class Watching(SDCFGCutoffCallback):
        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(sorted(callback_kwargs))
            return super().callback_fn(pipeline, step_index, timestep, callback_kwargs)

    def without_guidance(pipeline, i, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return {}

    expected = pipe(*photos, **fast | guided, callback_on_step_end=without_guidance).frames
    for cut in (callback, Watching(cutoff_step_ratio=None, cutoff_step_index=0)):
        assert close(pipe(*photos, **fast | guided, callback_on_step_end=cut).frames, expected)
    assert seen == 3 * [["prompt_embeds"]]


def test_sizes_may_be_numpys_and_the_pair_is_saved(pipe, photos, tmp_path):
    sizes = {"height": np.int64(48), "width": np.int32(64)}
    steps = {"num_inference_steps": 4, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
    pair = pipe.prepare(*photos, **sizes, **steps)
    pipe.save_pair(pair, tmp_path / "pair.safetensors")
    assert pipe.load_pair(tmp_path / "pair.safetensors").canvas == pair.canvas


def test_models_may_have_their_channels_last(pipe, photos):
    def prepare():
        generator = torch.Generator().manual_seed(0)
        steps = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2, "lora_steps": 2}
        return pipe.prepare(*photos, **steps, generator=generator)

    prepared = prepare()
    expected = pipe.render(prepared, n_frames=3, output_type="pt").frames
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)
    assert close(pipe.render(prepared, n_frames=3, output_type="pt").frames, expected)
    again = prepare()
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert close(again.inversion.path[-1], prepared.inversion.path[-1])
    # AdamW's first steps are as long for a gradient next to nothing as for any other, so rounding may turn some round.
    apart = [(again.lora[name] - value).norm() / value.norm() for name, value in prepared.lora.items()]
    assert max(apart) < 0.05


def test_large_frames_go_through_a_tiled_vae(pipe, photos, fast):
    arguments = fast | {"height": 96, "width": 128, "n_frames": 1}
    expected = pipe(*photos, **arguments).frames
    pipe.vae.enable_tiling()
    tiled = pipe(*photos, **arguments).frames
    assert tiled.shape == expected.shape
    assert not torch.equal(tiled, expected)


def test_progress_is_shown_by_name_and_can_be_switched_off(pipe, photos, fast, capfd):
    pipe(*photos, **fast)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe(*photos, **fast | {"lora_steps": 1})
    shown = capfd.readouterr().err
    assert all(stage in shown for stage in ("Fitting LoRA", "Inverting", "Denoising", "Decoding"))


# ── Bad input is refused before any model runs ─────────────────────────────────────────────────────────────────────

GOOD = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"img0": "no/such/file.png"}, ValueError, "img0"),
        ({"img1": None}, TypeError, "img1"),
        ({"img1": np.full((64, 64, 3), np.nan, np.float32)}, ValueError, "img1"),
        ({"img0": [GOOD, GOOD], "img1": [GOOD]}, ValueError, "2 and 1 came"),
        ({"img0": [GOOD], "img1": GOOD}, ValueError, "img0.*img1"),
        ({"img0": np.zeros((4, 2000, 3), np.uint8)}, ValueError, "img0|aspect|side"),
        ({"n_frames": 0}, ValueError, "`n_frames` must be at least 1, not 0"),
        ({"n_frames": 2.5}, TypeError, "n_frames"),
        ({"times": [0.0, 0.5]}, ValueError, "`times`.*0.0"),
        ({"times": [0.5, 1.0]}, ValueError, "`times`.*1.0"),
        ({"times": [float("nan")]}, ValueError, "`times`"),
        ({"times": []}, ValueError, "`times`.*empty"),
        ({"times": "half"}, TypeError, "`times`"),
        ({"inversion_steps": 51}, ValueError, "must nest"),
        ({"feature_step": 31}, ValueError, "must nest"),
        ({"feature_step": 0}, ValueError, "feature_step"),
        ({"num_inference_steps": 1001}, ValueError, "num_inference_steps"),
        ({"feature_block": 4}, ValueError, "`feature_block` 4"),
        ({"feature_block": -1}, ValueError, "feature_block"),
        ({"feature_block": ()}, ValueError, "feature_block.*one block or several"),
        ({"feature_block": (1, 4)}, ValueError, "`feature_block` 4"),
        ({"feature_block": "1"}, TypeError, "feature_block"),
        ({"feature_block": True}, TypeError, "feature_block"),
        ({"distance_penalty": -0.1}, ValueError, "distance_penalty"),
        ({"flow_smoothing": -1}, ValueError, "flow_smoothing"),
        ({"importance": "depth"}, ValueError, "`importance`.*'agreement'"),
        ({"attention_blocks": (2, 4)}, ValueError, "attention_blocks.*4"),
        ({"attention_blocks": (0,)}, ValueError, "no self-attention"),
        ({"attention_blocks": 2}, TypeError, "attention_blocks"),
        ({"attention_blocks": (block for block in (2, 3))}, TypeError, "attention_blocks"),
        ({"attention_blocks": (2, True)}, TypeError, "attention_blocks"),
        ({"layout_hold": 1.5}, ValueError, "`layout_hold` must be at most 1, not 1.5"),
        ({"fusion": "three_level"}, ValueError, "`fusion`.*'two_level'"),
        ({"output_type": "jpeg"}, ValueError, "`output_type`.*'pil'"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale"),
        ({"guidance_scale": "7"}, TypeError, "guidance_scale"),
        ({"lora_steps": -1}, ValueError, "lora_steps"),
        ({"lora_rank": 0}, ValueError, "lora_rank"),
        ({"lora_learning_rate": 0.0}, ValueError, "lora_learning_rate"),
        ({"lora_scale": -1.0}, ValueError, "lora_scale"),
        ({"frame_batch_size": 0}, ValueError, "frame_batch_size"),
        ({"height": 0}, ValueError, "height"),
        ({"width": 8}, ValueError, "width"),
        ({"prompt": 5}, TypeError, "prompt"),
        ({"prompt": None}, TypeError, "prompt"),
        ({"prompt": ["a", "b", "c"]}, ValueError, "prompt"),
        ({"prompt_embeds": torch.zeros(1, 24, 32), "prompt": "a"}, ValueError, "not both"),
        ({"prompt_embeds": torch.zeros(3, 24, 32)}, ValueError, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 24, 16)}, ValueError, "prompt_embeds.*32"),
        ({"prompt_embeds": "a"}, TypeError, "prompt_embeds"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt"),
        ({"negative_prompt_embeds": torch.zeros(2, 24, 32)}, ValueError, "negative_prompt_embeds"),
        ({"generator": 5}, TypeError, "generator"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "generator"),
        ({"prompt_embeds": torch.full((1, 24, 32), torch.nan)}, ValueError, "`prompt_embeds`.*finite"),
        ({"clip_skip": -1}, ValueError, "clip_skip"),
        ({"clip_skip": 3}, ValueError, "`clip_skip` must be at most 2, not 3"),
        ({"callback_on_step_end": 1}, TypeError, "`callback_on_step_end` must be a function"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, "callback_on_step_end_tensor_inputs.*list"),
        ({"cross_attention_kwargs": "scale"}, TypeError, "cross_attention_kwargs.*dictionary"),
        ({"cross_attention_kwargs": {"scale": "1"}}, TypeError, "cross_attention_kwargs.*scale.*number"),
        ({"include_inputs": "no"}, TypeError, "`include_inputs` must be True or False, not 'no'"),
        ({"return_dict": None}, TypeError, "`return_dict` must be True or False"),
        ({"times": np.linspace(0, 1, 10**6 + 2)[1:-1]}, ValueError, "`times` must hold at most"),
        ({"guidance_scale": 2, "prompt_embeds": torch.zeros(1, 9, 32)}, ValueError, "9 tokens.*negative"),
        ({"guidance_scale": 2, "negative_prompt_embeds": torch.zeros(1, 9, 32)}, ValueError, "have 9; pass"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "callback_on_step_end_tensor_inputs"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_model_runs(pipe, calls, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**{"img0": GOOD, "img1": GOOD, "output_type": "pt", "n_frames": 1} | arguments)
    assert not any(calls.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a cat"}, "pass `prompt_embeds` instead of `prompt`"),
        ({"prompt_embeds": torch.zeros(1, 9, 32), "guidance_scale": 2}, "pass `negative_prompt_embeds`"),
    ],
)
def test_without_a_text_encoder_texts_come_as_embeddings(pipe, calls, arguments, message):
    pipe.text_encoder = None
    with pytest.raises(ValueError, match=message):
        pipe(GOOD, GOOD, **arguments)
    assert not any(calls.values())


def test_every_method_refuses_what_the_models_cannot_do(pipe, photos, fast, calls):
    pair = pipe.prepare(*photos, **{name: fast[name] for name in ("height", "width") if name in fast}, lora_steps=0)
    for count in calls:
        calls[count] = 0
    refused = [
        (pipe.prepare, photos, {"clip_skip": 3}, "clip_skip"),
        (pipe.fit_lora, photos, {"clip_skip": 3}, "clip_skip"),
        (pipe.fit_shared_lora, [photos], {"clip_skip": 3}, "clip_skip"),
        (pipe.interpolate_sequence, [photos], {"clip_skip": 3}, "clip_skip"),
        (pipe.interpolate_sequence, [photos], {"return_dict": 1}, "return_dict"),
        (pipe.render, [pair], {"negative_prompt_embeds": torch.zeros(1, 9, 32), "guidance_scale": 2}, "9"),
        (pipe.render, [pair], {"negative_prompt": "x \udcff", "guidance_scale": 2}, "`negative_prompt`.*Unicode"),
        (pipe.render, [None], {}, "`pair` must be what `prepare` or `load_pair` returned, not NoneType"),
        (pipe.preview, [pair, torch.tensor([0.5])], {"importance": "agrement"}, "`importance` must be one of"),
        (pipe.preview, [pair, torch.tensor([1.5])], {}, r"`times` must lie in \[0, 1\]"),
        (pipe.preview, [pair, [0.5]], {}, "`times` must be a tensor"),
        (pipe.place_frames, [pair], {"motion": "rigdi"}, "`motion` must be one of"),
        (pipe.fuse, [pair, torch.tensor([0.5])], {"fusion": "none"}, "`fusion` must be one of"),
        (pipe.fuse, [pair, torch.tensor([0.5])], {"fusion": "two_level_unwarped"}, "needs `predict_noise`"),
    ]
    for method, given, arguments, message in refused:
        with pytest.raises((TypeError, ValueError), match=message):
            method(*given, **arguments)
    assert not any(calls.values())


def test_a_call_that_is_refused_leaves_the_generator_as_it_was(pipe, photos, fast):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    pose = [[[30, 30, 1.0]] * 18]
    for method, refused, fault in (
        (pipe, {"poses": (pose, pose)}, "needs a ControlNet"),
        (pipe, {"method": "noise", "candidates": 2}, "ranked by CLIP"),
        (pipe, {"guidance_scale": 2, "negative_prompt_embeds": torch.zeros(1, 9, 32)}, "9"),
        (pipe.prepare, {"poses": (pose, pose)}, "needs a ControlNet"),
    ):
        with pytest.raises(ValueError, match=fault):
            method(*photos, **refused, lora_steps=1, generator=generator)
    pair = pipe.prepare(*photos, lora_steps=0)
    with pytest.raises(ValueError, match="no frame"):
        pipe.render(pair, n_frames=1, method="noise", choices={0.4: 0}, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_pair_is_rendered_in_another_precision(pipe, photos, fast):
    preparing = {name: fast[name] for name in ("num_inference_steps", "inversion_steps", "feature_step")}
    pair = pipe.prepare(*photos, **preparing, lora_steps=0)
    expected = pipe.render(pair, n_frames=1, output_type="latent").frames
    made = pipe.to(torch.bfloat16).render(pair, n_frames=1, output_type="latent").frames
    assert close(made, expected, 0.3)


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_a_pipeline_without_a_model_says_so(pipe, name):
    setattr(pipe, name, None)
    with pytest.raises(ValueError, match=f"made with `{name}` None"):
        pipe(GOOD, GOOD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type.*SDXL"),
        ({"class_embed_type": "projection"}, "class_embed_type.*unCLIP"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter.*unload_ip_adapter"),
    ],
)
def test_a_unet_that_needs_more_than_a_text_is_refused(pipe, calls, config, message):
    pipe.unet.register_to_config(**config)
    with pytest.raises(ValueError, match=message):
        pipe(GOOD, GOOD)
    assert not any(calls.values())


def test_prepare_takes_one_pair(pipe):
    with pytest.raises(ValueError, match="one pair"):
        pipe.prepare([GOOD] * 2, [GOOD] * 2)


def test_a_unet_for_something_else_is_refused(pipe, photos, fast):
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="9 channels"):
        pipe(*photos, **fast)
