# SPDX-License-Identifier: Apache-2.0
"""One LoRA for a pair of photos: fitted to the two of them, put on for a while, taken off without a trace.

During the fit peft carries the LoRA; afterwards it acts fused into the weights, so that the UNet runs at its own speed
and a compiled one is not compiled anew. What keeps it apart from the user's own adapters is in `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .adapters import (
    ADAPTER,
    TARGETS,
    adapter_weights,
    base_weight,
    isolated_adapter,
    require_in_memory,
    uncompiled,
    without_group_offloading,
)
from .ddim import recompose, v_from_eps
from .inputs import check_integer, check_number

FIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoraFit:
    """How a pair's LoRA is fitted. Source: DreamMover §4.1 (rank 16, 80 steps, learning rate 5e-4)."""

    steps: int  # AdamW steps on two images at random timesteps; more keeps identity better and moves less freely
    rank: int  # capacity; alpha equals rank, so a saved LoRA needs no metadata
    learning_rate: float  # AdamW's learning rate; a fit that diverges needs a lower one

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_integer("rank", self.rank, 1)
        check_number("learning_rate", self.learning_rate, 0, inclusive=False)


# ── The fit ────────────────────────────────────────────────────────────────────────────────────────────────────────


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

    The base weights stay frozen and the UNet comes back as it was. `seed` decides the result wholly: everything random
    is drawn on the CPU from a generator of its own, so the global one is neither read nor moved and every device sees
    the same draws. No step waits for a GPU. A compiled UNet runs uncompiled: compiling a backward pass takes longer
    than a fit. A group-offloaded UNet is wholly on the device during the fit.

    Source: DreamMover §3.4 and §4.1. Official code differs: it encodes and crops the images anew at every step.

    Args:
        unet: a `UNet2DConditionModel`, in float32, float16 or bfloat16.
        clean: z_0 of the n images, (n, C, h, w), n at least 2. Every step sees two of them.
        prompt_embeds: the embedded prompt of each image, (n, L, D).
        alphas_cumprod: ᾱ at every trained timestep, (T,).
        fit: the number of steps, the rank and the learning rate.
        seed: any integer.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        on_step: called after each step.
        gradient_checkpointing: compute activations again for the backward pass instead of keeping them: about a
            quarter of the memory, four thirds of the time, the same result.

    Returns:
        The weights in float32, by diffusers' names: "….to_q.lora_A.weight" (r, in), "….to_q.lora_B.weight" (out, r).

    Raises:
        ValueError: the UNet is offloaded or quantised so that it cannot be trained through.
        RuntimeError: the fit diverged.
    """
    _check_trainable(unet)
    generator = torch.Generator("cpu").manual_seed(seed)
    device, dtype = clean.device, unet.dtype
    alphas_cumprod = alphas_cumprod.to(device)
    with (
        # The caller may be in no_grad or inference_mode; tensors made there cannot be trained through, copies can.
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        without_group_offloading(unet, resident=True),
        isolated_adapter(unet, fit.rank) as layers,
        _checkpointing(unet, gradient_checkpointing),
    ):
        clean, prompt_embeds = clean.clone(), prompt_embeds.to(dtype).clone()
        parameters = _initialise(layers, generator)
        # the fused one knows without asking the device whether the scaler saw an overflow
        optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, fused=True)
        # float16 gradients underflow unscaled
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype == torch.float16)
        for _ in range(fit.steps):
            images, texts = _draw_two(clean, prompt_embeds, generator)
            loss = _prediction_loss(unet, images, texts, alphas_cumprod, prediction_type, generator)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            on_step()
        weights = {name: parameter.detach().clone() for name, parameter in adapter_weights(layers).items()}
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise RuntimeError(
            f"the LoRA fit diverged in {dtype} at learning rate {fit.learning_rate}; "
            "lower lora_learning_rate, or load the model in bfloat16 or float32"
        )
    return weights


def _draw_two(
    clean: torch.Tensor, prompt_embeds: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and texts that a step sees: the pair, or of more than two images two different ones, drawn anew.

    So in k steps on n images each is seen about 2k/n times.
    """
    if len(clean) == 2:
        return clean, prompt_embeds
    drawn = _placed(torch.randperm(len(clean), generator=generator)[:2], clean.device)
    return clean[drawn], prompt_embeds[drawn]


def _prediction_loss(
    unet: torch.nn.Module,
    images: torch.Tensor,
    texts: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    generator: torch.Generator,
) -> torch.Tensor:
    """The mean squared error of what the UNet predicts for two images, timesteps and noises being drawn.

    The UNet is run in the precision of `texts`.
    """
    timesteps = _placed(torch.randint(len(alphas_cumprod), (2,), generator=generator), images.device)
    noise = _placed(torch.randn(images.shape, generator=generator), images.device).to(images.dtype)
    alpha_bar = alphas_cumprod[timesteps]
    target = v_from_eps(images, noise, alpha_bar) if prediction_type == "v_prediction" else noise
    noisy = recompose(images, noise, alpha_bar)
    predicted = unet(noisy.to(texts.dtype), timesteps, texts, return_dict=False)[0]
    return F.mse_loss(predicted.to(target.dtype), target)


def _placed(draw: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What was drawn on the CPU, on a device; only from pinned memory does a copy to a GPU not halt the host."""
    return draw.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draw.to(device)


def _initialise(layers: dict[str, torch.nn.Module], generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Make A a gaussian of deviation 1/r and B zero, both float32 and trainable; returns all of them."""
    parameters = adapter_weights(layers)
    for name, parameter in parameters.items():
        parameter.data = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[0])
        parameter.requires_grad_(True)
    return list(parameters.values())


@contextmanager
def _checkpointing(unet: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Have the UNet compute activations again in a backward pass, if wanted and not so already."""
    model = uncompiled(unet)
    if not wanted or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def _check_trainable(unet: torch.nn.Module) -> None:
    """Raise unless gradients can pass through the UNet: its weights must be at hand, and in a precision of floats."""
    require_in_memory(unet)
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


# ── In effect ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def pair_lora(unet: torch.nn.Module, weights: dict[str, torch.Tensor] | None, scale: float) -> Iterator[None]:
    """Have a fitted LoRA act on the UNet while the context lasts, beside whatever adapters the user has.

    Args:
        unet: the UNet that the LoRA was fitted on.
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
    """Put W + scale · B A, computed in float32 at least, in the place of every W that the LoRA acts on."""
    model = uncompiled(unet)
    require_in_memory(model)
    originals = {}
    try:
        with without_group_offloading(model):
            for name in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
                weight = base_weight(model, name)
                wide = torch.promote_types(weight.dtype, torch.float32)
                down, up = (weights[f"{name}.lora_{part}.weight"].to(weight.device, wide) for part in "AB")
                originals[name] = weight.clone()
                weight.copy_(weight.to(wide) + scale * (up @ down))
        yield
    finally:
        with without_group_offloading(model):
            for name, original in originals.items():
                base_weight(model, name).copy_(original)


@contextmanager
def _adapted(unet: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """Put the LoRA beside weights that are stored too coarsely to hold it."""
    rank = next(weight.shape[0] for name, weight in weights.items() if "lora_A" in name)
    with isolated_adapter(unet, rank) as layers:
        for name, parameter in adapter_weights(layers).items():
            parameter.data = weights[name].to(parameter.device)  # peft makes it as coarse as the layer's own
        for layer in layers.values():
            layer.set_scale(ADAPTER, scale)
        yield


def check_pair_lora(unet: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raise unless these are LoRA weights that fit a UNet: every name there is, none else, and one rank throughout.

    Args:
        unet: the UNet that the LoRA is to act on; a user's adapters on it do not matter.
        weights: LoRA weights, in the form in which `fit_pair_lora` returns them.

    Raises:
        TypeError: the weights are not a dict of floating point tensors.
        ValueError: a weight is missing, unknown, or of a shape that does not fit.
    """
    if not isinstance(weights, dict):
        raise TypeError(f"`lora` must be a dict of tensors, not {type(weights).__name__}")
    sides = _sides(unet)
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


def _sides(unet: torch.nn.Module) -> dict[str, int]:
    """The length of each LoRA weight along the side that is not the rank, by the weight's name."""
    sides = {}
    for name, layer in uncompiled(unet).named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            base = getattr(layer, "base_layer", layer)
            sides[f"{name}.lora_A.weight"], sides[f"{name}.lora_B.weight"] = base.in_features, base.out_features
    return sides
