# SPDX-License-Identifier: Apache-2.0
"""Offloading, slices and tiles, alone and together, on the CPU: the hooks are the same as with a GPU."""

import pytest
import torch
from support.snapshot import snapshot

CPU = torch.device("cpu")


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload_by_block(pipe):
    pipe.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def group_offload_by_leaf(pipe):
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


OFFLOADS = [model_offload, group_offload_by_block, group_offload_by_leaf]


STEPS = {"prompt": "a fish", "num_inference_steps": 4, "inversion_steps": 2, "feature_step": 1}


def prepared(pipe, photos):
    """A pair with a LoRA, VAE tiles of 8×8 cells being smaller than its pictures."""
    generator = torch.Generator().manual_seed(0)
    return pipe.prepare(*photos, **STEPS, height=96, width=128, lora_steps=1, generator=generator)


def rendered(pipe, pair, frame_batch_size=None):
    return pipe.render(pair, n_frames=5, frame_batch_size=frame_batch_size, output_type="pt").frames


@pytest.fixture(scope="module")
def expected(new_pipe, photos):
    """The frames without offloading: in batches of 2; all at once and of tiles; in batches of 3 and of tiles."""
    pipe = new_pipe()
    pair = prepared(pipe, photos)
    whole = rendered(pipe, pair, 2)
    pipe.vae.enable_tiling()
    by_threes = rendered(pipe, pair, 3)
    pipe.vae.enable_slicing()
    tiled = rendered(pipe, prepared(pipe, photos))
    assert not torch.allclose(tiled, whole, atol=1e-3)
    return whole, tiled, by_threes


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_changes_nothing(pipe, photos, expected, offload):
    """First in batches, then again with the VAE in slices and tiles."""
    whole, tiled, _ = expected
    offload(pipe)
    assert torch.equal(rendered(pipe, prepared(pipe, photos), 2), whole)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert torch.allclose(rendered(pipe, prepared(pipe, photos)), tiled, atol=1e-5)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_memory_may_run_out_under_offloading(pipe, photos, expected, offload):
    """In the fit, in the frames and in the decoder, in one job."""
    _, _, by_threes = expected
    offload(pipe)
    failures = []

    def unet(module, args):
        fitting = torch.is_grad_enabled()
        if not pipe.unet.is_gradient_checkpointing if fitting else len(args[0]) > 2 + 3:
            failures.append("fit" if fitting else "frames")
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def decoder(module, args):
        if args[0].shape[-1] > 8:
            failures.append("decoder")
            raise torch.OutOfMemoryError("CUDA out of memory.")

    # inside the models, where offloading has brought what is to run
    pipe.unet.conv_in.register_forward_pre_hook(unet)
    pipe.vae.decoder.conv_in.register_forward_pre_hook(decoder)
    assert torch.allclose(rendered(pipe, prepared(pipe, photos)), by_threes, atol=1e-5)
    assert failures == ["fit", "frames", "decoder"]


@pytest.mark.parametrize("offload", [group_offload_by_block, group_offload_by_leaf])
def test_a_group_offloaded_pair_lora_is_gone_after_a_failure(pipe, photos, fast, offload):
    offload(pipe)
    weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

    def stop(pipeline, i, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(*photos, **fast | {"lora_steps": 2}, callback_on_step_end=stop)
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.unet.state_dict().items())


def test_weights_that_model_offloading_has_yet_to_bring_are_reckoned_with(pipe):
    """On a device that is not there: what counts is only where the weights are not."""
    latents = torch.zeros(2, 4, 8, 8)
    assert pipe._models().denoiser.footprint(latents)[-1] == 0
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._models().denoiser.footprint(latents)[-1] == 0
    pipe._offload_device = torch.device("meta")
    for hook in pipe._all_hooks:
        hook.hook.execution_device = torch.device("meta")
    assert pipe._models().denoiser.footprint(latents)[-1] == sum(weight.nbytes for weight in pipe.unet.parameters())


def test_sequential_offloading_works_with_a_lora_that_was_fitted_before(pipe, photos, fast):
    from accelerate import cpu_offload

    arguments = {key: fast[key] for key in ("prompt", "num_inference_steps", "inversion_steps", "feature_step")}
    pair = pipe.prepare(*photos, **arguments, lora_steps=2, generator=torch.Generator().manual_seed(0))
    expected = pipe.render(pair, n_frames=3, output_type="pt").frames
    before = snapshot(pipe.unet)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(model, execution_device=CPU)  # what enable_sequential_cpu_offload does
    assert torch.equal(pipe.render(pair, n_frames=3, output_type="pt").frames, expected)
    again = pipe.prepare(*photos, **arguments, lora=pair.lora)
    assert torch.equal(again.inversion.path, pair.inversion.path)
    pipe.remove_all_hooks()
    assert snapshot(pipe.unet) == before
