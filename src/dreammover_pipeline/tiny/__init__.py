# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint, a small Stable Diffusion at 128 px that runs the whole method offline in seconds.

Beside it are the drawn world that it was trained on, and the program that trained it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The checkpoint's folder, in plain diffusers layout; `DreamMoverPipeline.from_pretrained(CHECKPOINT)` loads it."""
