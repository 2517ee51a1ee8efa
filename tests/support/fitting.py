# SPDX-License-Identifier: Apache-2.0
"""A quick LoRA fit to latents and texts without meaning, for tests of the fit and of adapters."""

import torch
from peft import LoraConfig

from dreammover_pipeline.lora import LoraFit

FIT = LoraFit(steps=2, rank=4, learning_rate=1e-3)
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def random_pair():
    """Latents and embedded texts of two images, for the UNet of `build_components`.

    Latents of 16×16 are 2×2 in the mid block. Were they 8×8, attention would see a single token there; it would then
    weigh that token by 1 whatever the queries and keys are, and the gradient of these would be exactly zero.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 24, 32, generator=generator)


def forward(unet, latents, text):
    with torch.no_grad():
        return unet(latents, torch.tensor(301), text).sample


def add_user_lora(unet, name="style", targets=("to_q", "to_v", "proj_in"), seed=1):
    """A LoRA that visibly does something, on other layers than ours, convolutions among them."""
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in unet.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    unet.requires_grad_(False)
