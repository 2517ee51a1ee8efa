# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint: Stable Diffusion's architecture at 128 px, to run the whole method offline in seconds."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder in plain diffusers layout; `DreamMoverPipeline.from_pretrained(CHECKPOINT)` loads it."""
