# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out in the middle of real work on real models: what is done is kept, and the rest is done."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.snapshot import snapshot

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB, max allowed: 9.07 GB)."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
]
STEPS = 4


class Memory:
    """Raises before a module's forward where `exhausted(call, input)` says so; keeps the batch sizes of all calls."""

    def __init__(self, module, exhausted, error=ERRORS[0]):
        self.exhausted, self.error = exhausted, error
        self.tried, self.failed = [], 0
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        self.tried.append(len(x))
        if self.exhausted(len(self.tried) - 1, x):
            self.failed += 1
            raise self.error


def more_than(images):
    return lambda call, x: len(x) > images


@pytest.fixture(scope="module")
def unbothered(new_pipe, photos):
    """A pair, and its frames in batches of 2, made by models equal to those of `pipe`, which have all the memory."""
    pipe = new_pipe()
    pair = pipe.prepare(*photos, num_inference_steps=6, inversion_steps=STEPS, feature_step=2, lora_steps=0)
    return pair, latents(pipe, pair, frame_batch_size=2)


@pytest.fixture(scope="module")
def prepared(unbothered):
    return unbothered[0]


def latents(pipe, pair, frames=8, **arguments):
    return pipe.render(pair, n_frames=frames, output_type="latent", **arguments).frames


# ── The frames ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "mps", "cpu"])
@pytest.mark.parametrize("asked", [None, 5, 8])
def test_the_frames_go_on_in_smaller_batches(pipe, unbothered, caplog, error, asked):
    prepared, expected = unbothered
    memory = Memory(pipe.unet, more_than(4), error)
    assert torch.equal(latents(pipe, prepared, frame_batch_size=asked), expected)
    step = [2 + 2, 2, 2, 2]  # the two inputs lead the first batch
    first = [2 + 4] if asked == 5 else [2 + 8, 2 + 4]
    assert memory.tried == first + step * STEPS
    assert caplog.text.count("Out of memory; from here on at most 2 frames") == caplog.text.count("Out of memory") == 1


def test_a_failure_half_way_loses_no_step_and_no_finished_batch(pipe, prepared, caplog):
    expected = latents(pipe, prepared, frame_batch_size=4)
    memory = Memory(pipe.unet, lambda call, x: call == 5)  # the third step's second batch
    frames = latents(pipe, prepared, frame_batch_size=4)
    assert memory.tried == [6, 4] * 2 + [6, 4, 2, 2] + [4, 2, 2, 2]
    assert memory.failed == 1
    assert torch.allclose(frames, expected, atol=1e-5)
    assert caplog.text.count("Out of memory") == 1


def test_guidance_counts_twice(pipe, prepared):
    text = {"guidance_scale": 3.0, "negative_prompt": "a robot"}
    expected = latents(pipe, prepared, frame_batch_size=2, **text)
    memory = Memory(pipe.unet, more_than(8))
    assert torch.equal(latents(pipe, prepared, **text), expected)
    assert memory.tried == [20, 12] + [8, 4, 4, 4] * STEPS


def test_frames_between_two_prompts_keep_their_own_text(pipe, photos):
    settings = {"num_inference_steps": 6, "inversion_steps": STEPS, "feature_step": 2, "lora_steps": 0}
    pair = pipe.prepare(*photos, prompt=("a fish", "a robot"), **settings)
    expected = latents(pipe, pair, frame_batch_size=2)
    Memory(pipe.unet, more_than(4))
    assert torch.equal(latents(pipe, pair), expected)


def test_a_whole_call_recovers_with_its_lora(pipe, photos, fast):
    arguments = fast | {"n_frames": 8, "lora_steps": 2, "output_type": "latent"}

    def call(**more):
        return pipe(*photos, **arguments, generator=torch.Generator().manual_seed(0), **more).frames

    expected = call(frame_batch_size=2)
    before = snapshot(pipe.unet)
    memory = Memory(pipe.unet, more_than(4))
    assert torch.equal(call(), expected)
    assert memory.failed == 2
    after = snapshot(pipe.unet)
    assert after.pop("")["hooks"] != before.pop("")["hooks"]  # this test's own
    assert after == before


def test_another_render_asks_for_the_memory_anew(pipe, prepared):
    memory = Memory(pipe.unet, lambda call, x: call == 0)
    latents(pipe, prepared)
    memory.tried.clear()
    memory.exhausted = more_than(10)
    latents(pipe, prepared)
    assert memory.tried == [10] * STEPS


@pytest.mark.parametrize("work", ["frames", "fit"])
def test_nothing_of_the_failed_forward_is_held_while_trying_again(pipe, photos, prepared, work):
    held = []

    def exhausted(module, args):
        assert all(reference() is None for reference in held)
        # Deep in the UNet and from here, so that the traceback, and in the fit the graph too, holds activations.
        if len(held) < 2 and (len(args[0]) > 2 or (torch.is_grad_enabled() and not held)):
            held.append(weakref.ref(args[0]))
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.unet.up_blocks[3].resnets[0].register_forward_pre_hook(exhausted)
    gc.collect()
    gc.disable()  # reference counts must do it
    try:
        if work == "frames":
            latents(pipe, prepared)
        else:
            pipe.fit_lora(*photos, lora_steps=2)
    finally:
        gc.enable()
    assert len(held) == {"frames": 2, "fit": 1}[work]


def test_where_one_frame_is_too_many_the_error_says_what_to_try(pipe, prepared):
    before = snapshot(pipe.unet)
    memory = Memory(pipe.unet, lambda call, x: True)
    message = r"in the UNet, on latents \(1, 4, 8, 8\); try a smaller `height`.*float16.*enable_model_cpu_offload"
    with pytest.raises(torch.OutOfMemoryError, match=message) as caught:
        latents(pipe, prepared, attention_blocks=())
    assert memory.tried == [8, 4, 2, 1]
    assert caught.value.__cause__ is ERRORS[0]
    memory.exhausted = more_than(8)
    assert latents(pipe, prepared).isfinite().all()
    after = snapshot(pipe.unet)
    assert {name: state for name, state in after.items() if name} == {name: s for name, s in before.items() if name}


def test_inputs_that_do_not_fit_are_an_error_with_advice_too(pipe, photos, prepared, fast):
    Memory(pipe.unet, more_than(1))
    for work, size in ((lambda: pipe(*photos, **fast), 2), (lambda: latents(pipe, prepared), 2 + 1)):
        with pytest.raises(torch.OutOfMemoryError, match=rf"\({size}, 4, 8, 8\); try"):
            work()


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_pass_untouched_and_at_once(pipe, prepared, error):
    memory = Memory(pipe.unet, more_than(2), error)
    with pytest.raises(type(error)) as caught:
        latents(pipe, prepared)
    assert caught.value is error
    assert memory.tried == [10]


# ── The LoRA fit ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", [0, 2])
def test_the_fit_starts_anew_with_gradient_checkpointing(pipe, photos, fast, caplog, step):
    arguments = {key: fast[key] for key in ("prompt", "num_inference_steps", "inversion_steps", "feature_step")}

    def prepare():
        return pipe.prepare(*photos, **arguments, lora_steps=3, generator=torch.Generator().manual_seed(0))

    expected = prepare()
    before = snapshot(pipe.unet)
    memory = Memory(pipe.unet, lambda call, x: call == step and not pipe.unet.is_gradient_checkpointing)
    pair = prepare()
    assert memory.failed == 1
    assert all(torch.equal(pair.lora[name], expected.lora[name]) for name in expected.lora)
    assert torch.equal(pair.inversion.path, expected.inversion.path)
    assert caplog.text.count("gradient checkpointing") == 1
    assert {name: s for name, s in snapshot(pipe.unet).items() if name} == {n: s for n, s in before.items() if n}


def test_a_fit_that_does_not_fit_even_so_is_an_error_with_advice(pipe, photos):
    before = snapshot(pipe.unet)
    memory = Memory(pipe.unet, lambda call, x: torch.is_grad_enabled())
    with pytest.raises(torch.OutOfMemoryError, match="in the LoRA fit; try a smaller"):
        pipe.prepare(*photos, lora_steps=2)
    assert memory.failed == 2
    assert {name: s for name, s in snapshot(pipe.unet).items() if name} == {n: s for n, s in before.items() if n}


# ── The VAE ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def large(pipe, photos):
    """A pair on 12×16 cells, which the VAE's tiles of 8×8 divide."""
    settings = {"num_inference_steps": 6, "inversion_steps": STEPS, "feature_step": 2, "lora_steps": 0}
    return pipe.prepare(*photos, height=96, width=128, **settings)


def larger_than(cells):
    return lambda call, x: x.shape[-2] * x.shape[-1] > cells


def test_frames_too_large_to_decode_are_decoded_in_tiles(pipe, large, caplog):
    pipe.vae.enable_tiling()
    expected = pipe.render(large, n_frames=3, output_type="pt").frames
    pipe.vae.disable_tiling()
    memory = Memory(pipe.vae.decoder, larger_than(64))
    assert torch.equal(pipe.render(large, n_frames=3, output_type="pt").frames, expected)
    assert memory.failed == 1, "every frame tries the whole picture first"
    assert caplog.text.count("Out of memory decoding") == 1
    assert not pipe.vae.use_tiling


def test_latents_decoded_by_hand_are_sliced_then_tiled(pipe, large, caplog):
    z = latents(pipe, large, 3)[0]
    whole = pipe.decode_latents(z)
    memory = Memory(pipe.vae.decoder, more_than(1))
    assert torch.allclose(pipe.decode_latents(z), whole, atol=1e-5)
    assert memory.tried == [3, 1, 1, 1]
    pipe.vae.enable_tiling()
    tiled = pipe.decode_latents(z)
    pipe.vae.disable_tiling()
    memory.exhausted = larger_than(64)
    assert torch.allclose(pipe.decode_latents(z), tiled, atol=1e-5)
    assert not pipe.vae.use_tiling
    assert not pipe.vae.use_slicing


def test_photos_too_large_to_encode_together_are_encoded_one_by_one(pipe, photos, prepared):
    memory = Memory(pipe.vae.encoder, more_than(1))
    settings = {"num_inference_steps": 6, "inversion_steps": STEPS, "feature_step": 2, "lora_steps": 0}
    alone = pipe.prepare(*photos, **settings)
    assert memory.tried == [2, 1, 1]
    assert torch.allclose(alone.inversion.path[0], prepared.inversion.path[0], atol=1e-5)
    assert not pipe.vae.use_slicing


def test_frames_that_cannot_be_decoded_at_all_are_not_lost(pipe, prepared):
    expected = pipe.render(prepared, n_frames=3, detail="upsampled", output_type="pt").frames[0]
    memory = Memory(pipe.vae.decoder, lambda call, x: call >= 1)
    with pytest.raises(torch.OutOfMemoryError, match=r"decoding, on \(1, 4, 8, 8\); try") as caught:
        pipe.render(prepared, n_frames=3)
    assert "latents" in caught.value.__notes__[0]
    memory.exhausted = more_than(3)
    assert torch.allclose(pipe.decode_latents(caught.value.latents), expected, atol=1e-5)
    assert not pipe.vae.use_tiling


def test_frames_that_there_is_no_memory_to_look_up_photos_for_are_not_lost(pipe, prepared, monkeypatch):
    grid_sample = F.grid_sample

    def exhausted(*args, mode, **kwargs):
        if mode == "bicubic":  # as photos are looked up at full size
            raise ERRORS[2]
        return grid_sample(*args, mode=mode, **kwargs)

    monkeypatch.setattr(F, "grid_sample", exhausted)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        pipe.render(prepared, n_frames=3)
    assert len(caught.value.latents) == 3
    assert "latents" in caught.value.__notes__[0]


def test_a_vae_that_fails_for_another_reason_is_not_tried_again(pipe, prepared):
    error = RuntimeError("shapes do not match")
    memory = Memory(pipe.vae.decoder, lambda call, x: True, error)
    with pytest.raises(RuntimeError) as caught:
        pipe.render(prepared, n_frames=3)
    assert caught.value is error
    assert memory.tried == [1]
