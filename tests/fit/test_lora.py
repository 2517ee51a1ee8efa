# SPDX-License-Identifier: Apache-2.0
"""Fitting a pair's LoRA, and having it act."""

import weakref

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from support.fitting import FIT, add_user_lora, forward
from support.snapshot import snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from dreammover_pipeline.ddim import recompose
from dreammover_pipeline.denoiser import Denoiser
from dreammover_pipeline.lora import LoraFit, _adapted, fit_pair_lora, pair_lora

# ── The fit ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fit_learns_the_pair(tiny_pipe):
    """On the trained checkpoint: the loss on the pair's own latents falls, and only with the LoRA on."""
    unet = tiny_pipe.unet
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, 4, 16, 16, generator=generator)  # nothing it has ever seen
    text = torch.zeros(2, 24, 64)
    alphas_cumprod = tiny_pipe.scheduler.alphas_cumprod
    noise = torch.randn(clean.shape, generator=generator)

    def loss():
        noisy = recompose(clean, noise, float(alphas_cumprod[301]))
        return float((forward(unet, noisy, text) - noise).pow(2).mean())

    before = loss()
    weights = fit_pair_lora(unet, clean, text, alphas_cumprod, LoraFit(40, 8, 5e-3), seed=0)
    assert loss() == before
    with pair_lora(unet, weights, 1.0):
        assert loss() < 0.9 * before
    with pair_lora(unet, weights, 0.0):
        assert loss() == pytest.approx(before, abs=1e-6)


def test_weights_have_the_names_and_shapes_diffusers_gives_them(unet, pair, alphas_cumprod):
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    linears = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and isinstance(module, torch.nn.Linear)
    }
    assert len(weights) == 2 * len(linears)
    for name, module in linears.items():
        assert weights[f"{name}.lora_A.weight"].shape == (4, module.in_features)
        assert weights[f"{name}.lora_B.weight"].shape == (module.out_features, 4)
        assert weights[f"{name}.lora_B.weight"].abs().sum() > 0
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not any(weight.requires_grad for weight in weights.values())


def test_the_seed_decides_and_nothing_else(unet, pair, alphas_cumprod):
    def fit(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([weight.flatten() for weight in weights.values()])

    assert torch.equal(fit(0, 1), fit(0, 2))
    assert not torch.equal(fit(0, 1), fit(1, 1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_may_be_in_any_grad_mode(unet, pair, alphas_cumprod, mode):
    expected = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with mode():
        latents, text = pair[0] + 0, pair[1] + 0  # made in that mode
        weights = fit_pair_lora(unet, latents, text, alphas_cumprod, FIT, seed=0)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_are_fitted_in_float32(unet, pair, alphas_cumprod, dtype):
    unet.to(dtype)
    before = snapshot(unet)
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    with pair_lora(unet, weights, 1.0):
        assert forward(unet, pair[0].to(dtype), pair[1].to(dtype)).dtype == dtype
    assert snapshot(unet) == before


def test_v_prediction_is_fitted_to_v(unet, pair, alphas_cumprod):
    eps = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    v = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, prediction_type="v_prediction")
    assert any(not torch.equal(eps[name], v[name]) for name in eps)


def test_a_diverging_fit_is_an_error_in_words(unet, pair, alphas_cumprod):
    before = snapshot(unet)
    with pytest.raises(RuntimeError, match=r"diverged.*lora_learning_rate"):
        fit_pair_lora(unet, pair[0] * torch.inf, pair[1], alphas_cumprod, FIT, seed=0)
    assert snapshot(unet) == before


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"rank": 0}, {"rank": 1.5}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]
)
def test_settings_are_checked(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
        LoraFit(**{"steps": 1, "rank": 1, "learning_rate": 1e-4} | bad)


def test_a_unet_that_cannot_be_trained_through_is_refused(unet, pair, alphas_cumprod):
    from accelerate import cpu_offload

    cpu_offload(unet, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload does
    with pytest.raises(ValueError, match=r"enable_model_cpu_offload|lora_steps=0"):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)


def test_a_unet_in_eight_bits_is_refused(unet, pair, alphas_cumprod):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="lora_steps=0"):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)


# ── Memory and stalls ──────────────────────────────────────────────────────────────────────────────────────────────


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Peak bytes of what forwards keep for their backward passes; tensors that share memory count once.

    A model's own weights, which views keep, are not counted, nor what a backward pass computes again.
    """

    def __init__(self, model):
        self.users = {parameter.untyped_storage().data_ptr(): 1 for parameter in model.parameters()}
        self.now = self.peak = 0
        super().__init__(self.pack, lambda held: held[0])

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        held = Held([tensor])
        if self.users.setdefault(address, 0) == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.users[address] += 1
        weakref.finalize(held, self.release, address, size)
        return held

    def release(self, address, size):
        self.users[address] -= 1
        if self.users[address] == 0:
            self.now -= size


class Held(list):
    """A list that can be referred to weakly."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_keeps_less_and_fits_the_same(unet, pair, alphas_cumprod, dtype):
    unet.to(dtype)
    before = snapshot(unet)
    kept, recomputed = SavedBytes(unet), SavedBytes(unet)
    with kept:
        plain = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with recomputed:
        frugal = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, gradient_checkpointing=True)
    assert all(torch.equal(frugal[name], plain[name]) for name in plain)
    assert 0 < recomputed.peak < 0.5 * kept.peak
    assert snapshot(unet) == before


def test_gradient_checkpointing_is_switched_back_after_a_failure(unet, pair, alphas_cumprod):
    def interrupt():
        assert unet.is_gradient_checkpointing
        raise KeyboardInterrupt

    before = snapshot(unet)
    with pytest.raises(KeyboardInterrupt):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, 0, on_step=interrupt, gradient_checkpointing=True)
    assert snapshot(unet) == before


def test_a_users_own_gradient_checkpointing_stays(unet, pair, alphas_cumprod):
    unet.enable_gradient_checkpointing()
    before = snapshot(unet)
    fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, gradient_checkpointing=True)
    assert snapshot(unet) == before


class HostReads(TorchDispatchMode):
    """Counts tensor values that Python asks for; each of them would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_step_of_the_fit_waits_for_the_device(unet, pair, alphas_cumprod, dtype, checkpointing):
    unet.to(dtype)
    reads = []
    for steps in (1, 4):
        with HostReads() as mode:
            fit_pair_lora(
                unet, *pair, alphas_cumprod, LoraFit(steps, 4, 1e-3), 0, gradient_checkpointing=checkpointing
            )
        reads.append(mode.count)
    assert reads[0] == reads[1]


# ── In effect ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("user", ["none", "active"])
def test_fused_weights_act_as_an_adapter_would(unet, pair, fitted, scale, user):
    if user == "active":
        add_user_lora(unet)
    plain = forward(unet, *pair)
    with _adapted(unet, fitted, scale):
        expected = forward(unet, *pair)
    with pair_lora(unet, fitted, scale):
        fused = forward(unet, *pair)
        assert all("dreammover_pair" not in name for name, _ in unet.named_parameters())
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.allclose(fused, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_back_to_the_bit(unet, fitted, dtype):
    unet.to(dtype)
    expected = {name: weight.clone() for name, weight in unet.state_dict().items()}

    def changed():
        return {name for name, weight in unet.state_dict().items() if not torch.equal(weight, expected[name])}

    with pair_lora(unet, fitted, 0.7):
        assert changed() == {name.replace("lora_A.", "") for name in fitted if "lora_A" in name}
    assert not changed()
    with pytest.raises(KeyboardInterrupt), pair_lora(unet, fitted, 0.7):
        raise KeyboardInterrupt
    assert not changed()


def test_weights_stored_in_eight_bits_get_an_adapter(unet, pair, fitted):
    with pair_lora(unet, fitted, 1.0):
        expected = forward(unet, *pair) - forward_without(unet, pair, fitted)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before, plain = snapshot(unet), forward(unet, *pair)
    with pair_lora(unet, fitted, 1.0):
        effect = forward(unet, *pair) - plain
    assert snapshot(unet) == before
    assert (effect - expected).norm() < 0.2 * expected.norm()


def test_beside_weights_in_eight_bits_a_scale_for_all_loras_counts_once(unet, pair, fitted):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    latents, embeds = pair
    predicted = []
    for scale, asked in ((0.5, None), (1.0, {"scale": 0.5})):
        denoiser = Denoiser(unet, DDIMScheduler(), torch.device("cpu"), asked)
        with torch.no_grad(), denoiser.with_lora(fitted, scale):
            predicted.append(denoiser.predict_noise(latents, 101, embeds))
    torch.testing.assert_close(*predicted)


def forward_without(unet, pair, fitted):
    """Within the context of a LoRA: without it, by putting its negative on top."""
    with pair_lora(unet, fitted, -1.0):
        return forward(unet, *pair)


def test_scale_is_linear_in_the_weights(unet, pair, alphas_cumprod):
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    halved = {name: weight * (0.5 if "lora_B" in name else 1) for name, weight in weights.items()}
    with pair_lora(unet, weights, 0.5):
        scaled = forward(unet, *pair)
    with pair_lora(unet, halved, 1.0):
        assert torch.allclose(forward(unet, *pair), scaled, atol=1e-6)


def test_a_kept_lora_is_an_adapter_like_any_other(pipe, photos, fast, tmp_path):
    arguments = {"prompt": "a fish", "lora_steps": 3, "lora_rank": 4, "lora_learning_rate": 1e-2}
    fitted = pipe(*photos, **fast | arguments, generator=torch.Generator().manual_seed(0)).frames
    plain = pipe(*photos, **fast).frames

    weights = pipe.fit_lora(*photos, **arguments, generator=torch.Generator().manual_seed(0))
    assert pipe.unet.active_adapters() == ["dreammover"]
    kept = pipe(*photos, **fast).frames
    assert torch.allclose(kept, fitted, atol=1e-4)
    assert not torch.allclose(kept, plain, atol=1e-4)
    with pytest.raises(ValueError, match="adapter_name"):
        pipe.fit_lora(*photos, **arguments)

    pipe.save_lora_weights(tmp_path, unet_lora_layers=weights)
    pipe.unload_lora_weights()
    assert torch.equal(pipe(*photos, **fast).frames, plain)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(pipe(*photos, **fast).frames, fitted, atol=1e-4)

    donor = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    donor.unload_lora_weights()
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32)
    before = forward(donor.unet, latents, text)
    donor.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert not torch.allclose(forward(donor.unet, latents, text), before, atol=1e-5)


# ── Fused projections ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lora_is_fitted_and_acts_where_projections_are_fused(unet, pair, alphas_cumprod):
    expected = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with pair_lora(unet, expected, 1.0):
        acting = forward(unet, *pair)
    with torch.no_grad():
        unet.fuse_qkv_projections()
    before = snapshot(unet)
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pair_lora(unet, weights, 1.0):
        assert torch.equal(forward(unet, *pair), acting)
    assert snapshot(unet) == before


# ── Inference mode ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_unet_loaded_in_inference_mode_is_refused_by_a_fit_and_takes_a_lora(components, pair, alphas_cumprod):
    fitted = fit_pair_lora(components["unet"], *pair, alphas_cumprod, FIT, seed=0)
    with torch.inference_mode():
        unet = type(components["unet"]).from_config(components["unet"].config).eval()
    with pytest.raises(ValueError, match="inference_mode"):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    plain = forward(unet, *pair)
    with torch.no_grad(), pair_lora(unet, fitted, 1.0):
        assert not torch.equal(forward(unet, *pair), plain)
    assert torch.equal(forward(unet, *pair), plain)
