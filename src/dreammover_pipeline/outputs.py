# SPDX-License-Identifier: Apache-2.0
"""What the pipeline returns, and the forms its frames come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from .ranking import Chooser
from .records import BidirectionalFlow


@dataclass
class DreamMoverPipelineOutput(BaseOutput):
    """What `DreamMoverPipeline` returns; every field has one entry per pair, so `frames[0]` is the first pair's video.

    Args:
        frames: The frames of B pairs, in the form that `output_type` names: "pil" is lists of images; "np" is an array
            (B, F, H, W, 3) and "pt" a tensor (B, F, 3, H, W), both in [0, 1] on the CPU; "latent" is a tensor
            (B, F, C, h, w); "lazy" is `LazyFrames`, sequences of images each of which is made when it is asked for.
        flow: The `BidirectionalFlow` of each pair on its latent grid, in latent cells.
        nsfw_content_detected: For each pair, whether the safety checker flagged each frame (flagged frames are black);
            None without a safety checker. Of "lazy" frames it tells what is known so far.
        times: For each pair, the time δ of each frame; included inputs are at 0 and 1.
        candidates: For each pair, what frames were chosen among: `seen` and `chosen` by δ. None where every frame was
            made once.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor
    flow: list[BidirectionalFlow]
    nsfw_content_detected: list[list[bool]] | None
    times: list[tuple[float, ...]]
    candidates: list[Chooser | None] | None = None

    @property
    def blacked_out(self) -> int:
        """How many frames of the first pair the safety checker flagged and made black; 0 without a safety checker."""
        return sum(self.nsfw_content_detected[0]) if self.nsfw_content_detected else 0


def as_output(frame: torch.Tensor, output_type: str):
    """A frame (1, 3, H, W), uint8 or in [0, 1], as a list of one PIL image, an array (1, H, W, 3) or a tensor."""
    eight_bit = frame.dtype == torch.uint8
    if output_type == "pil":
        pixels = frame if eight_bit else frame.mul(255).round_().to(torch.uint8)  # few copies: a frame may be large
        return [PIL.Image.fromarray(pixels[0].movedim(0, -1).contiguous().cpu().numpy())]
    values = frame.to(torch.float32) / 255 if eight_bit else frame
    return values if output_type == "pt" else VaeImageProcessor.pt_to_numpy(values)


def joined(outputs: list[DreamMoverPipelineOutput]) -> DreamMoverPipelineOutput:
    """One output for several pairs, joined from an output for each; a single output is returned without a copy."""
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
    times = [output.times[0] for output in outputs]
    return DreamMoverPipelineOutput(frames, flow, flagged, times, joined_candidates(outputs))


def joined_candidates(outputs: Sequence[DreamMoverPipelineOutput]) -> list[Chooser | None] | None:
    """What frames of several outputs were chosen among, None where every frame was made once."""
    choosers = [None if output.candidates is None else output.candidates[0] for output in outputs]
    return None if all(chooser is None for chooser in choosers) else choosers


def hand_over(error: BaseException, join: Callable[[], DreamMoverPipelineOutput], parts: str) -> None:
    """Let an error that ends a call carry what the call had made by then, as the error's `output`.

    Args:
        error: What is raised.
        join: Function that returns the output of all parts before the one that failed. It may need memory that is not
            there; then the error carries nothing.
        parts: What the parts are, in the plural, for the error's note.
    """
    with suppress(RuntimeError, MemoryError):
        error.output = join()
        error.add_note(f"The {parts} before this one are not lost: this error's `output` holds their frames.")


def returned(output: DreamMoverPipelineOutput, return_dict: bool) -> DreamMoverPipelineOutput | tuple:
    """The output itself if `return_dict`, else the tuple of all its fields (`to_tuple` would leave out None)."""
    return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))
