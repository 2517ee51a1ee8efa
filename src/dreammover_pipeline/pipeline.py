# SPDX-License-Identifier: Apache-2.0
"""`DreamMoverPipeline`: two photos of one scene in, the frames between them out.

Reads like the paper (DreamMover, ECCV 2024, arXiv 2409.09605): `prepare` encodes the two, fits their LoRA, inverts
them and matches their features; `render` fuses the two at every δ, denoises with attention to both, and decodes.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import PIL.Image
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging, replace_example_docstring
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

# From a folder such as a clone's, diffusers copies exactly the modules that this file names by `from .name import`. So
# this block names every module that any of them needs; those that this file itself has no use for are marked.
from .adapters import check_adapters_act, check_new_adapter_name, load_beside
from .affine import Affine  # noqa: F401, named for the loader
from .arguments import Settings
from .attention import reference_attention  # noqa: F401, named for the loader
from .autoencoder import Autoencoder
from .branching import interpolate_in_noise  # noqa: F401, named for the loader
from .captured import replayed  # noqa: F401, named for the loader
from .cascade import PairCascade  # noqa: F401, named for the loader
from .conditioning import Conditioner
from .control import ControlPicture, check_controlnet, control_picture
from .ddim import recompose  # noqa: F401, named for the loader
from .denoiser import Denoiser
from .detail import with_detail  # noqa: F401, named for the loader
from .embeddings import fit_embeddings  # noqa: F401, named for the loader
from .features import up_block_features  # noqa: F401, named for the loader
from .fields import cell_grid  # noqa: F401, named for the loader
from .finishing import FrameMaker, Workplace, finish_frames, lazy_output, picture_dtype
from .flow import match_features  # noqa: F401, named for the loader
from .framing import fit  # noqa: F401, named for the loader
from .fusion import fuse_high_level  # noqa: F401, named for the loader
from .given_flow import given_flow  # noqa: F401, named for the loader
from .images import decode_images
from .inputs import check_choice, check_integer
from .kept_gaps import KeptGaps, check_can_keep, kept_gaps
from .layout import holding_layout  # noqa: F401, named for the loader
from .light import in_one_light  # noqa: F401, named for the loader
from .lora import check_pair_lora
from .memory import free_cache  # noqa: F401, named for the loader
from .model_checks import check_guidance, check_model_fits, check_no_callback, check_noise_levels, check_texts
from .models import Models
from .noise_training import NoiseTraining  # noqa: F401, named for the loader
from .outputs import DreamMoverPipelineOutput, as_output, hand_over, joined, returned
from .pairs import (
    ModelSizes,
    PairInput,
    check_generator,
    check_stackable,
    checked_pair,
    checked_pairs,
    pair_seeds,
    with_seeds,
)
from .paths import motion_paths  # noqa: F401, named for the loader
from .poses import (
    draw_pose,  # noqa: F401, named for the loader
    pose_pair,  # noqa: F401, named for the loader
)
from .preparing import fit_lora_of_gaps, prepare_pair
from .progress import ProgressListener, reported_stage
from .prompts import pair_negatives
from .ranking import Chooser, check_choices, clip_judge
from .records import Canvas, FrameSources, PreparedPair, check_prepared
from .refinement import refined_flow  # noqa: F401, named for the loader
from .rendering import DenoisedFrames, FramesAsked, negative_of, render_latents
from .repeatable import repeatable_attention  # noqa: F401, named for the loader
from .rigid import similarity_flow  # noqa: F401, named for the loader
from .sampling import denoise  # noqa: F401, named for the loader
from .schedules import deterministic_ddim
from .scratch import replacing  # noqa: F401, named for the loader
from .search import most_alike  # noqa: F401, named for the loader
from .sequence import LORAS, GapStages, check_arguments_of_a_sequence, checked_gaps, frames_of_gaps, make_gaps
from .settings import (
    PRESETS,
    Content,
    ControlContent,
    Delivery,
    FitSettings,
    NegativeContent,
    PrepareSettings,
    RenderSettings,
    takes_seed,
)
from .spacing import even_times  # noqa: F401, named for the loader
from .splatting import softmax_splat  # noqa: F401, named for the loader
from .stages import StageMethods
from .steering import steered_flow  # noqa: F401, named for the loader
from .storage import write_pair  # noqa: F401, named for the loader
from .text import embed_text  # noqa: F401, named for the loader
from .timing import EVEN
from .tone import with_tone  # noqa: F401, named for the loader
from .turns import interruptible, is_at_work

logger = logging.get_logger(__name__)

ADDED_COMPONENTS = ("controlnet", "clip", "clip_processor")  # components that no Stable Diffusion checkpoint has

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import export_to_video, load_image
        >>> from dreammover_pipeline import DreamMoverPipeline

        >>> pipe = DreamMoverPipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16, variant="fp16"
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
    StageMethods,
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
        controlnet: optional; a ControlNet for the UNet, by which frames follow `poses` or `control_images`.
        clip: optional; a CLIP that ranks `candidates`.
        clip_processor: prepares texts and frames for `clip`.
        requires_safety_checker: whether a missing safety checker deserves a warning.
    """

    PRESETS = PRESETS
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", *ADDED_COMPONENTS]  # noqa: RUF012, as in diffusers
    _exclude_from_cpu_offload = ["safety_checker"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    # No defaults for what checkpoints have: with one, `custom_pipeline=` would load what the user passed as None.
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        controlnet: ControlNetModel | None = None,
        clip: CLIPModel | None = None,
        clip_processor: CLIPProcessor | None = None,
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
            controlnet=controlnet,
            clip=clip,
            clip_processor=clip_processor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self._listeners: dict[int, ProgressListener] = {}
        self._sources: dict[int, list[FrameSources]] = {}  # sources of frames, by the threads that asked for them
        self._autoencoder: Autoencoder | None = None

    @property
    def components(self) -> dict[str, object]:
        """All components, by name, for another pipeline's constructor; optional ones that are None are left out.

        So `StableDiffusionPipeline(**pipe.components)` goes on working. The other way round
        `DreamMoverPipeline.from_pipe(pipe)` takes those that are needed.
        """
        found = super().components
        return {name: part for name, part in found.items() if part is not None or name not in ADDED_COMPONENTS}

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
        method: str = "flow",
        noise_levels: Sequence[float] = (0.25, 0.65),
        affine: Sequence[float] | None = None,
        candidates: int = 1,
        rank_by: Sequence[str] | Callable = ("high quality, detailed", "blurry, distorted"),
        choices: Mapping[float, int] | None = None,
        num_inference_steps: int = 50,
        inversion_steps: int = 30,
        feature_step: int = 14,
        feature_block: int | Sequence[int] = (1, 1, 2),
        distance_penalty: float = 0.1,
        rest_tolerance: float = 0.15,
        flow_smoothing: int = 1,
        flow_fit: str = "similarity",
        photo_tolerance: float = 0.1,
        flow: str | Callable | Sequence = "features+photos",
        points: Sequence | None = None,
        mask: object = None,
        poses: Sequence | None = None,
        attention_blocks: Sequence[int] = (2, 3),
        fusion: str = "two_level",
        motion: str = "rigid",
        importance: str = "agreement",
        layout_hold: float = 1.0,
        detail: str = "photos",
        guidance_scale: float = 1.0,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        embedding_steps: int = 0,
        embedding_learning_rate: float = 1e-4,
        lora_scale: float = 1.0,
        frame_batch_size: int | None = None,
        include_inputs: bool = False,
        endpoints: str = "original",
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        control_images: object = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DreamMoverPipelineOutput | tuple:
        """Make the frames between two photos of one scene.

        Images may be paths, PIL images, numpy arrays (H, W[, C]) or tensors (C, H, W), of any size, 8- or 16-bit or
        float in [0, 1], with EXIF orientation, grey, palette or alpha (put on white). A list of images, or an array
        with a leading batch axis, is a batch of pairs.

        Args:
            img0: the first image, at δ = 0; its size and aspect ratio decide those of the frames.
            img1: the last image, at δ = 1; fitted to the first one's frame without distortion, what overhangs is cut.
            prompt: What the photos show: one text for both, or two, one for each photo.
            height: Height in pixels to work at and to return. By default the model's native area is worked at, in the
                first photo's aspect ratio, and frames come back at the first photo's own size.
            width: Width in pixels to work at and to return. Where only one of `height` and `width` is given, the other
                one follows from the first photo's aspect ratio.
            n_frames: Number n of in-between frames; frame i is at δ = i/(n+1). Time grows with it; the batches that
                the UNet works on do not.
            times: The δ of the frames, each in (0, 1), instead of `n_frames`.
            easing: How the frames are spread over time: "linear", "ease-in-out", "ease-in", "ease-out", a rising
                function of δ from 0 at 0 to 1 at 1, or "even" for neighbours that differ equally, as far as warping
                alone tells.
            method: How frames are made: "flow" is DreamMover, for two photos of one scene, whose frames are denoised
                from what moves between the photos; "noise" is the interpolation of Wang and Golland, for two that do
                not show the same thing: the photos are noised and mixed, the frame in the middle is denoised first,
                and every other one is made in the same way from the two frames beside it. With "noise", `fusion`,
                `attention_blocks` and `layout_hold` do nothing.
            noise_levels: How far frames are noised where `method` is "noise", as shares of the schedule: the last ones
                that are made, and the frame in the middle, which is made first. Below a quarter frames look like a
                cross-fade; above two thirds they leave the photos.
            affine: Motion that is added where `method` is "noise": (zoom, degrees, right, down) by which the whole
                first photo moves on its way to the last one; it becomes `zoom` times as large, turns clockwise about
                its middle and shifts by shares of its width and height. The last photo comes from the other way, and
                both stand still at their own times. Frames with such motion get no detail of the photos, which would
                be where they do not stand any more. With "flow", motion is found in the photos.
            candidates: How often every frame is made, with other noise, where `method` is "noise"; the best is kept,
                and the frames beside it are made of it. More find better frames and take as many times as long. With
                "flow", where nothing is random, it must be 1.
            rank_by: What decides which of the `candidates` is the best: two texts, a good one and a bad one, by which
                CLIP (the components `clip` and `clip_processor`) takes the frame that is more like the first than like
                the second by most; or a function that gives a larger number for a better image.
            choices: Which of the `candidates`, from 0, is kept at some δ, whatever `rank_by` says: a dictionary from δ
                to number. The candidates of a call are in its output's `candidates`; with the same generator, only
                frames that are made of the chosen ones become others.
            num_inference_steps: Steps N of the whole DDIM schedule. More are finer and take longer.
            inversion_steps: How many of the steps the photos are inverted and the frames denoised, T. Fewer keep
                closer to the warped photos, more redraw what warping breaks: fewer ghosts, less likeness.
            feature_step: The step whose features are matched. A later one matches noisier, coarser features.
            feature_block: The UNet's up block whose features are matched, or several whose similarities are averaged,
                where a block named twice counts twice. The paper matches 1 alone, by meaning; a later block matches
                more finely and less by meaning.
            distance_penalty: How much cosine similarity a match loses that lies as far away as the image's shorter
                side is long, and half as much at half of that, so that of places that look alike the nearer one is
                matched. Too much holds back what moves far; 0 is the paper's.
            rest_tolerance: A place whose match is doubtful is taken to rest, unless the match is more similar than the
                same place in the other photo by more than this much cosine similarity. More holds more of the
                background still; 0, the paper's, none of it.
            flow_smoothing: Passes that carry the flow from cells whose match agrees both ways to their neighbours.
                More make the flow smoother and lose finer motion; 0 is the paper's bare argmax.
            flow_fit: What a pass of smoothing fits to the flow around every cell: "similarity", a shift, a turn and a
                scaling, or "mean", the weighted mean, which is right only for what is shifted.
            photo_tolerance: The flow is refined on the photos themselves, to fractions of a cell, wherever their
                colours then differ by no more than this on average, where 1 is from black to white, once both are in
                one light. More refines more places, and wrongly where the photos show different things; 0 is the
                paper's flow, of features alone. It acts only where `flow` is "features+photos".
            flow: What decides the flow: "features+photos", the UNet's features and then a refinement on the photos;
                "features", without the refinement; a function, called with the two photos as they are worked on, (3,
                H, W) float32 in [0, 1] on the CPU, that returns the flow forward and backward, (2, H, W) each, dx and
                dy in their pixels; or such a pair of arrays in the pixels of the photos as they were given, (2, H0,
                W0) and (2, H1, W1). NaN is what is unknown. A flow of your own is smoothed and steered, and not
                refined. A batch may have a list with one for each pair.
            points: Places that are in both photos, ((x0, y0), (x1, y1)) each, in pixels of the first and of the last
                photo with (0, 0) the centre of the top left pixel. They pull the flow around them. A batch has a list
                with the points of each pair, None for a pair without.
            mask: What may move, bright on dark; the rest stays where it is. One picture of the first photo's size is
                for both photos, two are one for each photo. A batch has a list with the masks of each pair, None for a
                pair without.
            poses: The people in the two photos, (pose of the first, pose of the last), for a `controlnet` of OpenPose
                poses: each the path of an OpenPose JSON file, or an array (18, 3) or (people, 18, 3) in OpenPose's
                order of points, x and y in pixels of the photo and confidence in [0, 1], 0 for what is not seen.
                Points that are seen in both move on straight lines, and every frame is conditioned on the pose at its
                δ. A batch has a list with the poses of each pair, None for a pair without.
            attention_blocks: Up blocks whose self-attention looks at the two photos. More copy more from the photos;
                none switches it off.
            fusion: How the pair is fused: "two_level" is the paper's, "two_level_unwarped" selects noise as the
                released code does, "direct" has no levels and blurs, which is the paper's ablation.
            motion: The way that things take through time: "rigid" turns and scales what moves as one about its centre,
                "straight" is the paper's, along which what turns shrinks on the way.
            importance: What decides between cells that land on one place: "agreement" of the two flows, or
                "photometric", the paper's brightness constancy, by which what looks alike in both photos wins.
            layout_hold: How much the frames are held to the warped photos while noise is high, where both photos agree
                on a place: 1 keeps all of their coarse layout and leaves detail to the UNet, 0 is the paper's, which
                lets deep inversion redraw what was right.
            detail: What is finer than diffusion makes it: "photos" brings the photos' own detail to every frame, at
                the size of the output, wherever it agrees with the frame or, with method="flow", is alike in both;
                "upsampled", the paper's, enlarges what diffusion made; "diffusion" is "photos" and then goes over what
                does not come from them with the UNet, tile by tile, for which a frame of 2048×2048 pixels takes up to
                136 further samples of Stable Diffusion 1.5's UNet.
            guidance_scale: Classifier-free guidance of the frames. Above 1 they follow the prompt more, at twice the
                cost; the paper uses none.
            controlnet_conditioning_scale: Factor of what the `controlnet` adds to the UNet; 0 adds nothing.
            control_guidance_start: Share of the denoising steps after which the `controlnet` begins to act.
            control_guidance_end: Share of the denoising steps after which the `controlnet` ceases to act.
            negative_prompt: What guidance leads away from; it acts where `guidance_scale` is above 1.
            lora_steps: Training steps of the pair's LoRA. More keep identity better, move less freely and take longer;
                0 skips the fit.
            lora_rank: Rank of the pair's LoRA. A higher one can hold more detail.
            lora_learning_rate: Learning rate of the pair's LoRA fit. A higher one learns faster and overfits sooner.
            embedding_steps: Training steps that fit the text embedding of each photo to it, starting from `prompt`,
                and a negative one to both, which guidance leads away from where no negative prompt is given. For
                photos that words describe badly, 100 to 500; 0 fits none.
            embedding_learning_rate: Learning rate of the fit of the text embeddings. A higher one leaves the words
                sooner.
            lora_scale: Weight of the pair's LoRA wherever the UNet runs; below 1 softens it.
            frame_batch_size: Frames denoised at once, at most; halved where memory runs out. The frames are the same
                up to rounding. By default it is what fits the free memory.
            include_inputs: Put the two photos at the ends.
            endpoints: What stands at the ends: "original", the photos at the output size and otherwise untouched, with
                the tone that the VAE takes from them faded out over the frames beside them; or "reconstructed", the
                photos as the VAE brings them back, made like all other frames, for a video of one cast.
            generator: What decides the fits of LoRA and embeddings, and the noise where `method` is "noise"; nothing
                else is random. A list holds one generator for each pair.
            prompt_embeds: Text embeddings (B, L, D) to use instead of `prompt`, or (2·B, L, D) with one for each
                photo.
            negative_prompt_embeds: Text embeddings (B, L, D) to use instead of `negative_prompt`.
            control_images: What the `controlnet` is given in place of drawn poses: two images, which are cross-faded,
                or a function of δ in [0, 1] that returns an image. They are brought to the frames' size as the photos
                are.
            output_type: Form of the frames: "pil", "np", "pt" or "latent"; or "lazy", PIL images each of which is made
                when it is asked for, so that the memory that large frames take does not grow with their number.
            return_dict: Return a `DreamMoverPipelineOutput` rather than a tuple of its fields.
            cross_attention_kwargs: Keyword arguments for the attention processors; "scale" scales every LoRA.
            clip_skip: Number of layers to leave out at the end of the text encoder; none by default.
            callback_on_step_end: Function called as (pipeline, i, timestep, tensors) after every denoising step of
                every pair; the tensors that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: Which of the pipeline's `_callback_tensor_inputs` the callback gets.
                Callbacks that diffusers has, such as `SDCFGCutoffCallback`, say it themselves.

        Returns:
            `DreamMoverPipelineOutput`, or the tuple of its fields.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
            Exception: a pair could not be made. If there were any before it, the error's `output` holds their frames.

        Examples:
        """
        arguments = locals()
        content, negative = Content.of(arguments), NegativeContent.of(arguments)
        preparing, rendering, delivery = (group.of(arguments) for group in (PrepareSettings, RenderSettings, Delivery))
        self._check_model_fits(preparing, rendering, delivery)
        pairs = checked_pairs(img0, img1, content, negative, self._sizes)
        self._check_texts(pairs, guidance_scale)
        check_stackable(pairs, output_type)
        self._check_candidates(rendering)
        pictures = self._control_pictures(control_images, pairs, [rendering] * len(pairs))
        if takes_seed(preparing, rendering):
            pairs = with_seeds(pairs, generator)
        with self._turn():
            self._interrupt = False
            outputs = []
            try:
                for pair in pairs:
                    prepared = self._prepare(pair, preparing)
                    # What a ControlNet is given is let go with the last pair on its canvas.
                    asked = FramesAsked(rendering, pair.negative, pair.seed, pictures.pop(0))
                    outputs.append(self._render(prepared, asked, delivery))
                    if self.interrupt:
                        break
            except (Exception, KeyboardInterrupt) as error:
                if outputs:
                    hand_over(error, lambda: joined(outputs), "pairs")
                raise
            return returned(joined(outputs), return_dict)

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
        feature_block: int | Sequence[int] = (1, 1, 2),
        distance_penalty: float = 0.1,
        rest_tolerance: float = 0.15,
        flow_smoothing: int = 1,
        flow_fit: str = "similarity",
        photo_tolerance: float = 0.1,
        flow: str | Callable | Sequence = "features+photos",
        points: Sequence | None = None,
        mask: object = None,
        poses: Sequence | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        embedding_steps: int = 0,
        embedding_learning_rate: float = 1e-4,
        lora_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        lora: dict[str, torch.Tensor] | None = None,
        canvas: Canvas | None = None,
    ) -> PreparedPair:
        """Do everything that does not depend on the frames asked for, once: encode, fit, invert, match.

        Args are those of `__call__`, for one pair, and:
            lora: LoRA weights, as `fit_lora` returns and `PreparedPair.lora` holds them, to use instead of fitting
                some; `lora_steps`, `lora_rank` and `lora_learning_rate` are then ignored, and so is `generator` where
                no embeddings are fitted.
            canvas: where both images are put, and the size of the frames: what the method `canvas` gives for another
                image, to have frames of its size. `height` and `width` must then be None.

        Returns:
            What `render` takes, as often as wanted.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
        """
        arguments = locals()
        settings = PrepareSettings.of(arguments)
        self._check_model_fits(settings)
        if lora is not None:
            check_pair_lora(self.unet, lora)
        pair = checked_pair(img0, img1, Content.of(arguments), self._sizes, canvas)
        self._check_texts([pair])
        if pair.poses is not None:
            self._require_controlnet("poses")
        if takes_seed(settings, lora=lora):
            (pair,) = with_seeds([pair], generator)
        with self._turn():
            return self._prepare(pair, settings, lora)

    def render(
        self,
        pair: PreparedPair,
        n_frames: int = 32,
        times: Sequence[float] | None = None,
        easing: str | Callable[[float], float] = "linear",
        method: str = "flow",
        noise_levels: Sequence[float] = (0.25, 0.65),
        affine: Sequence[float] | None = None,
        candidates: int = 1,
        rank_by: Sequence[str] | Callable = ("high quality, detailed", "blurry, distorted"),
        choices: Mapping[float, int] | None = None,
        attention_blocks: Sequence[int] = (2, 3),
        fusion: str = "two_level",
        motion: str = "rigid",
        importance: str = "agreement",
        layout_hold: float = 1.0,
        detail: str = "photos",
        guidance_scale: float = 1.0,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        frame_batch_size: int | None = None,
        include_inputs: bool = False,
        endpoints: str = "original",
        generator: torch.Generator | list[torch.Generator] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        control_images: object = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DreamMoverPipelineOutput | tuple:
        """Make frames of a prepared pair: fuse, denoise with reference attention, decode.

        Args are those of `__call__`, for one pair. `generator` decides the noise where `method` is "noise".

        Returns:
            As `__call__`, for a batch of one.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
            torch.OutOfMemoryError: memory does not suffice for a single frame. If that was in decoding, the error's
                `latents` (F, C, h, w) are the denoised frames, for `decode_latents`.
        """
        arguments = locals()
        settings, delivery = RenderSettings.of(arguments), Delivery.of(arguments)
        self._check_model_fits(settings, delivery)
        check_prepared(pair)
        check_noise_levels(settings, pair.inversion.schedule)
        pair = pair.in_precision(self.unet.dtype)
        away = NegativeContent.of(arguments)
        (negative,) = pair_negatives(away.negative_prompt, away.negative_prompt_embeds, 1, self._sizes.text_width)
        if guidance_scale > 1:
            tokens = pair.prompt_embeds.shape[1]
            check_guidance(tokens, negative_of(pair, negative), self.text_encoder, self.tokenizer)
        check_generator(generator, 1)
        self._check_candidates(settings)
        (picture,) = self._control_pictures(control_images, [pair], [settings])
        seed = pair_seeds(generator, 1)[0] if method == "noise" else None
        with self._turn():
            self._interrupt = False
            asked = FramesAsked(settings, negative, seed, picture)
            return returned(self._render(pair, asked, delivery), return_dict)

    def _prepare(
        self, pair: PairInput, settings: PrepareSettings, lora: dict[str, torch.Tensor] | None = None
    ) -> PreparedPair:
        prepared = prepare_pair(self._models(settings.cross_attention_kwargs), pair, settings, self._stage, lora)
        self.maybe_free_model_hooks()
        return prepared

    def _render(self, pair: PreparedPair, asked: FramesAsked, delivery: Delivery) -> DreamMoverPipelineOutput:
        output = self._finish(self._render_latents(pair, asked, delivery), asked.settings, delivery)
        self.maybe_free_model_hooks()
        return output

    def _render_latents(self, pair: PreparedPair, asked: FramesAsked, delivery: Delivery) -> DenoisedFrames:
        settings = asked.settings
        self._guidance_scale = settings.guidance_scale
        models = self._models(settings.cross_attention_kwargs)

        def on_step_end(i: int, timestep: int, tensors: dict) -> dict:
            if delivery.callback_on_step_end is None:
                return {}
            wanted = {name: tensors[name] for name in delivery.tensor_names}
            with interruptible():
                replaced = delivery.callback_on_step_end(self, i, timestep, wanted) or {}
            if not isinstance(replaced, dict):
                kind = type(replaced).__name__
                raise TypeError(f"`callback_on_step_end` must return a dictionary of tensors or None, not {kind}")
            models.denoiser.guidance_scale = self._guidance_scale  # which a callback may change
            return replaced

        @contextmanager
        def stages(name: str, total: int) -> Iterator[Callable[[], object]]:
            self._num_timesteps = total
            with self._stage(name, total) as step:
                yield step

        given = () if delivery.callback_on_step_end is None else delivery.tensor_names
        return render_latents(
            models,
            pair,
            asked,
            stages,
            on_step_end,
            lambda: self.interrupt,
            self._chooser(settings),
            copy_embeddings=any(name != "latents" for name in given),
        )

    def _finish(
        self, frames: DenoisedFrames, settings: RenderSettings, delivery: Delivery
    ) -> DreamMoverPipelineOutput:
        kept = self._sources.get(threading.get_ident())
        on_sources = None if kept is None else kept.append
        models = self._models(settings.cross_attention_kwargs)
        output_type, check = delivery.output_type, self.run_safety_checker
        if output_type != "lazy":
            return finish_frames(models, frames, settings, output_type, check, self._stage, on_sources)
        maker = FrameMaker(models, frames, settings, picture_dtype(output_type), check, on_sources)
        turn = self._turn if settings.detail_made == "diffusion" else self._step_turn  # only that changes the UNet
        workplace = Workplace(turn, self._step_turn, self._stage, self._free_hooks_of_idle_models)
        return lazy_output(maker, workplace, checked=self.safety_checker is not None)

    def interpolate_sequence(
        self,
        images,
        prompt: str | Sequence[str] | None = "",
        n_frames: int | Sequence[int] = 32,
        lora: str = "gap",
        include_inputs: bool = True,
        return_dict: bool = True,
        keep: str | os.PathLike | None = None,
        **arguments,
    ) -> DreamMoverPipelineOutput | tuple:
        """Make one video that leads through several photos, on the canvas of the first of them.

        Args:
            images: at least two, each as `__call__` takes it; the first one's size and aspect ratio decide those of
                all frames.
            prompt: what the images show; one text for all, or one per image.
            n_frames: number of frames in every gap, or a list of one number per gap.
            lora: "gap" fits a LoRA for every gap; "shared" fits one to all images, in as many steps, two images a
                step, and so at the cost of a single gap.
            include_inputs: put the images in their places; one that two gaps share is there once.
            return_dict: return a `DreamMoverPipelineOutput` rather than a tuple of its fields.
            keep: a folder in which every finished gap is kept, so that after a kill or an error the same call goes on
                from there; by default nothing is kept. Only what is as it was asked for is taken from it. Remove it
                when the video is done. It excludes `callback_on_step_end` and `control_images`, and a `flow` or
                a `rank_by` that is a function, for whose results it could not answer.
            **arguments: any others of `__call__` but `img0` and `img1`. They hold for every gap, `times` and `easing`
                too; `points`, `mask` and `poses` are lists with those of each gap, None for a gap without; a list as
                `flow` holds one per gap, and a list of generators one per LoRA; `prompt_embeds` are (1, L, D), or
                (n, L, D) with one per image.

        Returns:
            `DreamMoverPipelineOutput`, or the tuple of its fields: the video as `frames[0]`, and one entry per gap in
            `flow` and in `times`, where a photo that two gaps share is the 1 of the first of them.

        Raises:
            TypeError, ValueError: an argument is not what it may be; raised before any model runs.
            Exception: a gap could not be made; the error's `output` is what would be returned for those before it.
        """
        check_choice("lora", lora, LORAS)
        check_arguments_of_a_sequence(arguments)
        arguments |= {"prompt": prompt, "include_inputs": include_inputs, "return_dict": return_dict}
        content, negative = Content.of(arguments), NegativeContent.of(arguments)
        preparing, delivery = PrepareSettings.of(arguments), Delivery.of(arguments)
        shared = lora == "shared"
        self._check_model_fits(preparing, delivery)
        gaps = checked_gaps(images, content, negative, self._sizes, shared)
        counts = frames_of_gaps(n_frames, len(gaps))
        rendering = [RenderSettings.of({**arguments, "n_frames": count}) for count in counts]
        self._check_model_fits(preparing, *rendering)
        self._check_texts(gaps, rendering[0].guidance_scale)
        images_of_all = ControlContent.of(arguments).control_images
        self._check_candidates(*rendering)
        if keep is not None:
            check_no_callback("keep", delivery)
            check_can_keep(keep, gaps, rendering[0], images_of_all)
        pictures = self._control_pictures(images_of_all, gaps, rendering)
        if takes_seed(preparing, rendering[0]):
            gaps = with_seeds(gaps, content.generator)
        with self._turn():
            self._interrupt = False
            kept = KeptGaps()
            if keep is not None:
                dtypes = [str(model.dtype) for model in self._fingerprinted.values()]
                of_frames = of_pairs = f"{self._fingerprint(self._at_work)} {dtypes}"
                if self._at_work.keys() != self._fingerprinted.keys():  # else every weight would be read twice
                    of_pairs = f"{self._fingerprint(self._fingerprinted)} {dtypes}"
                kept = kept_gaps(keep, gaps, preparing, rendering, shared, of_frames, of_pairs, self._execution_device)
            models = self._models(preparing.cross_attention_kwargs)
            fits_once = shared and preparing.lora_steps > 0
            stages = GapStages(
                (lambda: fit_lora_of_gaps(models, gaps, preparing, self._stage)) if fits_once else None,
                lambda gap, own: self._prepare(gap, preparing, own),
                lambda k, pair: self._render_latents(
                    pair, FramesAsked(rendering[k], gaps[k].negative, gaps[k].seed, pictures[k]), delivery
                ),
                lambda k, frames: self._finish(frames, rendering[k], delivery),
                finish_needs_pair=rendering[0].detail_made == "diffusion",
            )
            output = make_gaps(gaps, stages, kept, lambda: self.interrupt, include_inputs)
            self.maybe_free_model_hooks()
            return returned(output, return_dict)

    def fit_shared_lora(
        self,
        images,
        prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        lora_steps: int = 80,
        lora_rank: int = 16,
        lora_learning_rate: float = 5e-4,
        embedding_steps: int = 0,
        embedding_learning_rate: float = 1e-4,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        check_integer("lora_steps", lora_steps, 1)
        arguments = locals()
        settings = FitSettings.of(arguments)
        self._check_model_fits(settings)
        gaps = checked_gaps(images, Content.of(arguments), NegativeContent(), self._sizes, shared=True)
        self._check_texts(gaps)
        gaps = with_seeds(gaps, generator)
        with self._turn():
            weights = fit_lora_of_gaps(self._models(cross_attention_kwargs), gaps, settings, self._stage)
            self.maybe_free_model_hooks()
            return weights

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
        embedding_steps: int = 0,
        embedding_learning_rate: float = 1e-4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
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
        check_integer("lora_steps", lora_steps, 1)
        arguments = locals()
        settings = FitSettings.of(arguments)
        self._check_model_fits(settings)
        check_new_adapter_name(self.unet, adapter_name)
        check_adapters_act(self.unet)
        pair = checked_pair(img0, img1, Content.of(arguments), self._sizes)
        self._check_texts([pair])
        (pair,) = with_seeds([pair], generator)
        with self._turn():
            weights = fit_lora_of_gaps(self._models(cross_attention_kwargs), [pair], settings, self._stage)
            load_beside(self, weights, adapter_name)
            self.maybe_free_model_hooks()
            return weights

    def check_inputs(self, **arguments) -> None:
        """Raise TypeError or ValueError unless these arguments of `__call__` are what they may be.

        What is left out has its default. Photos, points, masks, poses and the form of texts are looked at where they
        are used; what is no argument of the method is left alone.
        """
        for group in (Content, NegativeContent):
            group.of(arguments)  # which checks them
        rendering = RenderSettings.of(arguments)
        self._check_model_fits(PrepareSettings.of(arguments), rendering, Delivery.of(arguments))
        self._check_candidates(rendering)
        for name in ("poses", "control_images"):
            if arguments.get(name) is not None:
                self._require_controlnet(name)

    def canvas(self, image: torch.Tensor, height: int | None = None, width: int | None = None) -> Canvas:
        """Working size and output size for a first image (C, H, W), and for the size asked for, if any."""
        return self._sizes.canvas(image, height, width)

    @contextmanager
    def listening(self, listener: ProgressListener) -> Iterator[None]:
        """Tell a listener of progress, instead of drawing bars, while the context lasts.

        It is told of calls that are made in the thread that entered the context.

        Args:
            listener: Function called as (stage, steps done, steps in all) when a stage begins and after each of its
                steps. What it raises ends the work at that step and passes on, with the models as they were: so a job
                is cancelled.
        """
        with _entry(self._listeners, listener):
            yield

    @contextmanager
    def keeping_sources(self) -> Iterator[list[FrameSources]]:
        """Keep which photo every place of the frames comes from that are made while the context lasts.

        It holds for calls that are made in the thread that entered the context. What is kept is small maps, which
        `media.sources.sources_picture` draws.

        Yields:
            A list, to which every frame between the photos adds its `FrameSources`, in the order of the frames.
            Frames with `detail="upsampled"`, frames that are returned as latents and frames of gaps that were taken
            from `keep` add none.
        """
        kept = []
        with _entry(self._sources, kept):
            yield kept

    # What the methods above share.

    @property
    def _sizes(self) -> ModelSizes:
        sample = self.unet.config.sample_size
        native = (sample, sample) if isinstance(sample, int) else tuple(sample)
        native_side = self.vae_scale_factor * math.sqrt(math.prod(native))
        return ModelSizes(native_side, self.vae_scale_factor, self.unet.config.cross_attention_dim)

    def _models(self, cross_attention_kwargs: dict | None = None) -> Models:
        """The components of this moment as the objects that the stages work with."""
        device = self._execution_device
        if self._autoencoder is None or self._autoencoder.vae is not self.vae:
            self._autoencoder = Autoencoder(self.vae, device)
        self._autoencoder.device = device
        ddim = deterministic_ddim(self.scheduler)
        brought_when_called = bool(getattr(self, "_all_hooks", []))  # by enable_model_cpu_offload
        denoiser = Denoiser(self.unet, ddim, device, cross_attention_kwargs, brought_when_called, self.controlnet)
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        return Models(denoiser, self._autoencoder, self._conditioner(device, scale))

    def _conditioner(self, device: torch.device, lora_scale: float) -> Conditioner:
        dtype = None if self.unet is None else self.unet.dtype
        convert = partial(self.maybe_convert_prompt, tokenizer=self.tokenizer)  # for textual inversion
        return Conditioner(self.text_encoder, self.tokenizer, dtype, device, convert, lora_scale)

    def _control_pictures(
        self, images: object, pairs: Sequence[PairInput | PreparedPair], videos: Sequence[RenderSettings]
    ) -> list[ControlPicture | None]:
        """What the ControlNet is given at each time of each pair's video, None where it is given nothing.

        A function of the user's is asked here for the photos' pictures and for those of all times that are known
        before the models run. Pairs on one canvas share what it returns.

        Raises:
            TypeError, ValueError: The images are not what they may be, or there is no ControlNet to be given them.
        """
        picture_of = cache(partial(control_picture, images))
        pictures = []
        for pair, video in zip(pairs, videos, strict=True):
            for name, given in (("control_images", images), ("poses", pair.poses)):
                if given is not None:
                    self._require_controlnet(name)
            picture = picture_of(pair.poses, pair.canvas)
            if callable(images):
                for time in (0.0, 1.0, *(video.known_times or ())):
                    picture(time)
            pictures.append(picture)
        return pictures

    def _check_candidates(self, *videos: RenderSettings) -> None:
        """Raise ValueError if nothing can choose among candidates, or if a choice is for no frame of the videos."""
        settings = videos[0]
        if settings.choices and all(video.easing != EVEN for video in videos):
            check_choices(settings.choices, sorted({time for video in videos for time in video.known_times}))
        judged = callable(settings.rank_by) or (self.clip is not None and self.clip_processor is not None)
        if settings.candidates > 1 and not judged:
            raise ValueError(
                "`candidates` are ranked by CLIP, which this pipeline lacks; load it with `clip=CLIPModel."
                "from_pretrained(...)` and `clip_processor=CLIPProcessor.from_pretrained(...)`, on the command line by"
                " --clip, or pass a function as `rank_by`"
            )

    def _chooser(self, settings: RenderSettings) -> Chooser | None:
        """What chooses among the candidates of each frame; None where every frame is made once."""
        if settings.candidates == 1:
            return None
        judge = settings.rank_by
        if not callable(judge):
            judge = clip_judge(self.clip, self.clip_processor, judge, self._execution_device)
        return Chooser(judge, settings.choices or {}, self._checked)

    def _checked(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """A picture as it may be shown: black if the safety checker flags it, as a finished frame is."""
        if self.safety_checker is None:
            return picture
        checked, _ = self.run_safety_checker(decode_images(picture, "candidate")[0][None])
        return as_output(checked, "pil")[0]

    def _require_controlnet(self, argument: str) -> None:
        """Raise TypeError or ValueError unless there is a ControlNet that fits the UNet, for an argument's sake."""
        if self.controlnet is None:
            raise ValueError(
                f"`{argument}` needs a ControlNet, which this pipeline lacks; load it with "
                "`controlnet=ControlNetModel.from_pretrained(...)`, on the command line by --controlnet"
            )
        check_controlnet(self.controlnet, self.unet, self.vae_scale_factor)

    def _check_model_fits(self, *settings: Settings) -> None:
        check_model_fits(
            settings, self.unet, self.vae, self.text_encoder, self.scheduler, self._callback_tensor_inputs
        )

    def _check_texts(self, pairs: Sequence[PairInput], guidance_scale: float = 1.0) -> None:
        check_texts([pair.text for pair in pairs], self.text_encoder)
        if guidance_scale > 1:
            for pair in pairs:
                embeds = pair.text.embeds
                tokens = self.tokenizer.model_max_length if embeds is None else embeds.shape[1]
                check_guidance(tokens, pair.negative, self.text_encoder, self.tokenizer)

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[Callable[[], object]]:
        """A stage of the work: told to the listener, or drawn as diffusers' bar, whose settings stand."""
        listener = self._listeners.get(threading.get_ident())
        if listener is not None:
            with reported_stage(listener, name, total) as step:
                yield step
            return
        with self.progress_bar(total=total) as bar:
            if "desc" not in self._progress_bar_config:
                bar.set_description(name)
            yield bar.update

    def _free_hooks_of_idle_models(self) -> None:
        """What `maybe_free_model_hooks` does, unless the calling thread is inside a call of this UNet."""
        if not is_at_work(self.unet):
            self.maybe_free_model_hooks()


@contextmanager
def _entry(entries: dict[int, object], value: object) -> Iterator[None]:
    """Give this thread an entry while the context lasts, in the place of the one that it may have."""
    thread = threading.get_ident()
    before, entries[thread] = entries.get(thread), value
    try:
        yield
    finally:
        if before is None:
            del entries[thread]
        else:
            entries[thread] = before
