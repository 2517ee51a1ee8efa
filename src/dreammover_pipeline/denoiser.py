# SPDX-License-Identifier: Apache-2.0
"""The UNet of one call: it predicts noise, with the pair's LoRA on and with attention to the two photos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from diffusers import ControlNetModel, DDIMScheduler
from diffusers.utils import logging

from .adapters import scaled_adapters, unwrapped
from .attention import References, reference_attention
from .captured import RecordedCall, only_kernels
from .conditioning import Conditions
from .control import FrameControl
from .ddim import eps_from_v
from .lora import pair_lora
from .memory import Batches, advice_on_out_of_memory, affordable_frames
from .records import PreparedPair
from .turns import interruptible

logger = logging.get_logger(__name__)


class Denoiser:
    """A UNet and what holds for it throughout a call.

    Args:
        unet: A `UNet2DConditionModel`, compiled or not.
        ddim: The noise schedule that the UNet was trained with, and what it predicts.
        device: Where the UNet runs.
        cross_attention_kwargs: Keyword arguments for the attention processors.
        comes_late: Whether the UNet is brought to its device only when it is called, as model offloading does it.
        controlnet: A `ControlNetModel` for the UNet, or None.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        ddim: DDIMScheduler,
        device: torch.device,
        cross_attention_kwargs: dict | None = None,
        comes_late: bool = False,
        controlnet: ControlNetModel | None = None,
    ):
        self.unet, self.ddim, self.device, self.comes_late = unet, ddim, device, comes_late
        self.cross_attention_kwargs, self.controlnet = cross_attention_kwargs, controlnet
        # Without "scale": diffusers would multiply adapters by it and divide again in every call, which rounds, and
        # would forget the user's weights for a scale of 0. `with_lora` does it, and puts back what it found.
        self._given = dict(cross_attention_kwargs or {})
        self._lora_scale = self._given.pop("scale", 1.0)
        self.guidance_scale = 1.0
        self._recorded: RecordedCall | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The UNet's precision, which diffusers finds by going through all weights."""
        return self.unet.dtype

    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: int,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
        control_scale: float = 1.0,
    ) -> torch.Tensor:
        """The UNet's noise, also where it predicts v.

        With negative embeddings it is guided by `guidance_scale`, where that is above 1.

        A "scale" in `cross_attention_kwargs` holds inside `with_lora`.

        Args:
            latents: The noisy latents, (B, C, h, w).
            timestep: The trained timestep to ask at.
            prompt_embeds: The text embeddings, (B, L, D).
            negative_prompt_embeds: The text embeddings that guidance leads away from, (B, L, D); None for no guidance.
            control: The pictures that the ControlNet is given, (B, 3, H, W) in [0, 1], or None to leave it out.
            control_scale: Factor of what the ControlNet adds.

        Returns:
            ε, (B, C, h, w), float32.
        """
        guided = negative_prompt_embeds is not None
        if guided:
            latents = latents.repeat(2, 1, 1, 1)
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            control = None if control is None else control.repeat(2, 1, 1, 1)
        with interruptible(), advice_on_out_of_memory(f"in the UNet, on latents {tuple(latents.shape)}"):
            # A number for the timestep, or expanded embeddings besides others, would make torch.compile start anew.
            # `torch.tensor` would wait until a GPU has it, with all that was asked of that GPU before.
            inputs = (
                latents.to(self.dtype),
                torch.full((), timestep, dtype=torch.long, device=latents.device),
                prompt_embeds.contiguous(),
            )
            added = () if control is None else self._added_by_controlnet(*inputs, control, control_scale)
            output = (self._recorded or self._call_unet)(*inputs, *added).float()
        if self.ddim.config.prediction_type == "v_prediction":
            output = eps_from_v(output, latents, float(self.ddim.alphas_cumprod[timestep]))
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        if self.guidance_scale <= 1:  # by which a step callback ends guidance, as in diffusers
            return conditional
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _call_unet(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, *added: torch.Tensor
    ) -> torch.Tensor:
        *down, middle = added or (None,)
        return self.unet(
            latents,
            timestep,
            encoder_hidden_states=prompt_embeds,
            cross_attention_kwargs=self._given or None,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def _added_by_controlnet(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        control: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """What the ControlNet adds to the skip connections of the UNet, and last what it adds in the middle."""
        dtype = self.controlnet.dtype
        down, middle = self.controlnet(
            latents.to(dtype),
            timestep,
            encoder_hidden_states=prompt_embeds.to(dtype),
            controlnet_cond=control.to(dtype),
            conditioning_scale=scale,
            return_dict=False,
        )
        return tuple(part.to(self.dtype) for part in (*down, middle))

    @contextmanager
    def repeated_calls(self) -> Iterator[None]:
        """Have a GPU repeat the UNet's calls by itself while the context lasts, where that can be done.

        All calls inside must be alike: of one shape, with the same weights and without hooks.
        """
        compiled = self.unet is not unwrapped(self.unet) or self.unet._compiled_call_impl is not None
        if self.device.type != "cuda" or compiled or not only_kernels(self.unet):
            yield
            return
        self._recorded = RecordedCall(self._call_unet, "Calls of the UNet")
        try:
            yield
        finally:
            # An object that holds its own method would be freed no earlier than the garbage collector finds it.
            self._recorded = None

    @contextmanager
    def with_lora(self, weights: dict[str, torch.Tensor] | None, scale: float) -> Iterator[None]:
        """The pair's LoRA in effect while the context lasts, beside the user's adapters; None for no LoRA.

        A "scale" in `cross_attention_kwargs` scales the user's adapters, as in diffusers, and the pair's LoRA too.
        """
        with scaled_adapters(self.unet, self._lora_scale), pair_lora(self.unet, weights, scale * self._lora_scale):
            yield

    @contextmanager
    def frame_predictor(
        self,
        pair: PreparedPair,
        conditions: Conditions,
        attention_blocks: Sequence[int],
        largest: int | None,
        control: FrameControl | None = None,
        steps: int | None = None,
    ) -> Iterator[FramePredictor]:
        """What predicts the noise of in-between frames, while the context lasts.

        Args:
            pair: What the frames lie between.
            conditions: The embeddings of the frames, which are read anew at every step.
            attention_blocks: Indices of the up blocks whose self-attention looks at the photos.
            largest: Largest number of frames in a batch; None for what fits the free memory.
            control: What the ControlNet is given for the frames; None to leave it out.
            steps: How many denoising steps the frames take, by which the ControlNet begins and ceases to act; by
                default as many as the pair was inverted.
        """
        steps = steps or pair.inversion.steps
        groups = 1 if conditions.negative_prompt_embeds is None else 2
        batches = Batches(largest or affordable_frames(*self.footprint(pair.inversion.path, groups)))
        with reference_attention(self.unet, attention_blocks) as references:
            yield FramePredictor(self, pair, conditions, references, batches, control, steps)

    def footprint(self, latents: torch.Tensor, groups: int = 1) -> tuple[torch.device, int, int, torch.dtype, int]:
        """The arguments of `memory.affordable_frames`: what decides how much of the UNet's work fits at once.

        Args:
            latents: Any tensor (…, h, w) of the size of the latents that are to be worked on.
            groups: How many embeddings each sample is asked with: 2 under guidance, else 1.
        """
        h, w = latents.shape[-2:]
        to_come = 0
        if self.comes_late:
            away = (weight for weight in self.unet.parameters() if weight.device.type != self.device.type)
            to_come = sum(weight.nbytes for weight in away)
        return self.device, groups * h * w, self.unet.config.block_out_channels[0], self.dtype, to_come


@dataclass(eq=False)
class FramePredictor:
    """Predicts the noise of in-between frames, in batches that fit the memory.

    At every step the two photos lead the first batch, at their own latents of that step, and leave the tokens that all
    frames attend to; so the references are exact and the photos need no denoising of their own.

    The frames lie between the photos of `pair`. `conditions` are their embeddings, which are read anew at every step;
    `references` are installed in the UNet, and `control` is what the ControlNet is given, None to leave it out. The
    frames take `steps` denoising steps.
    """

    denoiser: Denoiser
    pair: PreparedPair
    conditions: Conditions
    references: References
    batches: Batches
    control: FrameControl | None
    steps: int
    _photos_lead: bool = field(default=False, init=False)

    def __call__(self, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        """ε of frames (F, C, h, w) at a timestep of the pair's path, (F, C, h, w), float32."""
        step = self.steps - 1 - self.pair.inversion.schedule.timesteps.index(timestep)
        acts = self.control is not None and self.control.acts(step, self.steps)
        self._photos_lead = bool(self.references.layers)
        allowed = self.batches.largest
        eps = self.batches.map(
            partial(self._predict_batch, timestep),
            latents,
            self.conditions.prompt_embeds,
            self.conditions.negative_prompt_embeds,
            self.control.pictures if acts else None,
        )
        if self.batches.largest < allowed:
            logger.warning(
                f"Out of memory; from here on at most {self.batches.largest} frames are denoised at once. "
                "The frames are the same."
            )
        return eps

    def _predict_batch(
        self,
        timestep: int,
        frames: torch.Tensor,
        text: torch.Tensor,
        negative: torch.Tensor | None,
        pictures: torch.Tensor | None,
    ) -> torch.Tensor:
        """ε of some of the frames; the first batch of a step is led by the photos."""
        scale = 1.0 if self.control is None else self.control.scale
        if not self._photos_lead:
            return self.denoiser.predict_noise(frames, timestep, text, negative, pictures, scale)
        photos, own_text = self.pair.inversion.at(timestep), self.pair.prompt_embeds
        frames, text = torch.cat([photos, frames]), torch.cat([own_text, text])
        if negative is not None:
            negative = torch.cat([negative[:1].expand_as(own_text), negative])
        if pictures is not None:
            pictures = torch.cat([self.control.ends, pictures])
        with self.references.led_by_inputs(1 if negative is None else 2):
            eps = self.denoiser.predict_noise(frames, timestep, text, negative, pictures, scale)
        self._photos_lead = False  # only now, since a batch that memory does not suffice for is made again
        return eps[len(photos) :]
