# SPDX-License-Identifier: Apache-2.0
"""Fitted LoRAs, kept under a digest of everything that decides them and never under a name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..arguments import arguments_of
from ..settings import FitSettings
from ..storage import digest_of
from .jobs import Job


class LoraCache:
    """A folder of LoRAs that several processes may read and write at once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The LoRA of a key; None if its file is missing or cut off."""
        try:
            weights = load_file(self._path(key))
        except (OSError, SafetensorError):
            return None
        # What safetensors loads are views of the file, at addresses that depend on its header. Some processors compute
        # with other kernels, which round otherwise, where an address is no multiple of 64, as torch's own all are; in
        # memory of their own the weights act to the bit as those that were fitted.
        return {name: weight.clone() for name, weight in weights.items()}

    def save(self, key: str, weights: dict[str, torch.Tensor], owner: str) -> None:
        """Keep a LoRA; its file appears whole or not at all.

        Args:
            key: as `lora_key` gives it.
            weights: as `PreparedPair.lora` holds them.
            owner: what no other process has at this moment; what a kill leaves is overwritten by the owner's next.
        """
        temporary = self.folder / f".{digest_of(owner)[:16]}"
        try:
            with temporary.open("wb") as file:
                file.write(save({name: weight.cpu().contiguous() for name, weight in weights.items()}))
                file.flush()
                os.fsync(file.fileno())  # a whole length of zeros after a power cut would load
            os.replace(temporary, self._path(key))
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def lora_key(job: Job, pixels: torch.Tensor, fingerprint: str, stack: dict[str, object]) -> str:
    """A digest of what decides a pair's LoRA, to the last bit.

    Args:
        job: for its prompt, its seed and how the LoRA is to be fitted.
        pixels: the two images as the models see them, (2, 3, H, W).
        fingerprint: of the checkpoint.
        stack: on what the pipeline runs.
    """
    decisive = {*arguments_of(FitSettings), "prompt", "seed"}
    settings = {name: value for name, value in job.settings.items() if name in decisive}
    content = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
    return digest_of([content, list(pixels.shape), settings, fingerprint, stack])
