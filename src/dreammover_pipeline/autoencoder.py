# SPDX-License-Identifier: Apache-2.0
"""The VAE of a pipeline, with what it falls back to where memory runs out or its precision overflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils import logging

from .memory import advice_on_out_of_memory, affordable_decodes, free_cache, is_out_of_memory
from .turns import interruptible

logger = logging.get_logger(__name__)

# What the VAE can switch on to need less memory, in the order in which it is tried, and how it then goes on.
MEMORY_SWITCHES = {"use_slicing": "one image at a time", "use_tiling": "in tiles, whose tones may differ a little"}


class Autoencoder:
    """Images to clean latents and back, in float32 whatever precision the VAE has.

    Args:
        vae: An `AutoencoderKL` or another VAE of diffusers with its interface.
        device: Where the VAE runs.
    """

    def __init__(self, vae: torch.nn.Module, device: torch.device):
        self.vae, self.device = vae, device
        self._warned_of_overflow = False

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Clean latents z_0: the VAE's posterior mean, scaled.

        Args:
            images: The pictures to encode, (B, 3, H, W) in [0, 1].

        Returns:
            (B, C, h, w), float32.
        """
        pixels = 2 * images.to(self.device) - 1
        with self._switches_kept():
            latents = self._in_memory(
                lambda x: retrieve_latents(self.vae.encode(x), sample_mode="argmax"), pixels, "encoding"
            )
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of clean latents.

        Args:
            latents: The clean latents to decode, (B, C, h, w).

        Returns:
            (B, 3, H, W) in [0, 1], float32.
        """
        with self.decoder() as decode:
            return decode(latents)

    @contextmanager
    def decoder(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """A function like `decode` for many calls: what one of them falls back to, the later ones begin with."""
        with self._switches_kept():
            yield self._decode

    def decodes_at_once(self, pixels: int) -> int:
        """How many images of so many pixels are best decoded in one call."""
        if getattr(self.vae, "use_slicing", False):
            return 1
        channels = self.vae.config.block_out_channels[0]
        return affordable_decodes(self.device, pixels, channels, self.vae.dtype)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents / self.vae.config.scaling_factor
        images = self._in_memory(lambda x: self.vae.decode(x, return_dict=False)[0], scaled, "decoding")
        return (images / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _switches_kept(self) -> Iterator[None]:
        """Put the VAE's memory switches back, when the context ends, to what they were when it began."""
        switches = {name: getattr(self.vae, name) for name in MEMORY_SWITCHES if hasattr(self.vae, name)}
        try:
            yield
        finally:
            for name, value in switches.items():
                setattr(self.vae, name, value)

    def _in_memory(self, function: Callable, x: torch.Tensor, doing: str) -> torch.Tensor:
        """Run the VAE. Where memory runs out, switch on what needs less, and leave it on for the calls to come."""
        for switch, how in MEMORY_SWITCHES.items():
            one_image_already = switch == "use_slicing" and len(x) == 1
            if one_image_already or getattr(self.vae, switch, True):
                continue
            try:
                return self._in_precision(function, x, doing)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            free_cache(x.device)
            logger.warning(f"Out of memory {doing}; the VAE goes on {how}.")
            setattr(self.vae, switch, True)
        with advice_on_out_of_memory(f"{doing}, on {tuple(x.shape)}"):
            return self._in_precision(function, x, doing)

    def _in_precision(self, function: Callable, x: torch.Tensor, doing: str) -> torch.Tensor:
        """Run the VAE in its own precision; where that overflows, as float16 can, run it once more in float32.

        A caller's autocast may compute in float16, too, whatever the VAE's own precision is.
        """
        dtype, device = self.vae.dtype, x.device.type
        as_stored = not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
        with interruptible():
            result = function(x.to(dtype)).float()
        if result.isfinite().all() or (as_stored and dtype == torch.float32):
            return result
        if not self._warned_of_overflow:
            used = dtype if as_stored else torch.get_autocast_dtype(device)
            logger.warning(f"The VAE overflowed {doing} in {used}; such images are done again in float32.")
            self._warned_of_overflow = True
        try:
            self.vae.to(torch.float32)
            with interruptible(), nullcontext() if as_stored else torch.autocast(device, enabled=False):
                return function(x.float())
        finally:
            self.vae.to(dtype)
