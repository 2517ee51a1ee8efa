# SPDX-License-Identifier: Apache-2.0
"""Frames of a prepared pair: place → fuse → denoise → decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from .autoencoder import Autoencoder
from .conditioning import Conditions
from .ddim import predict_clean, recompose
from .detail import PairDetail, frame_sources, plan_detail, with_detail
from .framing import fit, unfit
from .fusion import (
    agreement_importance,
    fuse_direct,
    fuse_high_level,
    fuse_low_level,
    photometric_importance,
    select_unwarped,
)
from .images import rgb
from .inputs import frame_times
from .layout import holding_layout
from .outputs import DreamMoverPipelineOutput, as_output
from .paths import MotionPaths, motion_paths
from .preparing import Models, require_finite
from .progress import Stages
from .prompts import NegativeText
from .records import BidirectionalFlow, Canvas, FrameSources, FusedFrames, PreparedPair
from .sampling import denoise
from .settings import RenderSettings, VideoSettings
from .spacing import PREVIEWS, even_times
from .timing import EVEN, eased_times
from .tone import tone_difference, with_tone
from .turns import interruptible

FRAMES_FUSED_AT_ONCE = 8

# From (i, timestep, tensors) of a denoising step to the tensors that replace the step's own.
StepCallback = Callable[[int, int, dict], dict]
# From pictures (B, 3, H, W) to the same with what was flagged blacked out, and which were; None without a checker.
SafetyCheck = Callable[[torch.Tensor], tuple[torch.Tensor, list[bool] | None]]
# Is handed which photo every place of a frame comes from.
SourcesListener = Callable[[FrameSources], object]


@dataclass(frozen=True, eq=False)
class DenoisedFrames:
    """Frames of a pair that are made and not decoded yet.

    `latents` (F, C, h, w) are clean, `times` the δ of each; `clean_ends` (2, C, h, w) are the clean latents of the two
    photos and `images` the photos at the output size, as `fit_to_output` gives them. `paths` are the ways of the cells
    that the frames were made along, None if the frames were kept in a file, which holds no paths.
    """

    latents: torch.Tensor
    times: tuple[float, ...]
    clean_ends: torch.Tensor
    images: tuple[torch.Tensor, torch.Tensor]
    canvas: Canvas
    flow: BidirectionalFlow
    paths: MotionPaths | None = None


def render_latents(
    models: Models,
    pair: PreparedPair,
    settings: RenderSettings,
    paths: MotionPaths,
    negative: NegativeText,
    stages: Stages,
    on_step_end: StepCallback = lambda i, timestep, tensors: {},
    interrupted: Callable[[], bool] = lambda: False,
) -> DenoisedFrames:
    """Place the frames in time, fuse the pair for each of them and denoise them with attention to both photos.

    Args:
        models: What to do it with.
        pair: What `prepare_pair` returned.
        settings: Which frames, and how; `paths` are taken instead of those that `motion` names.
        paths: The way of every cell of both photos.
        negative: What guidance leads away from.
        stages: What is told of progress.
        on_step_end: Called after every denoising step.
        interrupted: Asked before every denoising step; where it says yes the frames stay as they are.

    Raises:
        RuntimeError: The UNet overflowed.
    """
    with interruptible():
        times = place_frames(pair, settings, settings.importance, paths)
    delta = torch.tensor(times, dtype=torch.float32, device="cpu")
    conditions = models.conditioner.frames(pair.prompt_embeds, delta, settings.guidance_scale > 1, negative)
    denoiser, inversion = models.denoiser, pair.inversion
    denoiser.guidance_scale = settings.guidance_scale
    with (
        denoiser.with_lora(pair.lora, pair.lora_scale),
        denoiser.frame_predictor(
            pair, conditions, settings.attention_blocks, settings.frame_batch_size
        ) as predict_noise,
        stages("Denoising", inversion.steps) as step,
    ):
        with interruptible():
            fused = fuse_pair(pair, delta, settings.fusion, settings.importance, paths, predict_noise)

        def on_step(i: int, timestep: int, latents: torch.Tensor) -> torch.Tensor:
            step()
            return _replaced(on_step_end(i, timestep, {"latents": latents, **vars(conditions)}), latents, conditions)

        held = holding_layout(predict_noise, fused, inversion.schedule, settings.layout_hold)
        latents = denoise(fused.latents, held, inversion.schedule, inversion.steps, on_step, interrupted)
    require_finite(latents, denoiser.unet.dtype)
    return DenoisedFrames(latents, times, inversion.path[0], pair.images, pair.canvas, pair.flow, paths)


def _replaced(replaced: dict, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Put what a step callback returned in the place of the embeddings, and return the latents to go on with."""
    for name in vars(conditions):
        setattr(conditions, name, replaced.get(name, getattr(conditions, name)))
    return replaced.get("latents", latents)


def place_frames(pair: PreparedPair, video: VideoSettings, importance: str, paths: MotionPaths) -> tuple[float, ...]:
    """The δ of the frames asked for; for even spacing previews of the pair are looked at, and no model runs.

    Args:
        pair: What `prepare_pair` returned.
        video: Which frames are asked for.
        importance: The splat metric of the previews.
        paths: The way of every cell of both photos in the previews.
    """
    if video.easing == EVEN:
        times = torch.linspace(0, 1, PREVIEWS, dtype=torch.float32, device="cpu")
        return even_times(video.n_frames, preview_pair(pair, times, importance, paths))
    linear = frame_times(video.n_frames, video.times)
    return eased_times(linear, video.easing) if video.times is None else linear


def preview_pair(pair: PreparedPair, times: torch.Tensor, importance: str, paths: MotionPaths) -> torch.Tensor:
    """What frames would be if nothing were redrawn: the pair's clean latents, warped and averaged. No model runs.

    Args:
        pair: What `prepare_pair` returned.
        times: δ, (F,), in [0, 1].
        importance: The splat metric.
        paths: The way of every cell of both photos.

    Returns:
        Clean latents (F, C, h, w); at 0 and 1 those of the two photos.
    """
    clean = pair.inversion.path[0]
    metric = splat_metric(importance, clean, pair.flow)
    previews, _ = piecewise(lambda t: fuse_high_level(clean, paths, metric, t), times)
    return previews


def fuse_pair(
    pair: PreparedPair,
    times: torch.Tensor,
    fusion: str,
    importance: str,
    paths: MotionPaths,
    predict_noise: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> FusedFrames:
    """Fuse the pair at step T for every δ. Source: DreamMover §3.3.

    Args:
        pair: What `prepare_pair` returned.
        times: δ, (F,).
        fusion: "two_level", "two_level_unwarped" or "direct".
        importance: The splat metric.
        paths: The way of every cell of both photos.
        predict_noise: ε of frames (F, C, h, w) at a timestep; only "two_level_unwarped" asks it.

    Returns:
        The frames' latents z^δ_T and the levels they are made of.
    """
    inversion, flow = pair.inversion, pair.flow
    noisy, alpha_bar = inversion.path[-1], inversion.alpha_bar
    clean = predict_clean(noisy, inversion.eps, alpha_bar)
    metric = splat_metric(importance, clean, flow)
    if fusion == "direct":
        latents, coverage = piecewise(lambda t: fuse_direct(noisy, paths, metric, t), times)
        return FusedFrames(latents, None, None, coverage, times)
    layout, coverage = piecewise(lambda t: fuse_high_level(clean, paths, metric, t), times)
    if fusion == "two_level":
        (eps,) = piecewise(lambda t: (fuse_low_level(inversion.eps, paths, metric, t),), times)
    else:
        (mixed,) = piecewise(lambda t: (select_unwarped(noisy, clean, flow, t),), times)
        eps = predict_noise(mixed, inversion.schedule.timestep(inversion.steps))
    return FusedFrames(recompose(layout, eps, alpha_bar), layout, eps, coverage, times)


def splat_metric(importance: str, clean: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """The splat metric (2, 1, h, w) of a name, "agreement" or "photometric"."""
    return agreement_importance(flow) if importance == "agreement" else photometric_importance(clean, flow)


def piecewise(function: Callable[[torch.Tensor], tuple], times: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply a fusion to a few times at once, so that its workspace does not grow with the number of frames."""
    return tuple(torch.cat(parts) for parts in zip(*map(function, times.split(FRAMES_FUSED_AT_ONCE)), strict=True))


def finish_frames(
    autoencoder: Autoencoder,
    frames: DenoisedFrames,
    settings: RenderSettings,
    output_type: str,
    check_safety: SafetyCheck,
    stages: Stages,
    on_sources: SourcesListener | None = None,
) -> DreamMoverPipelineOutput:
    """Decode frames one by one into the form asked for, with the photos at the ends where they are wanted.

    Args:
        autoencoder: Decodes.
        frames: What `render_latents` returned.
        settings: What detail frames have, whether the photos are wanted, and in what form.
        output_type: "pil", "np", "pt" or "latent".
        check_safety: Blacks out what the safety checker flags.
        stages: What is told of progress.
        on_sources: Called for every frame that takes detail from the photos, the ends aside; by default nothing is.

    Returns:
        A batch of one.

    Raises:
        torch.OutOfMemoryError: Memory does not suffice for a single frame; the error's `latents` are the frames'.
    """
    times = (0.0, *frames.times, 1.0) if settings.include_inputs else frames.times
    if output_type == "latent":
        ends = frames.clean_ends
        latents = torch.cat([ends[:1], frames.latents, ends[1:]]) if settings.include_inputs else frames.latents
        return DreamMoverPipelineOutput(latents[None], [frames.flow], None, [times])
    try:
        pictures, flagged = _decoded(autoencoder, frames, settings, output_type, check_safety, stages, on_sources)
    except torch.OutOfMemoryError as error:
        error.latents = frames.latents
        error.add_note("What was denoised is not lost: this error's `latents` are for `decode_latents`.")
        raise
    if output_type == "pil":
        video = [[picture for (picture,) in pictures]]
    else:
        video = (torch.cat if output_type == "pt" else np.concatenate)(pictures)[None]
    return DreamMoverPipelineOutput(video, [frames.flow], [flagged] if flagged else None, [times])


def _decoded(
    autoencoder: Autoencoder,
    frames: DenoisedFrames,
    settings: RenderSettings,
    output_type: str,
    check_safety: SafetyCheck,
    stages: Stages,
    on_sources: SourcesListener | None,
) -> tuple[list, list[bool]]:
    """The pictures of the video in their order, and the safety checker's verdict on each; none without a checker."""
    pictures, flagged = [], []
    from_photos, ends, tones = settings.detail == "photos", [image[None] for image in frames.images], []
    both = from_photos or settings.include_inputs
    canvas = frames.canvas
    working = torch.stack([fit(rgb(image), canvas) for image in frames.images]) if both else None
    with (
        stages("Decoding", len(frames.latents) + 2 * both) as step,
        autoencoder.decoder() as decode,
    ):

        def decoded(latent: torch.Tensor) -> torch.Tensor:
            picture = decode(latent).cpu()
            step()
            return picture

        copies = [decoded(latent) for latent in frames.clean_ends.split(1)] if both else []
        finish = partial(_upsampled, canvas)
        if from_photos:
            with interruptible():
                paths = frames.paths or motion_paths(frames.flow, settings.motion)
                pair = PairDetail.of(frames.images, working, torch.cat(copies), canvas, frames.flow, paths)
            dtype = torch.uint8 if output_type == "pil" else torch.float32
            finish = partial(_detailed, pair, dtype)
        if settings.include_inputs and settings.endpoints == "reconstructed":
            ends = [finish(copy, [], time) for copy, time in zip(copies, (0.0, 1.0), strict=True)]
        elif settings.include_inputs:
            tones = [
                tone_difference(photo[canvas.content], copy[canvas.content])
                for photo, copy in zip(working.split(1), copies, strict=True)
            ]
        if from_photos:
            finish = partial(finish, on_sources=on_sources)
        for latent, time in zip(frames.latents.split(1), frames.times, strict=True):
            picture = decoded(latent)
            with interruptible():
                picture = finish(picture, tones, time)
            picture, flags = check_safety(picture)
            pictures.append(as_output(picture, output_type))
            flagged += flags or []
    if settings.include_inputs:
        first, last = (as_output(end, output_type) for end in ends)
        pictures = [first, *pictures, last]
        flagged = [False, *flagged, False] if flagged else []
    return pictures, flagged


def _upsampled(canvas: Canvas, decoded: torch.Tensor, tones: list[torch.Tensor], time: float) -> torch.Tensor:
    """A decoded frame at the output size, (1, 3, H, W), with as much of the photos' tones as its time calls for."""
    return with_tone(unfit(decoded, canvas), tones, time)


def _detailed(
    pair: PairDetail,
    dtype: torch.dtype,
    decoded: torch.Tensor,
    tones: list[torch.Tensor],
    time: float,
    on_sources: SourcesListener | None = None,
) -> torch.Tensor:
    """What `_upsampled` gives, with the detail of the photos."""
    content, frame = pair.canvas.content, decoded.clone()
    frame[content] = with_tone(decoded[content], tones, time)
    plan = plan_detail(pair, frame[0], time)
    if on_sources is not None:
        on_sources(frame_sources(pair, plan, time))
    return with_detail(pair, frame[0], time, dtype, plan=plan)[None]
