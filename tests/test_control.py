# SPDX-License-Identifier: Apache-2.0
"""Frames that are conditioned on poses or on pictures of the user's own, by a ControlNet made from the UNet."""

import re

import pytest
import torch
from diffusers import ControlNetModel
from support.conditioning import POSES, person, random_controlnet
from support.snapshot import snapshot

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.control import FrameControl, check_controlnet, control_picture
from dreammover_pipeline.poses import draw_pose
from dreammover_pipeline.records import Canvas, PosePair

CANVAS = Canvas(64, 64, 64, 64, 64, 64)
SHORT = {"num_inference_steps": 6, "inversion_steps": 4, "feature_step": 2, "lora_steps": 0}
LATENTS = {"n_frames": 3, "output_type": "latent"}


@pytest.fixture
def controlnet(pipe):
    return random_controlnet(pipe.unet)


@pytest.fixture
def controlled(pipe, controlnet):
    controlled = DreamMoverPipeline(**{**pipe.components, "controlnet": controlnet}, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    return controlled


def pictures_given(controlnet):
    """The pictures of every call of a ControlNet from now on."""
    given = []
    controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["controlnet_cond"]), with_kwargs=True
    )
    return given


def test_every_frame_is_given_the_pose_at_its_time_and_the_photos_their_own(controlled, photos):
    given = pictures_given(controlled.controlnet)
    pair = controlled.prepare(*photos, **SHORT, poses=POSES)
    assert not given, "the inversion knows of no poses"
    controlled.render(pair, **LATENTS, frame_batch_size=2)
    assert [len(pictures) for pictures in given] == [2 + 2, 1] * 4
    times = (0, 1, 0.25, 0.5, 0.75)
    for time, picture in zip(times, torch.cat(given[:2]), strict=True):
        assert torch.allclose(picture, draw_pose(*pair.poses.at(time), 64, 64), atol=1e-6)


@pytest.mark.parametrize("method", ["flow", "noise"])
def test_frames_follow_the_poses_in_both_methods(controlled, photos, method):
    settings = {**LATENTS, "method": method}

    def frames(pair, **more):
        return controlled.render(pair, **settings, **more, generator=torch.Generator().manual_seed(0)).frames

    plain = frames(controlled.prepare(*photos, **SHORT))
    pair = controlled.prepare(*photos, **SHORT, poses=POSES)
    posed = frames(pair)
    assert not torch.allclose(posed, plain, atol=1e-3)
    assert torch.allclose(frames(pair, controlnet_conditioning_scale=0.0), plain, atol=1e-5)
    assert torch.allclose(frames(pair, frame_batch_size=1), posed, atol=1e-4)
    half = frames(pair, control_guidance_end=0.5)
    assert not torch.allclose(half, posed, atol=1e-3)
    assert not torch.allclose(half, plain, atol=1e-3)
    guided = frames(pair, guidance_scale=3.0, negative_prompt="a robot")
    assert not torch.allclose(guided, posed, atol=1e-3)


@pytest.mark.parametrize(("method", "steps"), [("flow", [4]), ("noise", [4, 2])])
def test_the_window_is_of_the_steps_that_frames_take_from_the_noise_on(controlled, photos, method, steps):
    pair = controlled.prepare(*photos, **SHORT, poses=POSES)
    asked, controlled_at = [], []
    controlled.unet.register_forward_pre_hook(lambda module, inputs: asked.append(int(inputs[1])))
    controlled.controlnet.register_forward_pre_hook(lambda module, inputs: controlled_at.append(int(inputs[1])))
    controlled.render(pair, **LATENTS, method=method, control_guidance_end=0.5)
    assert len(asked) == sum(steps)
    generations = [asked[-sum(steps[k:]) :][:count] for k, count in enumerate(steps)]
    assert all(timesteps == sorted(timesteps, reverse=True) for timesteps in generations)
    assert controlled_at == [timestep for timesteps in generations for timestep in timesteps[: len(timesteps) // 2]]


def test_the_window_is_that_of_diffusers():
    control = FrameControl(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8), 1.0, 0.25, 0.75)
    assert [control.acts(step, 4) for step in range(4)] == [False, True, True, False]


def test_pictures_of_ones_own_are_faded_or_asked_for(controlled, photos):
    given = pictures_given(controlled.controlnet)
    pair = controlled.prepare(*photos, **SHORT)
    controlled.render(pair, **LATENTS, control_images=photos)
    first, last, quarter, *_ = given[0]
    assert torch.allclose(quarter, torch.lerp(first, last, 0.25))
    asked = []

    def picture(time):
        asked.append(time)
        return torch.full((3, 32, 32), time)

    given.clear()
    controlled.render(pair, **LATENTS, control_images=picture)
    assert asked == [0, 1, 0.25, 0.5, 0.75]
    assert torch.allclose(given[0].mean((1, 2, 3)), torch.tensor(asked), atol=1e-6)


def test_a_function_is_asked_once_for_each_time_and_before_a_model_runs(controlled, photos):
    happened = []
    for model in (controlled.unet, controlled.vae.encoder, controlled.text_encoder):
        model.register_forward_pre_hook(lambda *call: happened.append("a model ran"))

    def picture(time):
        happened.append(time)
        return photos[0]

    settings = {**SHORT, **LATENTS, "control_images": picture}
    lists = [photos[0]] * 2, [photos[1]] * 2
    controlled(*lists, **settings)
    assert happened[:5] == [0, 1, 0.25, 0.5, 0.75]
    assert set(happened[5:]) == {"a model ran"}, "pairs on one canvas share the pictures"

    happened.clear()
    controlled.interpolate_sequence([*photos, photos[0]], **settings | {"n_frames": [1, 2]})
    assert happened[:5] == [0, 1, 0.5, 1 / 3, 2 / 3]
    assert set(happened[5:]) == {"a model ran"}

    happened.clear()
    times = controlled(*photos, **settings, easing="even").times[0]
    assert happened[:3] == [0, 1, "a model ran"]
    assert [time for time in happened[3:] if time != "a model ran"] == list(times)


def test_what_a_function_returns_is_refused_before_a_model_runs(controlled, photos):
    def picture(time):
        return "" if time == wrong else photos[0]

    wrong = None
    pair = controlled.prepare(*photos, **SHORT)
    for model in (controlled.unet, controlled.vae.encoder, controlled.vae.decoder, controlled.text_encoder):
        model.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    for wrong, more in ((0, {}), (0.75, {}), (1, {"easing": "even"})):
        generator = torch.Generator().manual_seed(1)
        settings = {**LATENTS, **more, "control_images": picture, "method": "noise", "generator": generator}
        for call in (
            lambda settings=settings: controlled(*photos, **SHORT, **settings),
            lambda settings=settings: controlled.render(pair, **settings),
            lambda settings=settings: controlled.interpolate_sequence([*photos, photos[0]], **SHORT, **settings),
        ):
            with pytest.raises((TypeError, ValueError, OSError), match=re.escape(f"control_images({wrong:g})")):
                call()
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_poses_are_kept_with_a_prepared_pair_and_with_gaps(controlled, photos, tmp_path):
    pair = controlled.prepare(*photos, **SHORT, poses=POSES)
    controlled.save_pair(pair, tmp_path / "pair.safetensors")
    loaded = controlled.load_pair(tmp_path / "pair.safetensors")
    assert torch.equal(loaded.poses.places, pair.poses.places)
    assert torch.equal(controlled.render(loaded, **LATENTS).frames, controlled.render(pair, **LATENTS).frames)

    def sequence(*poses):
        return controlled.interpolate_sequence(
            [*photos, photos[0]], **SHORT, n_frames=1, output_type="latent", poses=list(poses), keep=tmp_path / "kept"
        ).frames

    made = sequence(POSES, None)
    given = pictures_given(controlled.controlnet)
    assert torch.equal(sequence(POSES, None), made)
    assert not given, "both gaps were kept"
    assert not torch.equal(sequence((person(20, 50), person(50, 50)), None), made)
    whole = controlled(*photos, **SHORT, **LATENTS, poses=POSES).frames
    assert torch.equal(whole, controlled.render(pair, **LATENTS).frames)


def test_models_are_as_they_were(controlled, photos):
    before = snapshot(controlled.unet), snapshot(controlled.controlnet)
    controlled(*photos, **SHORT, **LATENTS, poses=POSES)
    assert (snapshot(controlled.unet), snapshot(controlled.controlnet)) == before


def test_a_compiled_controlnet_is_taken(controlled):
    check_controlnet(
        torch.compile(controlled.controlnet, backend="eager"), controlled.unet, controlled.vae_scale_factor
    )


def test_it_is_saved_and_loaded_like_any_component(controlled, tmp_path):
    controlled.save_pretrained(tmp_path / "saved")
    again = DreamMoverPipeline.from_pretrained(tmp_path / "saved", requires_safety_checker=False)
    assert isinstance(again.controlnet, ControlNetModel)
    assert again.fingerprint() == controlled.fingerprint()
    plain = DreamMoverPipeline.from_pretrained(tmp_path / "saved", controlnet=None, requires_safety_checker=False)
    assert plain.controlnet is None
    assert plain.fingerprint() != controlled.fingerprint()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"poses": POSES}, ValueError, "`poses` needs a ControlNet"),
        ({"control_images": lambda time: None}, ValueError, "`control_images` needs a ControlNet"),
    ],
)
def test_without_a_controlnet_both_are_refused_before_a_model_runs(pipe, photos, wrong, error, message):
    pipe.vae.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    pipe.vae.encoder.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        pipe(*photos, **SHORT, **LATENTS, **wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"poses": POSES, "control_images": lambda time: None}, ValueError, "not both"),
        ({"control_images": "picture.png"}, TypeError, "`control_images` must be two images"),
        ({"poses": POSES[:1]}, TypeError, "`poses` must be a pair"),
        ({"poses": POSES, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, ValueError, "must be below"),
        ({"poses": POSES, "controlnet_conditioning_scale": -1.0}, ValueError, "`controlnet_conditioning_scale`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_runs(controlled, photos, wrong, error, message):
    controlled.vae.encoder.register_forward_pre_hook(lambda *call: pytest.fail("a model ran"))
    with pytest.raises(error, match=message):
        controlled(*photos, **SHORT, **LATENTS, **wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_time"}, "SDXL"),
        ({"cross_attention_dim": 48}, "`cross_attention_dim` is 48"),
        ({"block_out_channels": (8, 8, 16, 16)}, "another UNet"),
        ({"conditioning_channels": 1}, "of 3 channels, not of 1"),
        ({"conditioning_embedding_out_channels": (8, 8, 8)}, "another VAE: its latent cells are 4 pixels wide"),
    ],
)
def test_a_controlnet_of_another_family_is_refused(controlled, photos, change, message):
    controlled.controlnet.register_to_config(**change)
    with pytest.raises(ValueError, match=message):
        controlled(*photos, **SHORT, **LATENTS, poses=POSES)


def test_people_without_a_common_point_draw_nothing():
    places, confidence = torch.rand(2, 1, 18, 2) * 64, torch.zeros(2, 1, 18)
    picture = control_picture(None, PosePair(places, confidence), CANVAS)
    assert not picture(0.5).any()
