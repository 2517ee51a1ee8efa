# SPDX-License-Identifier: Apache-2.0
"""More than two photos: one video through all of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from support.sequences import FEW_STEPS, seeded, three_photos, through, without_frames

from dreammover_pipeline.lora import LoraFit, fit_pair_lora

PROMPTS = ["a fish", "a cat", "a bird"]


@pytest.fixture(scope="module")
def album(photos):
    return three_photos(photos)


@pytest.fixture
def fast(fast):
    return {**fast, **FEW_STEPS, "flow": "features"}


@pytest.mark.parametrize("lora", ["gap", "shared"])
def test_two_photos_are_a_pair(pipe, photos, fast, lora):
    fast["lora_steps"] = 2
    generators = seeded(), seeded()
    pair = pipe(*photos, **fast, include_inputs=True, generator=generators[0])
    output = through(pipe, photos, fast, lora=lora, generator=generators[1])
    assert torch.equal(output.frames, pair.frames)
    assert output.times == pair.times
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_every_gap_is_its_pair_and_shared_photos_are_there_once(pipe, album, fast):
    fast |= {"lora_steps": 2, "prompt": PROMPTS}
    output = through(pipe, album, fast, n_frames=[2, 1])
    assert output.frames.shape == (1, 6, 3, 64, 64)
    assert output.times == [pytest.approx((0, 1 / 3, 2 / 3, 1)), (0.5, 1)]
    for k, (places, count) in enumerate(((slice(0, 4), 2), (slice(3, 6), 1))):
        arguments = {**fast, "prompt": PROMPTS[k : k + 2], "n_frames": count}
        pair = pipe(*album[k : k + 2], **arguments, include_inputs=True, generator=seeded())
        assert torch.equal(output.frames[0, places], pair.frames[0])
        assert torch.equal(output.flow[k].forward, pair.flow[0].forward)


def test_all_frames_are_on_the_first_photos_canvas(pipe, album, fast):
    first = album[0].resize((60, 40))
    images = [first, album[1].resize((100, 200)), album[2]]
    output = through(pipe, images, fast, output_type="pil")
    (video,) = output.frames
    assert len(video) == 9
    assert {frame.size for frame in video} == {(60, 40)}
    np.testing.assert_array_equal(video[0], first)
    whole = pipe.prepare(images[0], images[1], **without_frames(fast)).canvas
    for k, (one, other) in enumerate(pairwise(images)):
        pair = pipe.prepare(one, other, **without_frames(fast), canvas=whole)
        middle = pipe.render(pair, n_frames=3, detail="upsampled").frames[0][1]  # which has none of the ends' tone
        np.testing.assert_array_equal(video[2 + 4 * k], middle)


def test_an_easing_is_asked_about_the_frames_that_there_are(pipe, album, fast):
    asked = []

    def easing(time):
        asked.append(time)
        return time

    through(pipe, album, fast, easing=easing)
    assert {round(time, 6) for time in asked} == {0.0, 0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_every_form_of_output_and_no_photos_where_none_are_wanted(pipe, album, fast, output_type):
    fast |= {"output_type": output_type, "n_frames": 1}
    with_photos, without = [through(pipe, album, fast, include_inputs=wanted) for wanted in (True, False)]
    assert [len(output.frames[0]) for output in (with_photos, without)] == [5, 2]
    assert without.times == [(0.5,), (0.5,)]
    for made, alone in zip(with_photos.frames[0][1::2], without.frames[0], strict=True):
        np.testing.assert_array_equal(made, alone)


def test_a_shared_lora_is_fitted_to_all_and_acts_in_every_gap(pipe, album, fast):
    fast |= {"lora_steps": 4, "lora_learning_rate": 1e-2, "prompt": PROMPTS}
    output = through(pipe, album, fast, lora="shared")
    fit = {name: fast[name] for name in ("lora_steps", "lora_learning_rate")}
    weights = pipe.fit_shared_lora(album, PROMPTS, generator=seeded(), **fit)
    for k in (0, 1):
        pair = pipe.prepare(*album[k : k + 2], **{**without_frames(fast), "prompt": PROMPTS[k : k + 2]}, lora=weights)
        frames = pipe.render(pair, n_frames=3, include_inputs=True, detail="upsampled", output_type="pt").frames[0]
        assert torch.equal(output.frames[0, 4 * k : 4 * k + 5], frames)


def test_a_step_of_the_fit_sees_two_different_ones_of_many(components):
    unet, steps, seen = components["unet"], 12, []
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 4, 8, 8, generator=generator)
    text = torch.arange(4.0)[:, None, None].expand(-1, 24, 32) / 4
    alphas_cumprod = torch.linspace(0.99, 0.01, 1000)
    hook = unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2][:, 0, 0] * 4))
    weights = fit_pair_lora(unet, clean, text, alphas_cumprod, LoraFit(steps, 2, 1e-3), seed=0)
    hook.remove()
    assert all(len(set(drawn.tolist())) == 2 for drawn in seen)
    counts = torch.cat(seen).long().bincount(minlength=4)
    assert (len(seen), counts.min() >= 3) == (steps, True)
    again = fit_pair_lora(unet, clean, text, alphas_cumprod, LoraFit(steps, 2, 1e-3), seed=0)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_generator_for_each_lora(pipe, album, fast):
    fast["lora_steps"] = 2
    both = through(pipe, album, fast, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)])
    alike = through(pipe, album, fast)
    assert torch.equal(both.frames[0, :5], alike.frames[0, :5])
    assert not torch.equal(both.frames[0, 5:8], alike.frames[0, 5:8])


def test_points_and_masks_of_a_gap_steer_that_gap(pipe, album, fast):
    points = [((20, 24), (44, 36))]
    left = Image.fromarray(np.uint8(255 * (np.mgrid[:64, :64][1] < 32)))
    plain = through(pipe, album, fast)
    output = through(pipe, album, fast, points=[points, None], mask=[None, left])
    pair = pipe.prepare(*album[:2], **without_frames(fast), points=points)
    assert torch.equal(output.flow[0].forward, pair.flow.forward)
    assert not torch.equal(output.flow[0].forward, plain.flow[0].forward)
    pair = pipe.prepare(*album[1:], **without_frames(fast), mask=left)
    assert torch.equal(output.flow[1].forward, pair.flow.forward)
    assert not torch.equal(output.flow[1].forward, plain.flow[1].forward)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"images": "one.png"}, TypeError, "must be a list of photos"),
        ({"images": [Image.new("RGB", (64, 64))]}, ValueError, "at least two photos, but 1 came"),
        ({"n_frames": [3]}, ValueError, "1 entries, but 3 photos have 2 gaps"),
        ({"n_frames": [3, 0]}, ValueError, r"n_frames\[1\]` must be at least 1"),
        ({"n_frames": 2.5}, TypeError, "must be an integer"),
        ({"lora": "all"}, ValueError, "one of 'gap', 'shared', not 'all'"),
        ({"prompt": ["a", "b"]}, ValueError, "2 entries for 3 photos"),
        ({"prompt": 7}, TypeError, "one for each photo"),
        ({"prompt": "", "prompt_embeds": torch.zeros(2, 4, 32)}, ValueError, r"\(3, L, 32\)"),
        ({"prompt_embeds": torch.zeros(3, 4, 32)}, ValueError, "not both"),
        ({"img1": "x.png"}, TypeError, "`img1` is no argument of a sequence"),
        ({"fusion": "none"}, ValueError, "fusion"),
        ({"feature_step": 9}, ValueError, "must nest"),
        ({"points": [None]}, ValueError, "1 entries for 2 pairs"),
        ({"points": [None, [((0, 0), (64, 0))]]}, ValueError, r"points\[1\]\[0\]` is at \(64, 0\)"),
        ({"mask": [None, Image.new("L", (9, 9))]}, ValueError, r"mask\[1\]` has 9×9"),
        ({"generator": [torch.Generator()]}, ValueError, "1 entries for 2 pairs"),
        ({"generator": [torch.Generator()] * 2, "lora": "shared"}, ValueError, "2 entries, but one LoRA is fitted"),
        ({"height": 2}, ValueError, "at least 32 pixels"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_runs(pipe, album, fast, arguments, error, reason):
    for model in (pipe.vae, pipe.unet, pipe.text_encoder):
        model.forward = None
    with pytest.raises(error, match=reason):
        through(pipe, arguments.pop("images", album), fast, **arguments)


def test_a_canvas_and_a_size_exclude_each_other(pipe, photos, fast):
    canvas = pipe.prepare(*photos, **without_frames(fast)).canvas
    with pytest.raises(ValueError, match="`canvas` decides the size"):
        pipe.prepare(*photos, **without_frames(fast), canvas=canvas, height=64)
    with pytest.raises(TypeError, match="must be a Canvas"):
        pipe.prepare(*photos, **without_frames(fast), canvas=(64, 64))


def test_what_is_made_survives_what_fails_later_and_an_interruption_ends_it_all(pipe, album, fast):
    calls = []

    def fail(pipe, i, timestep, tensors):
        calls.append(i)
        if len(calls) == fast["inversion_steps"] + 2:
            raise RuntimeError("in the second gap")
        return {}

    def interrupt(pipe, i, timestep, tensors):
        pipe._interrupt = True
        return {}

    whole = through(pipe, album, fast)
    with pytest.raises(RuntimeError, match="in the second gap") as caught:
        through(pipe, album, fast, callback_on_step_end=fail)
    assert torch.equal(caught.value.output.frames[0], whole.frames[0, :5])
    assert len(through(pipe, album, fast, callback_on_step_end=interrupt).frames[0]) == 5
