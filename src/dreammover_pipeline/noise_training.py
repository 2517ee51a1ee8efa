# SPDX-License-Identifier: Apache-2.0
"""Training of a few weights, on a UNet that stays as it is, so that it predicts the noise in two photos better.

The weights are a LoRA's (`lora.py`) or those of text embeddings (`embeddings.py`). The seed alone decides the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .adapters import (
    gradient_flags_kept,
    require_in_memory,
    scaled_adapters,
    unmerge_disabled,
    unwrapped,
    without_group_offloading,
)
from .captured import TrainingStep, only_kernels, replayed
from .ddim import recompose, v_from_eps
from .repeatable import repeatable_attention, repeatable_convolutions
from .turns import interruptible

FIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a step is taken on: the indices of two images (2,), a timestep of each (2,) and noise (2, C, h, w).

    The tensors keep their places, and every step fills them anew.
    """

    drawn: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def like(cls, clean: torch.Tensor) -> StepInputs:
        """Places for two of the images (n, C, h, w)."""
        drawn = torch.arange(2, device=clean.device)
        return cls(drawn, torch.zeros_like(drawn), torch.empty_like(clean[:2]))

    def draw(self, images: int, trained_steps: int, generator: torch.Generator) -> None:
        """Draw what the next step is taken on.

        Of more than two images, every step draws two different ones, so that k steps use each of n images about 2k/n
        times.
        """
        device = self.noise.device
        if images > 2:
            self.drawn.copy_(_placed(torch.randperm(images, generator=generator, device="cpu")[:2], device))
        self.timesteps.copy_(_placed(torch.randint(trained_steps, (2,), generator=generator, device="cpu"), device))
        self.noise.copy_(_placed(gaussian(self.noise.shape, generator), device))


class NoiseTraining:
    """A UNet and the images whose noise it learns to predict.

    Args:
        unet: A `UNet2DConditionModel` in one of `FIT_DTYPES`.
        clean: The clean latents z_0 of n images, (n, C, h, w), n at least 2. Every step uses two of the images.
        alphas_cumprod: ᾱ at every trained timestep, (T,).
        prediction_type: What the UNet predicts, "epsilon" or "v_prediction".
        gradient_checkpointing: Whether activations are computed again for the backward pass instead of being kept.
        cross_attention_kwargs: Keyword arguments for the attention processors; "scale" scales every LoRA.

    Raises:
        ValueError: Gradients cannot pass through the UNet.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        clean: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        gradient_checkpointing: bool,
        cross_attention_kwargs: dict | None = None,
    ):
        _check_trainable(unet)
        self.unet, self.clean, self.prediction_type = unet, clean, prediction_type
        self.alphas_cumprod, self.dtype = alphas_cumprod.to(clean.device), unet.dtype
        self.cross_attention_kwargs = dict(cross_attention_kwargs or {})
        self.lora_scale = self.cross_attention_kwargs.pop("scale", 1.0)
        self.checkpointed = gradient_checkpointing or unwrapped(unet).is_gradient_checkpointing

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Bring the UNet into the state in which it is trained through, and put everything back afterwards.

        A compiled UNet runs uncompiled, because compiling a backward pass takes longer than a fit. A group-offloaded
        UNet is wholly on the device, and one that would come when it is called is there. No weight takes gradients.
        """
        with (
            # The caller may be in no_grad or inference_mode. Tensors made there cannot be trained through; copies can.
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            _uncached_autocast(),
            without_group_offloading(self.unet, resident=True),
            _checkpointing(self.unet, self.checkpointed),
            _frozen(self.unet),
        ):
            _bring(self.unet)
            unmerge_disabled(self.unet)
            self.clean = self.clean.clone()
            yield

    def descend(
        self,
        parameters: list[torch.nn.Parameter],
        texts: Callable[[torch.Tensor], list[torch.Tensor]],
        steps: int,
        learning_rate: float,
        generator: torch.Generator,
        on_step: Callable[[], None],
        change: Callable[[], None] = lambda: None,
    ) -> None:
        """Train by AdamW on the error of the predicted noise; no step waits for a CUDA GPU.

        Args:
            parameters: The parameters that are trained, in float32.
            texts: Function from the indices (2,) of two images to one tensor of embeddings (2, L, D) or several; the
                noise of both images is to be predicted with each of them.
            steps: Number of steps that are taken.
            learning_rate: Learning rate of AdamW.
            generator: A CPU generator, from which the images, timesteps and noise of every step are drawn.
            on_step: Function called after each step.
            change: Function called before each prediction, which changes the UNet as the parameters say.
        """
        device, dtype = self.clean.device, self.dtype
        # A backward pass that is checkpointed runs modules again from the host.
        recorded = device.type == "cuda" and not self.checkpointed and only_kernels(self.unet)
        # Fused AdamW skips a step that overflowed without the CPU waiting for the GPU to report the overflow. Not all
        # devices have it, and on MPS torch before 2.14 takes such steps all the same and leaves gradients scaled.
        fused = device.type in ("cpu", "cuda", "xpu")
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=fused, capturable=recorded)
        # Without a scaled loss, float16 gradients underflow.
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=dtype == torch.float16)
        inputs = StepInputs.like(self.clean)

        def loss() -> torch.Tensor:
            change()
            return self._loss(inputs, texts(inputs.drawn))

        step = TrainingStep(loss, parameters, optimizer, scaler)
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(repeatable_attention(self.unet))
                stack.enter_context(repeatable_convolutions())
            stack.enter_context(scaled_adapters(self.unet, self.lora_scale))
            stack.enter_context(interruptible())
            for number in range(steps):
                inputs.draw(len(self.clean), len(self.alphas_cumprod), generator)
                if recorded and number == 0:
                    step = replayed(step, dtype)
                step()
                on_step()

    def _loss(self, inputs: StepInputs, texts: list[torch.Tensor]) -> torch.Tensor:
        """The mean squared error of the UNet's prediction with each of the texts."""
        images, noise = self.clean[inputs.drawn], inputs.noise
        alpha_bar = self.alphas_cumprod[inputs.timesteps]
        target = v_from_eps(images, noise, alpha_bar) if self.prediction_type == "v_prediction" else noise
        noisy = recompose(images, noise, alpha_bar).to(self.dtype)
        noisy, timesteps, target = (torch.cat([part] * len(texts)) for part in (noisy, inputs.timesteps, target))
        asked = {"cross_attention_kwargs": self.cross_attention_kwargs or None, "return_dict": False}
        predicted = self.unet(noisy, timesteps, torch.cat(texts), **asked)[0]
        return F.mse_loss(predicted.to(target.dtype), target)


def require_converged(
    fitted: Iterable[torch.Tensor], dtype: torch.dtype, what: str, argument: str, learning_rate: float
) -> None:
    """Raise RuntimeError unless all that was fitted is finite.

    Args:
        fitted: The tensors that were fitted.
        dtype: The UNet's precision.
        what: What error messages call the fit.
        argument: The name of the argument that is the learning rate of the fit.
        learning_rate: The learning rate of the fit.
    """
    if not all(values.isfinite().all() for values in fitted):
        remedy = f"lower `{argument}`"
        if dtype == torch.float16:
            remedy += ", or load the model in bfloat16 or float32"
        raise RuntimeError(f"{what} diverged in {dtype} at learning rate {learning_rate}; {remedy}")


def gaussian(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values from a Gaussian, float32 on the CPU, whatever torch's default dtype and default device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _placed(draw: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move values drawn on the CPU to a device; to a GPU from pinned memory, so that the CPU need not wait."""
    return draw.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draw.to(device)


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


@contextmanager
def _frozen(unet: torch.nn.Module) -> Iterator[None]:
    """Have no weight of a UNet take gradients while the context lasts."""
    model = unwrapped(unet)
    with gradient_flags_kept(model):
        model.requires_grad_(False)
        yield


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Have a caller's autocast keep no copies of weights while the context lasts, since they change at every step."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _bring(unet: torch.nn.Module) -> None:
    """Bring a UNet to the device that enable_model_cpu_offload would bring it to when it is called."""
    hook = getattr(unet, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(unet)


def _check_trainable(unet: torch.nn.Module) -> None:
    """Raise ValueError unless gradients can pass through the UNet: weights in memory, and in one of `FIT_DTYPES`."""
    require_in_memory(unet)
    if any(parameter.is_meta for parameter in unet.parameters()):
        raise ValueError(
            "nothing can be fitted while the UNet is offloaded layer by layer (enable_sequential_cpu_offload); "
            "use enable_model_cpu_offload(), or pass lora_steps=0 and embedding_steps=0"
        )
    if any(parameter.is_inference() for parameter in unet.parameters()):
        raise ValueError(
            "nothing can be fitted on a UNet whose weights or adapters were loaded inside torch.inference_mode(); "
            "load them outside of it, or pass lora_steps=0 and embedding_steps=0"
        )
    stored = {parameter.dtype for parameter in unet.parameters()}
    if not stored <= set(FIT_DTYPES):
        raise ValueError(
            f"nothing can be fitted on a UNet stored in {sorted(map(str, stored))}; "
            "load it in float32, float16 or bfloat16, or pass lora_steps=0 and embedding_steps=0"
        )
