# SPDX-License-Identifier: Apache-2.0
"""Embeddings of prompts by CLIP, as Stable Diffusion uses them."""

from __future__ import annotations

import torch
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTokenizer

from .turns import interruptible

logger = logging.get_logger(__name__)


def embed_text(
    text: str | list[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    device: torch.device,
    clip_skip: int | None = None,
) -> torch.Tensor:
    """Embeddings of texts, cut or padded to the tokenizer's length, with a warning for what is cut.

    Args:
        text: One text, or a list of P texts.
        tokenizer: The CLIP tokenizer of the checkpoint.
        text_encoder: The CLIP text encoder of the checkpoint.
        device: The device that the text encoder runs on.
        clip_skip: Number of layers to leave out at the end of the text encoder; None leaves out none.

    Returns:
        The embeddings (P, L, D) of L tokens for each text, in the text encoder's precision.
    """
    limit = tokenizer.model_max_length
    tokens = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="np")
    whole = tokenizer(text, padding="longest", return_tensors="np").input_ids
    if whole.shape[-1] > limit:
        lost = tokenizer.batch_decode(whole[:, limit - 1 : -1])
        logger.warning(f"CLIP reads {limit} tokens; this part of the prompt is left out: {lost}")
    masked = text_encoder.config.to_dict().get("use_attention_mask")
    with interruptible():
        output = text_encoder(
            torch.from_numpy(tokens.input_ids).to(device),
            attention_mask=torch.from_numpy(tokens.attention_mask).to(device) if masked else None,
            # For these transformers puts hooks into the text encoder that stay, and cannot be pickled.
            output_hidden_states=clip_skip is not None,
        )
    if clip_skip is None:
        return output.last_hidden_state
    # Since transformers 5 the text model's layers belong to CLIPTextModel itself.
    text_model = getattr(text_encoder, "text_model", text_encoder)
    return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
