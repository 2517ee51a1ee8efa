# SPDX-License-Identifier: Apache-2.0
"""How much goes through the UNet at once, and what happens where that was too much.

Frames never see each other, so any number of them gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Peak activations in elements per latent cell and first-block channel, counted on the Stable Diffusion 1.5 UNet in
# float16 with fused attention: of one frame's forward, 65 MiB at 512²; of the LoRA fit's forward and backward on both
# images, 2046 MiB at 512² (495 with gradient checkpointing). In float32 the fit takes 1.5 times that, not twice.
FRAME_ELEMENTS = 26
FIT_ELEMENTS = 818
CPU_FRAMES = 8  # on a CPU a bigger batch is no faster
SHARE_OF_FREE_MEMORY = 0.8
LARGEST_BATCH = 64
# How backends without an exception of their own say it: CPU, MPS, and MPS for a single tensor that is too big.
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory", "Invalid buffer size: ")


def free_memory(device: torch.device) -> int | None:
    """Bytes the device can still give, what torch holds in its cache included; None where nothing tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def affordable_frames(
    device: torch.device, cells: int, channels: int, dtype: torch.dtype, weights_to_come: int = 0
) -> int:
    """Frames that fit one UNet forward, at least 1.

    Args:
        device: where the UNet runs.
        cells: latent cells h·w of a frame, twice that under guidance.
        channels: channels of the UNet's first block.
        dtype: the UNet's.
        weights_to_come: bytes of weights that will be moved to the device before it runs.
    """
    free = free_memory(device)
    if free is None:
        return CPU_FRAMES
    frame = FRAME_ELEMENTS * cells * channels * dtype.itemsize
    return min(max(int(SHARE_OF_FREE_MEMORY * (free - weights_to_come) / frame), 1), LARGEST_BATCH)


def affords_fit(device: torch.device, cells: int, channels: int, dtype: torch.dtype, weights_to_come: int = 0) -> bool:
    """Whether a LoRA fit on two images can keep its activations; if not, it needs gradient checkpointing.

    Args are those of `affordable_frames`. True where nothing tells the free memory.
    """
    free = free_memory(device)
    fit = FIT_ELEMENTS * cells * channels * dtype.itemsize
    return free is None or fit <= SHARE_OF_FREE_MEMORY * (free - weights_to_come)


def split_evenly(count: int, largest: int) -> list[int]:
    """Sizes of the fewest batches of at most `largest`, as equal as can be: 32 by 20 is [16, 16], not [20, 12]."""
    batches = -(-count // largest)
    return [count // batches + (i < count % batches) for i in range(batches)]


class Batches:
    """Applies a function to many frames in batches that fit; where memory runs out, batches are halved from then on.

    Args:
        largest: frames in a batch, at most; holds the size found.
    """

    def __init__(self, largest: int):
        self.largest = largest

    def map(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> torch.Tensor:
        """Concatenated results of `function` on slices of the tensors' first axes. What is done is not done again.

        Args:
            function: called with one slice (B, …) of each tensor, None where that is None.
            tensors: (F, …) each; the first one is not None.

        Raises:
            RuntimeError: memory does not suffice for one frame; other errors pass likewise.
        """
        results, done, frames = [], 0, len(tensors[0])
        while done < frames:
            size = split_evenly(frames - done, self.largest)[0]
            batch = [None if tensor is None else tensor[done : done + size] for tensor in tensors]
            try:
                results.append(function(*batch))
                done += size
                continue
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Only out here is the error gone, and with its traceback the tensors of the forward that failed.
            free_cache(tensors[0].device)
            self.largest = -(-size // 2)
        return torch.cat(results)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def advice_on_out_of_memory(doing: str) -> Iterator[None]:
    """An out-of-memory error that passes says what was being done, and what to try.

    Raises:
        torch.OutOfMemoryError: instead of whatever the backend raised, from it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"out of memory {doing}; try a smaller `height` and `width`, a lower precision (dtype=torch.float16), "
            "or pipe.enable_model_cpu_offload()"
        ) from error


def free_cache(device: torch.device) -> None:
    """Give back what torch holds on a device without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
