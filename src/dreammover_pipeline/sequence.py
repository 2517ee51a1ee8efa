# SPDX-License-Identifier: Apache-2.0
"""Videos that lead through several photos: what holds for each gap between two neighbours, and their frames in a row.

n photos have n − 1 gaps; gap k lies between photos k and k + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from .images import Photo, decode_images, is_batch
from .inputs import check_integer
from .kept_gaps import KeptGaps
from .outputs import DreamMoverPipelineOutput, hand_over, joined_candidates
from .pairs import (
    ModelSizes,
    PairInput,
    check_generator,
    flows_of_pairs,
    poses_of_pairs,
    steering_of_pairs,
)
from .prompts import PairText, check_embeds, pair_negatives
from .records import PreparedPair
from .rendering import DenoisedFrames
from .settings import Content, NegativeContent, arguments

LORAS = ("gap", "shared")
OWN_ARGUMENTS = ("prompt", "n_frames", "include_inputs", "return_dict")  # named in the signature of a sequence itself


@dataclass(frozen=True)
class GapStages:
    """What the pipeline does with gaps: it fits one LoRA for all, and makes of each a prepared pair, latents, frames.

    `fit_shared` is None where every gap has a LoRA of its own, or none has any. `finish_needs_pair` says whether a
    prepared pair is needed to make frames of latents, too.
    """

    fit_shared: Callable[[], dict[str, torch.Tensor]] | None
    prepare: Callable[[PairInput, dict[str, torch.Tensor] | None], PreparedPair]
    render: Callable[[int, PreparedPair], DenoisedFrames]
    finish: Callable[[int, DenoisedFrames], DreamMoverPipelineOutput]
    finish_needs_pair: bool


def make_gaps(
    gaps: Sequence[PairInput],
    stages: GapStages,
    kept: KeptGaps,
    interrupted: Callable[[], bool],
    photos_included: bool,
) -> DreamMoverPipelineOutput:
    """Make every gap that is not kept already, and put the frames of all in a row.

    Args:
        gaps: The gaps, in their order.
        stages: What is done with each of the gaps.
        kept: What earlier calls have done and this one does.
        interrupted: Function asked after every gap; where it says yes the rest is left out.
        photos_included: Whether the frames of a gap begin and end with its photos.

    Raises:
        Exception, KeyboardInterrupt: A gap could not be made. If there were any before it, the error's `output` holds
            their frames.
    """
    shared = None if stages.fit_shared is None else _kept_or_fitted(kept, stages.fit_shared)
    outputs = []
    try:
        for k, gap in enumerate(gaps):
            frames = kept.frames(k, gap)
            if frames is None or stages.finish_needs_pair:
                lora = kept.lora(k) if shared is None else shared
                pair = stages.prepare(gap, lora)
                if lora is None:
                    kept.keep_lora(k, pair.lora)
            if frames is None:
                frames = stages.render(k, pair)
                if not interrupted():
                    kept.keep_frames(k, frames)
            elif stages.finish_needs_pair:
                frames = replace(frames, pair=pair)
            outputs.append(stages.finish(k, frames))
            if interrupted():
                break
    except (Exception, KeyboardInterrupt) as error:
        error.gap = len(outputs)
        if outputs:
            hand_over(error, lambda: in_a_row(outputs, photos_included), "gaps")
        raise
    return in_a_row(outputs, photos_included)


def _kept_or_fitted(kept: KeptGaps, fit: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The LoRA that all gaps share, which is kept under the key of the first."""
    weights = kept.lora(0)
    if weights is None:
        weights = fit()
        kept.keep_lora(0, weights)
    return weights


def checked_gaps(
    images: Sequence[Photo],
    content: Content,
    negative: NegativeContent,
    sizes: ModelSizes,
    shared: bool,
) -> list[PairInput]:
    """The gaps of a sequence as pairs without seeds, all on the canvas of the first photo.

    Args:
        images: The photos, in order.
        content: The prompt of all photos or one for each, points and masks of every gap, and so on.
        negative: What guidance leads away from in every gap.
        sizes: What of the models decides the form of photos and texts.
        shared: Whether one LoRA is fitted to all photos, and so one seed is for all gaps.

    Raises:
        TypeError, ValueError: An argument is not what it may be.
    """
    photos = load_sequence(images)
    both = list(pairwise(photos))
    texts = texts_of_gaps(content.prompt, content.prompt_embeds, len(photos), sizes.text_width)
    (away,) = pair_negatives(negative.negative_prompt, negative.negative_prompt_embeds, 1, sizes.text_width)
    canvas = sizes.canvas(photos[0], content.height, content.width)
    steerings = steering_of_pairs(content, both, [canvas] * len(both), sizes.cell, True)
    flows = flows_of_pairs(content, both, [canvas] * len(both), sizes.cell, True)
    fits = 1 if shared else len(both)
    if shared and isinstance(content.generator, list | tuple) and len(content.generator) != 1:
        raise ValueError(
            f"`generator` has {len(content.generator)} entries, but one LoRA is fitted; give one generator"
        )
    check_generator(content.generator, fits)
    poses = poses_of_pairs(content, both, [canvas] * len(both), True)
    columns = zip(both, texts, steerings, flows, poses, strict=True)
    return [PairInput(two, canvas, text, away, *others) for two, text, *others in columns]


def load_sequence(images: Sequence[Photo]) -> list[torch.Tensor]:
    """The photos of a sequence, decoded.

    Raises:
        TypeError, ValueError: A photo cannot be had, or there are fewer than two.
    """
    if not is_batch(images):
        raise TypeError(f"`images` must be a list of photos, or an array with a leading axis, not {_short(images)}")
    photos = decode_images(images, "images")
    if len(photos) < 2:
        raise ValueError(f"`images` must be at least two photos, but {len(photos)} came")
    return photos


def frames_of_gaps(n_frames: int | Sequence[int], gaps: int) -> list[int]:
    """How many frames every gap gets, from one number for all or one for each.

    Raises:
        TypeError, ValueError: A number is no integer of at least 1, or there are not as many as gaps.
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
) -> list[PairText]:
    """What the two photos of every gap show.

    Args:
        prompt: One text for all photos, or one for each.
        prompt_embeds: Text embeddings to use instead of `prompt`, (1, L, width) for all photos or (photos, L, width)
            with one for each.
        photos: How many photos there are.
        width: The length of a token's embedding.

    Raises:
        TypeError, ValueError: Neither prompts nor embeddings came, or both, or they are not what they may be.
    """
    if prompt_embeds is None:
        texts = [prompt] * photos if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`prompt` must be a string, or a list with one for each photo, not {prompt!r}")
        if len(texts) != photos:
            raise ValueError(
                f"`prompt` has {len(texts)} entries for {photos} photos; give one for all, or one for each"
            )
        return [PairText(both) for both in pairwise(texts)]
    if prompt:
        raise ValueError("pass `prompt` or `prompt_embeds`, not both")
    check_embeds("prompt_embeds", prompt_embeds)
    shape = tuple(prompt_embeds.shape)
    if len(shape) != 3 or shape[0] not in (1, photos) or shape[2] != width:
        raise ValueError(
            f"`prompt_embeds` must be (1, L, {width}), or ({photos}, L, {width}) with one per photo; not {shape}"
        )
    embeds = prompt_embeds.expand(photos, -1, -1)
    return [PairText(embeds=embeds[k : k + 2]) for k in range(photos - 1)]


def check_arguments_of_a_sequence(given: Mapping[str, object]) -> None:
    """Raise TypeError if something is given that is no argument of a sequence beside those of its own signature."""
    allowed = [name for name in arguments() if name not in OWN_ARGUMENTS]
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` is no argument of a sequence; allowed beside its own are {', '.join(allowed)}"
        )


def in_a_row(outputs: Sequence[DreamMoverPipelineOutput], photos_included: bool) -> DreamMoverPipelineOutput:
    """One video out of the gaps' videos; a photo that two of them share is kept as the end of the first of the two.

    Args:
        outputs: The output of each gap, a batch of one.
        photos_included: Whether the frames of a gap begin and end with its photos.

    Returns:
        `frames` and `nsfw_content_detected` with one entry, the video's; `flow` and `times` with one for each gap.
    """

    def joined(field: str) -> list:
        return [getattr(output, field)[0][int(photos_included and k > 0) :] for k, output in enumerate(outputs)]

    frames, flagged = joined("frames"), None
    if outputs[0].nsfw_content_detected is not None:
        flagged = [[flag for gap in joined("nsfw_content_detected") for flag in gap]]
    if isinstance(frames[0], torch.Tensor):
        video = torch.cat(frames)[None]
    elif isinstance(frames[0], np.ndarray):
        video = np.concatenate(frames)[None]
    elif isinstance(frames[0], list):
        video = [[frame for gap in frames for frame in gap]]
    else:  # frames that are made when they are asked for, and know then which of them are flagged
        video = [sum(frames[1:], frames[0])]
        flagged = flagged and [video[0].flags]
    flow, candidates = [output.flow[0] for output in outputs], joined_candidates(outputs)
    return DreamMoverPipelineOutput(video, flow, flagged, joined("times"), candidates)


def _short(value: object) -> str:
    return type(value).__name__ if isinstance(value, torch.Tensor | np.ndarray) else repr(value)
