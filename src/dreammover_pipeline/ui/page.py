# SPDX-License-Identifier: Apache-2.0
"""What is on the page: its components, region by region, from the top left to the bottom right.

Every function builds a region inside the Gradio context that is open when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ..settings import ENDPOINTS, arguments
from ..timing import CURVES, EVEN

INTRO = """
# DreamMover
Two photos of one scene in, the frames between them out. The first video of a pair takes longest, since the model gets
to know the two photos; after that, moving a slider for frames, timing or δ makes another video of what is known.
"""
POINTS_HELP = """
Where the video mixes up what belongs together, click a spot in the first photo and then the same spot in the last one.
A few spots are enough. Then make the video again.
"""
CANDIDATES_HELP = """
Where frames are mixed in noise and *Candidates* (under *More*) is above 1, every frame is made several times. Click
another one to have the video made with it. The frames that are made of this one then change too, so begin at the top
of the list.
"""
# By name; each picture has its headline in itself.
PICTURES = ("flow", "matches", "confidence", "occlusion", "sources", "sheet")
MAX_PROMPT = 500  # characters that a prompt may have
MAX_SEED = 2**53  # largest whole number that a browser surely sends as it is typed
PICTURE_VIEW = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
# Whatever fails is said in words, on the status line or in a box of its own. Gradio writes "Error" over the line, too,
# even over "Cancelled": its server ends a cancelled job with a message that has no values, and its page takes the
# message for a failure wherever the message arrives before the answer to the request that cancels.
CSS = """
footer {display: none !important}
.status {min-height: 5.5em}
#status [data-testid="status-tracker"]:has(> .error) {display: none}
#frame img {width: 100%; height: 100%; object-fit: contain}
"""

Component = gr.components.Component


@dataclass(frozen=True)
class Buttons:
    """The buttons that start and stop a job."""

    make: gr.Button
    cancel: gr.Button


@dataclass(frozen=True)
class SpotMarking:
    """Where visitors click what belongs together: the two photos, and the buttons that take clicks back."""

    first: gr.Image
    last: gr.Image
    undo: gr.Button
    clear: gr.Button


@dataclass(frozen=True)
class Results:
    """What shows the results, and what chooses or makes one of the frames."""

    status: gr.Markdown
    video: gr.Video
    frame: gr.Image
    scrubber: gr.Slider
    moment: gr.Slider
    candidates_of: gr.Dropdown
    candidates: gr.Gallery
    pictures: list[gr.Image]
    beside: gr.Video

    @property
    def changed_by_a_video(self) -> list[Component]:
        """What a new video changes, in the order in which `EventHandlers.make` returns its values."""
        shown = [self.status, self.video, self.beside, self.scrubber, self.frame]
        return [*shown, self.candidates_of, self.candidates, *self.pictures]


@dataclass(frozen=True)
class PageComponents:
    """The components of the page that take part in events.

    Args:
        form: the components that hold what a visitor wants, by the name of the setting.
        buttons: what starts and stops a job.
        marking: where spots are clicked.
        results: what shows the results.
    """

    form: dict[str, Component]
    buttons: Buttons
    marking: SpotMarking
    results: Results


def build_components(examples: Path, defaults: Mapping[str, object]) -> PageComponents:
    """Build everything that is on the page.

    Args:
        examples: a folder of example pairs, each a folder with `0.png` and `1.png`, or `0.jpg` and `1.jpg`, and with
            `prompt.txt`.
        defaults: what the pipeline's arguments are until a visitor changes them.
    """
    gr.Markdown(INTRO)
    with gr.Row():
        with gr.Column(scale=2, min_width=340):
            form = _photos(examples)
            buttons = _buttons()
            form |= _frames(defaults)
            form |= _more_settings(defaults)
            marking = _spot_marking()
        with gr.Column(scale=3, min_width=340):
            results = _results()
    form["spots"] = gr.State([[], []])  # the spots of the first photo, and those of the last one
    return PageComponents(form, buttons, marking, results)


def _photos(examples: Path) -> dict[str, Component]:
    with gr.Row():
        # Without an image mode, Gradio leaves the file as it was uploaded.
        upload = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
        first = gr.Image(label="First photo", height=220, elem_id="first", **upload)
        last = gr.Image(label="Last photo", height=220, elem_id="last", **upload)
    prompt = gr.Textbox(label="What the photos show", placeholder="a photo of a lion", max_length=MAX_PROMPT)
    pairs = sorted(examples.iterdir())
    gr.Examples(
        [
            [
                *(str(next(pair.glob(f"{end}.[jp]*"))) for end in (0, 1)),  # not 0.250.png, which is a frame between
                (pair / "prompt.txt").read_text(encoding="utf-8").strip(),
            ]
            for pair in pairs
        ],
        [first, last, prompt],
        label="Or an example",
        example_labels=[pair.name for pair in pairs],
    )
    return {"first": first, "last": last, "prompt": prompt}


def _buttons() -> Buttons:
    with gr.Row():
        make = gr.Button("Make the video", variant="primary", scale=2, elem_id="make")
        cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel")
    return Buttons(make, cancel)


def _frames(defaults: Mapping[str, object]) -> dict[str, Component]:
    with gr.Row():
        frames = _slider("n_frames", defaults, label="Frames in between", elem_id="frames")
        fps = gr.Slider(1, 60, 16, step=1, label="Frames per second", elem_id="fps")
    with gr.Row():
        easing = gr.Dropdown([*CURVES, EVEN], value="linear", label="Timing", elem_id="easing")
        ping_pong = gr.Checkbox(label="There and back again", elem_id="ping-pong")
    return {"n_frames": frames, "fps": fps, "easing": easing, "ping_pong": ping_pong}


def _slider(name: str, defaults: Mapping[str, object], explained: bool = False, **settings) -> gr.Slider:
    """The slider of an argument of the pipeline, over the range that is declared for it."""
    declared = arguments()[name]
    info = declared.about if explained else None
    return gr.Slider(*declared.slider, defaults[name], step=1, info=info, **settings)


def _more_settings(defaults: Mapping[str, object]) -> dict[str, Component]:
    with gr.Accordion("More", open=False):
        method = gr.Dropdown(
            [("The photos show one scene: find what moves", "flow"), ("They do not: mix them in noise", "noise")],
            value=defaults["method"],
            label="Method",
            elem_id="method",
        )
        candidates = gr.Slider(
            1,
            6,
            defaults["candidates"],
            step=1,
            label="Candidates",
            info="How often every frame that is mixed in noise is made, for you to choose from. More take longer.",
            elem_id="candidate-count",
        )
        lora_steps = _slider("lora_steps", defaults, label="LoRA steps", elem_id="lora-steps", explained=True)
        inversion_steps = _slider(
            "inversion_steps", defaults, label="Inversion steps", elem_id="inversion-steps", explained=True
        )
        embedding_steps = _slider(
            "embedding_steps", defaults, label="Embedding steps", elem_id="embedding-steps", explained=True
        )
        hold = gr.Slider(0, 3, 0, step=0.1, label="Both ends stand still, in seconds", elem_id="hold")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")  # Gradio's error about bounds would not name it
        endpoints = gr.Dropdown(
            list(ENDPOINTS),
            value=defaults["endpoints"],
            label="Ends",
            info="The photos themselves at both ends, or the photos as the model brings them back.",
        )
    return {
        "lora_steps": lora_steps,
        "method": method,
        "candidates": candidates,
        "embedding_steps": embedding_steps,
        "inversion_steps": inversion_steps,
        "hold": hold,
        "seed": seed,
        "endpoints": endpoints,
    }


def _spot_marking() -> SpotMarking:
    with gr.Accordion("Say what belongs together", open=False):
        gr.Markdown(POINTS_HELP)
        with gr.Row():
            clickable = {"interactive": False, "buttons": [], "height": 260}
            first = gr.Image(label="1. Click a spot here", elem_id="spots-first", **clickable)
            last = gr.Image(label="2. Click the same spot here", elem_id="spots-last", **clickable)
        with gr.Row():
            undo, clear = gr.Button("Take the last spot back", size="sm"), gr.Button("Remove all spots", size="sm")
    return SpotMarking(first, last, undo, clear)


def _results() -> Results:
    status = gr.Markdown("Choose two photos, or an example.", elem_id="status", elem_classes="status")
    with gr.Tab("Video"):
        video = gr.Video(label="Video", autoplay=True, loop=True, buttons=["download"], elem_id="video")
    with gr.Tab("Frames"):
        frame = gr.Image(label="Frame", height=420, elem_id="frame", **PICTURE_VIEW)
        scrubber = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="scrubber")
        moment = gr.Slider(0.01, 0.99, 0.5, step=0.01, label="A moment δ of your own, made anew", elem_id="moment")
    with gr.Tab("Candidates"):
        gr.Markdown(CANDIDATES_HELP)
        candidates_of = gr.Dropdown([], label="Frame, in the order in which they are made", elem_id="candidates-of")
        # A preview would cover the others, and looking through it would choose.
        candidates = gr.Gallery(
            label="Candidates",
            columns=3,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="candidates",
        )
    with gr.Tab("Flow and confidence"):
        pictures = [gr.Image(show_label=False, elem_id=name, **PICTURE_VIEW) for name in PICTURES]
    with gr.Tab("Beside a cross-fade"):
        beside = gr.Video(label="Beside a cross-fade", loop=True, buttons=["download"], elem_id="beside")
    return Results(status, video, frame, scrubber, moment, candidates_of, candidates, pictures, beside)
