# SPDX-License-Identifier: Apache-2.0
"""Frames that are made when they are asked for."""

import numpy as np
import pytest
import torch
from support.sequences import FEW_STEPS, three_photos

import dreammover_pipeline.finishing as finishing
from dreammover_pipeline import memory
from dreammover_pipeline.finishing import LazyFrames
from dreammover_pipeline.turns import Turn


@pytest.fixture
def fast(fast):
    return {**fast, **FEW_STEPS, "lora_steps": 0, "include_inputs": True}


@pytest.fixture
def decodes(pipe, monkeypatch):
    """How many latents each call of the VAE has decoded so far."""
    counted, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **rest: counted.append(len(z)) or decode(z, **rest))
    return counted


def same(made, expected):
    return all(np.array_equal(*both) for both in zip(made, expected, strict=True))


@pytest.mark.parametrize("detail", ["photos", "upsampled"])
@pytest.mark.parametrize("endpoints", ["original", "reconstructed"])
def test_they_are_the_frames_of_an_ordinary_call(pipe, photos, fast, detail, endpoints):
    settings = {**fast, "detail": detail, "endpoints": endpoints}
    whole = pipe(*photos, **{**settings, "output_type": "pil"})
    lazy = pipe(*photos, **{**settings, "output_type": "lazy"})
    (frames,) = lazy.frames
    assert isinstance(frames, LazyFrames)
    assert len(frames) == len(whole.frames[0])
    assert frames.frame_size == whole.frames[0][0].size
    assert lazy.times == whole.times
    assert lazy.nsfw_content_detected is None
    assert same([frames[2]], [whole.frames[0][2]])
    assert same(frames, whole.frames[0])
    assert same(frames[1:-1], whole.frames[0][1:-1])
    assert same(frames.arranged([3, 3, 0, 3]), [whole.frames[0][index] for index in (3, 3, 0, 3)])


@pytest.fixture
def large(photos):
    """Photos half as large again as the model's own size."""
    return [photo.resize((96, 96)) for photo in photos]


def test_refined_by_diffusion_they_leave_the_unet_as_it_was(pipe, large, fast):
    settings = {**fast, "lora_steps": 1, "detail": "diffusion", "generator": torch.Generator().manual_seed(0)}
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    whole = pipe(*large, **{**settings, "output_type": "pil"}).frames[0]
    photos_alone = pipe(*large, **{**settings, "detail": "photos", "output_type": "pil"}).frames[0]
    settings["generator"].manual_seed(0)
    lazy = pipe(*large, **{**settings, "output_type": "lazy"}).frames[0]
    assert same(lazy, whole)
    assert not same(whole[1:-1], photos_alone[1:-1])
    assert before.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_kept_gaps_are_refined_by_diffusion_as_new_ones_are(pipe, large, fast, tmp_path):
    settings = {**fast, "lora_steps": 1, "detail": "diffusion", "output_type": "pil", "keep": tmp_path / "kept"}
    made = [
        pipe.interpolate_sequence(large, **settings, generator=torch.Generator().manual_seed(0)).frames[0]
        for _ in range(2)
    ]
    assert same(*made)


@pytest.mark.parametrize("method", ["flow", "noise"])
def test_frames_in_noise_do_not_count_as_moved_along_the_flow(pipe, photos, fast, monkeypatch, method):
    told, plan = [], finishing.plan_detail
    monkeypatch.setattr(finishing, "plan_detail", lambda pair, *rest: told.append(pair.moved) or plan(pair, *rest))
    with pipe.keeping_sources():
        pipe(*photos, **{**fast, "detail": "photos"}, method=method)
    assert told == [method == "flow"] * 3


@pytest.mark.parametrize(("room", "made_again"), [(3, 0), (2, 3)])
def test_what_does_not_fit_is_made_again(pipe, photos, fast, decodes, monkeypatch, room, made_again):
    monkeypatch.setattr(finishing, "KEPT_BYTES", room * 4 * 64 * 64)
    frames = pipe(*photos, **{**fast, "include_inputs": False, "output_type": "lazy"}).frames[0]
    assert not decodes
    first = list(frames)
    assert sum(decodes) == 3
    assert same(frames, first)
    assert sum(decodes) == 3 + made_again
    assert same(frames.arranged([2, 2, 2, 0]), [first[2]] * 3 + [first[0]])
    assert sum(decodes) == 3 + made_again + (2 if made_again else 0)
    two = frames[:2]  # which are as few as can be kept, but of a video of which none is
    assert same(two, first[:2])
    assert same(two, first[:2])
    assert sum(decodes) == 3 + made_again + (2 + 4 if made_again else 0)


def test_frames_that_are_decoded_together_are_the_same(pipe, photos, fast, decodes, monkeypatch):
    settings = {**fast, "n_frames": 5, "detail": "upsampled", "output_type": "pt", "include_inputs": False}
    expected = pipe(*photos, **settings).frames
    assert decodes == [1] * 5
    monkeypatch.setattr(memory, "CPU_DECODES", 2)
    assert torch.allclose(pipe(*photos, **settings).frames, expected, atol=1e-5)
    assert decodes[5:] == [2, 2, 1]
    lazy = pipe(*photos, **{**settings, "output_type": "lazy"}).frames[0]
    backwards = list(lazy.arranged(range(4, -1, -1)))
    assert decodes[8:] == [1, 2, 2]
    assert same(backwards, pipe(*photos, **{**settings, "output_type": "pil"}).frames[0][::-1])


def test_no_frame_is_held_once_it_has_been_handed_over(pipe, photos, fast, monkeypatch):
    monkeypatch.setattr(finishing, "KEPT_BYTES", 0)
    monkeypatch.setattr(memory, "CPU_DECODES", 2)
    frames = pipe(*photos, **{**fast, "detail": "photos", "output_type": "lazy"}).frames[0]
    for _ in frames:
        pass
    assert frames[1]  # beside which its neighbour is decoded
    assert all(frame.kept is None and frame.maker._pair is None for frame in frames._frames)
    assert not frames._frames[1].maker._decoded


def test_those_of_a_sequence_follow_each_other(pipe, photos, fast):
    album = three_photos(photos)
    whole = pipe.interpolate_sequence(album, **{**fast, "detail": "photos", "output_type": "pil"})
    lazy = pipe.interpolate_sequence(album, **{**fast, "detail": "photos", "output_type": "lazy"})
    assert lazy.times == whole.times
    (frames,), pictures, pairs_held = lazy.frames, [], []
    for picture in frames:
        pictures.append(picture)
        pairs_held.append(len({frame.maker for frame in frames._frames if frame.maker._pair is not None}))
    assert same(pictures, whole.frames[0])
    assert max(pairs_held) == 1


def test_a_batch_has_lazy_frames_of_each_pair(pipe, photos, fast):
    first, last = photos
    output = pipe([first, last.resize((48, 72))], [last, first], **{**fast, "output_type": "lazy"})
    assert [frames[1].size for frames in output.frames] == [(64, 64), (48, 72)]


def test_which_photo_they_come_from_is_told_once(pipe, photos, fast):
    with pipe.keeping_sources() as sources:
        frames = pipe(*photos, **{**fast, "detail": "photos", "output_type": "lazy"}).frames[0]
    assert not sources
    for _ in range(2):
        for _ in frames[:]:
            pass
    assert [told.time for told in sources] == [0.25, 0.5, 0.75]


def test_others_can_use_the_models_between_two_frames(pipe, photos, fast):
    frames = pipe(*photos, **{**fast, "output_type": "lazy"}).frames[0]
    for _ in frames:
        with Turn([pipe.unet, pipe.vae], pipe.unet):
            pass


def test_reading_a_frame_inside_a_call_frees_no_models(pipe, photos, fast, monkeypatch):
    """With model offloading the call would find its models gone from their device."""
    (frames,) = pipe(*photos, **{**fast, "output_type": "lazy"}).frames
    freed, read = [], []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(len(read)))

    def look(pipeline, i, timestep, tensors):
        read.append(frames[i])

    pipe(*photos, **fast, callback_on_step_end=look)
    assert freed == [0, len(read)]  # after preparing, and at the end
    assert frames[0] is read[0]  # which was kept
    assert freed == [0, len(read)]
    assert frames[-1].size == read[0].size
    assert len(freed) == 3


def test_a_listener_is_told_of_every_frame_and_can_stop_the_work(pipe, photos, fast):
    told = []

    def listener(stage, done, total):
        told.append((stage, done, total))
        if done == 3:
            raise InterruptedError

    frames = pipe(*photos, **{**fast, "output_type": "lazy"}).frames[0]
    with pipe.listening(listener), pytest.raises(InterruptedError):
        list(frames)
    assert told == [("Decoding", done, 5) for done in range(4)]


def test_memory_that_does_not_suffice_leaves_the_latents(pipe, photos, fast, monkeypatch):
    frames = pipe(*photos, **{**fast, "output_type": "lazy"}).frames[0]

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(pipe.vae, "decode", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        list(frames)
    assert caught.value.latents.shape == (3, 4, 8, 8)
