# SPDX-License-Identifier: Apache-2.0
import weakref

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from support.snapshot import snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from dreammover_pipeline.ddim import recompose
from dreammover_pipeline.lora import LoraFit, _adapted, fit_pair_lora, pair_lora

FIT = LoraFit(steps=3, rank=4, learning_rate=1e-3)


@pytest.fixture
def unet(components):
    return components["unet"]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 32, generator=generator)


@pytest.fixture
def alphas_cumprod():
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def forward(unet, latents, text):
    with torch.no_grad():
        return unet(latents, torch.tensor(301), text).sample


def add_user_lora(unet, name="style", targets=("to_q", "to_v", "proj_in"), seed=1):
    """A LoRA that visibly does something, on other layers than ours, convolutions among them."""
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in unet.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    unet.requires_grad_(False)


# ── The fit ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fit_learns_the_pair(tiny_pipe):
    """On the trained checkpoint: the loss on the pair's own latents falls, and only with the LoRA on."""
    unet = tiny_pipe.unet
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, 4, 24, 24, generator=generator)  # nothing it has ever seen
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


@pytest.fixture
def fitted(unet, pair, alphas_cumprod):
    return fit_pair_lora(unet, *pair, alphas_cumprod, LoraFit(3, 4, 1e-2), seed=0)


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


def forward_without(unet, pair, fitted):
    """Within the context of a LoRA: without it, by putting its negative on top."""
    with pair_lora(unet, fitted, -1.0):
        return forward(unet, *pair)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_pauses_for_the_fit_and_for_fusing(components, pair, alphas_cumprod, fitted, level):
    """A backward pass would find the weights gone: groups come for forwards only."""
    unet = components["unet"]
    expected = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with pair_lora(unet, fitted, 1.0):
        acting = forward(unet, *pair)
    plain = forward(unet, *pair)
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1)

    hooked = set()

    def look():
        hooked.add(
            any(getattr(module, "_diffusers_hook", None) and module._diffusers_hook.hooks for module in unet.modules())
        )

    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, on_step=look)
    assert hooked == {False}
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with pair_lora(unet, fitted, 1.0):
        assert torch.equal(forward(unet, *pair), acting)
        look()
    assert hooked == {False, True}
    assert torch.equal(forward(unet, *pair), plain)


def test_weights_offloaded_to_disk_are_refused(unet, pair, alphas_cumprod, fitted, tmp_path):
    cpu = torch.device("cpu")
    unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    with pytest.raises(ValueError, match="offload_to_disk_path"):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with pytest.raises(ValueError, match="offload_to_disk_path"), pair_lora(unet, fitted, 1.0):
        pass


def test_a_lora_acts_on_a_unet_offloaded_layer_by_layer(unet, pair, fitted):
    from accelerate import cpu_offload

    plain = forward(unet, *pair)
    with pair_lora(unet, fitted, 1.0):
        expected = forward(unet, *pair)
    cpu_offload(unet, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload does
    with pair_lora(unet, fitted, 1.0):
        assert torch.equal(forward(unet, *pair), expected)
    assert torch.equal(forward(unet, *pair), plain)


# ── The user's own adapters ────────────────────────────────────────────────────────────────────────────────────────


def user_none(unet):
    pass


def user_active(unet):
    add_user_lora(unet)
    unet.set_adapters(["style"], weights=[0.7])


def user_inactive_beside_active(unet):
    add_user_lora(unet)
    add_user_lora(unet, "other", targets=("to_k", "ff.net.2"), seed=2)
    unet.set_adapter("style")


def user_disabled(unet):
    add_user_lora(unet)
    unet.disable_adapters()


def user_fused(unet):
    add_user_lora(unet)
    unet.fuse_lora()


def user_fused_and_unloaded(unet):
    add_user_lora(unet)
    unet.fuse_lora()
    unet.unload_lora()


def user_trains_it(unet):
    add_user_lora(unet)
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_A" in name)


USERS = [
    user_none,
    user_active,
    user_inactive_beside_active,
    user_disabled,
    user_fused,
    user_fused_and_unloaded,
    user_trains_it,
]


@pytest.mark.parametrize("user", USERS)
def test_a_users_adapters_work_meanwhile_and_are_afterwards_what_they_were(unet, pair, alphas_cumprod, user):
    user(unet)
    before, expected = snapshot(unet), forward(unet, *pair)
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    assert snapshot(unet) == before
    assert torch.equal(forward(unet, *pair), expected)

    nothing = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with pair_lora(unet, nothing, 1.0):
        assert torch.allclose(forward(unet, *pair), expected, atol=1e-5), "the user's adapters act differently"
    with pair_lora(unet, {name: weight + 0.1 for name, weight in weights.items()}, 1.0):
        assert not torch.allclose(forward(unet, *pair), expected, atol=1e-3), "the pair's LoRA does not act"
    assert snapshot(unet) == before
    assert torch.equal(forward(unet, *pair), expected)


@pytest.mark.parametrize("user", USERS)
def test_an_interrupted_fit_leaves_the_unet_as_it_was(unet, pair, alphas_cumprod, user):
    user(unet)
    before = snapshot(unet)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, on_step=interrupt)
    assert snapshot(unet) == before


def test_no_trace_is_left_in_what_is_saved(unet, pair, alphas_cumprod):
    keys = set(unet.state_dict())
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with pair_lora(unet, weights, 1.0):
        pass
    assert set(unet.state_dict()) == keys
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())


def test_scale_is_linear_in_the_weights(unet, pair, alphas_cumprod):
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    halved = {name: weight * (0.5 if "lora_B" in name else 1) for name, weight in weights.items()}
    with pair_lora(unet, weights, 0.5):
        scaled = forward(unet, *pair)
    with pair_lora(unet, halved, 1.0):
        assert torch.allclose(forward(unet, *pair), scaled, atol=1e-6)


# ── Through the pipeline ───────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_kept_lora_leaves_the_users_beside_it(pipe, photos):
    user_active(pipe.unet)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "style" in name}
    pipe.fit_lora(*photos, prompt="a fish", lora_steps=1, lora_rank=4)
    assert set(pipe.unet.active_adapters()) == {"style", "dreammover"}
    assert {name: dict(pipe.unet.named_parameters())[name].requires_grad for name in flags} == flags
    pipe.delete_adapters("dreammover")
    assert pipe.unet.active_adapters() == ["style"]


def test_cross_attention_kwargs_scale_all_loras(pipe, photos, fast):
    plain = pipe(*photos, **fast).frames
    user_active(pipe.unet)
    active = pipe(*photos, **fast).frames
    off = {"cross_attention_kwargs": {"scale": 0.0}}
    assert not torch.allclose(active, plain, atol=1e-3)
    assert torch.allclose(pipe(*photos, **fast, **off).frames, plain, atol=1e-4)
    fit = {"lora_steps": 3, "lora_learning_rate": 1e-2}
    assert torch.allclose(pipe(*photos, **fast | fit, **off).frames, plain, atol=1e-4)


def test_the_text_encoders_loras_are_scaled_too_and_come_back(pipe):
    def embed(scale=None):
        with torch.no_grad():
            return pipe.encode_prompt("a fish", torch.device("cpu"), lora_scale=scale)[0]

    plain = embed()
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]), "words")
    for name, parameter in pipe.text_encoder.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    full = embed()
    assert not torch.allclose(full, plain, atol=1e-3)
    assert torch.allclose(embed(0.0), plain, atol=1e-5)
    assert not torch.allclose(embed(0.5), full, atol=1e-4)
    assert torch.allclose(embed(), full, atol=1e-6)
