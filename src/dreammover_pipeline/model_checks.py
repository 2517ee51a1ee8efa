# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments against the models they are for, made before any model runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from transformers import CLIPTextModel, CLIPTokenizer

from .arguments import Settings
from .attention import self_attention_names
from .branching import steps_of_generations
from .inputs import check_attention_blocks_exist, check_choice, check_feature_blocks_exist, check_integer
from .prompts import NegativeText, PairText
from .records import Schedule
from .schedules import ddim_schedule
from .settings import Delivery, FitSettings, PrepareSettings, RenderSettings


def check_model_fits(
    settings: Sequence[Settings],
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    text_encoder: CLIPTextModel | None,
    scheduler: SchedulerMixin,
    callback_tensors: Sequence[str],
) -> None:
    """Raise ValueError unless the models can do what the settings ask for.

    Args:
        settings: Groups of settings, each checked for what it holds.
        unet: The pipeline's UNet.
        vae: The pipeline's VAE.
        text_encoder: The pipeline's text encoder; None for a pipeline without one.
        scheduler: The pipeline's scheduler.
        callback_tensors: Names of the tensors that a step callback may ask for.
    """
    check_models(unet, vae, scheduler)
    for group in settings:
        if isinstance(group, FitSettings):
            check_clip_skip(group.clip_skip, text_encoder)
        if isinstance(group, PrepareSettings):
            check_preparing(group, unet, scheduler)
        elif isinstance(group, RenderSettings):
            blocks = range(len(unet.up_blocks))
            attentions = [len(self_attention_names(unet, block)) for block in blocks]
            check_attention_blocks_exist(group.attention_blocks, attentions)
        elif isinstance(group, Delivery):
            for name in group.tensor_names:
                check_choice("callback_on_step_end_tensor_inputs", name, callback_tensors)
    in_noise = [group for group in settings if isinstance(group, RenderSettings) and group.method == "noise"]
    prepared = [group for group in settings if isinstance(group, PrepareSettings)]
    if in_noise and prepared:
        schedule = ddim_schedule(scheduler, prepared[0].num_inference_steps, prepared[0].inversion_steps)
        for group in in_noise:
            check_noise_levels(group, schedule)


def check_models(unet: torch.nn.Module | None, vae: torch.nn.Module | None, scheduler: SchedulerMixin | None) -> None:
    """Raise ValueError unless there are all of these, and the UNet takes a VAE's latents, a text and nothing else."""
    for name, component in (("unet", unet), ("vae", vae), ("scheduler", scheduler)):
        if component is None:
            raise ValueError(f"the pipeline was made with `{name}` None, and cannot make frames without it")
    wanted, given = unet.config.in_channels, vae.config.latent_channels
    if wanted != given:
        raise ValueError(
            f"the UNet takes {wanted} channels but the VAE's latents have {given}: "
            "inpainting, depth and upscaling checkpoints are not supported"
        )
    if unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise ValueError(
            "the UNet has an IP-Adapter, which needs a picture of its own besides the two photos; "
            "take it off by `unload_ip_adapter()` of the pipeline that loaded it"
        )
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        value = getattr(unet.config, name)
        if value is not None:
            raise ValueError(
                f"the UNet needs more than latents, a timestep and a text (its `{name}` is {value!r}): "
                "SDXL, unCLIP and other checkpoints beside Stable Diffusion 1.x and 2.x are not supported"
            )


def check_clip_skip(clip_skip: int | None, text_encoder: CLIPTextModel | None) -> None:
    """Raise ValueError if more layers were to be left out than the text encoder has."""
    if clip_skip is not None and text_encoder is not None:
        check_integer("clip_skip", clip_skip, 0, text_encoder.config.num_hidden_layers)


def check_texts(texts: Sequence[PairText], text_encoder: CLIPTextModel | None) -> None:
    """Raise ValueError if there are prompts, and no text encoder to embed them."""
    if text_encoder is None and any(text.prompts is not None for text in texts):
        raise ValueError("the pipeline was made with `text_encoder` None; pass `prompt_embeds` instead of `prompt`")


def check_guidance(
    tokens: int, negative: NegativeText, text_encoder: CLIPTextModel | None, tokenizer: CLIPTokenizer | None
) -> None:
    """Raise ValueError unless guidance can compare the embeddings of frames with those that it leads away from.

    Args:
        tokens: Number of tokens L in the embeddings (2, L, D) of a pair.
        negative: What guidance leads away from.
        text_encoder: The pipeline's text encoder; None for a pipeline without one.
        tokenizer: The tokenizer that belongs to the text encoder; None for a pipeline without one.
    """
    if negative.embeds is not None:
        others, remedy = negative.embeds.shape[1], "pass both of the same length"
    elif text_encoder is None:
        raise ValueError(
            "the pipeline was made with `text_encoder` None; "
            "pass `negative_prompt_embeds` where `guidance_scale` is above 1"
        )
    else:
        others, remedy = tokenizer.model_max_length, "pass `negative_prompt_embeds` of the same length"
    if tokens != others:
        raise ValueError(
            f"guidance needs embeddings of one length, but those of the photos have {tokens} tokens and "
            f"`negative_prompt_embeds`, or the negative prompt, have {others}; {remedy}"
        )


def check_preparing(settings: PrepareSettings, unet: torch.nn.Module, scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless a pair can be prepared with these settings and models.

    Args:
        settings: How the pair is to be inverted and matched.
        unet: The UNet, which must have the blocks whose features are to be matched.
        scheduler: The scheduler, which must have as many distinct timesteps as there are to be steps.
    """
    trained = scheduler.config.num_train_timesteps
    if settings.num_inference_steps > trained:
        raise ValueError(
            f"`num_inference_steps` must be at most the {trained} timesteps the model was trained with, "
            f"not {settings.num_inference_steps}"
        )
    ddim_schedule(scheduler, settings.num_inference_steps, settings.inversion_steps)
    check_feature_blocks_exist(settings.feature_block, len(unet.up_blocks))


def check_noise_levels(settings: RenderSettings, schedule: Schedule) -> None:
    """Raise ValueError if frames would be noised so far that nothing of the photos is left in them.

    Args:
        settings: How the frames are made.
        schedule: The noise schedule that the pair is prepared with.
    """
    if settings.method != "noise":
        return
    first, last = steps_of_generations(2, settings.noise_levels, len(schedule.timesteps))
    if not schedule.has_signal(max(first, last)):
        levels = tuple(settings.noise_levels)
        raise ValueError(f"`noise_levels` {levels} reach a timestep without signal; lower the higher one")


def check_no_callback(name: str, delivery: Delivery) -> None:
    """Raise ValueError if there is a step callback beside an argument of this name, whose work it would undo."""
    if delivery.callback_on_step_end is not None:
        raise ValueError(
            f"`{name}` and `callback_on_step_end` exclude each other, since what a step callback changes cannot be "
            "known again; follow the progress by the method `listening` instead"
        )
