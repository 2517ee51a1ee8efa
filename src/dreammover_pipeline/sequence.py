# SPDX-License-Identifier: Apache-2.0
"""Videos that lead through several photos: what holds for each gap between two neighbours, and their frames in a row.

n photos have n − 1 gaps; gap k lies between photos k and k + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from itertools import pairwise

import numpy as np
import torch

from .images import Photo, is_batch, load_images
from .inputs import check_integer
from .outputs import DreamMoverPipelineOutput

LORAS = ("gap", "shared")


def load_sequence(images: Sequence[Photo]) -> list[torch.Tensor]:
    """The photos of a sequence, (3, H, W) in [0, 1] each.

    Raises:
        TypeError, ValueError: an image cannot be had, or there are fewer than two.
    """
    if not is_batch(images):
        raise TypeError(f"`images` must be a list of photos, or an array with a leading axis, not {_short(images)}")
    photos = load_images(images, "images")
    if len(photos) < 2:
        raise ValueError(f"`images` must be at least two photos, but {len(photos)} came")
    return photos


def frames_of_gaps(n_frames: int | Sequence[int], gaps: int) -> list[int]:
    """How many frames every gap gets: one number for all, or one for each.

    Raises:
        TypeError, ValueError: a number is no integer of at least 1, or there are not as many as gaps.
    """
    if not isinstance(n_frames, (list, tuple)):
        check_integer("n_frames", n_frames, 1)
        return [n_frames] * gaps
    if len(n_frames) != gaps:
        raise ValueError(
            f"`n_frames` has {len(n_frames)} entries, but {gaps + 1} photos have {gaps} gap{'s' * (gaps > 1)}; "
            "give one number for all, or one for each gap"
        )
    for k, count in enumerate(n_frames):
        check_integer(f"n_frames[{k}]", count, 1)
    return list(n_frames)


def texts_of_gaps(
    prompt: str | Sequence[str] | None, prompt_embeds: torch.Tensor | None, photos: int, width: int
) -> list[dict]:
    """For every gap, what its two photos show: {"prompt": two strings} or {"prompt_embeds": (2, L, width)}.

    Args:
        prompt: one text for all photos, or one for each.
        prompt_embeds: (1, L, width) for all or (photos, L, width) instead.
        photos: how many there are.
        width: of the embeddings that the UNet reads.

    Raises:
        TypeError, ValueError: neither, both, or not what they may be.
    """
    if prompt_embeds is None:
        texts = [prompt] * photos if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`prompt` must be a string, or a list with one for each photo, not {prompt!r}")
        if len(texts) != photos:
            raise ValueError(
                f"`prompt` has {len(texts)} entries for {photos} photos; give one for all, or one for each"
            )
        return [{"prompt": both} for both in pairwise(texts)]
    if prompt:
        raise ValueError("pass `prompt` or `prompt_embeds`, not both")
    if not isinstance(prompt_embeds, torch.Tensor) or not prompt_embeds.is_floating_point():
        raise TypeError(f"`prompt_embeds` must be a floating point tensor, not {_short(prompt_embeds)}")
    shape = tuple(prompt_embeds.shape)
    if len(shape) != 3 or shape[0] not in (1, photos) or shape[2] != width:
        raise ValueError(
            f"`prompt_embeds` must be (1, L, {width}), or ({photos}, L, {width}) with one per photo; not {shape}"
        )
    embeds = prompt_embeds.expand(photos, -1, -1)
    return [{"prompt": None, "prompt_embeds": embeds[k : k + 2]} for k in range(photos - 1)]


def with_defaults(
    arguments: Mapping[str, object], parameters: Mapping[str, Parameter], excluded: Sequence[str]
) -> dict[str, object]:
    """A value for each parameter that has a default and is not excluded: what was given, else the default.

    Raises:
        TypeError: something was given that is no such parameter.
    """
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not Parameter.empty and name not in excluded
    }
    unknown = [name for name in arguments if name not in defaults]
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` is no argument of a sequence; allowed beside its own are {', '.join(defaults)}"
        )
    return {**defaults, **arguments}


def in_a_row(outputs: Sequence[DreamMoverPipelineOutput], photos_included: bool) -> DreamMoverPipelineOutput:
    """One video out of the gaps' videos; a photo that two of them share is kept as the end of the first of the two.

    Args:
        outputs: of each gap, in a batch of one.
        photos_included: whether they begin and end with their photos.

    Returns:
        `frames` and `nsfw_content_detected` with one entry, the video's; `flow` and `times` with one for each gap.
    """

    def joined(field: str) -> list:
        return [getattr(output, field)[0][int(photos_included and k > 0) :] for k, output in enumerate(outputs)]

    frames = joined("frames")
    if isinstance(frames[0], torch.Tensor):
        video = torch.cat(frames)[None]
    elif isinstance(frames[0], np.ndarray):
        video = np.concatenate(frames)[None]
    else:
        video = [[frame for gap in frames for frame in gap]]
    flagged = None
    if outputs[0].nsfw_content_detected is not None:
        flagged = [[flag for gap in joined("nsfw_content_detected") for flag in gap]]
    return DreamMoverPipelineOutput(video, [output.flow[0] for output in outputs], flagged, joined("times"))


def _short(value: object) -> str:
    return f"{type(value).__name__}" if isinstance(value, torch.Tensor | np.ndarray) else repr(value)
