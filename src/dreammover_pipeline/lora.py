# SPDX-License-Identifier: Apache-2.0
"""One LoRA for a pair of photos: it is fitted to both, acts on the UNet for a while, and is removed without a trace.

During the fit, peft carries the LoRA. Afterwards it acts fused into the weights, so that the UNet runs at its usual
speed and a compiled UNet is not compiled again. `adapters.py` keeps the LoRA apart from the user's own adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .adapters import (
    ADAPTER,
    TARGETS,
    adapter_weights,
    base_weight,
    isolated_adapter,
    require_in_memory,
    unwrapped,
    without_group_offloading,
)
from .attention import separate_projections
from .captured import TrainingStep, only_kernels, replayed
from .ddim import recompose, v_from_eps
from .inputs import check_integer, check_number
from .repeatable import repeatable_attention
from .turns import interruptible

FIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoraFit:
    """How a pair's LoRA is fitted. Source: DreamMover §4.1 (rank 16, 80 steps, learning rate 5e-4)."""

    steps: int  # AdamW steps on two images at random timesteps; more keeps identity better and motion less free
    rank: int  # the LoRA's rank; its alpha equals the rank, so a saved LoRA needs no metadata
    learning_rate: float  # the learning rate of AdamW; a fit that diverges needs a lower one

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

    The base weights stay frozen, and the UNet is afterwards as it was before. `seed` alone decides the result:
    everything random is drawn from a CPU generator of the fit's own, so the global generator is neither used nor
    changed, and the draws are the same on every device. No step waits for a GPU. A compiled UNet runs uncompiled,
    because compiling a backward pass takes longer than a fit. A group-offloaded UNet is wholly on the device during
    the fit.

    Source: DreamMover §3.4 and §4.1. Official code differs: it encodes and crops the images anew at every step.

    Args:
        unet: A `UNet2DConditionModel` in float32, float16 or bfloat16.
        clean: The clean latents z_0 of n images, (n, C, h, w), n at least 2. Every step uses two of the images.
        prompt_embeds: The embedded prompt of each image, (n, L, D).
        alphas_cumprod: ᾱ at every trained timestep, (T,).
        fit: The number of steps, the rank and the learning rate of the fit.
        seed: Any integer; it decides the initial weights, and the images, timesteps and noise of every step.
        prediction_type: What the UNet predicts, "epsilon" or "v_prediction".
        on_step: Function called after each step.
        gradient_checkpointing: Whether activations are computed again for the backward pass instead of being kept,
            which takes about a quarter of the memory and four thirds of the time, and gives the same result.

    Returns:
        The LoRA weights in float32, by the names that diffusers gives them in a file: "….to_q.lora_A.weight" (r, in),
        "….to_q.lora_B.weight" (out, r), and so on.

    Raises:
        ValueError: The UNet is offloaded or quantised in a way that gradients cannot pass through.
        RuntimeError: The fit diverged.
    """
    _check_trainable(unet)
    generator = torch.Generator("cpu").manual_seed(seed)
    device, dtype = clean.device, unet.dtype
    alphas_cumprod = alphas_cumprod.to(device)
    # A backward pass that is checkpointed runs modules again from the host.
    checkpointed = gradient_checkpointing or unwrapped(unet).is_gradient_checkpointing
    recorded = device.type == "cuda" and not checkpointed and only_kernels(unet)
    repeated = repeatable_attention(unet) if device.type == "cuda" else nullcontext()
    with (
        # The caller may be in no_grad or inference_mode. Tensors made there cannot be trained through; copies can.
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        without_group_offloading(unet, resident=True),
        separate_projections(unet),
        isolated_adapter(unet, fit.rank) as layers,
        _checkpointing(unet, gradient_checkpointing),
        repeated,
    ):
        clean, prompt_embeds = clean.clone(), prompt_embeds.to(dtype).clone()
        parameters = _initialise(layers, generator)
        # Fused AdamW skips a step that overflowed without the CPU waiting for the GPU to report the overflow.
        optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, fused=True, capturable=recorded)
        # Without a scaled loss, float16 gradients underflow.
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype == torch.float16)
        inputs = StepInputs.like(clean, prompt_embeds)
        loss = partial(_prediction_loss, unet, inputs, alphas_cumprod, prediction_type)
        step = TrainingStep(loss, parameters, optimizer, scaler)
        with interruptible():
            for number in range(fit.steps):
                inputs.draw(clean, prompt_embeds, len(alphas_cumprod), generator)
                if recorded and number == 0:
                    step = replayed(step, dtype)
                step()
                on_step()
        weights = {name: parameter.detach().clone() for name, parameter in adapter_weights(layers).items()}
    _check_converged(weights, dtype, fit.learning_rate)
    return weights


def _check_converged(weights: dict[str, torch.Tensor], dtype: torch.dtype, learning_rate: float) -> None:
    """Raise RuntimeError unless all fitted weights are finite."""
    if not all(weight.isfinite().all() for weight in weights.values()):
        remedy = "lower `lora_learning_rate`"
        if dtype == torch.float16:
            remedy += ", or load the model in bfloat16 or float32"
        raise RuntimeError(f"the LoRA fit diverged in {dtype} at learning rate {learning_rate}; {remedy}")


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a step is taken on: two images (2, C, h, w), their texts (2, L, D), timesteps (2,) and noise (2, C, h, w).

    The tensors keep their places, and every step fills them anew.
    """

    images: torch.Tensor
    texts: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def like(cls, clean: torch.Tensor, prompt_embeds: torch.Tensor) -> StepInputs:
        """Places for two of the images."""
        timesteps = torch.zeros(2, dtype=torch.long, device=clean.device)
        return cls(clean[:2].clone(), prompt_embeds[:2].clone(), timesteps, torch.empty_like(clean[:2]))

    def draw(
        self, clean: torch.Tensor, prompt_embeds: torch.Tensor, trained_steps: int, generator: torch.Generator
    ) -> None:
        """Draw what the next step is taken on.

        Of more than two images, every step draws two different ones, so that k steps use each of n images about 2k/n
        times.
        """
        device = self.images.device
        if len(clean) > 2:
            drawn = _placed(torch.randperm(len(clean), generator=generator, device="cpu")[:2], device)
            self.images.copy_(clean[drawn])
            self.texts.copy_(prompt_embeds[drawn])
        self.timesteps.copy_(_placed(torch.randint(trained_steps, (2,), generator=generator, device="cpu"), device))
        self.noise.copy_(_placed(_drawn(self.noise.shape, generator), device))


def _prediction_loss(
    unet: torch.nn.Module, inputs: StepInputs, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The mean squared error of the UNet's prediction, which is run in the precision of the texts."""
    images, noise = inputs.images, inputs.noise
    alpha_bar = alphas_cumprod[inputs.timesteps]
    target = v_from_eps(images, noise, alpha_bar) if prediction_type == "v_prediction" else noise
    noisy = recompose(images, noise, alpha_bar)
    predicted = unet(noisy.to(inputs.texts.dtype), inputs.timesteps, inputs.texts, return_dict=False)[0]
    return F.mse_loss(predicted.to(target.dtype), target)


def _drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values from a Gaussian, float32 on the CPU, whatever torch's default dtype and default device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _placed(draw: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move values drawn on the CPU to a device; to a GPU from pinned memory, so that the CPU need not wait."""
    return draw.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draw.to(device)


def _initialise(layers: dict[str, torch.nn.Module], generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Draw the LoRA's A from a Gaussian of standard deviation 1/r and set B to zero, both in float32 and trainable."""
    parameters = adapter_weights(layers)
    for name, parameter in parameters.items():
        parameter.data = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if "lora_A" in name:
            parameter.data.copy_(_drawn(parameter.shape, generator) / parameter.shape[0])
        parameter.requires_grad_(True)
    return list(parameters.values())


@contextmanager
def _checkpointing(unet: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Switch gradient checkpointing of the UNet on while the context lasts, if wanted and not already on."""
    model = unwrapped(unet)
    if not wanted or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def _check_trainable(unet: torch.nn.Module) -> None:
    """Raise ValueError unless gradients can pass through the UNet: weights in memory, and in one of `FIT_DTYPES`."""
    require_in_memory(unet)
    if any(parameter.is_meta for parameter in unet.parameters()):
        raise ValueError(
            "a LoRA cannot be fitted while the UNet is offloaded layer by layer (enable_sequential_cpu_offload); "
            "use enable_model_cpu_offload(), or pass lora_steps=0"
        )
    if any(parameter.is_inference() for parameter in unet.parameters()):
        raise ValueError(
            "a LoRA cannot be fitted on a UNet whose weights or adapters were loaded inside torch.inference_mode(); "
            "load them outside of it, or pass lora_steps=0"
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
        unet: The UNet that the LoRA was fitted on.
        weights: The LoRA weights that `fit_pair_lora` returned; None leaves the UNet as it is.
        scale: Factor that multiplies the LoRA's effect; 1 gives the effect that was fitted.
    """
    if weights is None:
        yield
        return
    stored = {parameter.dtype for parameter in unet.parameters()}
    acting = _fused if stored <= set(FIT_DTYPES) else _adapted
    with separate_projections(unet), acting(unet, weights, scale):
        yield


@contextmanager
def _fused(unet: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """Replace every weight W that the LoRA acts on by W + scale · B A, computed at least in float32."""
    model = unwrapped(unet)
    require_in_memory(model)
    originals = {}
    try:
        with without_group_offloading(model):
            for name in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
                weight = base_weight(model, name)
                wide = torch.promote_types(weight.dtype, torch.float32)
                down, up = (weights[f"{name}.lora_{part}.weight"].to(weight.device, wide) for part in "AB")
                originals[name] = weight.clone()
                _overwrite(weight, weight.to(wide) + scale * (up @ down))
        yield
    finally:
        with without_group_offloading(model):
            for name, original in originals.items():
                _overwrite(base_weight(model, name), original)


def _overwrite(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Put values into a model's weight, also where the model was loaded in inference mode."""
    with torch.inference_mode():
        weight.copy_(values)


@contextmanager
def _adapted(unet: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> Iterator[None]:
    """Have the LoRA act as an adapter beside the weights, which are stored too coarsely (quantised) to be changed."""
    rank = next(weight.shape[0] for name, weight in weights.items() if "lora_A" in name)
    with isolated_adapter(unet, rank) as layers:
        for name, parameter in adapter_weights(layers).items():
            parameter.data = weights[name].to(parameter.device)  # peft's own parameter is as coarse as the layer's
        for layer in layers.values():
            layer.set_scale(ADAPTER, scale)
        yield


def check_pair_lora(unet: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raise unless LoRA weights fit a UNet: they have exactly the names that it needs, and all have the same rank.

    Args:
        unet: The UNet that the LoRA is to act on; a user's adapters on it do not matter.
        weights: LoRA weights in the form in which `fit_pair_lora` returns them.

    Raises:
        TypeError: The weights are not a dict of floating point tensors.
        ValueError: A weight is missing, is unknown, has a shape that does not fit, or is not finite.
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
            raise TypeError(f"`lora` must hold floating point tensors, but {name!r} is not one")
        rank = rank or max(weight.numel() // side, 1)
        shape = (rank, side) if "lora_A" in name else (side, rank)
        if tuple(weight.shape) != shape:
            raise ValueError(f"`lora` does not fit this UNet: {name!r} must be {shape}, not {tuple(weight.shape)}")
        if not weight.isfinite().all():
            raise ValueError(f"`lora` must hold finite numbers, but {name!r} has others")


def _sides(unet: torch.nn.Module) -> dict[str, int]:
    """The length of the axis of each LoRA weight that is not the rank, by the weight's name."""
    sides = {}
    for name, layer in unwrapped(unet).named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            base = getattr(layer, "base_layer", layer)
            sides[f"{name}.lora_A.weight"], sides[f"{name}.lora_B.weight"] = base.in_features, base.out_features
    return sides
