# SPDX-License-Identifier: Apache-2.0
"""The models of a pipeline together, as the stages take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .autoencoder import Autoencoder
from .conditioning import Conditioner
from .denoiser import Denoiser


@dataclass(frozen=True)
class Models:
    """The three model objects that the stages work with."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    conditioner: Conditioner


def require_finite(latents: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError if the UNet left something behind that is not a finite number."""
    if not latents.isfinite().all():
        remedy = "lower `lora_scale`, or any other scale of a LoRA"
        if dtype == torch.float16:
            remedy = "load the pipeline in bfloat16 or float32"
        raise RuntimeError(f"the UNet overflowed in {dtype}; {remedy}")
