# SPDX-License-Identifier: Apache-2.0
"""The pair's LoRA beside a user's own adapters, and on a UNet whose weights are kept elsewhere."""

from dataclasses import replace

import pytest
import torch
from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.fitting import FIT, add_user_lora, forward
from support.snapshot import snapshot

from dreammover_pipeline.adapters import adapter_weights, base_weight, isolated_adapter
from dreammover_pipeline.lora import fit_pair_lora, pair_lora

# ── The adapter itself ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_adapter_is_on_the_attention_projections_and_does_nothing_by_itself(unet, pair):
    before, plain, drawn = snapshot(unet), forward(unet, *pair), torch.get_rng_state()
    with isolated_adapter(unet, 4) as layers:
        assert layers.keys() == {
            name for name, _ in unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
        }
        assert set(adapter_weights(layers)) == {f"{name}.lora_{part}.weight" for name in layers for part in "AB"}
        assert not any(parameter.requires_grad for parameter in unet.parameters())
        assert torch.equal(forward(unet, *pair), plain)
    assert snapshot(unet) == before
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_base_weight_is_the_one_below_a_users_adapter(unet):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = unet.get_submodule(name).weight
    assert base_weight(unet, name).data_ptr() == weight.data_ptr()
    add_user_lora(unet)
    assert isinstance(unet.get_submodule(name), BaseTunerLayer)
    assert base_weight(unet, name).data_ptr() == weight.data_ptr()


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


def random_weights(unet, name):
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in unet.named_parameters():
        if f".{name}" in parameter_name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    unet.requires_grad_(False)


def ia3(target_modules):
    return IA3Config(target_modules=target_modules, feedforward_modules=[])


def user_of_another_kind(config):
    """An adapter that is no LoRA, both on layers that the pair's LoRA is on and on others."""

    def user(unet):
        unet.add_adapter(config(target_modules=["to_q", "ff.net.0.proj"]), adapter_name="style")
        random_weights(unet, "style")

    user.__name__ = f"user_{config.__name__}"
    return user


def user_two_kinds(unet):
    add_user_lora(unet, targets=("to_k", "ff.net.2"))
    unet.add_adapter(LoHaConfig(r=2, target_modules=["to_q", "ff.net.0.proj"]), adapter_name="other")
    random_weights(unet, "other")
    unet.set_adapter(["style", "other"])


def user_two_kinds_on_a_layer(unet):
    unet.add_adapter(LoHaConfig(r=2, target_modules=["to_q"]), adapter_name="other")
    add_user_lora(unet, targets=("to_q", "ff.net.2"))
    random_weights(unet, "other")
    unet.set_adapter(["style", "other"])


def user_injects_by_peft(unet):
    get_peft_model(unet, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "ff.net.2"]))
    random_weights(unet, "default")


USERS = [
    user_none,
    user_active,
    user_inactive_beside_active,
    user_disabled,
    user_fused,
    user_fused_and_unloaded,
    user_trains_it,
    user_of_another_kind(LoHaConfig),
    user_of_another_kind(LoKrConfig),
    user_of_another_kind(ia3),
    user_two_kinds,
    user_two_kinds_on_a_layer,
    user_injects_by_peft,
]


@pytest.mark.parametrize("user", USERS)
def test_a_users_adapters_work_meanwhile_and_are_afterwards_what_they_were(unet, pair, alphas_cumprod, user):
    user(unet)
    before, expected = snapshot(unet), forward(unet, *pair)
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    assert all(weight.any() for weight in weights.values()), "a part of the LoRA did not act in the fit"
    assert snapshot(unet) == before
    assert torch.equal(forward(unet, *pair), expected)

    nothing = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with pair_lora(unet, nothing, 1.0):
        assert torch.allclose(forward(unet, *pair), expected, atol=1e-5), "the user's adapters act differently"
    with pair_lora(unet, {name: weight + 0.1 for name, weight in weights.items()}, 1.0):
        assert not torch.allclose(forward(unet, *pair), expected, atol=1e-3), "the pair's LoRA does not act"
    assert snapshot(unet) == before
    assert torch.equal(forward(unet, *pair), expected)


@pytest.mark.parametrize("work", ["fit", "act"])
def test_a_lora_that_is_fused_and_then_disabled_does_not_come_back(unet, pair, alphas_cumprod, fitted, work):
    """Peft takes it out of the weights when the UNet is called, which must not be undone."""
    plain = forward(unet, *pair)
    add_user_lora(unet)
    unet.fuse_lora()
    unet.disable_adapters()
    if work == "fit":
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    else:
        with pair_lora(unet, fitted, 1.0):
            forward(unet, *pair)
    torch.testing.assert_close(forward(unet, *pair), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("user", USERS)
def test_an_interrupted_fit_leaves_the_unet_as_it_was(unet, pair, alphas_cumprod, user):
    user(unet)
    before = snapshot(unet)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0, on_step=interrupt)
    assert snapshot(unet) == before


@pytest.mark.parametrize("user", [user_active, user_of_another_kind(LoHaConfig), user_of_another_kind(ia3)])
def test_a_fingerprint_knows_adapters_of_every_kind(pipe, user):
    plain = pipe.fingerprint()
    user(pipe.unet)
    acting = pipe.fingerprint()
    assert acting != plain
    pipe.unet.disable_adapters()
    assert pipe.fingerprint() == plain


def test_a_fingerprint_knows_freeu(pipe):
    plain = pipe.fingerprint()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    enabled = pipe.fingerprint()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.5)
    assert len({plain, enabled, pipe.fingerprint()}) == 3
    pipe.disable_freeu()
    assert pipe.fingerprint() == plain


def test_a_unet_inside_a_model_of_peft_is_fitted_as_itself(pipe, photos, fast):
    """`get_peft_model` wraps the UNet; names of a LoRA are those in the UNet all the same."""
    fit = {"lora_steps": 2, "lora_learning_rate": 1e-2}
    seed = torch.Generator().manual_seed
    wrapped = get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "ff.net.2"]))
    random_weights(wrapped, "default")
    before = snapshot(pipe.unet)
    expected = pipe(*photos, **fast | fit, generator=seed(0)).frames
    pipe.unet = wrapped
    assert torch.equal(pipe(*photos, **fast | fit, generator=seed(0)).frames, expected)
    assert snapshot(wrapped.get_base_model()) == before
    weights = pipe.fit_lora(*photos, lora_steps=1)
    assert not any("base_model" in name for name in weights)
    assert wrapped.get_base_model().active_adapters() == ["default", "dreammover"]


def test_no_trace_is_left_in_what_is_saved(unet, pair, alphas_cumprod):
    keys = set(unet.state_dict())
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    with pair_lora(unet, weights, 1.0):
        pass
    assert set(unet.state_dict()) == keys
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())


# ── Offloading ─────────────────────────────────────────────────────────────────────────────────────────────────────


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


class Arriving(CpuOffload):
    """Brings the weights of a module when it is called, as if they came from another device."""

    def __init__(self, module):
        super().__init__(torch.device("cpu"))
        self.away = [(parameter, parameter.data) for parameter in module.parameters()]
        for parameter, value in self.away:
            parameter.data = torch.full_like(value, torch.nan)

    def pre_forward(self, module, *args, **kwargs):
        for parameter, value in self.away:
            parameter.data = value
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("others", [0, 1])
def test_a_unet_that_comes_when_it_is_called_is_there_when_the_fit_begins(unet, pair, alphas_cumprod, others):
    """As after enable_model_cpu_offload, alone and among other hooks."""
    expected = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    add_hook_to_module(unet, Arriving(unet))
    for _ in range(others):
        add_hook_to_module(unet, ModelHook(), append=True)
    weights = fit_pair_lora(unet, *pair, alphas_cumprod, FIT, seed=0)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


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


# ── Through the pipeline ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [None, 1, "", "v1.0", "keys", "training", "dreammover_pair", "style"])
def test_a_name_that_a_kept_lora_cannot_have_is_refused_before_the_fit(pipe, photos, name):
    user_active(pipe.unet)
    before, steps = snapshot(pipe.unet), []
    with (
        pipe.listening(lambda *step: steps.append(step)),
        pytest.raises((TypeError, ValueError), match="`adapter_name`"),
    ):
        pipe.fit_lora(*photos, lora_steps=1, adapter_name=name)
    assert not steps
    assert snapshot(pipe.unet) == before


def test_an_adapter_with_the_name_of_the_pairs_is_not_taken_for_it(unet):
    add_user_lora(unet, name="dreammover_pair")
    before = snapshot(unet)
    with pytest.raises(ValueError, match="dreammover_pair"), isolated_adapter(unet, 4):
        pass
    assert snapshot(unet) == before


def test_a_fit_in_inference_mode_leaves_nothing_that_refuses_gradients(pipe, photos):
    with torch.inference_mode():
        pipe.fit_lora(*photos, lora_steps=1)
    assert pipe.fit_lora(*photos, lora_steps=1, adapter_name="second")
    assert not any(tensor.is_inference() for tensor in pipe.unet.state_dict().values())


def test_a_kept_lora_leaves_the_users_beside_it(pipe, photos):
    user_active(pipe.unet)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "style" in name}
    pipe.fit_lora(*photos, prompt="a fish", lora_steps=1, lora_rank=4)
    assert set(pipe.unet.active_adapters()) == {"style", "dreammover"}
    assert {name: dict(pipe.unet.named_parameters())[name].requires_grad for name in flags} == flags
    pipe.delete_adapters("dreammover")
    assert pipe.unet.active_adapters() == ["style"]


def test_a_fit_that_is_to_stay_is_refused_where_it_would_undo_others_or_not_act(pipe, photos):
    user_active(pipe.unet)
    before = snapshot(pipe.unet)
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match="are disabled, and so would the fitted one be"):
        pipe.fit_lora(*photos, lora_steps=1)
    pipe.unet.enable_adapters()
    assert snapshot(pipe.unet) == before
    pipe.fuse_lora()
    fused = snapshot(pipe.unet)
    with pytest.raises(ValueError, match="LoRAs are fused into the UNet"):
        pipe.fit_lora(*photos, lora_steps=1)
    assert snapshot(pipe.unet) == fused


def test_cross_attention_kwargs_scale_all_loras(pipe, photos, fast):
    plain = pipe(*photos, **fast).frames
    user_active(pipe.unet)
    active = pipe(*photos, **fast).frames
    off = {"cross_attention_kwargs": {"scale": 0.0}}
    assert not torch.allclose(active, plain, atol=1e-3)
    assert torch.allclose(pipe(*photos, **fast, **off).frames, plain, atol=1e-4)
    fit = {"lora_steps": 3, "lora_learning_rate": 1e-2}
    assert torch.allclose(pipe(*photos, **fast | fit, **off).frames, plain, atol=1e-4)


def test_a_scale_for_all_loras_scales_the_pairs_too(pipe, photos):
    steps = {"num_inference_steps": 3, "inversion_steps": 2, "feature_step": 1}
    pair = pipe.prepare(*photos, **steps, lora_steps=3, lora_learning_rate=1e-2)

    def latents(pair, **arguments):
        return pipe.render(pair, n_frames=1, output_type="latent", **arguments).frames

    halved = latents(pair, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(halved, latents(replace(pair, lora_scale=0.5)))
    assert not torch.allclose(halved, latents(pair), atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_fit_sees_all_loras_scaled_as_frames_do(unet, pair, alphas_cumprod, checkpointed):
    """Also where activations are computed again, which diffusers does with LoRAs that are not scaled any more."""
    user_active(unet)
    before = snapshot(unet)

    def fitted(**arguments):
        arguments |= {"seed": 0, "gradient_checkpointing": checkpointed}
        return fit_pair_lora(unet, *pair, alphas_cumprod, FIT, **arguments)

    plain, halved = fitted(), fitted(cross_attention_kwargs={"scale": 0.5})
    assert snapshot(unet) == before
    none = fitted(cross_attention_kwargs={"scale": 0.0})
    assert snapshot(unet) == before
    assert all(not weight.any() for name, weight in none.items() if "lora_B" in name)
    assert not any(torch.allclose(plain[name], halved[name], atol=1e-5) for name in plain if "lora_B" in name)
    expected = fit_pair_lora(
        unet, *pair, alphas_cumprod, FIT, seed=0, cross_attention_kwargs={"scale": 0.5}, gradient_checkpointing=False
    )
    assert all(torch.allclose(halved[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_a_scale_for_one_call_leaves_the_users_weights_to_the_bit(pipe, photos, scale):
    for model, targets in ((pipe.unet, ["to_q"]), (pipe.text_encoder, ["q_proj"])):
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), "mine")
        for layer in model.modules():
            if "mine" in getattr(layer, "lora_B", ()):
                layer.set_scale("mine", 0.1)  # 0.1 · 0.7 / 0.7 is less than 0.1
    before = pipe.fingerprint()
    steps = {"num_inference_steps": 3, "inversion_steps": 2, "feature_step": 1, "lora_steps": 0}
    pipe(*photos, **steps, n_frames=1, output_type="latent", cross_attention_kwargs={"scale": scale})
    assert pipe.fingerprint() == before


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
