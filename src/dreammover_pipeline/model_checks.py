# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments against the models they are for, made before any model runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin

from .arguments import Settings
from .attention import self_attention_names
from .inputs import check_attention_blocks_exist, check_choice, check_feature_blocks_exist
from .schedules import ddim_schedule
from .settings import Delivery, PrepareSettings, RenderSettings


def check_model_fits(
    settings: Sequence[Settings],
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: SchedulerMixin,
    callback_tensors: Sequence[str],
) -> None:
    """Raise ValueError unless the models can do what the settings ask for.

    Args:
        settings: Groups of settings, each checked for what it holds.
        unet: Of the pipeline.
        vae: Of the pipeline.
        scheduler: Of the pipeline.
        callback_tensors: Names of the tensors that a step callback may ask for.
    """
    for group in settings:
        if isinstance(group, PrepareSettings):
            check_preparing(group, unet, vae, scheduler)
        elif isinstance(group, RenderSettings):
            blocks = range(len(unet.up_blocks))
            attentions = [len(self_attention_names(unet, block)) for block in blocks]
            check_attention_blocks_exist(group.attention_blocks, attentions)
        elif isinstance(group, Delivery):
            for name in group.callback_on_step_end_tensor_inputs:
                check_choice("callback_on_step_end_tensor_inputs", name, callback_tensors)


def check_preparing(
    settings: PrepareSettings, unet: torch.nn.Module, vae: torch.nn.Module, scheduler: SchedulerMixin
) -> None:
    """Raise ValueError unless a pair can be prepared with these settings and models.

    Args:
        settings: How the pair is to be inverted and matched.
        unet: Must take the VAE's latents and nothing else.
        vae: Encodes the photos.
        scheduler: Must have as many distinct timesteps as there are to be steps.
    """
    trained = scheduler.config.num_train_timesteps
    if settings.num_inference_steps > trained:
        raise ValueError(
            f"`num_inference_steps` must be at most the {trained} timesteps the model was trained with, "
            f"not {settings.num_inference_steps}"
        )
    ddim_schedule(scheduler, settings.num_inference_steps, settings.inversion_steps)
    check_feature_blocks_exist(settings.feature_block, len(unet.up_blocks))
    wanted, given = unet.config.in_channels, vae.config.latent_channels
    if wanted != given:
        raise ValueError(
            f"the UNet takes {wanted} channels but the VAE's latents have {given}: "
            "inpainting, depth and upscaling checkpoints are not supported"
        )


def check_no_callback(name: str, delivery: Delivery) -> None:
    """Raise ValueError if there is a step callback beside an argument of this name, whose work it would undo."""
    if delivery.callback_on_step_end is not None:
        raise ValueError(
            f"`{name}` and `callback_on_step_end` exclude each other, since what a step callback changes cannot be "
            "known again; follow the progress by the method `listening` instead"
        )
