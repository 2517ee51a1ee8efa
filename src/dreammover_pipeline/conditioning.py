# SPDX-License-Identifier: Apache-2.0
"""What the UNet is told the pictures show: embeddings of the two photos, and of every frame between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .adapters import scaled_adapters
from .fusion import slerp
from .prompts import NegativeText, PairText
from .text import embed_text


@dataclass
class Conditions:
    """The embeddings of the frames of one call, (F, L, D); `negative_prompt_embeds` is None without guidance.

    A step callback may replace them between two steps.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None

    def copied(self) -> Conditions:
        """The same embeddings in memory of their own, so that they can be changed in place."""
        negative = self.negative_prompt_embeds
        return Conditions(self.prompt_embeds.clone(), None if negative is None else negative.clone())

    def selected(self, frames: list[int]) -> Conditions:
        """The embeddings of some of the frames, by the frames' indices."""
        negative = self.negative_prompt_embeds
        return Conditions(self.prompt_embeds[frames], None if negative is None else negative[frames])


class Conditioner:
    """The text encoder of one call.

    Args:
        text_encoder: The text encoder of CLIP; None where every text comes as embeddings.
        tokenizer: The tokenizer that belongs to the text encoder.
        unet_dtype: The precision of the UNet that reads the embeddings, which may not be the text encoder's; None
            without a UNet.
        device: Where the text encoder runs and the embeddings are wanted.
        convert: Function from a prompt to the prompt with the tokens of textual inversion put in.
        lora_scale: Factor of the weights of the text encoder's LoRAs.
    """

    def __init__(
        self,
        text_encoder: torch.nn.Module | None,
        tokenizer,
        unet_dtype: torch.dtype | None,
        device: torch.device,
        convert: Callable,
        lora_scale: float = 1.0,
    ):
        self.text_encoder, self.tokenizer, self.unet_dtype, self.device = text_encoder, tokenizer, unet_dtype, device
        self.convert, self.lora_scale = convert, lora_scale

    def encode(
        self,
        prompt: str | list[str] | None,
        guided: bool = False,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of P texts and, where guided, of what guidance leads away from.

        Args:
            prompt: P texts, or None where `prompt_embeds` are given.
            guided: Whether negative embeddings are wanted too.
            negative_prompt: One text, or one for each prompt; the empty text by default.
            prompt_embeds: Text embeddings (P, L, D) to use instead of `prompt`.
            negative_prompt_embeds: Text embeddings (P, L, D) to use instead of `negative_prompt`.
            clip_skip: Number of layers to leave out at the end of the text encoder.

        Returns:
            (P, L, D) twice; the second is None where not guided.
        """
        if prompt_embeds is None:
            prompt_embeds = self._embed(prompt, clip_skip)
        if guided and negative_prompt_embeds is None:
            negative_prompt_embeds = self._embed(negative_prompt or "")
            if len(negative_prompt_embeds) == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand_as(prompt_embeds)
        dtype = self.unet_dtype or prompt_embeds.dtype
        return prompt_embeds.to(self.device, dtype), negative_prompt_embeds.to(self.device, dtype) if guided else None

    def pair(self, text: PairText, clip_skip: int | None = None) -> torch.Tensor:
        """Embeddings of the two photos, (2, L, D); a prompt that they share is encoded once."""
        prompts = None if text.prompts is None else list(dict.fromkeys(text.prompts))
        embeds, _ = self.encode(prompts, prompt_embeds=text.embeds, clip_skip=clip_skip)
        return embeds.expand(2, -1, -1)

    def frames(
        self, pair_embeds: torch.Tensor, times: torch.Tensor, guided: bool, negative: NegativeText
    ) -> Conditions:
        """Embeddings of every frame: of two different ones of the photos the spherical interpolation.

        Args:
            pair_embeds: Text embeddings of the two photos, (2, L, D).
            times: The δ of each frame, (F,).
            guided: Whether negative embeddings are wanted too.
            negative: What guidance leads away from.
        """
        first, last = pair_embeds
        if torch.equal(first, last):
            prompt_embeds = pair_embeds[:1].expand(len(times), -1, -1)
        else:
            prompt_embeds = slerp(first, last, times).to(first.dtype)
        if not guided:
            return Conditions(prompt_embeds, None)
        _, away = self.encode(
            None,
            guided=True,
            negative_prompt=negative.prompt,
            prompt_embeds=pair_embeds[:1],
            negative_prompt_embeds=negative.embeds,
        )
        return Conditions(prompt_embeds, away.expand_as(prompt_embeds))

    def _embed(self, prompt: str | list[str], clip_skip: int | None = None) -> torch.Tensor:
        if self.text_encoder is None:
            raise ValueError("this pipeline has no `text_encoder` to embed texts; pass `prompt_embeds` instead")
        with scaled_adapters(self.text_encoder, self.lora_scale):
            return embed_text(self.convert(prompt), self.tokenizer, self.text_encoder, self.device, clip_skip)
