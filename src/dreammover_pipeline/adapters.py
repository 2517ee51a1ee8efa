# SPDX-License-Identifier: Apache-2.0
"""Adapters and offloading: a LoRA beside the user's own adapters, and weights that are kept off the device.

Peft adds layers to a model and changes flags of its existing adapter layers; diffusers' offloading moves weights away
and hooks every layer. Whatever the contexts here change is restored when they end, also after an exception, so that
the user's adapters, whether loaded, disabled or fused, are afterwards as they were before.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from diffusers.utils import is_peft_available

ADAPTER = "dreammover_pair"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

# What torch takes as the name of a submodule is what peft takes as the name of an adapter.
_NO_NAMES = frozenset(dir(torch.nn.ModuleDict())) | {""}

# The flags of an adapter layer that change when another adapter is added: which adapters are active, whether adapters
# are disabled, and which adapters are fused into the weights.
_Flags = tuple[str | list[str], bool, list[str]]


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside the wrappers of torch.compile and of peft's `get_peft_model`, whose modules can be changed.

    A model without a wrapper is returned as it is.
    """
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ── Adapters ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def isolated_adapter(unet: torch.nn.Module, rank: int) -> Iterator[dict[str, torch.nn.Module]]:
    """Add a LoRA that acts beside the user's adapters; afterwards the UNet's modules and flags are restored.

    All parameters of the UNet are frozen while the context lasts.

    Args:
        unet: The UNet to add the LoRA to, compiled or not.
        rank: The LoRA's rank; its alpha equals the rank.

    Yields:
        The layers that carry the LoRA, by their names in the UNet.

    Raises:
        ImportError: The library peft is not installed.
        ValueError: One of the user's adapters has the name that the pair's LoRA has.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("a LoRA on a quantised UNet needs peft: pip install peft, or leave the LoRA out") from error

    model = unwrapped(unet)
    _check_name_is_free(model)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    with gradient_flags_kept(model), _restored_adapters(model) as users:
        for layer in users:
            layer.merged_adapters = []  # else peft would unmerge fused adapters; the base is to include them
        # Peft draws initial weights, which the caller overwrites, and moves them to where the layers are.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model.add_adapter(config, adapter_name=ADAPTER)
        layers = {name: layer for name, layer in _tuner_layers(model).items() if _carries_lora(layer)}
        for layer in [*users, *layers.values()]:
            layer.enable_adapters(True)
            acting = _acting(*users[layer]) if layer in users else []
            layer.set_adapter([*acting, ADAPTER] if _carries_lora(layer) else acting)
        model.requires_grad_(False)
        _reapply_group_offloading(model)
        yield layers


@contextmanager
def gradient_flags_kept(model: torch.nn.Module) -> Iterator[None]:
    """Have a model's parameters take gradients, or not, at the end of the context as they did at its beginning."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _restored_adapters(model: torch.nn.Module) -> Iterator[dict[torch.nn.Module, _Flags]]:
    """Remove the pair's adapter at the end and restore peft's flags; yields those of the user's adapter layers."""
    users = {
        layer: (layer._active_adapter, layer._disable_adapters, layer.merged_adapters)
        for layer in _tuner_layers(model).values()
    }
    had_adapters, had_config = model._hf_peft_config_loaded, hasattr(model, "peft_config")
    try:
        yield users
    finally:
        _remove_adapter(model, users)
        for layer, flags in users.items():
            layer._active_adapter, layer._disable_adapters, layer.merged_adapters = flags
        if hasattr(model, "peft_config"):
            model.peft_config.pop(ADAPTER, None)
            if not had_config:
                del model.peft_config
        model._hf_peft_config_loaded = had_adapters
        _reapply_group_offloading(model)


@contextmanager
def scaled_adapters(model: torch.nn.Module, scale: float) -> Iterator[None]:
    """Multiply the scales of all adapters on a model while the context lasts.

    diffusers does so for a forward pass with "scale" in `cross_attention_kwargs`. It undoes it before the backward
    pass, which would see other scales where activations are computed again; and after a scale of 0 every adapter has
    its full weight, whatever the user had given it.
    """
    layers = _tuner_layers(unwrapped(model)).values() if scale != 1 else ()
    scaled = [layer.scaling for layer in layers if hasattr(layer, "scaling")]
    before = [dict(scales) for scales in scaled]
    try:
        for scales in scaled:
            scales.update({name: scale * value for name, value in scales.items()})
        yield
    finally:
        for scales, values in zip(scaled, before, strict=True):
            scales.update(values)


def _remove_adapter(model: torch.nn.Module, users: Container[torch.nn.Module]) -> None:
    for name, layer in _tuner_layers(model).items():
        if layer not in users:  # it wraps a layer of the model, or a user's adapter of another kind, such as LoHa
            model.set_submodule(name, layer.base_layer)
        elif _carries_lora(layer):
            layer.set_adapter([])  # else peft would activate another adapter, and warn that it does
            layer.delete_adapter(ADAPTER)


def _carries_lora(layer: torch.nn.Module) -> bool:
    """Whether the pair's LoRA is on an adapter layer; only layers of peft's kind "LoRA" can carry one."""
    return ADAPTER in getattr(layer, "lora_A", ())


def _acting(active: str | list[str], disabled: bool, merged: list[str]) -> list[str]:
    """The user's adapters that must act unmerged: none where they are disabled or already in the weights."""
    if disabled or merged:
        return []
    return [active] if isinstance(active, str) else list(active)


def _tuner_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a model that peft has wrapped, by name; there are none where peft is not installed."""
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_weights(layers: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """The parameters of the pair's LoRA, by the names that diffusers gives them in a file.

    Args:
        layers: The layers that `isolated_adapter` yields.

    Returns:
        Two parameters for every layer: "<name>.lora_A.weight" (rank, in) and "<name>.lora_B.weight" (out, rank).
    """
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }


def acting_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, float]]:
    """The tensors that decide what a model computes: its own, and those of the adapters that act on it.

    An adapter acts while it is active, enabled and not fused; a fused adapter is already part of the model's own
    tensors. Names do not show what wraps a model (adapter layers, torch.compile), nor what its adapters are called.

    Args:
        model: Any model, offloaded or not.

    Yields:
        The name of a tensor; the tensor, which is a parameter or a persistent buffer; and its weight, which is 1 for a
        tensor of the model and the adapter's scale for a tensor of an adapter.

    Raises:
        ValueError: The model's tensors are on disk, or cannot be found.
    """
    model = unwrapped(model)
    require_in_memory(model)
    tuners = _tuner_layers(model)
    for name, tensor in model.state_dict().items():
        value = _offloaded(model, name) if tensor.is_meta else tensor
        plain, scale = name, 1.0
        tuner = next((tuner for tuner in tuners if name.startswith(f"{tuner}.")), None)
        if tuner is not None:
            layer = tuners[tuner]
            kind, adapter, *rest = name.removeprefix(f"{tuner}.").split(".")
            if kind == "base_layer":
                plain = ".".join([tuner, adapter, *rest])
            elif adapter in _acting(layer._active_adapter, layer._disable_adapters, layer.merged_adapters):
                plain = ".".join([tuner, kind, *rest])
                scale = getattr(layer, "scaling", {}).get(adapter, 1.0)  # some kinds of adapters have no scale
            else:
                continue
        yield plain.replace("_orig_mod.", ""), value, scale


# ── Offloading ─────────────────────────────────────────────────────────────────────────────────────────────────────


def base_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor that holds a layer's own weight, without the user's adapters, wherever it is kept.

    Args:
        model: The model that the layer is in, not wrapped by torch.compile.
        name: The layer's name in the model.

    Raises:
        ValueError: The weight is on the meta device, and no offloading hook keeps it elsewhere.
    """
    name, layer = base_layer(model, name)
    return _offloaded(model, f"{name}.weight") if layer.weight.is_meta else layer.weight.data


def base_layer(model: torch.nn.Module, name: str) -> tuple[str, torch.nn.Module]:
    """The layer of a name without the user's adapters that are on it, and the name that it has in the model itself."""
    layer = model.get_submodule(name)
    while hasattr(layer, "base_layer"):  # of several kinds of adapters each wraps the one before
        name, layer = f"{name}.base_layer", layer.base_layer
    return name, layer


def unmerge_disabled(model: torch.nn.Module) -> None:
    """Take adapters that are fused, but disabled by now, out of a model's weights, as peft does when it is called."""
    for layer in _tuner_layers(unwrapped(model)).values():
        if layer._disable_adapters and layer.merged_adapters:
            layer.unmerge()


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A tensor of a layer-by-layer offloaded model (enable_sequential_cpu_offload), from where accelerate keeps it."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "weights_map", None) is not None:
            return part.weights_map[leaf]
    raise ValueError(f"{type(model).__name__} has no weights: its {name!r} is on the meta device")


def require_in_memory(model: torch.nn.Module) -> None:
    """Raise unless a model's weights are in memory.

    Group offloading to disk leaves uninitialised tensors in the model, which must not be taken for its weights.

    Raises:
        ValueError: The model is group-offloaded to disk.
    """
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    hook = _get_top_level_group_offload_hook(model)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise ValueError(
            f"the weights of {type(model).__name__} are offloaded to disk and cannot be read there; "
            "enable group offloading without `offload_to_disk_path`"
        )


@contextmanager
def without_group_offloading(unet: torch.nn.Module, resident: bool = False) -> Iterator[None]:
    """Suspend group offloading while the context lasts; a UNet that is not group-offloaded is not changed.

    Group offloading works on copies of the weights that it makes when it is applied. After weights have changed it
    must be applied again, which happens when the context ends.

    Args:
        unet: The UNet, compiled or not.
        resident: Whether all weights are on the device while the context lasts. A backward pass needs them there,
            since group offloading loads weights for forward passes only.
    """
    from diffusers.hooks import group_offloading as offloading

    model = unwrapped(unet)
    hook = offloading._get_top_level_group_offload_hook(model)
    if hook is None:
        yield
        return
    registry = offloading.HookRegistry.check_if_exists_or_initialize(model)
    for name in (
        offloading._GROUP_OFFLOADING,
        offloading._LAYER_EXECUTION_TRACKER,
        offloading._LAZY_PREFETCH_GROUP_OFFLOADING,
    ):
        registry.remove_hook(name, recurse=True)
    try:
        if resident:
            model.to(hook.config.onload_device)
        yield
    finally:
        offloading._apply_group_offloading(model, hook.config)


def _reapply_group_offloading(model: torch.nn.Module) -> None:
    """Apply group offloading again if it is on, so that it hooks new layers and forgets those that were removed."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)


def check_new_adapter_name(unet: torch.nn.Module, adapter_name: str) -> None:
    """Raise unless a LoRA can be loaded into a UNet under a name.

    Args:
        unet: The UNet, compiled or not.
        adapter_name: The name to check.

    Raises:
        TypeError: The name is not a string.
        ValueError: Another adapter has the name, or torch cannot have a module of this name.
    """
    if not isinstance(adapter_name, str):
        raise TypeError(f"`adapter_name` must be a string, not {adapter_name!r}")
    if "." in adapter_name or adapter_name in _NO_NAMES:
        raise ValueError(
            f"`adapter_name` must not be empty, have a dot, or be an attribute of torch modules, not {adapter_name!r}"
        )
    if adapter_name == ADAPTER:
        raise ValueError(f"`adapter_name` {ADAPTER!r} is kept for a pair's LoRA on quantised weights; choose another")
    if adapter_name in getattr(unwrapped(unet), "peft_config", {}):
        raise ValueError(f"`adapter_name` {adapter_name!r} is loaded already; choose another, or delete that one")


def check_adapters_act(unet: torch.nn.Module) -> None:
    """Raise ValueError if a LoRA that is loaded now would not act, or would undo what the user did to others.

    Args:
        unet: The UNet, compiled or not.
    """
    layers = _tuner_layers(unwrapped(unet)).values()
    if any(layer.merged_adapters for layer in layers):
        raise ValueError(
            "LoRAs are fused into the UNet, and would be taken out of it again by loading another; call "
            "`unfuse_lora()` first, or `unload_lora_weights()`, after which they stay in the weights"
        )
    if any(layer._disable_adapters for layer in layers):
        raise ValueError(
            "the UNet's adapters are disabled, and so would the fitted one be; call `enable_lora()` first, or "
            "`unload_lora_weights()`"
        )


def _check_name_is_free(model: torch.nn.Module) -> None:
    """Raise ValueError if one of the user's adapters has the name of the pair's, and would be taken for it."""
    if ADAPTER in getattr(model, "peft_config", {}):
        raise ValueError(
            f"an adapter named {ADAPTER!r} is loaded, which is the name that a pair's LoRA has on quantised weights; "
            "delete it, and load yours under another name"
        )


def _adapter_dtype(layer: torch.nn.Module) -> torch.dtype:
    """The dtype of a LoRA on a layer: that of the layer's own weight, or float32 beside a quantised weight."""
    own = layer.get_base_layer().weight.dtype
    return own if own.is_floating_point and own.itemsize > 1 else torch.float32


def load_beside(pipe, weights: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Load LoRA weights into a pipeline's UNet as an adapter that acts beside those that are already active.

    Args:
        pipe: A diffusers pipeline.
        weights: The LoRA weights, by the names that diffusers gives them in a file.
        adapter_name: A name for the adapter that no loaded adapter has.
    """
    unet = unwrapped(pipe.unet)
    acting = [_acting(layer._active_adapter, False, []) for layer in _tuner_layers(unet).values()]
    active = list(dict.fromkeys(name for names in acting for name in names))
    with gradient_flags_kept(unet):
        with torch.device("cpu"):  # whatever torch's default device is; peft moves the layers to where the others are
            unet.load_lora_adapter(weights, prefix=None, adapter_name=adapter_name, _pipeline=pipe)
        for name, layer in _tuner_layers(unet).items():
            for part in ("lora_A", "lora_B"):
                if adapter_name in getattr(layer, part, ()):  # peft made it in torch's default dtype, whatever that is
                    parameter = getattr(layer, part)[adapter_name].weight
                    parameter.data = weights[f"{name}.{part}.weight"].to(parameter.device, _adapter_dtype(layer))
        unet.set_adapter([*active, adapter_name])
        unet.requires_grad_(False)  # peft makes active adapters trainable
