# SPDX-License-Identifier: Apache-2.0
"""Frames of a prepared pair, up to clean latents: place → fuse → denoise; or, in noise, place → mix → denoise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from .affine import Affine
from .branching import generations, interpolate_in_noise, steps_of_generations
from .conditioning import Conditions
from .control import ControlPicture, FrameControl, frame_control
from .ddim import predict_clean, recompose
from .denoiser import Denoiser
from .fusion import (
    agreement_importance,
    fuse_direct,
    fuse_high_level,
    fuse_low_level,
    photometric_importance,
    select_unwarped,
)
from .layout import holding_layout
from .models import Models, require_finite
from .outputs import as_output
from .paths import MotionPaths, motion_paths
from .progress import Stages
from .prompts import NegativeText
from .ranking import Chooser
from .records import BidirectionalFlow, Canvas, FusedFrames, PreparedPair
from .sampling import AfterStep, PredictNoise, denoise
from .settings import RenderSettings, VideoSettings
from .spacing import PREVIEWS, even_times
from .turns import interruptible

FRAMES_FUSED_AT_ONCE = 8

# A function from (i, timestep, tensors) of a denoising step to the tensors that replace the step's own.
StepCallback = Callable[[int, int, dict], dict]


@dataclass(frozen=True, eq=False)
class FramesAsked:
    """What a call says of the frames of one pair: which, how they are made, and of what beside the pair.

    `settings` are those of all pairs; `negative` is what guidance leads away from, and where it is nothing, what was
    fitted to the pair takes its place; `seed` decides the noise of frames that are made in noise; `picture` is what
    the ControlNet is given at each time, None to leave it out.
    """

    settings: RenderSettings
    negative: NegativeText
    seed: int | None = None
    picture: ControlPicture | None = None


@dataclass(frozen=True, eq=False)
class DenoisedFrames:
    """Frames of a pair that are made and not decoded yet.

    `latents` (F, C, h, w) are clean, `times` the δ of each; `clean_ends` (2, C, h, w) are the clean latents of the two
    photos and `images` the photos at the output size, as `fit_to_output` gives them. `pair` is what the frames lie
    between, None if they were kept in a file, which does not hold it; `paths` are the ways of the cells by which
    detail is looked up, None for those that follow from the flow. `candidates` holds what they were chosen among, None
    where every frame was made once.
    """

    latents: torch.Tensor
    times: tuple[float, ...]
    clean_ends: torch.Tensor
    images: tuple[torch.Tensor, torch.Tensor]
    canvas: Canvas
    flow: BidirectionalFlow
    pair: PreparedPair | None = None
    paths: MotionPaths | None = None
    candidates: list[Chooser] | None = None


def render_latents(
    models: Models,
    pair: PreparedPair,
    asked: FramesAsked,
    stages: Stages,
    on_step_end: StepCallback = lambda i, timestep, tensors: {},
    interrupted: Callable[[], bool] = lambda: False,
    chooser: Chooser | None = None,
    copy_embeddings: bool = False,
    paths: MotionPaths | None = None,
) -> DenoisedFrames:
    """Place the frames in time and make them, by the method that is asked for.

    Args:
        models: The models that make the frames.
        pair: What `prepare_pair` returned.
        asked: Which frames are made, and how.
        stages: What is told of progress.
        on_step_end: Function called after every denoising step.
        interrupted: Function asked before every denoising step; where it says yes the frames stay as they are.
        chooser: What chooses among the candidates of each frame; None where every frame is made once.
        copy_embeddings: Whether the frames have embeddings of their own, which `on_step_end` may change in place;
            otherwise the embeddings of all frames may lie in the same memory, which may be the pair's.
        paths: The way of every cell of both photos through time; None for the one that the settings' `motion` names,
            which is found out where it is needed.

    Raises:
        RuntimeError: The UNet overflowed.
    """
    settings, negative = asked.settings, asked.negative

    @cache
    def ways() -> MotionPaths:
        return motion_paths(pair.flow, settings.motion) if paths is None else paths

    with interruptible():
        times = place_frames(pair, settings, settings.importance, ways)
    negative = negative_of(pair, negative)
    delta = torch.tensor(times, dtype=torch.float32, device="cpu")
    conditions = models.conditioner.frames(pair.prompt_embeds, delta, settings.guidance_scale > 1, negative)
    if copy_embeddings:
        conditions = conditions.copied()
    models.denoiser.guidance_scale = settings.guidance_scale
    control = None
    if asked.picture is not None:
        window = (settings.control_guidance_start, settings.control_guidance_end)
        scale = settings.controlnet_conditioning_scale
        with interruptible():
            control = frame_control(asked.picture, times, scale, window, pair.prompt_embeds)
    total = denoising_steps(settings.method, pair, times, settings.noise_levels)
    with models.denoiser.with_lora(pair.lora, pair.lora_scale), stages("Denoising", total) as step:

        def on_step(i: int, timestep: int, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
            step()
            return _replaced(on_step_end(i, timestep, {"latents": latents, **vars(conditions)}), latents, conditions)

        if settings.method == "noise":
            latents = _in_noise(
                models, pair, settings, times, conditions, control, asked.seed, chooser, on_step, interrupted
            )
        else:
            latents = _along_flow(
                models.denoiser, pair, settings, delta, ways, conditions, control, on_step, interrupted
            )
    require_finite(latents, models.denoiser.dtype)
    candidates = None if chooser is None else [chooser]
    ends = pair.inversion.path[0]
    return DenoisedFrames(latents, times, ends, pair.images, pair.canvas, pair.flow, pair, candidates=candidates)


def negative_of(pair: PreparedPair, asked: NegativeText) -> NegativeText:
    """What guidance leads a pair's frames away from: what is asked for, or else the embeddings fitted to the pair."""
    if pair.negative_embeds is None or asked.prompt is not None or asked.embeds is not None:
        return asked
    return replace(asked, embeds=pair.negative_embeds)


def denoising_steps(method: str, pair: PreparedPair, times: tuple[float, ...], levels: tuple[float, float]) -> int:
    """How many denoising steps the frames of a pair take, however many frames each of them is for."""
    if method == "flow":
        return pair.inversion.steps
    return sum(steps_of_generations(len(generations(times)), levels, len(pair.inversion.schedule.timesteps)))


# A function from (i, timestep, latents, conditions) of a denoising step to the latents to go on with.
OnStep = Callable[[int, int, torch.Tensor, Conditions], torch.Tensor]


def _in_noise(
    models: Models,
    pair: PreparedPair,
    settings: RenderSettings,
    times: tuple[float, ...],
    conditions: Conditions,
    control: FrameControl | None,
    seed: int,
    chooser: Chooser | None,
    on_step: OnStep,
    interrupted: Callable[[], bool],
) -> torch.Tensor:
    """Make the frames from the middle outwards. Source: arXiv 2307.12560, §3."""

    @contextmanager
    def at_work(frames: list[int], steps: int) -> Iterator[tuple[PredictNoise, AfterStep]]:
        own = conditions.selected(frames)
        pictures = None if control is None else control.selected(frames)
        with models.denoiser.frame_predictor(pair, own, (), settings.frame_batch_size, pictures, steps) as predict:
            yield predict, lambda i, timestep, latents: on_step(i, timestep, latents, own)

    def choose(time: float, candidates: torch.Tensor) -> int:
        if chooser is None:
            return 0
        decoded = [models.autoencoder.decode(latent)[pair.canvas.content] for latent in candidates.split(1)]
        return chooser.choose(time, [picture for frame in decoded for picture in as_output(frame, "pil")])

    return interpolate_in_noise(
        pair.inversion.path[0],
        times,
        at_work,
        pair.inversion.schedule,
        settings.noise_levels,
        seed,
        interrupted,
        settings.candidates,
        choose,
        Affine.of(settings.affine),
    )


def _along_flow(
    denoiser: Denoiser,
    pair: PreparedPair,
    settings: RenderSettings,
    delta: torch.Tensor,
    ways: Callable[[], MotionPaths],
    conditions: Conditions,
    control: FrameControl | None,
    on_step: OnStep,
    interrupted: Callable[[], bool],
) -> torch.Tensor:
    """Fuse the pair for each frame and denoise them with attention to both photos.

    Source: DreamMover §3.3 and §3.4.
    """
    inversion = pair.inversion
    with denoiser.frame_predictor(
        pair, conditions, settings.attention_blocks, settings.frame_batch_size, control
    ) as predict_noise:
        with interruptible():
            fused = fuse_pair(pair, delta, settings.fusion, settings.importance, ways(), predict_noise)
        held = holding_layout(predict_noise, fused, inversion.schedule, settings.layout_hold)
        return denoise(
            fused.latents,
            held,
            inversion.schedule,
            inversion.steps,
            lambda i, timestep, latents: on_step(i, timestep, latents, conditions),
            interrupted,
        )


def _replaced(replaced: dict, latents: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Put what a step callback returned in the place of the embeddings, and return the latents to go on with.

    Raises:
        TypeError, ValueError: What it returned is no tensor, or has another shape than what it is to replace.
    """
    before = {"latents": latents, **vars(conditions)}
    now = before | {name: _in_place_of(before[name], replaced[name], name) for name in before if name in replaced}
    latents = now.pop("latents")
    for name, tensor in now.items():
        setattr(conditions, name, tensor)
    return latents


def _in_place_of(before: torch.Tensor | None, tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
    """A tensor of this name that a step callback returned, in the precision and on the device of the one before.

    None in the place of the negative embeddings ends guidance.
    """
    if tensor is before or (tensor is None and name == "negative_prompt_embeds"):
        return tensor
    if before is None or not isinstance(tensor, torch.Tensor):
        wanted = "None" if before is None else "a tensor"
        raise TypeError(f"`callback_on_step_end` must return {wanted} as {name!r}, not {type(tensor).__name__}")
    if name != "latents" and tensor.shape == before[:1].shape:  # diffusers' callbacks return one for all samples
        tensor = tensor.expand_as(before)
    if tensor.shape != before.shape:
        raise ValueError(
            f"`callback_on_step_end` must return {name!r} as {tuple(before.shape)}, not {tuple(tensor.shape)}"
        )
    return tensor.to(before)


def place_frames(
    pair: PreparedPair, video: VideoSettings, importance: str, ways: Callable[[], MotionPaths]
) -> tuple[float, ...]:
    """The δ of the frames asked for; for even spacing previews of the pair are looked at, and no model runs.

    Args:
        pair: What `prepare_pair` returned.
        video: Which frames are asked for.
        importance: The name of the splat metric of the previews, "agreement" or "photometric".
        ways: Function that gives the way of every cell of both photos through time; it is asked where there are
            previews.
    """
    if video.known_times is not None:
        return video.known_times
    times = torch.linspace(0, 1, PREVIEWS, dtype=torch.float32, device="cpu")
    return even_times(video.n_frames, preview_pair(pair, times, importance, ways()))


def preview_pair(pair: PreparedPair, times: torch.Tensor, importance: str, paths: MotionPaths) -> torch.Tensor:
    """What frames would be if nothing were redrawn: the pair's clean latents, warped and averaged. No model runs.

    Args:
        pair: What `prepare_pair` returned.
        times: The δ of each frame, (F,), in [0, 1].
        importance: The name of the splat metric, "agreement" or "photometric".
        paths: The way of every cell of both photos through time.

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
        times: The δ of each frame, (F,), in [0, 1].
        fusion: How the pair is fused: "two_level", "two_level_unwarped" or "direct".
        importance: The name of the splat metric, "agreement" or "photometric".
        paths: The way of every cell of both photos through time.
        predict_noise: Function from latents (F, C, h, w) and a timestep to their noise ε; only "two_level_unwarped"
            asks it.

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
        (mixed,) = piecewise(lambda t: (select_unwarped(noisy, flow, t),), times)
        eps = predict_noise(mixed, inversion.schedule.timestep(inversion.steps))
    return FusedFrames(recompose(layout, eps, alpha_bar), layout, eps, coverage, times)


def splat_metric(importance: str, clean: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """The splat metric (2, 1, h, w) of a name, "agreement" or "photometric"."""
    return agreement_importance(flow) if importance == "agreement" else photometric_importance(clean, flow)


def piecewise(function: Callable[[torch.Tensor], tuple], times: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply a fusion to a few times at once, so that its workspace does not grow with the number of frames."""
    return tuple(torch.cat(parts) for parts in zip(*map(function, times.split(FRAMES_FUSED_AT_ONCE)), strict=True))
