# SPDX-License-Identifier: Apache-2.0
"""Text embeddings that are fitted to the photos: textual inversion of the whole embedding of a prompt.

Words say little of what a photo shows. Fitted, the embedding of each photo describes it better, and guidance leads
towards it from what the photos have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .inputs import check_integer, check_number
from .noise_training import NoiseTraining, require_converged


@dataclass(frozen=True)
class EmbeddingFit:
    """How text embeddings are fitted. Source: arXiv 2307.12560, §3 (100 to 500 steps, learning rate 1e-4)."""

    steps: int  # AdamW steps on two images at random timesteps
    learning_rate: float  # the learning rate of AdamW

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_number("learning_rate", self.learning_rate, 0, inclusive=False)


def fit_embeddings(
    unet: torch.nn.Module,
    clean: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor | None,
    alphas_cumprod: torch.Tensor,
    fit: EmbeddingFit,
    seed: int,
    prediction_type: str = "epsilon",
    on_step: Callable[[], None] = lambda: None,
    gradient_checkpointing: bool = False,
    cross_attention_kwargs: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit the text embeddings of two images or more, by noise prediction; nothing else is trained.

    Every image has an embedding of its own. The negative embedding, from which guidance leads away, is shared: it
    learns to predict the noise in all images. `seed` alone decides the result, as in `fit_pair_lora`.

    Source: arXiv 2307.12560, §3; there the error is that of the guided prediction, which would tie the embeddings to
    one `guidance_scale`.

    Args:
        unet: A `UNet2DConditionModel` in float32, float16 or bfloat16.
        clean: The clean latents z_0 of n images, (n, C, h, w), n at least 2. Every step uses two of the images.
        prompt_embeds: The embeddings to begin with, (n, L, D).
        negative_embeds: The negative embedding to begin with, (1, L, D), or None to fit none.
        alphas_cumprod: ᾱ at every trained timestep, (T,).
        fit: The number of steps and the learning rate.
        seed: Any integer; it decides the images, timesteps and noise of every step.
        prediction_type: What the UNet predicts, "epsilon" or "v_prediction".
        on_step: Function called after each step.
        gradient_checkpointing: Whether activations are computed again for the backward pass instead of being kept.
        cross_attention_kwargs: Keyword arguments for the attention processors; "scale" scales every LoRA.

    Returns:
        The fitted embeddings, (n, L, D) and (1, L, D) or None, in the UNet's precision.

    Raises:
        ValueError: The UNet is offloaded or quantised in a way that gradients cannot pass through.
        RuntimeError: The fit diverged.
    """
    generator, dtype = torch.Generator("cpu").manual_seed(seed), unet.dtype
    training = NoiseTraining(
        unet, clean, alphas_cumprod, prediction_type, gradient_checkpointing, cross_attention_kwargs
    )
    with training.ready():
        starts = [prompt_embeds] if negative_embeds is None else [prompt_embeds, negative_embeds]
        fitted = [torch.nn.Parameter(start.detach().float().clone()) for start in starts]

        def texts(drawn: torch.Tensor) -> list[torch.Tensor]:
            positive, *negative = (embeds.to(dtype) for embeds in fitted)
            return [positive[drawn], *(embeds.expand_as(positive[:2]) for embeds in negative)]

        training.descend(fitted, texts, fit.steps, fit.learning_rate, generator, on_step)
        positive, *negative = (embeds.detach() for embeds in fitted)
    what = "the fit of the text embeddings"
    require_converged((positive, *negative), dtype, what, "embedding_learning_rate", fit.learning_rate)
    return positive.to(dtype), negative[0].to(dtype) if negative else None
