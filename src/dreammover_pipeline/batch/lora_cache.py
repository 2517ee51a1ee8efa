# SPDX-License-Identifier: Apache-2.0
"""Fitted LoRAs in a folder, each under a digest of everything that decides it and never under a name."""

from __future__ import annotations

from pathlib import Path

import torch

from ..arguments import arguments_of
from ..settings import FitSettings
from ..storage import digest_of, digest_of_tensors, read_tensors, write_tensors
from .jobs import Job


class LoraCache:
    """A folder of LoRAs that several processes may read and write at once.

    Args:
        folder: The folder. It is made where it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """The LoRA of a key that `cache_key` gave; None if its file is missing, cut off, damaged or altered."""
        return read_tensors(self._path(key))

    def save(self, key: str, weights: dict[str, torch.Tensor]) -> None:
        """Keep a LoRA under the key that `cache_key` gives. Its file appears whole or not at all."""
        write_tensors(self._path(key), weights)

    def _path(self, key: str) -> Path:
        """The file of the LoRA of a key."""
        return self.folder / f"{key}.safetensors"


def cache_key(job: Job, pixels: torch.Tensor, fingerprint: str, stack: dict[str, object]) -> str:
    """A digest of everything that decides a pair's LoRA to the last bit.

    Args:
        job: The job, whose prompt, seed and settings of the fit count.
        pixels: The two photos as the models see them, (2, 3, H, W).
        fingerprint: What `DreamMoverPipeline.pair_fingerprint` says of the checkpoint.
        stack: What `stack_of` says of the pipeline.
    """
    decisive = {*arguments_of(FitSettings), "prompt", "seed"}
    settings = {name: value for name, value in job.settings.items() if name in decisive}
    return digest_of([digest_of_tensors([pixels]), settings, fingerprint, stack])
