# SPDX-License-Identifier: Apache-2.0
"""The UNet's training data: every image encoded into a latent, in shards, and every caption as tokens."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from . import validation
from .models import WORDS, build_tokenizer
from .recipes import Recipe, draw_images, from_bytes, seed_of
from .trainer import write_state

SHORTENED = 8  # one caption in so many leaves the background out


class LatentShards:
    """Latents of the UNet's training images, encoded once, because drawing images anew would slow the training down.

    Shards are files in a folder. They are decided by the recipe and the autoencoder, so they need not be copied along
    with the states of the training: a shard that is missing or damaged is made again.

    Args:
        recipe: the recipe of the training, which says how many images there are.
        folder: the folder that the shards are kept in.
        vae: the finished autoencoder.
        vae_step: number of steps that the autoencoder was trained for; shards made at another number are replaced.
    """

    def __init__(self, recipe: Recipe, folder: Path, vae: AutoencoderKL, vae_step: int):
        self.recipe, self.folder, self.vae, self.vae_step = recipe, folder, vae, vae_step
        self.tokenizer = build_tokenizer(WORDS, recipe.sizes.tokens)

    def make(self, deadline: float) -> bool:
        """Make the shards that are missing, until `deadline` on the clock of `time.monotonic`.

        Returns:
            Whether all shards are there now; otherwise the time was up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = range(self.recipe.images // self.recipe.shard)
        for number in tqdm(numbers, desc="latents", unit="shard"):
            if self._is_there(number):
                continue
            if time.monotonic() >= deadline:
                return False
            write_state(self._file(number), self._encoded(number))
        return True

    def load(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All scaled latents, (N, C, h, w) float16, and the tokens of all captions, (N, L)."""
        files = [self._file(number) for number in range(self.recipe.images // self.recipe.shard)]
        shards = [torch.load(file) for file in files]
        latents, tokens = (torch.cat([shard[key] for shard in shards]) for key in ("latents", "tokens"))
        return latents.to(device), tokens.to(device)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.pt"

    def _is_there(self, number: int) -> bool:
        file = self._file(number)
        if not file.is_file():
            return False
        try:
            return torch.load(file, mmap=True)["vae_step"] == self.vae_step
        except Exception:  # there are errors of many classes for a file that is not as torch writes them
            return False

    def _encoded(self, number: int) -> dict:
        seed = seed_of(self.recipe.seed, "latents", number)
        images, captions = draw_images(self.recipe.world, self.recipe.shard, seed, self.vae.device)
        captions[::SHORTENED] = [caption.split(" over ")[0] for caption in captions[::SHORTENED]]
        if self.recipe.mirrored:  # no caption says which way round its picture is
            images, captions = torch.cat([images, images.flip(-1)]), 2 * captions
        latents = [validation.encode(self.vae, from_bytes(part)) for part in images.split(256)]
        return {
            "latents": torch.cat(latents).half().cpu(),
            "tokens": tokenized(self.tokenizer, captions),
            "vae_step": self.vae_step,
        }


def tokenized(tokenizer, captions: list[str]) -> Tensor:
    """Tokens of captions, (B, L) int16, padded to the length of the longest prompt that the tokenizer allows."""
    ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    return ids.input_ids.to(torch.int16)
