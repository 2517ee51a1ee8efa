# SPDX-License-Identifier: Apache-2.0
"""What the pipeline returns, and the forms its frames come in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from .records import BidirectionalFlow


@dataclass
class DreamMoverPipelineOutput(BaseOutput):
    """What `DreamMoverPipeline` returns; every field has one entry per pair, so `frames[0]` is the video of a pair.

    Args:
        frames: by `output_type`: "pil" lists of images, "np" (B, F, H, W, 3) and "pt" (B, F, 3, H, W) in [0, 1] on
            the CPU, "latent" (B, F, C, h, w).
        flow: the `BidirectionalFlow` of each pair, on its latent grid in latent cells.
        nsfw_content_detected: for each pair, the safety checker's verdict on each frame (flagged frames are black);
            None without a safety checker.
        times: for each pair, the δ of each frame, 0 and 1 for included inputs.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor
    flow: list[BidirectionalFlow]
    nsfw_content_detected: list[list[bool]] | None
    times: list[tuple[float, ...]]


def as_output(frame: torch.Tensor, output_type: str):
    """A frame (1, 3, H, W) as [PIL image], array (1, H, W, 3) or tensor (1, 3, H, W)."""
    if output_type == "pt":
        return frame
    array = VaeImageProcessor.pt_to_numpy(frame)
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)


def joined(outputs: list[DreamMoverPipelineOutput]) -> DreamMoverPipelineOutput:
    """The output of several pairs, made of one output each; a single one is passed on, its frames not copied."""
    if len(outputs) == 1:
        return outputs[0]
    frames = [output.frames for output in outputs]
    if isinstance(frames[0], list):
        frames = [video for batch in frames for video in batch]
    else:
        frames = (torch.cat if isinstance(frames[0], torch.Tensor) else np.concatenate)(frames)
    flow = [output.flow[0] for output in outputs]
    flagged = [output.nsfw_content_detected for output in outputs]
    flagged = None if flagged[0] is None else [flags for batch in flagged for flags in batch]
    return DreamMoverPipelineOutput(frames, flow, flagged, [output.times[0] for output in outputs])


def returned(output: DreamMoverPipelineOutput, return_dict: bool) -> DreamMoverPipelineOutput | tuple:
    """The output as it was asked for: itself, or the tuple of its fields (`to_tuple` would leave out None)."""
    return output if return_dict else (output.frames, output.flow, output.nsfw_content_detected, output.times)
