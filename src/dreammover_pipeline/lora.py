# SPDX-License-Identifier: Apache-2.0
"""One LoRA for a pair of photos: fitted to the two of them, put on for a while, taken off without a trace.

peft does the fit's LoRA; afterwards it acts fused into the weights, so that the UNet runs at its own speed and a
compiled one is not compiled anew. What is ours is the isolation: a user's own adapters, loaded, disabled or fused, act
during the pair's as they did before, and are afterwards, like every weight, what they were to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import is_peft_available

from .ddim import recompose, v_from_eps
from .inputs import check_integer, check_number

ADAPTER = "dreammover_pair"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
FIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoraFit:
    """How a pair's LoRA is fitted. Source: DreamMover §4.1 (rank 16, 80 steps, learning rate 5e-4)."""

    steps: int  # AdamW steps on two images at random timesteps; more keeps identity better and moves less freely
    rank: int  # capacity; alpha equals rank, so a saved LoRA needs no metadata
    learning_rate: float

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("rank", self.rank, 1)
        check_number("learning_rate", self.learning_rate, 0, inclusive=False)


def fit_pair_lora(
    unet: torch.nn.Module,
    clean: torch.Tensor,
    prompt_embeds: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    fit: LoraFit,
    seed: int,
    prediction_type: str = "epsilon",
    on_step: Callable[[], None] = lambda: None,
    gradient_checkpointing: bool = False,
) -> dict[str, torch.Tensor]:
    """Fit one LoRA on the UNet's attention projections to the latents of two images or more, by noise prediction.

    Every step sees two images: the pair; of more than two, two different ones, drawn anew at every step, so that in k
    steps on n images each is seen about 2k/n times.

    The base weights stay frozen and the UNet comes back as it was. `seed` decides the result wholly: the initial
    weights, noises and timesteps are drawn on the CPU from a generator of its own, so the global one is neither read
    nor moved and every device sees the same draws. No step waits for a GPU. A compiled UNet runs uncompiled: compiling
    a backward pass takes longer than a fit. A group-offloaded one is wholly on the device meanwhile.

    Source: DreamMover §3.4 and §4.1. Official code differs: it encodes and crops the images anew at every step.

    Args:
        unet: a `UNet2DConditionModel`, in float32, float16 or bfloat16.
        clean: z_0 of the n images, (n, C, h, w), n at least 2.
        prompt_embeds: one per image, (n, L, D).
        alphas_cumprod: ᾱ at every trained timestep, (T,).
        fit: steps, rank, learning rate.
        seed: any integer.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        on_step: called after each step.
        gradient_checkpointing: compute activations again for the backward pass instead of keeping them: about a
            quarter of the memory, four thirds of the time, the same result.

    Returns:
        The weights, by diffusers' names ("….to_q.lora_A.weight" (r, in), "….lora_B.weight" (out, r)), in float32.

    Raises:
        ValueError: the UNet is offloaded or quantised so that it cannot be trained through.
        RuntimeError: the fit diverged.
    """
    _check_trainable(unet)
    generator = torch.Generator("cpu").manual_seed(seed)
    device, dtype = clean.device, unet.dtype
    alphas_cumprod = alphas_cumprod.to(device)

    def moved(draw: torch.Tensor) -> torch.Tensor:
        # only from pinned memory does a copy to a GPU not halt the host
        return draw.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draw.to(device)

    with (
        # The caller may be in no_grad or inference_mode; tensors made there cannot be trained through, copies can.
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        _without_group_offloading(unet, resident=True),
        _isolated_adapter(unet, fit.rank) as layers,
        _checkpointing(unet, gradient_checkpointing),
    ):
        clean, prompt_embeds = clean.clone(), prompt_embeds.to(dtype).clone()
        parameters = _initialise(layers, generator)
        # the fused one knows without asking the device whether the scaler saw an overflow
        optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, fused=True)
        # float16 gradients underflow unscaled
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype == torch.float16)
        images, texts = clean, prompt_embeds
        for _ in range(fit.steps):
            if len(clean) > 2:
                drawn = moved(torch.randperm(len(clean), generator=generator)[:2])
                images, texts = clean[drawn], prompt_embeds[drawn]
            timesteps = moved(torch.randint(len(alphas_cumprod), (2,), generator=generator))
            noise = moved(torch.randn(images.shape, generator=generator)).to(images.dtype)
            noisy = recompose(images, noise, alphas_cumprod[timesteps])
            target = noise
            if prediction_type == "v_prediction":
                target = v_from_eps(images, noise, alphas_cumprod[timesteps])
            predicted = unet(noisy.to(dtype), timesteps, texts, return_dict=False)[0]
            loss = F.mse_loss(predicted.to(target.dtype), target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            on_step()
        weights = _read_weights(layers)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise RuntimeError(
            f"the LoRA fit diverged in {dtype} at learning rate {fit.learning_rate}; "
            "lower lora_learning_rate, or load the model in bfloat16 or float32"
        )
    return weights


@contextmanager
def pair_lora(unet: torch.nn.Module, weights: dict[str, torch.Tensor] | None, scale: float) -> Iterator[None]:
    """Have a fitted LoRA act on the UNet while the context lasts, beside whatever adapters the user has.

    Args:
        unet: the UNet it was fitted on.
        weights: what `fit_pair_lora` returned; None leaves the UNet as it is.
        scale: multiplies the LoRA's effect; 1 is what was fitted.
    """
    if weights is None:
        yield
        return
    stored = {parameter.dtype for parameter in unet.parameters()}
    with _fused(unet, weights, scale) if stored <= set(FIT_DTYPES) else _adapted(unet, weights, scale):
        yield


@contextmanager
def _fused(unet: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """W + scale · B A in the place of W, computed in float32."""
    model = getattr(unet, "_orig_mod", unet)
    _require_in_memory(model)
    originals = {}
    try:
        with _without_group_offloading(model):
            for name in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
                weight = _base_weight(model, name)
                wide = torch.promote_types(weight.dtype, torch.float32)
                down, up = (weights[f"{name}.lora_{part}.weight"].to(weight.device, wide) for part in "AB")
                originals[name] = weight.clone()
                weight.copy_(weight.to(wide) + scale * (up @ down))
        yield
    finally:
        with _without_group_offloading(model):
            for name, original in originals.items():
                _base_weight(model, name).copy_(original)


@contextmanager
def _adapted(unet: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """The LoRA beside weights that are stored too coarsely to hold it."""
    rank = next(weight.shape[0] for name, weight in weights.items() if "lora_A" in name)
    with _isolated_adapter(unet, rank) as layers:
        for name, parameter in _weights(layers).items():
            parameter.data = weights[name].to(parameter.device)  # peft makes it as coarse as the layer's own
        for layer in layers.values():
            layer.set_scale(ADAPTER, scale)
        yield


def _base_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor, wherever it is kept, that holds a layer's weight below a user's adapters."""
    layer = model.get_submodule(name)
    if hasattr(layer, "base_layer"):
        name, layer = f"{name}.base_layer", layer.base_layer
    return _offloaded(model, f"{name}.weight") if layer.weight.is_meta else layer.weight.data


def check_pair_lora(unet: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raise unless these are LoRA weights that fit a UNet: every name there is, none else, and one rank throughout.

    Args:
        unet: the UNet they are to act on; a user's adapters on it do not matter.
        weights: as `fit_pair_lora` returns them.

    Raises:
        TypeError: not a dict of floating point tensors.
        ValueError: a weight is missing, unknown, or of a shape that does not fit.
    """
    if not isinstance(weights, dict):
        raise TypeError(f"`lora` must be a dict of tensors, not {type(weights).__name__}")
    model = getattr(unet, "_orig_mod", unet)
    sides = {}  # the length of every weight's other side, which is not the rank
    for name, layer in model.named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            base = getattr(layer, "base_layer", layer)
            sides[f"{name}.lora_A.weight"], sides[f"{name}.lora_B.weight"] = base.in_features, base.out_features
    for verb, names in (("lacks", sides.keys() - weights.keys()), ("has an unknown", weights.keys() - sides.keys())):
        if names:
            raise ValueError(f"`lora` does not fit this UNet: it {verb} {min(names)!r}, one of {len(names)}")
    rank = None
    for name, side in sides.items():
        weight = weights[name]
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise TypeError(f"`lora` must hold floating point tensors, but {name!r} is none")
        rank = rank or max(weight.numel() // side, 1)
        shape = (rank, side) if "lora_A" in name else (side, rank)
        if tuple(weight.shape) != shape:
            raise ValueError(f"`lora` does not fit this UNet: {name!r} must be {shape}, not {tuple(weight.shape)}")


def acting_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, float]]:
    """The tensors that decide what a model computes: its own, and those of the adapters that act on it.

    An adapter acts while it is active, enabled and not fused; a fused one is in the model's own tensors already. What
    only wraps a model (layers of adapters, torch.compile) does not show in the names, nor do the names of adapters.

    Args:
        model: any model, offloaded or not.

    Yields:
        Name, tensor (a parameter or a persistent buffer), and weight: an adapter's scale, 1 for the model's own.

    Raises:
        ValueError: the model's tensors are on disk, or nowhere.
    """
    model = getattr(model, "_orig_mod", model)
    _require_in_memory(model)
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


def _check_trainable(unet: torch.nn.Module) -> None:
    _require_in_memory(unet)
    if any(parameter.is_meta for parameter in unet.parameters()):
        raise ValueError(
            "a LoRA cannot be fitted while the UNet is offloaded layer by layer (enable_sequential_cpu_offload); "
            "use enable_model_cpu_offload(), or pass lora_steps=0"
        )
    stored = {parameter.dtype for parameter in unet.parameters()}
    if not stored <= set(FIT_DTYPES):
        raise ValueError(
            f"a LoRA cannot be fitted on a UNet stored in {sorted(map(str, stored))}; "
            "load it in float32, float16 or bfloat16, or pass lora_steps=0"
        )


def _require_in_memory(model: torch.nn.Module) -> None:
    """Group offloading to disk leaves uninitialised tensors behind, which must not be taken for the weights."""
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    hook = _get_top_level_group_offload_hook(model)
    if hook is not None and hook.config.offload_to_disk_path is not None:
        raise ValueError(
            f"the weights of {type(model).__name__} are offloaded to disk and cannot be read there; "
            "enable group offloading without `offload_to_disk_path`"
        )


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A tensor that accelerate keeps elsewhere while the model is not running (enable_sequential_cpu_offload)."""
    owner, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "weights_map", None) is not None:
            return part.weights_map[leaf]
    raise ValueError(f"{type(model).__name__} has no weights: its {name!r} is on the meta device")


def _initialise(layers: dict[str, torch.nn.Module], generator: torch.Generator) -> list[torch.nn.Parameter]:
    """A gaussian of deviation 1/r, B zero, both float32 and trainable; returns them."""
    parameters = _weights(layers)
    for name, parameter in parameters.items():
        parameter.data = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[0])
        parameter.requires_grad_(True)
    return list(parameters.values())


def _weights(layers: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }


def _read_weights(layers: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _weights(layers).items()}


def _tuner_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def _isolated_adapter(unet: torch.nn.Module, rank: int) -> Iterator[dict[str, torch.nn.Module]]:
    """Add a LoRA that acts beside the user's adapters; afterwards the UNet's modules and flags are what they were.

    Yields the layers that carry it, by name. All parameters are frozen meanwhile.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("the pair's LoRA needs peft: pip install peft, or pass lora_steps=0") from error

    model = getattr(unet, "_orig_mod", unet)  # torch.compile(unet) wraps the model whose modules change
    users = _tuner_layers(model)
    saved = {
        name: (layer._active_adapter, layer._disable_adapters, layer.merged_adapters) for name, layer in users.items()
    }
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    had_adapters = model._hf_peft_config_loaded
    try:
        for layer in users.values():
            layer.merged_adapters = []  # peft would unmerge them; as they are, the fused weights serve as the base
        with torch.random.fork_rng(devices=[]):  # peft draws initial weights that are overwritten
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
            model.add_adapter(config, adapter_name=ADAPTER)
        for name, layer in _tuner_layers(model).items():
            layer.enable_adapters(True)
            layer.set_adapter(_acting(*saved[name]) if name in saved else [])
        layers = {name: layer for name, layer in _tuner_layers(model).items() if ADAPTER in layer.lora_A}
        for layer in layers.values():
            layer.set_adapter([*layer.active_adapters, ADAPTER])
        model.requires_grad_(False)
        _reapply_group_offloading(model)
        yield layers
    finally:
        _remove_adapter(model, users)
        for name, layer in users.items():
            layer._active_adapter, layer._disable_adapters, layer.merged_adapters = saved[name]
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        if hasattr(model, "peft_config"):
            model.peft_config.pop(ADAPTER, None)
            if not had_adapters:
                del model.peft_config
        model._hf_peft_config_loaded = had_adapters
        _reapply_group_offloading(model)


def _acting(active: str | list[str], disabled: bool, merged: list[str]) -> list[str]:
    """The user's adapters that must act unmerged: none where they are disabled or already in the weights."""
    if disabled or merged:
        return []
    return [active] if isinstance(active, str) else list(active)


def _remove_adapter(model: torch.nn.Module, users: dict[str, torch.nn.Module]) -> None:
    for name, layer in _tuner_layers(model).items():
        if name not in users:
            model.set_submodule(name, layer.base_layer)
        elif ADAPTER in layer.lora_A:
            layer.set_adapter([])  # so that peft does not choose, and announce, another one
            layer.delete_adapter(ADAPTER)


@contextmanager
def _checkpointing(unet: torch.nn.Module, wanted: bool) -> Iterator[None]:
    model = getattr(unet, "_orig_mod", unet)
    if not wanted or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


@contextmanager
def _without_group_offloading(unet: torch.nn.Module, resident: bool = False) -> Iterator[None]:
    """Group offloading pauses: its copies of the weights are made anew afterwards, and a backward pass, for which it
    would not bring any, finds them on the device if they are to be `resident`.
    """
    from diffusers.hooks import group_offloading as offloading

    model = getattr(unet, "_orig_mod", unet)
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
    """Group offloading hooks every layer it finds: let it find the new ones, and forget the ones that are gone."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    _maybe_remove_and_reapply_group_offloading(model)
