# SPDX-License-Identifier: Apache-2.0
"""`DreamMoverPipeline`: two photos of one scene in, the frames between them out.

Reads like the paper (DreamMover, ECCV 2024, arXiv 2409.09605): `prepare` encodes the two, fits their LoRA, inverts
them and matches their features; `render` fuses the two at every δ, denoises with attention to both, and decodes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from .attention import reference_attention, self_attention_names
from .ddim import eps_from_v, predict_clean, recompose
from .features import up_block_features
from .flow import distance_bias, join_features, match_features, smooth_flow
from .fusion import (
    agreement_importance,
    fuse_direct,
    fuse_high_level,
    fuse_low_level,
    photometric_importance,
    select_unwarped,
    slerp,
)
from .images import fit, fit_points, fit_to_output, is_batch, load_images, load_masks, plan_canvas, unfit
from .inputs import (
    ENDPOINTS,
    FUSIONS,
    IMPORTANCES,
    OUTPUT_TYPES,
    check_attention_blocks,
    check_choice,
    check_feature_blocks,
    check_generator,
    check_integer,
    check_number,
    check_points_inside,
    check_steps,
    draw_seed,
    feature_blocks,
    frame_times,
    pair_entries,
    pair_generators,
    pair_negatives,
    pair_texts,
    point_pairs,
)
from .lora import LoraFit, check_pair_lora, fit_pair_lora, pair_lora
from .memory import (
    Batches,
    advice_on_out_of_memory,
    affordable_frames,
    affords_fit,
    free_cache,
    is_out_of_memory,
)
from .outputs import DreamMoverPipelineOutput, as_output, joined, returned
from .progress import ProgressListener, ReportedStage
from .records import BidirectionalFlow, Canvas, FusedFrames, PreparedPair
from .sampling import denoise, invert
from .schedules import ddim_schedule, deterministic_ddim
from .sequence import LORAS, frames_of_gaps, in_a_row, load_sequence, texts_of_gaps, with_defaults
from .splatting import softmax_splat  # noqa: F401, named so that the custom-pipeline loader ships it
from .steering import Steering, cells_of, cells_that_move, steered_flow
from .storage import check_same_models, fingerprint, read_pair, write_pair
from .text import embed_text
from .timing import EVEN, PREVIEWS, check_easing, eased_times, even_times
from .tone import tone_difference, with_tone

logger = logging.get_logger(__name__)

# of the scheduler's configuration, what the pipeline's own DDIM takes over
SCHEDULE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import export_to_video, load_image
        >>> from dreammover_pipeline import DreamMoverPipeline

        >>> pipe = DreamMoverPipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16
        ... ).to("cuda")
        >>> img0, img1 = load_image("lion_0.png"), load_image("lion_1.png")
        >>> frames = pipe(img0, img1, prompt="a photo of a lion", n_frames=32, include_inputs=True).frames[0]
        >>> export_to_video(frames, "lion.mp4", fps=16)
        ```
"""


class DreamMoverPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    FromSingleFileMixin,
):
    """Frames between two photos of one scene, by DreamMover (arXiv 2409.09605), on any Stable Diffusion 1.x/2.x.

    Args:
        vae: encodes images to latents and back.
        text_encoder: frozen CLIP text encoder.
        tokenizer: its tokenizer.
        unet: predicts noise (or v) in latents; it needs a VAE's latents and nothing else as input channels.
        scheduler: any Stable Diffusion scheduler; its noise schedule is kept, its sampler replaced by deterministic
            DDIM without clipping.
        safety_checker: optional; frames it flags come back black.
        feature_extractor: prepares frames for the safety checker.
        requires_safety_checker: whether a missing safety checker deserves a warning.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor"]  # noqa: RUF012, as diffusers declares it
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    # No defaults for the optional components: with one, `custom_pipeline=` would load what the user passed as None.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        requires_safety_checker: bool = True,
    ):
        super().__init__()
        if safety_checker is None and requires_safety_checker:
            logger.warning(
                f"{type(self).__name__} runs without a safety checker. The Stable Diffusion licence asks that "
                "unfiltered results are not offered to the public; see https://github.com/huggingface/diffusers/pull/254"
            )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("`safety_checker` needs a `feature_extractor`; pass one, or `safety_checker=None`")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=None if scheduler is None else deterministic_ddim(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._warned_of_overflow = False
        self._listener: ProgressListener | None = None

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance of the call in progress; a step callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of a pair, which is how often `callback_on_step_end` is called for it."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the denoising steps is skipped; a step callback may set `_interrupt`."""
        return self._interrupt

    @contextmanager
    def listening(self, listener: ProgressListener) -> Iterator[None]:
        """Tell a listener of progress, instead of drawing progress bars, while the context lasts.

        The listener hears of every stage of `__call__`, `prepare`, `render`, `interpolate_sequence` and the LoRA fits.
        A context inside another one replaces the outer listener until the inner context ends. With model offloading,
        a model whose work the listener ended stays on the device until `maybe_free_model_hooks` or the next call.

        Args:
            listener: called as (stage name, steps done, steps in all) when a stage begins and after each of its steps.
                Whatever it raises ends the work at that step and passes on to the caller, with the models as they
                were, so a job is cancelled by raising.
        """
        outer, self._listener = self._listener, listener
        try:
            yield
        finally:
            self._listener = outer

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        img0,
        img1,
        prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        n_frames: int = 32,
        times: Sequence[float] | None = None,
        easing: str | Callable[[float], float] = "linear",
        num_inference_steps: int = 50,
        inversion_steps: int = 30,
        feature_step: int = 14,
        feature_block: int | Sequence[int] = (1, 2),
        distance_penalty: float = 0.1,
        flow_smoothing: int = 3,
        points: Sequence | None = None,
        mask=None,
        attention_blocks: Sequence[int] = (2, 3),
        fusion: str = "two_level",
        importance: str = "agreement",
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        lora_scale: float = 1.0,
        frame_batch_size: int | None = None,
        include_inputs: bool = False,
        endpoints: str = "original",
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DreamMoverPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DreamMoverPipelineOutput | tuple:
        """Make the frames between two photos of one scene.

        Images may be paths, PIL images, numpy arrays (H, W[, C]) or tensors (C, H, W), of any size, 8- or 16-bit or
        float in [0, 1], with EXIF orientation, grey, palette or alpha (put on white). A list of images, or an array
        with a leading batch axis, is a batch of pairs.

        Args:
            img0: the first image, at δ = 0; its size and aspect ratio decide those of the frames.
            img1: the last image, at δ = 1; fitted to the first one's frame without distortion, what overhangs is cut.
            prompt: what the images show; two strings are one per image, and frames then get interpolated embeddings.
            height: pixels of frames to work at and to return. Default: work at the checkpoint's native area at
                `img0`'s aspect ratio, and return frames at `img0`'s own size.
            width: likewise; with only one of the two, the other follows from `img0`'s aspect ratio.
            n_frames: number of in-between frames, n; frame i is at δ = i/(n+1).
            times: the δ of the frames instead, each in (0, 1).
            easing: where the `n_frames` stand: "linear", "ease-in-out", "ease-in", "ease-out", a rising function of δ
                from 0 at 0 to 1 at 1, or "even" for neighbours that differ equally, as far as warping alone tells.
            num_inference_steps: N, steps of the whole DDIM schedule.
            inversion_steps: T, how many of them the images are inverted and the frames denoised; fewer keep closer to
                the photos, more let the model redraw what warping breaks.
            feature_step: the step whose features are matched.
            feature_block: the up block whose features are matched, or several whose similarities are averaged; the
                paper matches 1 alone.
            distance_penalty: cosine similarity that a match loses for each shorter side of the image it lies away, so
                that of places that look alike the nearer one is matched; 0 for the paper's.
            flow_smoothing: passes that carry the flow from cells whose match agrees both ways to their neighbours; 0
                for the paper's bare argmax.
            points: ((x0, y0), (x1, y1)) of each place that is in both images, in pixels of `img0` and of `img1`, EXIF
                orientation applied; (0, 0) is the centre of the top left pixel. They pull the flow around them. For a
                batch of pairs, a list with the points of each, None for a pair without.
            mask: what may move, bright on dark; the rest stays where it is. One image of `img0`'s size, for both, or
                two, each of its image's size. For a batch of pairs, a list with the masks of each, None for a pair
                without.
            attention_blocks: up blocks whose self-attention looks at the two images; none to switch that off.
            fusion: "two_level" (the paper's), "two_level_unwarped" (the released code's noise selection), "direct"
                (no levels; the paper's ablation).
            importance: what decides between cells that land on one place: "agreement" of the two flows, or
                "photometric", the paper's brightness constancy.
            guidance_scale: above 1, classifier-free guidance of the frames; the paper uses none.
            negative_prompt: what guidance leads away from.
            lora_steps: steps of the pair's LoRA fit; 0 for none.
            lora_rank: its rank.
            lora_learning_rate: of its AdamW.
            lora_scale: weight of the fitted LoRA wherever the UNet runs.
            frame_batch_size: frames denoised at once, at most; halved where memory runs out; the result is the same
                up to rounding. Default: what fits the free memory.
            include_inputs: put the two inputs at the ends.
            endpoints: as what: "original", at the output size and otherwise untouched, with the tone that the VAE
                takes from them faded out over the frames beside them; or "reconstructed", as the VAE brings them back.
            generator: decides the LoRA fit (nothing else is random); a list holds one per pair.
            prompt_embeds: text embeddings (B, L, D) instead of `prompt`, or (2·B, L, D) with one per image.
            negative_prompt_embeds: text embeddings (B, L, D) instead of `negative_prompt`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return a `DreamMoverPipelineOutput` rather than a tuple of its fields.
            cross_attention_kwargs: passed on to the attention processors; "scale" scales all LoRAs.
            clip_skip: layers of the text encoder to leave out at its end.
            callback_on_step_end: called as (pipeline, i, timestep, tensors) after every denoising step of every pair;
                the tensors it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: which of `_callback_tensor_inputs` it gets.

        Returns:
            `DreamMoverPipelineOutput`, or the tuple of its fields.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.

        Examples:
        """
        self._interrupt = False
        preparing = {
            "num_inference_steps": num_inference_steps,
            "inversion_steps": inversion_steps,
            "feature_step": feature_step,
            "feature_block": feature_block,
            "distance_penalty": distance_penalty,
            "flow_smoothing": flow_smoothing,
            "lora_steps": lora_steps,
            "lora_rank": lora_rank,
            "lora_learning_rate": lora_learning_rate,
            "lora_scale": lora_scale,
            "clip_skip": clip_skip,
        }
        rendering = {
            "n_frames": n_frames,
            "times": times,
            "easing": easing,
            "attention_blocks": attention_blocks,
            "fusion": fusion,
            "importance": importance,
            "guidance_scale": guidance_scale,
            "frame_batch_size": frame_batch_size,
            "endpoints": endpoints,
            "output_type": output_type,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        self.check_inputs(**preparing)
        self.check_render_inputs(**rendering)
        firsts, lasts = load_pairs(img0, img1)
        pairs = len(firsts)
        check_generator(generator, pairs)
        canvases = [self.canvas(first, height, width) for first in firsts]
        if output_type != "pil" and len({(c.output_height, c.output_width, c.height, c.width) for c in canvases}) > 1:
            raise ValueError(
                f"`output_type` {output_type!r} stacks the pairs, but their first images have different sizes; "
                "pass `height` and `width`, or use 'pil'"
            )
        width_of_text = self.unet.config.cross_attention_dim
        embeds = pair_texts(prompt, prompt_embeds, pairs, is_batch(img0), width_of_text)
        negatives = pair_negatives(negative_prompt, negative_prompt_embeds, pairs, width_of_text)
        points = pair_entries("points", points, pairs, is_batch(img0))
        masks = pair_entries("mask", mask, pairs, is_batch(img0))
        for i, photos in enumerate(zip(firsts, lasts, strict=True)):
            of = f"[{i}]" if is_batch(img0) else ""
            masks[i] = load_masks(masks[i], [photo.shape[-2:] for photo in photos], f"mask{of}")
            self._steering(points[i], masks[i], photos, canvases[i], of)  # for its complaints, before anything runs

        generators = pair_generators(generator, pairs) if lora_steps else [None] * pairs
        outputs = []
        for i in range(pairs):
            pair = self.prepare(
                firsts[i],
                lasts[i],
                **embeds[i],
                **preparing,
                points=points[i],
                mask=masks[i],
                height=height,
                width=width,
                generator=generators[i],
                cross_attention_kwargs=cross_attention_kwargs,
            )
            output = self.render(
                pair,
                **negatives[i],
                **rendering,
                include_inputs=include_inputs,
                cross_attention_kwargs=cross_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
            )
            outputs.append(output)
            if self.interrupt:
                break
        return returned(joined(outputs), return_dict)

    @torch.no_grad()
    def prepare(
        self,
        img0,
        img1,
        prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        inversion_steps: int = 30,
        feature_step: int = 14,
        feature_block: int | Sequence[int] = (1, 2),
        distance_penalty: float = 0.1,
        flow_smoothing: int = 3,
        points: Sequence | None = None,
        mask=None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        lora_scale: float = 1.0,
        generator: torch.Generator | None = None,
        prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        lora: dict[str, torch.Tensor] | None = None,
        canvas: Canvas | None = None,
    ) -> PreparedPair:
        """Do everything that does not depend on the frames asked for, once: encode, fit, invert, match.

        Args are those of `__call__`, for one pair, and:
            lora: LoRA weights, as `fit_lora` returns and `PreparedPair.lora` holds them, to use instead of fitting
                some; `lora_steps`, `lora_rank`, `lora_learning_rate` and `generator` are then ignored.
            canvas: where both images are put, and the size of the frames: what the method `canvas` gives for another
                image, to have frames of its size. `height` and `width` must then be None.

        Returns:
            What `render` takes, as often as wanted.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
        """
        self.check_inputs(
            num_inference_steps=num_inference_steps,
            inversion_steps=inversion_steps,
            feature_step=feature_step,
            feature_block=feature_block,
            distance_penalty=distance_penalty,
            flow_smoothing=flow_smoothing,
            lora_steps=lora_steps,
            lora_rank=lora_rank,
            lora_learning_rate=lora_learning_rate,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )
        check_generator(generator, 1)
        if lora is not None:
            check_pair_lora(self.unet, lora)
        schedule = ddim_schedule(self.scheduler, num_inference_steps, inversion_steps)
        first, last, canvas, text = self._one_pair(img0, img1, prompt, height, width, prompt_embeds, canvas)
        masks = load_masks(mask, [first.shape[-2:], last.shape[-2:]])
        steering = self._steering(points, masks, (first, last), canvas)

        clean = self.encode_images(torch.stack([fit(first, canvas), fit(last, canvas)]))
        prompt_embeds = self._encode_pair(**text, cross_attention_kwargs=cross_attention_kwargs, clip_skip=clip_skip)
        if lora is None and lora_steps:
            settings = LoraFit(lora_steps, lora_rank, lora_learning_rate)
            lora = self._fit_lora(clean, prompt_embeds, settings, draw_seed(generator))

        def predict_noise(latents: torch.Tensor, timestep: int) -> torch.Tensor:
            return self.predict_noise(latents, timestep, prompt_embeds, cross_attention_kwargs=cross_attention_kwargs)

        with self._pair_lora(lora, lora_scale, cross_attention_kwargs):
            with self._progress(inversion_steps + 1, "Inverting") as bar:
                inversion = invert(clean, predict_noise, schedule, inversion_steps, bar.update)
            _require_finite(inversion.path[-1], self.unet.dtype)
            timestep = schedule.timestep(feature_step)
            blocks = feature_blocks(feature_block)
            features = up_block_features(self.unet, blocks, lambda: predict_noise(inversion.at(timestep), timestep))
        size = clean.shape[-2:]
        matched = features[0] if len(features) == 1 else join_features(features, size)
        bias = distance_bias(size, distance_penalty, matched)
        if steering is None:
            flow = smooth_flow(match_features(matched, size, bias), flow_smoothing)
        else:
            flow = steered_flow(matched, steering, flow_smoothing, bias)
        self.maybe_free_model_hooks()
        ends = (fit_to_output(first, canvas), fit_to_output(last, canvas))
        return PreparedPair(ends, canvas, inversion, flow, prompt_embeds, lora, lora_scale)

    @torch.no_grad()
    def render(
        self,
        pair: PreparedPair,
        n_frames: int = 32,
        times: Sequence[float] | None = None,
        easing: str | Callable[[float], float] = "linear",
        attention_blocks: Sequence[int] = (2, 3),
        fusion: str = "two_level",
        importance: str = "agreement",
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        frame_batch_size: int | None = None,
        include_inputs: bool = False,
        endpoints: str = "original",
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[[DreamMoverPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DreamMoverPipelineOutput | tuple:
        """Make frames of a prepared pair: fuse, denoise with reference attention, decode.

        Args are those of `__call__`, for one pair.

        Returns:
            As `__call__`, for a batch of one.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
            torch.OutOfMemoryError: memory does not suffice for a single frame. If that was in decoding, the error's
                `latents` (F, C, h, w) are the denoised frames, for `decode_latents`.
        """
        self.check_render_inputs(
            n_frames=n_frames,
            times=times,
            easing=easing,
            attention_blocks=attention_blocks,
            fusion=fusion,
            importance=importance,
            guidance_scale=guidance_scale,
            frame_batch_size=frame_batch_size,
            endpoints=endpoints,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._interrupt = False
        self._guidance_scale = guidance_scale
        self._num_timesteps = pair.inversion.steps
        times = self.place_frames(pair, n_frames, times, easing, importance)
        delta = torch.tensor(times)
        conditions = self._frame_conditions(
            pair, delta, guidance_scale > 1, negative_prompt, negative_prompt_embeds, cross_attention_kwargs
        )

        def on_step(i: int, timestep: int, latents: torch.Tensor) -> torch.Tensor:
            bar.update()
            if callback_on_step_end is None:
                return latents
            tensors = {"latents": latents, **conditions}
            wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            replaced = callback_on_step_end(self, i, timestep, wanted) or {}
            conditions.update({name: replaced.get(name, conditions[name]) for name in conditions})
            return replaced.get("latents", latents)

        with (
            self._pair_lora(pair.lora, pair.lora_scale, cross_attention_kwargs),
            self._frame_predictor(
                pair, conditions, attention_blocks, frame_batch_size, cross_attention_kwargs
            ) as predict_noise,
            self._progress(pair.inversion.steps, "Denoising") as bar,
        ):
            fused = self.fuse(pair, delta, fusion, importance, predict_noise)
            latents = denoise(
                fused.latents,
                predict_noise,
                pair.inversion.schedule,
                pair.inversion.steps,
                on_step,
                lambda: self.interrupt,
            )
        _require_finite(latents, self.unet.dtype)
        frames, flagged = self._finish(pair, latents, times, include_inputs, endpoints, output_type)
        self.maybe_free_model_hooks()
        if include_inputs:
            times = (0.0, *times, 1.0)
        return returned(DreamMoverPipelineOutput(frames, [pair.flow], flagged, [times]), return_dict)

    @torch.no_grad()
    def interpolate_sequence(
        self,
        images,
        prompt: str | Sequence[str] | None = "",
        n_frames: int | Sequence[int] = 32,
        lora: str = "gap",
        include_inputs: bool = True,
        return_dict: bool = True,
        **arguments,
    ) -> DreamMoverPipelineOutput | tuple:
        """Make one video that leads through several photos, in their order.

        Every gap between two neighbours is made as `__call__` makes a pair, on the canvas of the first photo of all.

        Args:
            images: at least two, each as `__call__` takes it; the first one's size and aspect ratio decide those of
                all frames.
            prompt: what the images show; one text for all, or one per image.
            n_frames: number of frames in every gap, or a list of one number per gap.
            lora: "gap" fits a LoRA for every gap; "shared" fits one to all images, in as many steps, two images a
                step, and so at the cost of a single gap.
            include_inputs: put the images in their places; one that two gaps share is there once.
            return_dict: return a `DreamMoverPipelineOutput` rather than a tuple of its fields.
            **arguments: any others of `__call__` but `img0` and `img1`. They hold for every gap, `times` and `easing`
                too; `points` and `mask` are lists with those of each gap, None for a gap without, and a list of
                generators holds one per LoRA; `prompt_embeds` are (1, L, D), or (n, L, D) with one per image.

        Returns:
            `DreamMoverPipelineOutput`, or the tuple of its fields: the video as `frames[0]`, and one entry per gap in
            `flow` and in `times`, where a photo that two gaps share is the 1 of the first of them.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
            Exception: a gap could not be made. If there were any before it, the error's `output` is what would have
                been returned for those.
        """
        self._interrupt = False
        check_choice("lora", lora, LORAS)
        excluded = ("prompt", "n_frames", "include_inputs", "return_dict")
        settings = with_defaults(arguments, inspect.signature(type(self).__call__).parameters, excluded)

        def taken_by(stage: Callable, *but: str) -> dict:
            names = inspect.signature(stage).parameters.keys() - set(but)
            return {name: value for name, value in settings.items() if name in names}

        photos = load_sequence(images)
        gaps = len(photos) - 1
        counts = frames_of_gaps(n_frames, gaps)
        self.check_inputs(**taken_by(self.check_inputs, "points"))
        for count in counts:
            self.check_render_inputs(n_frames=count, **taken_by(self.check_render_inputs))
        width_of_text = self.unet.config.cross_attention_dim
        texts = texts_of_gaps(prompt, settings["prompt_embeds"], len(photos), width_of_text)
        (negative,) = pair_negatives(settings["negative_prompt"], settings["negative_prompt_embeds"], 1, width_of_text)
        canvas = self.canvas(photos[0], settings["height"], settings["width"])
        points = pair_entries("points", settings["points"], gaps, True)
        masks = pair_entries("mask", settings["mask"], gaps, True)
        for k, both in enumerate(pairwise(photos)):
            masks[k] = load_masks(masks[k], [photo.shape[-2:] for photo in both], f"mask[{k}]")
            self._steering(points[k], masks[k], both, canvas, f"[{k}]")  # for its complaints, before anything runs
        fits = 1 if lora == "shared" else gaps
        check_generator(settings["generator"], fits)
        generators = pair_generators(settings["generator"], fits) if settings["lora_steps"] else [None] * fits

        weights = None
        if lora == "shared" and settings["lora_steps"]:
            fitting = taken_by(self.fit_shared_lora, "prompt_embeds", "generator")
            weights = self.fit_shared_lora(
                photos, prompt, prompt_embeds=settings["prompt_embeds"], generator=generators[0], **fitting
            )
            generators = [None] * gaps
        preparing = taken_by(self.prepare, "height", "width", "prompt_embeds", "points", "mask", "generator")
        rendering = taken_by(self.render, "negative_prompt", "negative_prompt_embeds")
        outputs = []
        try:
            for k, (first, last) in enumerate(pairwise(photos)):
                pair = self.prepare(
                    first,
                    last,
                    **texts[k],
                    **preparing,
                    points=points[k],
                    mask=masks[k],
                    generator=generators[k],
                    lora=weights,
                    canvas=canvas,
                )
                outputs.append(
                    self.render(pair, n_frames=counts[k], **negative, **rendering, include_inputs=include_inputs)
                )
                if self.interrupt:
                    break
        except Exception as error:
            if outputs:
                error.output = in_a_row(outputs, include_inputs)
                error.add_note("The gaps before this one are not lost: this error's `output` holds their frames.")
            raise
        return returned(in_a_row(outputs, include_inputs), return_dict)

    @torch.no_grad()
    def fit_shared_lora(
        self,
        images,
        prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        generator: torch.Generator | None = None,
        prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Fit one LoRA to several photos, for `prepare` to take as `lora`; nothing is loaded.

        Every step sees two of them, drawn at random; so for as many looks at each as a pair's fit has, it takes n/2
        times the steps. Of two photos it is the LoRA that `prepare` fits.

        Args are those of `interpolate_sequence` and `__call__`.

        Returns:
            The weights, by diffusers' names.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
        """
        self._check_lora_inputs(lora_steps, lora_rank, lora_learning_rate, least_steps=1)
        check_generator(generator, 1)
        photos = load_sequence(images)
        texts = texts_of_gaps(prompt, prompt_embeds, len(photos), self.unet.config.cross_attention_dim)
        canvas = self.canvas(photos[0], height, width)
        fitted = torch.stack([fit(photo, canvas) for photo in photos])
        clean = torch.cat([self.encode_images(two) for two in fitted.split(2)])
        embeds = [
            self._encode_pair(**text, cross_attention_kwargs=cross_attention_kwargs, clip_skip=clip_skip)
            for text in texts
        ]
        embeds = torch.cat([*(both[:1] for both in embeds), embeds[-1][1:]])
        weights = self._fit_lora(
            clean, embeds, LoraFit(lora_steps, lora_rank, lora_learning_rate), draw_seed(generator)
        )
        self.maybe_free_model_hooks()
        return weights

    @torch.no_grad()
    def fit_lora(
        self,
        img0,
        img1,
        prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        generator: torch.Generator | None = None,
        prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
        adapter_name: str = "dreammover",
    ) -> dict[str, torch.Tensor]:
        """Fit the pair's LoRA and keep it loaded and active, beside the adapters that were.

        From then on it is an adapter like any other: `set_adapters`, `delete_adapters` and `fuse_lora` know it, and
        calls with `lora_steps=0` use it. Save it with `save_lora_weights(folder, unet_lora_layers=weights)`; it loads
        here and in `StableDiffusionPipeline` by `load_lora_weights(folder)`.

        Args are those of `__call__`, for one pair, and:
            adapter_name: a name no loaded adapter has.

        Returns:
            The weights, by diffusers' names.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
        """
        self._check_lora_inputs(lora_steps, lora_rank, lora_learning_rate, least_steps=1)
        check_generator(generator, 1)
        if adapter_name in getattr(self.unet, "peft_config", {}):
            raise ValueError(f"`adapter_name` {adapter_name!r} is loaded already; choose another, or delete that one")
        first, last, canvas, text = self._one_pair(img0, img1, prompt, height, width, prompt_embeds)
        clean = self.encode_images(torch.stack([fit(first, canvas), fit(last, canvas)]))
        prompt_embeds = self._encode_pair(**text, clip_skip=clip_skip)
        settings = LoraFit(lora_steps, lora_rank, lora_learning_rate)
        weights = self._fit_lora(clean, prompt_embeds, settings, draw_seed(generator))
        active = self.unet.active_adapters() if self.unet._hf_peft_config_loaded else []
        flags = [(parameter, parameter.requires_grad) for parameter in self.unet.parameters()]
        self.unet.load_lora_adapter(weights, prefix=None, adapter_name=adapter_name, _pipeline=self)
        self.unet.set_adapter([*active, adapter_name])
        self.unet.requires_grad_(False)  # peft makes active adapters trainable
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.maybe_free_model_hooks()
        return weights

    def fingerprint(self) -> str:
        """What decides the frames of given arguments, in short: all weights of UNet, VAE and text encoder, the noise
        schedule, and the scale of the latents.

        It is the same wherever the weights are held, offloaded or not, compiled or not, and in every precision that
        rounds none of them. A LoRA changes it while it acts: loaded and active, at its weight, or fused; loaded and
        disabled it does not. Every call reads every weight: seconds for Stable Diffusion 1.5 on one CPU core.

        Returns:
            64 hexadecimal digits.
        """
        schedule = {name: deterministic_ddim(self.scheduler).config[name] for name in SCHEDULE_SETTINGS}
        scale = None if self.vae is None else self.vae.config.scaling_factor
        settings = json.dumps([schedule, scale], default=list)
        return hashlib.sha256(f"{fingerprint(self._fingerprinted)} {settings}".encode()).hexdigest()

    def save_pair(self, pair: PreparedPair, path: str | os.PathLike) -> None:
        """Write a prepared pair to one safetensors file, whole or not at all, together with the models' fingerprints.

        The fingerprints are those of now: save before LoRAs are loaded, fused or unloaded.

        Args:
            pair: what `prepare` returned.
            path: the file; one that is there is replaced.
        """
        write_pair(pair, path, self._fingerprints())

    def load_pair(self, path: str | os.PathLike) -> PreparedPair:
        """Read a pair that `save_pair` wrote, for `render` on this pipeline's device; frames come out the same.

        UNet and VAE must be those it was saved with. With another text encoder, which only negative prompts still
        need, it loads with a warning.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut off, damaged or of another kind, its format version is unknown, or the UNet or
                the VAE are other ones.
        """
        pair, saved = read_pair(path, self._execution_device)
        present = self._fingerprints()
        check_same_models(path, saved, {name: present[name] for name in ("unet", "vae")})
        if "text_encoder" in present and saved.get("text_encoder") != present["text_encoder"]:
            logger.warning(f"'{path}' was saved with another text encoder; negative prompts will be read by this one.")
        return replace(pair, prompt_embeds=pair.prompt_embeds.to(self.unet.dtype))

    # The stages, each of them public.

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text embeddings, as every Stable Diffusion pipeline gives them.

        Args:
            prompt: P texts; None with `prompt_embeds`.
            device: where the text encoder runs.
            num_images_per_prompt: copies of each.
            do_classifier_free_guidance: whether negative embeddings are wanted too.
            negative_prompt: one text, or one per prompt; the empty text by default.
            prompt_embeds: (P, L, D), to use instead of `prompt`.
            negative_prompt_embeds: (P, L, D), to use instead of `negative_prompt`.
            lora_scale: weight of the text encoder's LoRAs.
            clip_skip: layers to leave out at the text encoder's end.

        Returns:
            Two (P · num_images_per_prompt, L, D), the second None without guidance.
        """
        if lora_scale is not None and self.text_encoder is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            if prompt_embeds is None:
                prompt = self.maybe_convert_prompt(prompt, self.tokenizer)  # textual inversion
                prompt_embeds = embed_text(prompt, self.tokenizer, self.text_encoder, device, clip_skip)
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                negative_prompt = self.maybe_convert_prompt(negative_prompt or "", self.tokenizer)
                negative_prompt_embeds = embed_text(negative_prompt, self.tokenizer, self.text_encoder, device)
                if len(negative_prompt_embeds) == 1:
                    negative_prompt_embeds = negative_prompt_embeds.expand_as(prompt_embeds)
        finally:
            if lora_scale is not None and self.text_encoder is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
        # the text encoder may have come up in another precision than the UNet that reads it
        dtype = prompt_embeds.dtype if self.unet is None else self.unet.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype).repeat_interleave(
                num_images_per_prompt, 0
            )
        return prompt_embeds, negative_prompt_embeds

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Clean latents z_0: the VAE's posterior mean, scaled.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, C, h, w), float32.
        """
        pixels = 2 * images.to(self._execution_device) - 1
        with self._vae_switches_kept():
            latents = self._in_vae_memory(
                lambda x: retrieve_latents(self.vae.encode(x), sample_mode="argmax"), pixels, "encoding"
            )
        return latents * self.vae.config.scaling_factor

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of clean latents.

        Args:
            latents: (B, C, h, w).

        Returns:
            (B, 3, H, W) in [0, 1], float32.
        """
        with self._vae_switches_kept():
            return self._decode(latents)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self._in_vae_memory(
            lambda x: self.vae.decode(x, return_dict=False)[0], latents / self.vae.config.scaling_factor, "decoding"
        )
        return (images / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _vae_switches_kept(self) -> Iterator[None]:
        """What `_in_vae_memory` switches on meanwhile is afterwards as it was."""
        names = [name for name in ("use_slicing", "use_tiling") if hasattr(self.vae, name)]
        switches = {name: getattr(self.vae, name) for name in names}
        try:
            yield
        finally:
            for name, value in switches.items():
                setattr(self.vae, name, value)

    def _in_vae_memory(self, function: Callable, x: torch.Tensor, doing: str) -> torch.Tensor:
        """Run the VAE; where memory does not suffice, image by image, then in tiles, and so from then on."""
        switches = {"use_slicing": "one image at a time", "use_tiling": "in tiles, whose tones may differ a little"}
        if len(x) == 1:
            del switches["use_slicing"]
        for switch, how in switches.items():
            if getattr(self.vae, switch, True):
                continue
            try:
                return self._in_vae_precision(function, x, doing)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            free_cache(x.device)
            logger.warning(f"Out of memory {doing}; the VAE goes on {how}.")
            setattr(self.vae, switch, True)
        with advice_on_out_of_memory(f"{doing}, on {tuple(x.shape)}"):
            return self._in_vae_precision(function, x, doing)

    def _in_vae_precision(self, function: Callable, x: torch.Tensor, doing: str) -> torch.Tensor:
        """Run the VAE in its own precision; where that overflows, as float16 can, run this once more in float32."""
        dtype = self.vae.dtype
        result = function(x.to(dtype)).float()
        if result.isfinite().all() or dtype == torch.float32:
            return result
        if not self._warned_of_overflow:
            logger.warning(f"The VAE overflowed {doing} in {dtype}; such images are done again in float32.")
            self._warned_of_overflow = True
        try:
            self.vae.to(torch.float32)
            return function(x.float())
        finally:
            self.vae.to(dtype)

    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: int,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """The UNet's noise, also where it predicts v; with negative embeddings, guided.

        Args:
            latents: (B, C, h, w).
            timestep: the trained timestep to ask at.
            prompt_embeds: (B, L, D).
            negative_prompt_embeds: (B, L, D), for guidance by `guidance_scale`.
            cross_attention_kwargs: as in `__call__`.

        Returns:
            ε, (B, C, h, w), float32.
        """
        guided = negative_prompt_embeds is not None
        if guided:
            latents = latents.repeat(2, 1, 1, 1)
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        with advice_on_out_of_memory(f"in the UNet, on latents {tuple(latents.shape)}"):
            # A number for the timestep, or expanded embeddings besides others, would make torch.compile start anew.
            output = self.unet(
                latents.to(self.unet.dtype),
                torch.tensor(timestep, device=latents.device),
                encoder_hidden_states=prompt_embeds.contiguous(),
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0].float()
        if self.scheduler.config.prediction_type == "v_prediction":
            output = eps_from_v(output, latents, float(self.scheduler.alphas_cumprod[timestep]))
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def place_frames(
        self,
        pair: PreparedPair,
        n_frames: int = 32,
        times: Sequence[float] | None = None,
        easing: str | Callable[[float], float] = "linear",
        importance: str = "agreement",
    ) -> tuple[float, ...]:
        """The δ of the frames asked for.

        Args:
            pair: what `prepare` returned.
            n_frames: as in `__call__`, like the next three.
            times: returned as they are.
            easing: "even" looks at previews of the pair; no model runs.
            importance: the splat metric of those previews.

        Returns:
            δ of every frame, in (0, 1).

        Raises:
            TypeError, ValueError: an argument is not what it may be.
        """
        check_easing(n_frames, times, easing)
        if easing == EVEN:
            return even_times(n_frames, self.preview(pair, torch.linspace(0, 1, PREVIEWS), importance))
        linear = frame_times(n_frames, times)
        return eased_times(linear, easing) if times is None else linear

    def preview(self, pair: PreparedPair, times: torch.Tensor, importance: str = "agreement") -> torch.Tensor:
        """What frames would be if nothing were redrawn: the pair's clean latents, warped and averaged. No model runs.

        Args:
            pair: what `prepare` returned.
            times: δ, (F,), in [0, 1].
            importance: the splat metric.

        Returns:
            Clean latents (F, C, h, w), for `decode_latents`; at 0 and 1 those of the two images.
        """
        clean = pair.inversion.path[0]
        metric = _metric(importance, clean, pair.flow)
        previews, _ = _piecewise(lambda t: fuse_high_level(clean, pair.flow, metric, t), times)
        return previews

    def fuse(
        self,
        pair: PreparedPair,
        times: torch.Tensor,
        fusion: str = "two_level",
        importance: str = "agreement",
        predict_noise: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> FusedFrames:
        """Fuse the pair at step T for every δ.

        Source: DreamMover §3.3.

        Args:
            pair: what `prepare` returned.
            times: δ, (F,).
            fusion: as in `__call__`, like the next.
            importance: the splat metric.
            predict_noise: ε of frames (F, C, h, w) at a timestep; only "two_level_unwarped" asks it.

        Returns:
            The frames' latents z^δ_T and the levels they are made of.
        """
        inversion, flow = pair.inversion, pair.flow
        noisy, alpha_bar = inversion.path[-1], inversion.alpha_bar
        clean = predict_clean(noisy, inversion.eps, alpha_bar)
        metric = _metric(importance, clean, flow)
        if fusion == "direct":
            latents, coverage = _piecewise(lambda t: fuse_direct(noisy, flow, metric, t), times)
            return FusedFrames(latents, None, None, coverage, times)
        layout, coverage = _piecewise(lambda t: fuse_high_level(clean, flow, metric, t), times)
        if fusion == "two_level":
            (eps,) = _piecewise(lambda t: (fuse_low_level(inversion.eps, flow, metric, t),), times)
        else:
            (mixed,) = _piecewise(lambda t: (select_unwarped(noisy, clean, flow, t),), times)
            eps = predict_noise(mixed, inversion.schedule.timestep(inversion.steps))
        return FusedFrames(recompose(layout, eps, alpha_bar), layout, eps, coverage, times)

    def run_safety_checker(self, image: torch.Tensor) -> tuple[torch.Tensor, list[bool] | None]:
        """Black out what the safety checker flags, if there is one.

        Args:
            image: (B, 3, H, W) in [0, 1].

        Returns:
            The images, and which were flagged; None without a safety checker.
        """
        if self.safety_checker is None:
            return image, None
        pictures = self.image_processor.numpy_to_pil(self.image_processor.pt_to_numpy(image))
        device, dtype = self._execution_device, self.safety_checker.dtype
        clip_input = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(device, dtype)
        return self.safety_checker(images=image, clip_input=clip_input)

    # Checks, made before any model runs.

    def check_inputs(
        self,
        *,
        num_inference_steps,
        inversion_steps,
        feature_step,
        feature_block,
        distance_penalty,
        flow_smoothing,
        lora_steps,
        lora_rank,
        lora_learning_rate,
        lora_scale,
        clip_skip,
        points=None,
    ) -> None:
        """Raise TypeError or ValueError unless these arguments of `prepare` are what they may be, without photos."""
        check_steps(num_inference_steps, inversion_steps, feature_step, self.scheduler.config.num_train_timesteps)
        ddim_schedule(self.scheduler, num_inference_steps, inversion_steps)
        check_feature_blocks(feature_block, len(self.unet.up_blocks))
        check_number("distance_penalty", distance_penalty, 0)
        check_integer("flow_smoothing", flow_smoothing, 0)
        point_pairs(points)
        self._check_lora_inputs(lora_steps, lora_rank, lora_learning_rate)
        check_number("lora_scale", lora_scale, 0)
        if clip_skip is not None:
            check_integer("clip_skip", clip_skip, 0)
        wanted, given = self.unet.config.in_channels, self.vae.config.latent_channels
        if wanted != given:
            raise ValueError(
                f"the UNet takes {wanted} channels but the VAE's latents have {given}: "
                "inpainting, depth and upscaling checkpoints are not supported"
            )

    def _check_lora_inputs(self, steps, rank, learning_rate, least_steps=0) -> None:
        check_integer("lora_steps", steps, least_steps)
        check_integer("lora_rank", rank, 1)
        check_number("lora_learning_rate", learning_rate, 0, inclusive=False)

    def check_render_inputs(
        self,
        *,
        n_frames,
        times,
        easing,
        attention_blocks,
        fusion,
        importance,
        guidance_scale,
        frame_batch_size,
        endpoints,
        output_type,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raise TypeError or ValueError unless these arguments of `render` are what they may be."""
        check_easing(n_frames, times, easing)
        blocks = range(len(self.unet.up_blocks))
        check_attention_blocks(attention_blocks, [len(self_attention_names(self.unet, block)) for block in blocks])
        check_choice("fusion", fusion, FUSIONS)
        check_choice("importance", importance, IMPORTANCES)
        check_number("guidance_scale", guidance_scale, 0)
        if frame_batch_size is not None:
            check_integer("frame_batch_size", frame_batch_size, 1)
        check_choice("endpoints", endpoints, ENDPOINTS)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

    def canvas(self, image: torch.Tensor, height: int | None = None, width: int | None = None) -> Canvas:
        """Working size and output size for a first image (3, H, W)."""
        sample = self.unet.config.sample_size
        native = (sample, sample) if isinstance(sample, int) else tuple(sample)
        return plan_canvas(
            tuple(image.shape[-2:]),
            native_side=self.vae_scale_factor * math.sqrt(math.prod(native)),
            multiple=math.lcm(8, self.vae_scale_factor),
            min_side=4 * self.vae_scale_factor,
            height=height,
            width=width,
        )

    def _one_pair(self, img0, img1, prompt, height, width, prompt_embeds, canvas=None):
        """The two images, their canvas, and what their text is, of arguments that may hold one pair only."""
        firsts, lasts = load_pairs(img0, img1)
        if len(firsts) != 1:
            raise ValueError(f"this takes one pair of images, not {len(firsts)}; call it once for each")
        (text,) = pair_texts(prompt, prompt_embeds, 1, is_batch(img0), self.unet.config.cross_attention_dim)
        if canvas is None:
            return firsts[0], lasts[0], self.canvas(firsts[0], height, width), text
        if not isinstance(canvas, Canvas):
            raise TypeError(f"`canvas` must be a Canvas, as the method `canvas` returns it, not {canvas!r}")
        if height is not None or width is not None:
            raise ValueError("`canvas` decides the size, and so do `height` and `width`; leave one of them out")
        return firsts[0], lasts[0], canvas, text

    def _steering(self, points, masks, photos, canvas: Canvas, of: str = "") -> Steering | None:
        """What the user says of the match, on the latent grid; None where that is nothing.

        Args:
            points: as given for this pair.
            masks: what `load_masks` made of the mask.
            photos: the two, (3, H, W) each.
            canvas: theirs.
            of: the pair's index as errors write it, like "[2]".
        """
        points = point_pairs(points, f"points{of}")
        if masks is None and not len(points):
            return None
        sizes = [tuple(photo.shape[-2:]) for photo in photos]
        check_points_inside(points, sizes, f"points{of}")
        content, cell = (canvas.content_height, canvas.content_width), self.vae_scale_factor
        points = torch.stack([fit_points(points[:, i], sizes[i], canvas) for i in (0, 1)], 1)
        points = cells_of(points, content, cell, f"points{of}")
        if masks is None:
            moves = torch.ones(2, 1, canvas.height // cell, canvas.width // cell, dtype=torch.bool)
        else:
            fitted = torch.stack([fit(mask, canvas) for mask in masks]).expand(2, -1, -1, -1)
            moves = cells_that_move(fitted, content, cell, f"mask{of}")
        return Steering(points, moves)

    # What the stages share.

    @property
    def _fingerprinted(self) -> dict[str, torch.nn.Module]:
        models = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {name: model for name, model in models.items() if model is not None}

    def _fingerprints(self) -> dict[str, str]:
        """Of each model by itself."""
        return {name: fingerprint({name: model}) for name, model in self._fingerprinted.items()}

    def _encode_pair(self, prompt, prompt_embeds=None, cross_attention_kwargs=None, clip_skip=None) -> torch.Tensor:
        """(2, L, D), one per image; a prompt they share is encoded once."""
        texts = None if prompt is None else list(dict.fromkeys(prompt))
        embeds, _ = self.encode_prompt(
            texts,
            self._execution_device,
            prompt_embeds=prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        return embeds.expand(2, -1, -1)

    def _fit_lora(
        self, clean: torch.Tensor, prompt_embeds: torch.Tensor, settings: LoraFit, seed: int
    ) -> dict[str, torch.Tensor]:
        ddim = deterministic_ddim(self.scheduler)

        def attempt(gradient_checkpointing: bool) -> dict[str, torch.Tensor]:
            with self._progress(settings.steps, "Fitting LoRA") as bar:
                return fit_pair_lora(
                    self.unet,
                    clean,
                    prompt_embeds,
                    ddim.alphas_cumprod,
                    settings,
                    seed,
                    ddim.config.prediction_type,
                    bar.update,
                    gradient_checkpointing,
                )

        if affords_fit(*self._footprint(clean)):
            try:
                return attempt(False)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            free_cache(clean.device)
            logger.warning("Out of memory; the LoRA fit starts anew with gradient checkpointing, for the same result.")
        with advice_on_out_of_memory("in the LoRA fit"):
            return attempt(True)

    def _pair_lora(self, lora, scale: float, cross_attention_kwargs: dict | None):
        """The pair's LoRA in effect; "scale" in the kwargs, which diffusers gives loaded ones, is given to it too."""
        return pair_lora(self.unet, lora, scale * (cross_attention_kwargs or {}).get("scale", 1.0))

    def _footprint(self, latents: torch.Tensor, groups: int = 1) -> tuple[torch.device, int, int, torch.dtype, int]:
        """What decides how much of the UNet's work on latents (…, h, w) fits, in `groups` of guidance."""
        h, w = latents.shape[-2:]
        device, to_come = self._execution_device, 0
        if getattr(self, "_all_hooks", []):  # enable_model_cpu_offload brings the whole UNet when it is called
            to_come = sum(weight.nbytes for weight in self.unet.parameters() if weight.device.type != device.type)
        return device, groups * h * w, self.unet.config.block_out_channels[0], self.unet.dtype, to_come

    def _frame_conditions(
        self, pair, times, guided, negative_prompt, negative_prompt_embeds, cross_attention_kwargs
    ) -> dict[str, torch.Tensor | None]:
        """The embeddings of every frame, (F, L, D); negative ones are None without guidance."""
        first, last = pair.prompt_embeds
        if torch.equal(first, last):
            prompt_embeds = pair.prompt_embeds[:1].expand(len(times), -1, -1)
        else:
            prompt_embeds = slerp(first, last, times).to(first.dtype)
        if not guided:
            return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": None}
        _, negative = self.encode_prompt(
            None,
            self._execution_device,
            1,
            True,
            negative_prompt,
            pair.prompt_embeds[:1],
            negative_prompt_embeds,
            (cross_attention_kwargs or {}).get("scale"),
        )
        return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative.expand_as(prompt_embeds)}

    @contextmanager
    def _frame_predictor(
        self, pair, conditions, attention_blocks, frame_batch_size, cross_attention_kwargs
    ) -> Iterator[Callable[[torch.Tensor, int], torch.Tensor]]:
        """ε of in-between frames (F, C, h, w) at a timestep of the pair's path, in batches that fit the memory.

        At every step the two inputs go first, at their own latents of that step, and leave the tokens that the
        frames then attend to; so the references are exact and the inputs need no denoising of their own.
        """
        groups = 1 if conditions["negative_prompt_embeds"] is None else 2
        batches = Batches(frame_batch_size or affordable_frames(*self._footprint(pair.inversion.path, groups)))
        with reference_attention(self.unet, attention_blocks) as references:

            def predict_noise(latents: torch.Tensor, timestep: int) -> torch.Tensor:
                prompt_embeds, negative = conditions["prompt_embeds"], conditions["negative_prompt_embeds"]
                if references.layers:
                    with references.record():
                        inputs = pair.inversion.at(timestep)
                        unconditional = None if negative is None else negative[:1].expand_as(pair.prompt_embeds)
                        self.predict_noise(inputs, timestep, pair.prompt_embeds, unconditional, cross_attention_kwargs)
                largest = batches.largest
                eps = batches.map(
                    lambda x, text, other: self.predict_noise(x, timestep, text, other, cross_attention_kwargs),
                    latents,
                    prompt_embeds,
                    negative,
                )
                if batches.largest < largest:
                    logger.warning(
                        f"Out of memory; from here on at most {batches.largest} frames are denoised at once. "
                        "The frames are the same."
                    )
                return eps

            yield predict_noise

    def _finish(
        self,
        pair: PreparedPair,
        latents: torch.Tensor,
        times: Sequence[float],
        include_inputs: bool,
        endpoints: str,
        output_type: str,
    ):
        """Frames as asked for, in a batch of one, and the safety checker's verdicts, likewise."""
        if output_type == "latent":
            ends = pair.inversion.path[0]
            return (torch.cat([ends[:1], latents, ends[1:]]) if include_inputs else latents)[None], None
        frames, flagged, ends, tones = [], [], [image[None] for image in pair.images], []

        def decode(latent: torch.Tensor) -> torch.Tensor:
            frame = unfit(self._decode(latent).cpu(), pair.canvas)
            bar.update()
            return frame

        total = len(latents) + 2 * include_inputs
        with self._progress(total, "Decoding") as bar, self._vae_switches_kept():
            try:
                if include_inputs:
                    reconstructed = [decode(latent) for latent in pair.inversion.path[0].split(1)]
                    if endpoints == "reconstructed":
                        ends = reconstructed
                    else:
                        tones = [tone_difference(*both) for both in zip(ends, reconstructed, strict=True)]
                for latent, time in zip(latents.split(1), times, strict=True):
                    frame = with_tone(decode(latent), tones, time)
                    frame, flags = self.run_safety_checker(frame)
                    frames.append(as_output(frame, output_type))
                    flagged += flags or []
            except torch.OutOfMemoryError as error:
                error.latents = latents
                error.add_note("What was denoised is not lost: this error's `latents` are for `decode_latents`.")
                raise
        if include_inputs:
            first, last = (as_output(end, output_type) for end in ends)
            frames = [first, *frames, last]
            flagged = [False, *flagged, False] if flagged else []
        if output_type == "pil":
            frames = [[picture for (picture,) in frames]]
        else:
            frames = (torch.cat if output_type == "pt" else np.concatenate)(frames)[None]
        return frames, [flagged] if flagged else None

    def _progress(self, total: int, doing: str):
        """A stage whose steps `update` counts: reported to the listener, or shown by diffusers' progress bar."""
        if self._listener is not None:
            return ReportedStage(self._listener, doing, total)
        settings = getattr(self, "_progress_bar_config", {})
        try:
            self.set_progress_bar_config(**{"desc": doing, **settings})
            return self.progress_bar(total=total)
        finally:
            self.set_progress_bar_config(**settings)


def load_pairs(img0, img1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first and the last images of all pairs, (3, H, W) in [0, 1] each.

    Raises:
        TypeError, ValueError: an image cannot be had, or there are not as many last as first ones.
    """
    firsts, lasts = load_images(img0, "img0"), load_images(img1, "img1")
    if is_batch(img0) != is_batch(img1) or len(firsts) != len(lasts):
        raise ValueError(
            f"`img0` and `img1` must be two images or two batches of one length; {len(firsts)} and {len(lasts)} came"
        )
    return firsts, lasts


def _metric(importance: str, clean: torch.Tensor, flow: BidirectionalFlow) -> torch.Tensor:
    """The splat metric of that name."""
    return agreement_importance(flow) if importance == "agreement" else photometric_importance(clean, flow)


def _piecewise(function: Callable[[torch.Tensor], tuple], times: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply a fusion to a few times at once, so that its workspace does not grow with the number of frames."""
    return tuple(torch.cat(parts) for parts in zip(*map(function, times.split(8)), strict=True))


def _require_finite(latents: torch.Tensor, dtype: torch.dtype) -> None:
    if not latents.isfinite().all():
        raise RuntimeError(f"the UNet overflowed in {dtype}; load the pipeline in bfloat16 or float32")
