# SPDX-License-Identifier: Apache-2.0
"""How many frames go through the UNet at once, and what happens if memory runs out.

Frames never see each other, so the size of a batch does not change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Peak activations, as a number of elements for each latent cell and each channel of the UNet's first block, counted on
# the Stable Diffusion 1.5 UNet in float16 with fused attention. The forward pass of one frame takes 65 MiB at 512².
# The forward and backward pass of the LoRA fit on both images takes 1749 MiB at 512² (439 MiB with gradient
# checkpointing), of which 178 MiB, the weights that the LoRA has changed, do not grow with the image: so many elements
# for each two channels of the first block.
FRAME_ELEMENTS = 26
FIT_ELEMENTS = 628
CHANGED_WEIGHTS = 912
# The same for the VAE's decoder, for each pixel and each channel of its last block: 384 MiB for one image of 512².
DECODE_ELEMENTS = 6
LEADING_PHOTOS = 2  # the two photos, which go through the UNet ahead of the first batch of frames
CPU_FRAMES = 8  # frames in a batch on a CPU, where a bigger batch is no faster
CPU_DECODES = 1  # images decoded at once on a CPU
SHARE_OF_FREE_MEMORY = 0.8  # share of the free memory that activations are planned to take at most
LARGEST_BATCH = 64  # frames in a batch at most, however much memory is free
LARGEST_DECODE = 4  # images decoded at once at most, which then take no more memory than the LoRA fit
# Parts of the message with which a backend that has no exception for it reports that memory has run out: the CPU, MPS,
# and MPS for a single tensor that is too big.
OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory", "Invalid buffer size: ")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None on devices that do not tell.

    Torch's cache counts as free on CUDA; MPS counts it among what is taken.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def affordable_frames(
    device: torch.device, cells: int, channels: int, dtype: torch.dtype, weights_to_come: int = 0
) -> int:
    """How many frames fit into one forward pass of the UNet beside the two photos, at least 1.

    Args:
        device: The device that the UNet runs on.
        cells: Number h·w of latent cells in a frame, twice that number with guidance.
        channels: Number of channels of the UNet's first block.
        dtype: The UNet's dtype.
        weights_to_come: Bytes of weights that will be moved to the device before the UNet runs.
    """
    free = free_memory(device)
    if free is None:
        return CPU_FRAMES
    frame = FRAME_ELEMENTS * cells * channels * dtype.itemsize
    samples = int(SHARE_OF_FREE_MEMORY * (free - weights_to_come) / frame)
    return min(max(samples - LEADING_PHOTOS, 1), LARGEST_BATCH)


def affords_fit(device: torch.device, cells: int, channels: int, dtype: torch.dtype, weights_to_come: int = 0) -> bool:
    """Whether a LoRA fit on two images can keep its activations; if not, it needs gradient checkpointing.

    Args:
        device: The device that the UNet runs on.
        cells: Number h·w of latent cells in an image.
        channels: Number of channels of the UNet's first block.
        dtype: The UNet's dtype.
        weights_to_come: Bytes of weights that will be moved to the device before the UNet runs.

    Returns:
        True if the activations fit, and also on devices that do not tell how much memory is free.
    """
    free = free_memory(device)
    fit = (FIT_ELEMENTS * cells + CHANGED_WEIGHTS * channels) * channels * dtype.itemsize
    return free is None or fit <= SHARE_OF_FREE_MEMORY * (free - weights_to_come)


def affordable_decodes(device: torch.device, pixels: int, channels: int, dtype: torch.dtype) -> int:
    """How many images the VAE decodes at once, at least 1.

    Args:
        device: The device that the VAE runs on.
        pixels: Number H·W of pixels in an image.
        channels: Number of channels of the decoder's last block.
        dtype: The VAE's dtype.
    """
    free = free_memory(device)
    if free is None:
        return CPU_DECODES
    image = DECODE_ELEMENTS * pixels * channels * dtype.itemsize
    return min(max(int(SHARE_OF_FREE_MEMORY * free / image), 1), LARGEST_DECODE)


def split_evenly(count: int, largest: int) -> list[int]:
    """Split `count` frames into the fewest batches of at most `largest`, as equal as possible.

    For example, 32 frames in batches of at most 20 become [16, 16], not [20, 12].
    """
    batches = -(-count // largest)
    return [count // batches + (i < count % batches) for i in range(batches)]


class Batches:
    """Applies a function to many frames in batches; when memory runs out, all further batches are half as large.

    Args:
        largest: Largest number of frames in a batch. The attribute of this name is lowered when memory runs out.
    """

    def __init__(self, largest: int):
        self.largest = largest

    def map(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor | None) -> torch.Tensor:
        """Concatenate the results of `function` on slices of the tensors along their first axis.

        When memory runs out, batches that are already done are not computed again.

        Args:
            function: Function called with one slice (B, …) of each tensor, and with None in the place of a tensor that
                is None.
            tensors: Tensors (F, …) with one entry per frame, or None; the first one is not None.

        Raises:
            RuntimeError: Memory does not suffice for a single frame. Other errors of `function` are not caught either.
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
            # After the `except` block the error is gone, and with its traceback the tensors of the failed forward.
            free_cache(tensors[0].device)
            self.largest = -(-size // 2)
        return torch.cat(results)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a GPU or the CPU has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@contextmanager
def advice_on_out_of_memory(doing: str) -> Iterator[None]:
    """Have an out-of-memory error raised inside the context say what was being done, and what to try instead.

    Args:
        doing: What was being done, to follow "out of memory" in the message, such as "in the LoRA fit".

    Raises:
        torch.OutOfMemoryError: The code inside the context ran out of memory; the backend's error is its cause.
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
    """Free the memory that torch keeps in its cache on a device; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
