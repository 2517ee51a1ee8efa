# SPDX-License-Identifier: Apache-2.0
"""Adapters and offloading: a LoRA beside the user's own adapters, and weights that are kept off the device.

Peft adds layers to a model and changes flags of its existing adapter layers; diffusers' offloading moves weights away
and hooks every layer. Whatever the contexts here change is restored when they end, also after an exception, so that
the user's adapters, whether loaded, disabled or fused, are afterwards as they were before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.utils import is_peft_available

ADAPTER = "dreammover_pair"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

# The flags of an adapter layer that change when another adapter is added: which adapters are active, whether adapters
# are disabled, and which adapters are fused into the weights.
_Flags = tuple[str | list[str], bool, list[str]]


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside torch.compile's wrapper, whose modules can be changed; a model without one as it is."""
    return getattr(model, "_orig_mod", model)


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
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("the pair's LoRA needs peft: pip install peft, or pass lora_steps=0") from error

    model = uncompiled(unet)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    with _restored_adapters(model) as users:
        for layer in _tuner_layers(model).values():
            layer.merged_adapters = []  # else peft would unmerge fused adapters; the base is to include them
        with torch.random.fork_rng(devices=[]):  # peft draws initial weights, which the caller overwrites
            model.add_adapter(config, adapter_name=ADAPTER)
        for name, layer in _tuner_layers(model).items():
            layer.enable_adapters(True)
            layer.set_adapter(_acting(*users[name]) if name in users else [])
        layers = {name: layer for name, layer in _tuner_layers(model).items() if ADAPTER in layer.lora_A}
        for layer in layers.values():
            layer.set_adapter([*layer.active_adapters, ADAPTER])
        model.requires_grad_(False)
        _reapply_group_offloading(model)
        yield layers


@contextmanager
def _restored_adapters(model: torch.nn.Module) -> Iterator[dict[str, _Flags]]:
    """Remove the pair's adapter at the end and restore every flag; yields the flags of the user's layers, by name."""
    users = _tuner_layers(model)
    flags = {
        name: (layer._active_adapter, layer._disable_adapters, layer.merged_adapters) for name, layer in users.items()
    }
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    had_adapters = model._hf_peft_config_loaded
    try:
        yield flags
    finally:
        _remove_adapter(model, users)
        for name, layer in users.items():
            layer._active_adapter, layer._disable_adapters, layer.merged_adapters = flags[name]
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if hasattr(model, "peft_config"):
            model.peft_config.pop(ADAPTER, None)
            if not had_adapters:
                del model.peft_config
        model._hf_peft_config_loaded = had_adapters
        _reapply_group_offloading(model)


def _remove_adapter(model: torch.nn.Module, users: dict[str, torch.nn.Module]) -> None:
    for name, layer in _tuner_layers(model).items():
        if name not in users:
            model.set_submodule(name, layer.base_layer)
        elif ADAPTER in layer.lora_A:
            layer.set_adapter([])  # else peft would activate another adapter, and warn that it does
            layer.delete_adapter(ADAPTER)


def _acting(active: str | list[str], disabled: bool, merged: list[str]) -> list[str]:
    """The user's adapters that must act unmerged: none where they are disabled or already in the weights."""
    if disabled or merged:
        return []
    return [active] if isinstance(active, str) else list(active)


def _tuner_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers of a model that peft has wrapped, by name."""
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
    model = uncompiled(model)
    require_in_memory(model)
    tuners = _tuner_layers(model) if is_peft_available() else {}
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
                plain, scale = ".".join([tuner, kind, *rest]), layer.scaling[adapter]
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
    layer = model.get_submodule(name)
    if hasattr(layer, "base_layer"):
        name, layer = f"{name}.base_layer", layer.base_layer
    return _offloaded(model, f"{name}.weight") if layer.weight.is_meta else layer.weight.data


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

    model = uncompiled(unet)
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


def load_beside(pipe, weights: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Load LoRA weights into a pipeline's UNet as an adapter that acts beside those that are already active.

    Args:
        pipe: A diffusers pipeline.
        weights: The LoRA weights, by the names that diffusers gives them in a file.
        adapter_name: A name for the adapter that no loaded adapter has.
    """
    unet = pipe.unet
    active = unet.active_adapters() if unet._hf_peft_config_loaded else []
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    unet.load_lora_adapter(weights, prefix=None, adapter_name=adapter_name, _pipeline=pipe)
    unet.set_adapter([*active, adapter_name])
    unet.requires_grad_(False)  # peft makes active adapters trainable
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
