# SPDX-License-Identifier: Apache-2.0
"""How many frames to denoise at once. Frames never see each other, so any number gives the same result."""

from __future__ import annotations

import torch

# Peak activations of one frame's UNet forward, in elements per latent cell and first-block channel: counted on the
# Stable Diffusion 1.5 UNet with fused attention, 65 MiB a frame in float16 at 512².
ELEMENTS_PER_CELL_CHANNEL = 26
CPU_FRAMES = 8  # on a CPU a bigger batch is no faster
SHARE_OF_FREE_MEMORY = 0.8
LARGEST_BATCH = 64


def free_memory(device: torch.device) -> int | None:
    """Bytes the device can still give, what torch holds in its cache included; None where nothing tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def affordable_frames(device: torch.device, cells: int, channels: int, dtype: torch.dtype) -> int:
    """Frames that fit one UNet forward, at least 1.

    Args:
        device: where the UNet runs.
        cells: latent cells h·w of a frame, twice that under guidance.
        channels: channels of the UNet's first block.
        dtype: the UNet's.
    """
    free = free_memory(device)
    if free is None:
        return CPU_FRAMES
    frame = ELEMENTS_PER_CELL_CHANNEL * cells * channels * dtype.itemsize
    return min(max(int(SHARE_OF_FREE_MEMORY * free / frame), 1), LARGEST_BATCH)


def split_evenly(count: int, largest: int) -> list[int]:
    """Sizes of the fewest batches of at most `largest`, as equal as can be: 32 by 20 is [16, 16], not [20, 12]."""
    batches = -(-count // largest)
    return [count // batches + (i < count % batches) for i in range(batches)]
