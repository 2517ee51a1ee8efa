# SPDX-License-Identifier: Apache-2.0
"""One LoRA for a pair of photos: it is fitted to both, acts on the UNet for a while, and is removed without a trace.

It acts in the UNet's weights, in the fit too, where they are computed anew from A and B at every step. So the UNet
runs at its usual speed, a compiled UNet is not compiled again, and the user's own adapters stay as they are. Only
where weights are stored too coarsely to be changed it is an adapter, which `adapters.py` keeps apart from the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .adapters import (
    ADAPTER,
    TARGETS,
    adapter_weights,
    base_layer,
    base_weight,
    isolated_adapter,
    require_in_memory,
    unmerge_disabled,
    unwrapped,
    without_group_offloading,
)
from .attention import separate_projections
from .flow import exact_matmul
from .inputs import check_integer, check_number
from .noise_training import FIT_DTYPES, NoiseTraining, gaussian, require_converged


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
    cross_attention_kwargs: dict | None = None,
) -> dict[str, torch.Tensor]:
    """Fit one LoRA on the UNet's attention projections to the latents of two images or more, by noise prediction.

    The UNet's own weights stay frozen, and the UNet is afterwards as it was before. `seed` alone decides the result:
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
        cross_attention_kwargs: Keyword arguments for the attention processors; "scale" scales every LoRA.

    Returns:
        The LoRA weights in float32, by the names that diffusers gives them in a file: "….to_q.lora_A.weight" (r, in),
        "….to_q.lora_B.weight" (out, r), and so on.

    Raises:
        ValueError: The UNet is offloaded or quantised in a way that gradients cannot pass through.
        RuntimeError: The fit diverged.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    dtype = unet.dtype
    training = NoiseTraining(
        unet, clean, alphas_cumprod, prediction_type, gradient_checkpointing, cross_attention_kwargs
    )
    with training.ready(), separate_projections(unet):
        texts = prompt_embeds.to(dtype).clone()
        lora = TrainedLora(unet, fit.rank, generator, training.lora_scale)
        parameters = list(lora.weights.values())
        try:
            training.descend(
                parameters, lambda drawn: [texts[drawn]], fit.steps, fit.learning_rate, generator, on_step, lora.act
            )
        finally:
            lora.remove()
    fitted = {name: weight.detach() for name, weight in lora.weights.items()}
    require_converged(fitted.values(), dtype, "the LoRA fit", "lora_learning_rate", fit.learning_rate)
    return fitted


class TrainedLora:
    """A LoRA that is trained on a UNet's attention projections, and acts in their weights.

    A is drawn from a Gaussian of standard deviation 1/rank, and B is zero; `weights` are both of every layer, by the
    names that diffusers gives them in a file, in float32.

    Args:
        unet: The UNet, whose own weights take no gradients.
        rank: The rank of the LoRA.
        generator: A CPU generator, from which A is drawn.
        scale: Factor that multiplies the LoRA's effect.
    """

    def __init__(self, unet: torch.nn.Module, rank: int, generator: torch.Generator, scale: float = 1.0):
        self.scale, self.weights = scale, {}
        self._layers = _projections(unet)
        for name, layer in self._layers.items():
            weight = layer.weight
            height, width = weight.shape
            down = gaussian(torch.Size((rank, width)), generator) / rank
            up = torch.zeros(height, rank, dtype=torch.float32, device="cpu")
            for part, value in (("A", down), ("B", up)):
                self.weights[f"{name}.lora_{part}.weight"] = torch.nn.Parameter(value.to(weight.device))

    def act(self) -> None:
        """Have the layers compute with W + scale · B A, as A and B are now; gradients pass through to A and B."""
        with exact_matmul(next(iter(self.weights.values())).device.type):
            for name, layer in self._layers.items():
                # What the step before made goes first; else its gradients' graph would go on as a part of this step's.
                vars(layer).pop("weight", None)
                down, up = (self.weights[f"{name}.lora_{part}.weight"] for part in "AB")
                # An attribute of this name is found before the layer's parameter, which stays what and where it is;
                # and it stays for the backward pass, which may compute activations again.
                vars(layer)["weight"] = _with_lora(layer._parameters["weight"], down, up, self.scale)

    def remove(self) -> None:
        """Give the layers their own weights back."""
        for layer in self._layers.values():
            vars(layer).pop("weight", None)


def _projections(unet: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The layers of a UNet that a pair's LoRA acts on, without the user's adapters, by their names in the UNet."""
    model = unwrapped(unet)
    names = [name for name, _ in model.named_modules() if name.endswith(tuple(f".{target}" for target in TARGETS))]
    return {name: base_layer(model, name)[1] for name in names}


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
    """Replace every weight that the LoRA acts on by `_with_lora`."""
    model = unwrapped(unet)
    require_in_memory(model)
    unmerge_disabled(model)
    originals = {}
    try:
        with without_group_offloading(model):
            for name in (name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")):
                weight = base_weight(model, name)
                down, up = (weights[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
                with exact_matmul(weight.device.type):
                    changed = _with_lora(weight, down, up, scale)
                originals[name] = weight.clone()
                _overwrite(weight, changed)
        yield
    finally:
        with without_group_offloading(model):
            for name, original in originals.items():
                _overwrite(base_weight(model, name), original)


def _with_lora(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale · B A of a weight W, `down` being A and `up` B, in W's precision, computed at least in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.add(weight, up.to(wide) @ down.to(wide), alpha=scale).to(weight.dtype)


def _overwrite(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Put values into a model's weight, also where the model was loaded in inference mode."""
    with torch.inference_mode():
        weight.copy_(values)
    # Inside of a caller's autocast, torch would go on with copies in lower precision that it made of the old values.
    torch.clear_autocast_cache()


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
    for name, layer in _projections(unet).items():
        sides[f"{name}.lora_A.weight"], sides[f"{name}.lora_B.weight"] = layer.in_features, layer.out_features
    return sides
