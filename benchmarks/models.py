# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: the embedded checkpoint, and two configurations with random weights.

Time, memory and FLOPs do not depend on the weights, so nothing needs to be downloaded.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreammover_pipeline import DreamMoverPipeline
from dreammover_pipeline.adapters import TARGETS
from dreammover_pipeline.lora import TrainedLora
from dreammover_pipeline.memory import free_cache
from dreammover_pipeline.tiny import CHECKPOINT

# Stable Diffusion 1.5's configurations ("sd15"), and the smallest ones that run every line of code ("micro").
UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "micro": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
}
VAES = {
    "sd15": {"sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "micro": {"sample_size": 64, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
}
TEXT_ENCODERS = {
    "sd15": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "micro": {
        "vocab_size": 49408,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def random_models(name: str) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """UNet, VAE and text encoder with random weights, in the configuration "sd15", "micro" or "tiny"."""
    torch.manual_seed(0)
    if name == "tiny":
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CHECKPOINT, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CHECKPOINT, subfolder="vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(CHECKPOINT / "text_encoder"))
        return unet.eval(), vae.eval(), text_encoder.eval()
    unet = UNet2DConditionModel(**UNETS[name])
    vae = AutoencoderKL(
        **VAES[name],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[name]))
    return unet.eval(), vae.eval(), text_encoder.eval()


def add_lora(unet: UNet2DConditionModel, rank: int = 16) -> TrainedLora:
    """Put a LoRA on a UNet, as the fit of a pair's does, and freeze everything else."""
    unet.requires_grad_(False)
    return TrainedLora(unet, rank, torch.Generator().manual_seed(0))


def add_adapter(unet: UNet2DConditionModel, rank: int = 16) -> list[torch.nn.Parameter]:
    """Put a LoRA on a UNet as an adapter of peft, freeze everything else, and return the LoRA's float32 parameters."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    cast_training_params(unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def fake_models(name: str, dtype: torch.dtype, mode: FakeTensorMode) -> list[torch.nn.Module]:
    """Models like those of `random_models`, with fake weights: in `mode` they compute nothing, by code for the CPU."""
    with torch.device("meta"):
        models = [model.to(dtype) for model in random_models(name)]
    with mode:
        for module in (module for model in models for module in model.modules()):
            for key, value in module.named_parameters(recurse=False):
                fake = torch.empty(value.shape, dtype=value.dtype)
                setattr(module, key, torch.nn.Parameter(fake, requires_grad=value.requires_grad))
            for key, value in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty(value.shape, dtype=value.dtype))
    return models


def load_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> DreamMoverPipeline:
    """A pipeline without progress bars, of the embedded checkpoint ("tiny") or of random weights in one of `UNETS`."""
    if name == "tiny":
        pipe = DreamMoverPipeline.from_pretrained(CHECKPOINT)
    else:
        with torch.device(device):  # where weights are drawn in less time
            unet, vae, text_encoder = random_models(name)
        scheduler = PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        )
        pipe = DreamMoverPipeline(
            vae,
            text_encoder,
            CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer", model_max_length=77),
            unet,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    # By way of the CPU, since among weights that are cast on a GPU holes are left that no other program can use.
    pipe.to("cpu", dtype)
    free_cache(device)
    return pipe.to(device)
