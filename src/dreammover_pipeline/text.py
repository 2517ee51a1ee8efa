# SPDX-License-Identifier: Apache-2.0
"""Text to embeddings, as Stable Diffusion reads it."""

from __future__ import annotations

import torch
from diffusers.utils import logging
from transformers import CLIPTextModel, CLIPTokenizer

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
        text: one text or P of them.
        tokenizer: CLIP's.
        text_encoder: CLIP's.
        device: where the text encoder runs.
        clip_skip: layers to leave out at the text encoder's end.

    Returns:
        (P, L, D), in the text encoder's precision.
    """
    limit = tokenizer.model_max_length
    tokens = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    whole = tokenizer(text, padding="longest", return_tensors="pt").input_ids
    if whole.shape[-1] > limit:
        lost = tokenizer.batch_decode(whole[:, limit - 1 : -1])
        logger.warning(f"CLIP reads {limit} tokens; this part of the prompt is left out: {lost}")
    masked = text_encoder.config.to_dict().get("use_attention_mask")
    output = text_encoder(
        tokens.input_ids.to(device),
        attention_mask=tokens.attention_mask.to(device) if masked else None,
        output_hidden_states=True,
    )
    if clip_skip is None:
        return output.last_hidden_state
    # transformers 5 moved the text model's layers up into CLIPTextModel itself
    text_model = getattr(text_encoder, "text_model", text_encoder)
    return text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
