# SPDX-License-Identifier: Apache-2.0
"""Every argument of the pipeline, declared once.

A declaration holds the argument's name, type, default, allowed values and meaning, the paper's value where the default
is another one, and what of the frames the argument decides. The checks, the presets, the options of the command line,
the keys of a manifest, the key of the LoRA cache and the ranges on the web page are made from it. The signatures and
the docstring in `pipeline.py` and README's table are written from it by `python tools/write_arguments.py`.

Nothing here imports torch, so that the command line can answer `--help` at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import (
    ASK_PYTHON,
    PICTURES,
    Argument,
    Blocks,
    Choice,
    Choices,
    Function,
    Keywords,
    Levels,
    Motion,
    Names,
    Numbers,
    Pictures,
    Plain,
    Poses,
    Ranking,
    Settings,
    Switch,
    Text,
    Values,
    WholeNumbers,
    argument,
    arguments_of,
)
from .inputs import check_attention_blocks, check_feature_blocks, check_steps, frame_times
from .timing import EVEN, check_easing, eased_times

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

FUSIONS = ("two_level", "two_level_unwarped", "direct")
IMPORTANCES = ("agreement", "photometric")
METHODS = ("flow", "noise")
FLOWS = ("features+photos", "features")
FLOW_FITS = ("similarity", "mean")
MOTIONS = ("rigid", "straight")
DETAILS = ("photos", "upsampled", "diffusion")
ENDPOINTS = ("original", "reconstructed")
OUTPUT_TYPES = ("pil", "np", "pt", "latent", "lazy")


@dataclass(frozen=True)
class Content(Settings):
    """What the pairs of a call are, and how large their frames are to be; it may differ from pair to pair."""

    prompt: str | Sequence[str] | None = argument(
        "", Text(of_each_photo=True), "What the photos show: one text for both, or two, one for each photo."
    )
    height: int | None = argument(
        None,
        Plain(),
        "Height in pixels to work at and to return. By default the model's native area is worked at, in the first "
        "photo's aspect ratio, and frames come back at the first photo's own size.",
        option=ASK_PYTHON,
    )
    width: int | None = argument(
        None,
        Plain(),
        "Width in pixels to work at and to return. Where only one of `height` and `width` is given, the other one "
        "follows from the first photo's aspect ratio.",
        option=ASK_PYTHON,
    )
    flow: str | Callable | Sequence = argument(
        "features+photos",
        Plain(),
        'What decides the flow: "features+photos", the UNet\'s features and then a refinement on the photos; '
        '"features", without the refinement; a function, called with the two photos as they are worked on, (3, H, W) '
        "float32 in [0, 1] on the CPU, that returns the flow forward and backward, (2, H, W) each, dx and dy in their "
        "pixels; or such a pair of arrays in the pixels of the photos as they were given, (2, H0, W0) and "
        "(2, H1, W1). NaN is what is unknown. A flow of your own is smoothed and steered, and not refined. A batch "
        "may have a list with one for each pair.",
        option="--flow-from",
    )
    points: Sequence | None = argument(
        None,
        Plain(),
        "Places that are in both photos, ((x0, y0), (x1, y1)) each, in pixels of the first and of the last photo with "
        "(0, 0) the centre of the top left pixel. They pull the flow around them. A batch has a list with the points "
        "of each pair, None for a pair without.",
    )
    mask: object = argument(
        None,
        Pictures(),
        "What may move, bright on dark; the rest stays where it is. One picture of the first photo's size is for both "
        "photos, two are one for each photo. A batch has a list with the masks of each pair, None for a pair without.",
    )
    poses: Sequence | None = argument(
        None,
        Poses(),
        "The people in the two photos, (pose of the first, pose of the last), for a `controlnet` of OpenPose poses: "
        "each the path of an OpenPose JSON file, or an array (18, 3) or (people, 18, 3) in OpenPose's order of "
        "points, x and y in pixels of the photo and confidence in [0, 1], 0 for what is not seen. Points that are "
        "seen in both move on straight lines, and every frame is conditioned on the pose at its δ. A batch has a list "
        "with the poses of each pair, None for a pair without.",
    )
    generator: torch.Generator | list[torch.Generator] | None = argument(
        None,
        Values(),
        'What decides the fits of LoRA and embeddings, and the noise where `method` is "noise"; nothing else is '
        "random. A list holds one generator for each pair.",
        option=ASK_PYTHON,
    )
    prompt_embeds: torch.Tensor | None = argument(
        None,
        Values(),
        "Text embeddings (B, L, D) to use instead of `prompt`, or (2·B, L, D) with one for each photo.",
        option=ASK_PYTHON,
    )


@dataclass(frozen=True)
class SharedSettings(Settings):
    """What holds wherever the UNet runs."""

    cross_attention_kwargs: dict | None = argument(
        None,
        Keywords(),
        'Keyword arguments for the attention processors; "scale" scales every LoRA.',
        option=ASK_PYTHON,
    )


@dataclass(frozen=True)
class FitSettings(SharedSettings):
    """How the pair's LoRA is fitted, besides what the photos and their texts decide. Source: DreamMover §4.1."""

    lora_steps: int = argument(
        80,
        WholeNumbers(0),
        "Training steps of the pair's LoRA. More keep identity better, move less freely and take longer; 0 skips the "
        "fit.",
        slider=(0, 300),
    )
    lora_rank: int = argument(16, WholeNumbers(1), "Rank of the pair's LoRA. A higher one can hold more detail.")
    lora_learning_rate: float = argument(
        5e-4,
        Numbers(0, inclusive=False),
        "Learning rate of the pair's LoRA fit. A higher one learns faster and overfits sooner.",
    )
    embedding_steps: int = argument(
        0,
        WholeNumbers(0),
        "Training steps that fit the text embedding of each photo to it, starting from `prompt`, and a negative one "
        "to both, which guidance leads away from where no negative prompt is given. For photos that words describe "
        "badly, 100 to 500; 0 fits none.",
        slider=(0, 500),
    )
    embedding_learning_rate: float = argument(
        1e-4,
        Numbers(0, inclusive=False),
        "Learning rate of the fit of the text embeddings. A higher one leaves the words sooner.",
    )
    clip_skip: int | None = argument(
        None, WholeNumbers(0), "Number of layers to leave out at the end of the text encoder; none by default."
    )


@dataclass(frozen=True)
class PrepareSettings(FitSettings):
    """How a pair is inverted and matched. Source: DreamMover §3.1, §3.2 and §4.1."""

    num_inference_steps: int = argument(
        50, WholeNumbers(1), "Steps N of the whole DDIM schedule. More are finer and take longer.", option="--steps"
    )
    inversion_steps: int = argument(
        30,
        WholeNumbers(1),
        "How many of the steps the photos are inverted and the frames denoised, T. Fewer keep closer to the warped "
        "photos, more redraw what warping breaks: fewer ghosts, less likeness.",
        slider=(2, 50),
    )
    feature_step: int = argument(
        14, WholeNumbers(1), "The step whose features are matched. A later one matches noisier, coarser features."
    )
    feature_block: int | Sequence[int] = argument(
        (1, 1, 2),
        Blocks(check_feature_blocks, 1),
        "The UNet's up block whose features are matched, or several whose similarities are averaged, where a block "
        "named twice counts twice. The paper matches 1 alone, by meaning; a later block matches more finely and less "
        "by meaning.",
        paper=1,
    )
    distance_penalty: float = argument(
        0.1,
        Numbers(0),
        "How much cosine similarity a match loses that lies as far away as the image's shorter side is long, and half "
        "as much at half of that, so that of places that look alike the nearer one is matched. Too much holds back "
        "what moves far; 0 is the paper's.",
        paper=0,
    )
    rest_tolerance: float = argument(
        0.15,
        Numbers(0),
        "A place whose match is doubtful is taken to rest, unless the match is more similar than the same place in "
        "the other photo by more than this much cosine similarity. More holds more of the background still; 0, the "
        "paper's, none of it.",
        paper=0,
    )
    flow_smoothing: int = argument(
        1,
        WholeNumbers(0, 1000),
        "Passes that carry the flow from cells whose match agrees both ways to their neighbours. More make the flow "
        "smoother and lose finer motion; 0 is the paper's bare argmax.",
        paper=0,
    )
    flow_fit: str = argument(
        "similarity",
        Choice(FLOW_FITS),
        'What a pass of smoothing fits to the flow around every cell: "similarity", a shift, a turn and a scaling, or '
        '"mean", the weighted mean, which is right only for what is shifted.',
    )
    photo_tolerance: float = argument(
        0.1,
        Numbers(0),
        "The flow is refined on the photos themselves, to fractions of a cell, wherever their colours then differ by "
        "no more than this on average, where 1 is from black to white, once both are in one light. More refines more "
        "places, and wrongly where the photos show different things; 0 is the paper's flow, of features alone. It "
        'acts only where `flow` is "features+photos".',
        paper=0,
    )
    lora_scale: float = argument(
        1.0, Numbers(0), "Weight of the pair's LoRA wherever the UNet runs; below 1 softens it."
    )

    def __post_init__(self):
        super().__post_init__()
        check_steps(self.num_inference_steps, self.inversion_steps, self.feature_step)


@dataclass(frozen=True)
class NegativeContent(Settings):
    """What guidance leads the frames away from; it may differ from pair to pair."""

    negative_prompt: str | Sequence[str] | None = argument(
        None, Text(), "What guidance leads away from; it acts where `guidance_scale` is above 1."
    )
    negative_prompt_embeds: torch.Tensor | None = argument(
        None, Values(), "Text embeddings (B, L, D) to use instead of `negative_prompt`.", option=ASK_PYTHON
    )


@dataclass(frozen=True)
class ControlContent(Settings):
    """What frames are conditioned on besides texts and poses."""

    control_images: object = argument(
        None,
        Values(),
        "What the `controlnet` is given in place of drawn poses: two images, which are cross-faded, or a function of "
        "δ in [0, 1] that returns an image. They are brought to the frames' size as the photos are.",
        option=ASK_PYTHON,
    )


@dataclass(frozen=True)
class VideoSettings(SharedSettings):
    """Which frames are wanted."""

    n_frames: int = argument(
        32,
        WholeNumbers(1),
        "Number n of in-between frames; frame i is at δ = i/(n+1). Time grows with it; the batches that the UNet "
        "works on do not.",
        option="--frames",
        slider=(1, 64),
    )
    times: Sequence[float] | None = argument(
        None, Plain(), "The δ of the frames, each in (0, 1), instead of `n_frames`.", option=ASK_PYTHON
    )
    easing: str | Callable[[float], float] = argument(
        "linear",
        Plain(),
        'How the frames are spread over time: "linear", "ease-in-out", "ease-in", "ease-out", a rising function of δ '
        'from 0 at 0 to 1 at 1, or "even" for neighbours that differ equally, as far as warping alone tells.',
    )
    include_inputs: bool = argument(
        False, Switch(), "Put the two photos at the ends.", decides=PICTURES, option=ASK_PYTHON
    )
    endpoints: str = argument(
        "original",
        Choice(ENDPOINTS),
        'What stands at the ends: "original", the photos at the output size and otherwise untouched, with the tone '
        'that the VAE takes from them faded out over the frames beside them; or "reconstructed", the photos as the '
        "VAE brings them back, made like all other frames, for a video of one cast.",
        decides=PICTURES,
    )

    def __post_init__(self):
        super().__post_init__()
        check_easing(self.n_frames, self.times, self.easing)

    @property
    def known_times(self) -> tuple[float, ...] | None:
        """The δ of the frames, in (0, 1); None for even spacing, where they depend on the pair."""
        if self.easing == EVEN:
            return None
        linear = frame_times(self.n_frames, self.times)
        return eased_times(linear, self.easing) if self.times is None else linear


@dataclass(frozen=True)
class RenderSettings(VideoSettings):
    """How frames of a prepared pair are made. Source: DreamMover §3.3 and §3.4, and arXiv 2307.12560."""

    method: str = argument(
        "flow",
        Choice(METHODS),
        'How frames are made: "flow" is DreamMover, for two photos of one scene, whose frames are denoised from what '
        'moves between the photos; "noise" is the interpolation of Wang and Golland, for two that do not show the '
        "same thing: the photos are noised and mixed, the frame in the middle is denoised first, and every other one "
        'is made in the same way from the two frames beside it. With "noise", `fusion`, `attention_blocks` and '
        "`layout_hold` do nothing.",
    )
    noise_levels: Sequence[float] = argument(
        (0.25, 0.65),
        Levels(),
        'How far frames are noised where `method` is "noise", as shares of the schedule: the last ones that are made, '
        "and the frame in the middle, which is made first. Below a quarter frames look like a cross-fade; above two "
        "thirds they leave the photos.",
    )
    affine: Sequence[float] | None = argument(
        None,
        Motion(),
        'Motion that is added where `method` is "noise": (zoom, degrees, right, down) by which the whole first photo '
        "moves on its way to the last one; it becomes `zoom` times as large, turns clockwise about its middle and "
        "shifts by shares of its width and height. The last photo comes from the other way, and both stand still at "
        "their own times. Frames with such motion get no detail of the photos, which would be where they do not stand "
        'any more. With "flow", motion is found in the photos.',
    )
    candidates: int = argument(
        1,
        WholeNumbers(1, 100),
        'How often every frame is made, with other noise, where `method` is "noise"; the best is kept, and the frames '
        'beside it are made of it. More find better frames and take as many times as long. With "flow", where nothing '
        "is random, it must be 1.",
    )
    rank_by: Sequence[str] | Callable = argument(
        ("high quality, detailed", "blurry, distorted"),
        Ranking(),
        "What decides which of the `candidates` is the best: two texts, a good one and a bad one, by which CLIP (the "
        "components `clip` and `clip_processor`) takes the frame that is more like the first than like the second by "
        "most; or a function that gives a larger number for a better image.",
    )
    choices: Mapping[float, int] | None = argument(
        None,
        Choices(),
        "Which of the `candidates`, from 0, is kept at some δ, whatever `rank_by` says: a dictionary from δ to "
        "number. The candidates of a call are in its output's `candidates`; with the same generator, only frames that "
        "are made of the chosen ones become others.",
        option=ASK_PYTHON,
    )
    attention_blocks: Sequence[int] = argument(
        (2, 3),
        Blocks(check_attention_blocks, 0),
        "Up blocks whose self-attention looks at the two photos. More copy more from the photos; none switches it "
        "off.",
    )
    fusion: str = argument(
        "two_level",
        Choice(FUSIONS),
        'How the pair is fused: "two_level" is the paper\'s, "two_level_unwarped" selects noise as the released code '
        'does, "direct" has no levels and blurs, which is the paper\'s ablation.',
    )
    motion: str = argument(
        "rigid",
        Choice(MOTIONS),
        'The way that things take through time: "rigid" turns and scales what moves as one about its centre, '
        '"straight" is the paper\'s, along which what turns shrinks on the way.',
        paper="straight",
    )
    importance: str = argument(
        "agreement",
        Choice(IMPORTANCES),
        'What decides between cells that land on one place: "agreement" of the two flows, or "photometric", the '
        "paper's brightness constancy, by which what looks alike in both photos wins.",
        paper="photometric",
    )
    layout_hold: float = argument(
        1.0,
        Numbers(0, largest=1.0),
        "How much the frames are held to the warped photos while noise is high, where both photos agree on a place: 1 "
        "keeps all of their coarse layout and leaves detail to the UNet, 0 is the paper's, which lets deep inversion "
        "redraw what was right.",
        paper=0,
    )
    detail: str = argument(
        "photos",
        Choice(DETAILS),
        'What is finer than diffusion makes it: "photos" brings the photos\' own detail to every frame, at the size '
        'of the output, wherever it agrees with the frame or, with method="flow", is alike in both; "upsampled", the '
        "paper's, enlarges what diffusion made; "
        '"diffusion" is "photos" and then goes over what does not come from them with the UNet, tile by tile, for '
        "which a frame of 2048×2048 pixels takes up to 136 further samples of Stable Diffusion 1.5's UNet.",
        paper="upsampled",
        decides=PICTURES,
    )
    guidance_scale: float = argument(
        1.0,
        Numbers(0),
        "Classifier-free guidance of the frames. Above 1 they follow the prompt more, at twice the cost; the paper "
        "uses none.",
    )
    controlnet_conditioning_scale: float = argument(
        1.0, Numbers(0), "Factor of what the `controlnet` adds to the UNet; 0 adds nothing."
    )
    control_guidance_start: float = argument(
        0.0, Numbers(0, largest=1.0), "Share of the denoising steps after which the `controlnet` begins to act."
    )
    control_guidance_end: float = argument(
        1.0, Numbers(0, largest=1.0), "Share of the denoising steps after which the `controlnet` ceases to act."
    )
    frame_batch_size: int | None = argument(
        None,
        WholeNumbers(1),
        "Frames denoised at once, at most; halved where memory runs out. The frames are the same up to rounding. By "
        "default it is what fits the free memory.",
        decides=None,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.method == "flow" and self.candidates > 1:
            raise ValueError(
                f'`candidates` {self.candidates} need `method` "noise": with "flow" nothing but the LoRA fit is '
                "random, and all candidates would be the same"
            )
        if self.method == "flow" and self.affine is not None:
            raise ValueError(
                '`affine` needs `method` "noise": with "flow", motion is found in the photos, or given as `flow`'
            )
        wrong = [index for index in (self.choices or {}).values() if index >= self.candidates]
        if wrong:
            raise ValueError(
                f"`choices` must name candidates from 0 to {self.candidates - 1}, of `candidates` {self.candidates}, "
                f"not {wrong[0]}"
            )
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError(
                f"`control_guidance_start` {self.control_guidance_start} must be below `control_guidance_end` "
                f"{self.control_guidance_end}"
            )

    @property
    def detail_made(self) -> str:
        """The detail that frames get: none of the photos' where they are moved by `affine`, which detail is not."""
        return self.detail if self.affine is None else "upsampled"


@dataclass(frozen=True)
class Delivery(Settings):
    """How the frames reach the program that asked for them."""

    output_type: str = argument(
        "pil",
        Choice(OUTPUT_TYPES),
        'Form of the frames: "pil", "np", "pt" or "latent"; or "lazy", PIL images each of which is made when it is '
        "asked for, so that the memory that large frames take does not grow with their number.",
        option=ASK_PYTHON,
    )
    return_dict: bool = argument(
        True,
        Switch(),
        "Return a `DreamMoverPipelineOutput` rather than a tuple of its fields.",
        option=ASK_PYTHON,
    )
    callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = argument(
        None,
        Function(),
        "Function called as (pipeline, i, timestep, tensors) after every denoising step of every pair; the tensors "
        "that it returns replace the pipeline's.",
        option=ASK_PYTHON,
    )
    callback_on_step_end_tensor_inputs: Sequence[str] = argument(
        ("latents",),
        Names(),
        "Which of the pipeline's `_callback_tensor_inputs` the callback gets. Callbacks that diffusers has, such as "
        "`SDCFGCutoffCallback`, say it themselves.",
        option=ASK_PYTHON,
    )

    @property
    def tensor_names(self) -> Sequence[str]:
        """The names of the tensors that the callback gets; a `PipelineCallback` of diffusers says them itself."""
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)


def takes_seed(preparing: PrepareSettings, rendering: RenderSettings | None = None, lora: dict | None = None) -> bool:
    """Whether anything in a call is random, so that a seed is drawn from its generator.

    Args:
        preparing: How pairs are prepared.
        rendering: How frames are made of them in the same call, if they are.
        lora: Weights that are used instead of fitting some, if they are.
    """
    fits = preparing.embedding_steps > 0 or (lora is None and preparing.lora_steps > 0)
    return fits or (rendering is not None and rendering.method == "noise")


PREPARING = (Content, PrepareSettings)  # what `prepare` takes
RENDERING = (NegativeContent, ControlContent, RenderSettings, Delivery)  # what `render` takes
GROUPS = (*PREPARING, *RENDERING)


def arguments() -> dict[str, Argument]:
    """Every argument of the pipeline, by name."""
    return arguments_of(*GROUPS)


# What each preset costs and gives away is measured in docs/performance.md.
_FAST = {"num_inference_steps": 20, "inversion_steps": 12, "feature_step": 6, "lora_steps": 40}
PRESETS: dict[str, dict[str, object]] = {
    # The defaults, by name.
    "quality": {name: arguments()[name].default for name in _FAST},
    # The same depth of noise in steps two and a half times as long, and half the fit.
    "fast": _FAST,
    # DreamMover as published, without what this project changed.
    "paper": {name: declared.paper for name, declared in arguments().items() if declared.paper != declared.default},
}
