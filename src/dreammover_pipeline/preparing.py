# SPDX-License-Identifier: Apache-2.0
"""Everything that does not depend on the frames asked for: encode → fit → invert → match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from diffusers.utils import logging

from .denoiser import Denoiser
from .embeddings import EmbeddingFit, fit_embeddings
from .features import up_block_features
from .flow import (
    Regulariser,
    distance_bias,
    join_features,
    match_features,
    neighbourhood_mean,
    regularise,
    resting_cells,
)
from .given_flow import GivenFlow, called_flow, smoothed_flow
from .inputs import feature_blocks
from .lora import LoraFit, fit_pair_lora
from .memory import advice_on_out_of_memory, affords_fit, free_cache, is_out_of_memory
from .models import Models, require_finite
from .pairs import PairInput
from .progress import Stages
from .records import BidirectionalFlow, Inversion, PreparedPair
from .refinement import refined_flow
from .rigid import similarity_flow
from .sampling import invert
from .schedules import ddim_schedule
from .settings import FitSettings, PrepareSettings
from .steering import Steering, held_flow, steered_flow
from .turns import interruptible

logger = logging.get_logger(__name__)


def prepare_pair(
    models: Models,
    pair: PairInput,
    settings: PrepareSettings,
    stages: Stages,
    lora: dict[str, torch.Tensor] | None = None,
) -> PreparedPair:
    """Encode the two photos, fit their texts and their LoRA, invert both and match their features.

    Args:
        models: The models that prepare the pair.
        pair: The photos, their texts and what the user says of the match.
        settings: How the pair is prepared.
        stages: What is told of progress.
        lora: LoRA weights to use instead of fitting some; None to fit them.
    """
    photos = pair.fitted()
    clean = models.autoencoder.encode(photos)
    size = tuple(clean.shape[-2:])
    flow = pair.flow
    if callable(flow):  # before the long work, since what it returns may be no flow
        with interruptible():
            flow = called_flow(flow, photos, pair.canvas, pair.canvas.height // size[0])
    prompt_embeds = models.conditioner.pair(pair.text, settings.clip_skip)
    negative_embeds = None
    if settings.embedding_steps:
        prompt_embeds, negative_embeds = fit_texts(models, clean, prompt_embeds, settings, pair.seed, stages)
    if lora is None and settings.lora_steps:
        lora = fit_lora(models.denoiser, clean, prompt_embeds, settings, pair.seed, stages)
    with models.denoiser.with_lora(lora, settings.lora_scale):
        inversion = invert_pair(models.denoiser, clean, prompt_embeds, settings, stages)
        if not isinstance(flow, GivenFlow):
            features = pair_features(models.denoiser, inversion, prompt_embeds, settings)
    with interruptible():
        if isinstance(flow, GivenFlow):
            given = flow.to(clean.device)
            flow = smoothed_flow(given, settings.flow_smoothing, regulariser_of(settings), pair.steering)
        else:
            tolerance = settings.photo_tolerance if flow == "features+photos" else 0
            flow = match_pair(features, photos, size, pair.steering, settings, tolerance)
    return PreparedPair(
        pair.ends(),
        pair.canvas,
        inversion,
        flow,
        prompt_embeds,
        lora,
        settings.lora_scale,
        negative_embeds,
        pair.poses,
    )


def fit_lora_of_gaps(
    models: Models, gaps: Sequence[PairInput], settings: FitSettings, stages: Stages
) -> dict[str, torch.Tensor]:
    """Fit one LoRA to the photos of one gap, or of several gaps that follow each other, by the first gap's seed.

    Args:
        models: The models that prepare the gaps.
        gaps: The gaps, the second photo of each of which is the first photo of the next.
        settings: How the LoRA is fitted.
        stages: What is told of progress.

    Returns:
        The weights, by diffusers' names.
    """
    photos = torch.cat([gaps[0].fitted(), *(gap.fitted()[1:] for gap in gaps[1:])])
    clean = torch.cat([models.autoencoder.encode(two) for two in photos.split(2)])
    both = [models.conditioner.pair(gap.text, settings.clip_skip) for gap in gaps]
    prompt_embeds = torch.cat([both[0], *(embeds[1:] for embeds in both[1:])])
    if settings.embedding_steps:
        prompt_embeds, _ = fit_texts(models, clean, prompt_embeds, settings, gaps[0].seed, stages)
    return fit_lora(models.denoiser, clean, prompt_embeds, settings, gaps[0].seed, stages)


def fit_lora(
    denoiser: Denoiser,
    clean: torch.Tensor,
    prompt_embeds: torch.Tensor,
    settings: FitSettings,
    seed: int,
    stages: Stages,
) -> dict[str, torch.Tensor]:
    """Fit one LoRA to two photos or more; where memory runs out, once more with gradient checkpointing.

    Args:
        denoiser: The denoiser on whose UNet the LoRA is fitted.
        clean: Clean latents of the photos, (n, C, h, w).
        prompt_embeds: Embeddings of the photos, (n, L, D).
        settings: How the LoRA is fitted.
        seed: What decides the fit wholly.
        stages: What is told of progress.

    Returns:
        The weights, by diffusers' names.
    """

    def attempt(gradient_checkpointing: bool) -> dict[str, torch.Tensor]:
        with stages("Fitting LoRA", settings.lora_steps) as step:
            return fit_pair_lora(
                denoiser.unet,
                clean,
                prompt_embeds,
                denoiser.ddim.alphas_cumprod,
                LoraFit(settings.lora_steps, settings.lora_rank, settings.lora_learning_rate),
                seed,
                denoiser.ddim.config.prediction_type,
                step,
                gradient_checkpointing,
                denoiser.cross_attention_kwargs,
            )

    return _in_memory(attempt, affords_fit(*denoiser.footprint(clean)), "the LoRA fit", clean.device)


def fit_texts(
    models: Models,
    clean: torch.Tensor,
    prompt_embeds: torch.Tensor,
    settings: FitSettings,
    seed: int,
    stages: Stages,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit the embeddings of photos, and a negative one that they share, which begins as that of the empty text.

    Args:
        models: The models on whose UNet the embeddings are fitted, and whose text encoder embeds the empty text.
            Without a text encoder, or beside embeddings of another length than its own, no negative embedding is
            fitted.
        clean: Clean latents of the photos, (n, C, h, w).
        prompt_embeds: The embeddings of the photos to begin with, (n, L, D).
        settings: How the embeddings are fitted.
        seed: What decides the fit wholly.
        stages: What is told of progress.

    Returns:
        The embeddings, (n, L, D), and the negative one, (1, L, D) or None.
    """
    denoiser, negative = models.denoiser, None
    if models.conditioner.text_encoder is not None:
        negative, _ = models.conditioner.encode("")
        negative = negative if negative.shape[1:] == prompt_embeds.shape[1:] else None

    def attempt(gradient_checkpointing: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        with stages("Fitting embeddings", settings.embedding_steps) as step:
            return fit_embeddings(
                denoiser.unet,
                clean,
                prompt_embeds,
                negative,
                denoiser.ddim.alphas_cumprod,
                EmbeddingFit(settings.embedding_steps, settings.embedding_learning_rate),
                seed,
                denoiser.ddim.config.prediction_type,
                step,
                gradient_checkpointing,
                denoiser.cross_attention_kwargs,
            )

    samples = 1 if negative is None else 2  # for each photo
    enough = affords_fit(*denoiser.footprint(clean, samples))
    return _in_memory(attempt, enough, "the fit of the embeddings", clean.device)


Fitted = TypeVar("Fitted")


def _in_memory(attempt: Callable[[bool], Fitted], enough: bool, name: str, device: torch.device) -> Fitted:
    """The result of a fit; where memory runs out, of the same fit with gradient checkpointing.

    Args:
        attempt: The fit, which is told whether to use gradient checkpointing.
        enough: Whether memory is expected to suffice without gradient checkpointing.
        name: What error messages and warnings call the fit.
        device: The device that the fit runs on.
    """
    if enough:
        try:
            return attempt(False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_cache(device)
        logger.warning(f"Out of memory; {name} starts anew with gradient checkpointing, for the same result.")
    with advice_on_out_of_memory(f"in {name}"):
        return attempt(True)


def invert_pair(
    denoiser: Denoiser, clean: torch.Tensor, prompt_embeds: torch.Tensor, settings: PrepareSettings, stages: Stages
) -> Inversion:
    """Invert both photos to step T, keeping the whole path. Source: DreamMover §3.1.

    Args:
        denoiser: The denoiser, with the pair's LoRA on.
        clean: Clean latents of the two photos, (2, C, h, w).
        prompt_embeds: Embeddings of the two photos, (2, L, D).
        settings: Number of steps of the schedule and depth of the inversion.
        stages: What is told of progress.

    Raises:
        RuntimeError: The UNet overflowed.
    """
    schedule = ddim_schedule(denoiser.ddim, settings.num_inference_steps, settings.inversion_steps)
    with stages("Inverting", settings.inversion_steps + 1) as step, denoiser.repeated_calls():
        inversion = invert(
            clean,
            lambda latents, timestep: denoiser.predict_noise(latents, timestep, prompt_embeds),
            schedule,
            settings.inversion_steps,
            step,
        )
    require_finite(inversion.path[-1], denoiser.dtype)
    return inversion


def pair_features(
    denoiser: Denoiser, inversion: Inversion, prompt_embeds: torch.Tensor, settings: PrepareSettings
) -> list[torch.Tensor]:
    """The features of both photos at the step of the inversion that is matched. Source: DreamMover §3.2.

    Args:
        denoiser: The denoiser, with the pair's LoRA on.
        inversion: The inversion of the two photos.
        prompt_embeds: Embeddings of the two photos, (2, L, D).
        settings: The step and the up blocks whose features are matched.

    Returns:
        One (2, C', h', w') for each block.
    """
    timestep = inversion.schedule.timestep(settings.feature_step)
    return up_block_features(
        denoiser.unet,
        feature_blocks(settings.feature_block),
        lambda: denoiser.predict_noise(inversion.at(timestep), timestep, prompt_embeds),
    )


def match_pair(
    features: list[torch.Tensor],
    photos: torch.Tensor,
    size: tuple[int, int],
    steering: Steering | None,
    settings: PrepareSettings,
    photo_tolerance: float,
) -> BidirectionalFlow:
    """The flow between the two photos on the latent grid, both ways. Source: DreamMover §3.2.

    Args:
        features: The features of each block for the first and the second photo, (2, C', h', w') each.
        photos: The two photos on their canvas, (2, 3, H, W) in [0, 1].
        size: Size (h, w) of the latent grid.
        steering: What the user says of the match; None where that is nothing.
        settings: The penalty for distance, the tolerance for rest and the smoothing.
        photo_tolerance: Mean difference in colour, of 1, up to which the refinement counts a place as found; 0 for no
            refinement.
    """
    matched = features[0] if len(features) == 1 else join_features(features, size)
    bias = distance_bias(size, settings.distance_penalty, matched)
    regulariser = regulariser_of(settings)
    passes, tolerance = settings.flow_smoothing, settings.rest_tolerance
    if steering is not None:
        flow = steered_flow(matched, steering, passes, bias, regulariser, tolerance)
    else:
        flow = match_features(matched, size, bias)
        flow = regularise(flow, passes, regulariser, resting_cells(matched, flow, tolerance))
    if photo_tolerance:
        flow = refined_flow(flow, photos, photo_tolerance)
        if steering is not None:
            flow = held_flow(flow, steering)
    return flow


def regulariser_of(settings: PrepareSettings) -> Regulariser:
    """What a pass of smoothing carries the flow on by."""
    return similarity_flow if settings.flow_fit == "similarity" else neighbourhood_mean
