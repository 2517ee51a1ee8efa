# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on torch's default dtype and default device, which belong to the user's program."""

from contextlib import contextmanager

import pytest
import torch

from dreammover_pipeline import DreamMoverPipeline


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def default_of_64_bits():
    return default_dtype(torch.float64)


def default_of_16_bits():
    return default_dtype(torch.bfloat16)


def default_device():
    """Of a device that holds no values: whatever is made there by mistake cannot be computed with."""
    return torch.device("meta")


DEFAULTS = [default_of_64_bits, default_of_16_bits, default_device]
OPTIONS = {
    "a batch of texts, a LoRA and odd times": {
        "prompt": ["a fish", "a cat"],
        "times": [0.1, 0.33, 0.77],
        "include_inputs": True,
        "guidance_scale": 2.0,
        "points": [((10, 10), (20, 20))],
        "lora_steps": 2,
    },
    "even spacing, a mask and noise that is not warped": {
        "easing": "even",
        "flow_fit": "mean",
        "motion": "straight",
        "importance": "photometric",
        "fusion": "two_level_unwarped",
    },
    "the photos' detail, refined by diffusion": {"detail": "diffusion", "method": "noise", "output_type": "pt"},
    "many frames of another size": {
        "n_frames": 300,
        "width": 96,
        "height": 64,
        "fusion": "direct",
        "inversion_steps": 2,
    },
}


@pytest.fixture(scope="module")
def found():
    """What was made by torch's own defaults, by the name of what it is compared with; each is made once."""
    return {}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_frames_are_the_same(pipe, photos, fast, found, default, options):
    arguments = fast | {"output_type": "latent"} | OPTIONS[options]
    if "mask" in options:
        arguments["mask"] = photos[0]

    def call():
        return pipe(*photos, **arguments, generator=torch.Generator("cpu").manual_seed(0))

    if options not in found:
        found[options] = call()
    expected = found[options]
    with default():
        made = call()
    assert torch.equal(made.frames, expected.frames)
    assert made.times == expected.times


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_kept_lora_is_the_same(components, photos, fast, found, default):
    def fitted():
        pipe = DreamMoverPipeline(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        weights = pipe.fit_lora(*photos, lora_steps=2, generator=torch.Generator("cpu").manual_seed(0))
        frames = pipe(*photos, **fast).frames
        dtypes = {parameter.dtype for parameter in pipe.unet.parameters()}
        pipe.unload_lora_weights()
        return weights, frames, dtypes

    if "a kept LoRA" not in found:
        found["a kept LoRA"] = fitted()
    weights, frames, dtypes = found["a kept LoRA"]
    assert dtypes == {torch.float32}
    with default():
        again, same, dtypes = fitted()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert torch.equal(same, frames)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("default", [default_of_16_bits, default_device])
def test_many_photos_and_a_stored_pair_are_the_same(pipe, photos, fast, found, default, tmp_path):
    def work(place):
        seed = torch.Generator("cpu").manual_seed(0)
        arguments = fast | {
            "lora_steps": 1,
            "n_frames": 1,
            "inversion_steps": 2,
            "keep": tmp_path / place,
            "lora": "shared",
        }
        frames = [
            pipe.interpolate_sequence([*photos, photos[0]], **arguments, generator=seed).frames for _ in range(2)
        ]
        pair = pipe.prepare(*photos, num_inference_steps=6, inversion_steps=4, feature_step=2, lora_steps=0)
        pipe.save_pair(pair, tmp_path / f"{place}.safetensors")
        return [
            *frames,
            pipe.render(pipe.load_pair(tmp_path / f"{place}.safetensors"), n_frames=1, output_type="pt").frames,
        ]

    if "many photos" not in found:
        found["many photos"] = work("before")
    with default():
        made = work("after")
    assert all(torch.equal(a, b) for a, b in zip(made, found["many photos"], strict=True))
