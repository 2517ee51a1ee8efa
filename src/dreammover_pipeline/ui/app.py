# SPDX-License-Identifier: Apache-2.0
"""The page itself: what is on it, and what its buttons and sliders set off. The work is `studio`'s."""

from __future__ import annotations

import html
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
from starlette.middleware import Middleware

from ..cli.options import call_parameters
from ..inputs import ENDPOINTS
from ..pipeline import DreamMoverPipeline
from ..timing import CURVES, EVEN
from ..tiny.examples import write_examples
from .studio import Made, Session, StoppedError, Studio
from .visitors import COOKIE, Doorkeeper, Visitors

WAITING = 20  # jobs in the queue, beyond which newcomers are turned away
MACHINE = {"concurrency_limit": 1, "concurrency_id": "machine"}  # events that need the model, one at a time
QUIET = {"queue": False, "show_progress": "hidden"}
# The embedded checkpoint is so small that it redraws too freely when it is inverted deeply.
TINY_DEFAULTS = {"n_frames": 14, "inversion_steps": 10}
INTRO = """
# DreamMover
Two photos of one scene in, the frames between them out. The first video of a pair takes longest, since the model gets
to know the two photos; after that, moving a slider for frames, timing or δ makes another video of what is known.
"""
POINTS_HELP = """
Where the video mixes up what belongs together, click a spot in the first photo and then the same spot in the last one.
A few are enough. Then make the video again.
"""
PROGRESS = gr.Progress()  # Gradio gives whatever has this default the progress of its own event
VIEW = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
PICTURES = ("flow", "matches", "confidence", "occlusion", "sheet")  # their headlines are in them
CANCELLED = "Cancelled. What was made before is still here."
CSS = """
footer {display: none !important}
.status {min-height: 5.5em}
#frame img {width: 100%; height: 100%; object-fit: contain}
"""


def build_page(studio: Studio, examples: Path, defaults: dict[str, object]) -> gr.Blocks:
    """The page.

    Args:
        studio: does the work.
        examples: folder of example pairs, `name/0.png`, `name/1.png`, `name/prompt.txt`.
        defaults: for arguments of the pipeline, where they are not its own.
    """
    default = {name: parameter.default for name, parameter in call_parameters().items()} | defaults
    acts = _Acts(studio, default)
    with gr.Blocks(title="DreamMover", analytics_enabled=False) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                with gr.Row():
                    # without a mode, the file comes as it was uploaded
                    upload = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
                    first = gr.Image(label="First photo", height=220, elem_id="first", **upload)
                    last = gr.Image(label="Last photo", height=220, elem_id="last", **upload)
                prompt = gr.Textbox(label="What the photos show", placeholder="a photo of a lion", max_length=500)
                gr.Examples(
                    _example_rows(examples),
                    [first, last, prompt],
                    label="Or an example",
                    example_labels=[pair.name for pair in sorted(examples.iterdir())],
                )
                with gr.Row():
                    make = gr.Button("Make the video", variant="primary", scale=2, elem_id="make")
                    cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel")
                with gr.Row():
                    frames = gr.Slider(1, 64, default["n_frames"], step=1, label="Frames in between", elem_id="frames")
                    fps = gr.Slider(1, 60, 16, step=1, label="Frames per second", elem_id="fps")
                with gr.Row():
                    easing = gr.Dropdown([*CURVES, EVEN], value="linear", label="Timing", elem_id="easing")
                    ping_pong = gr.Checkbox(label="There and back again", elem_id="ping-pong")
                with gr.Accordion("More", open=False):
                    lora_steps = gr.Slider(
                        0,
                        300,
                        default["lora_steps"],
                        step=1,
                        label="LoRA steps",
                        elem_id="lora-steps",
                        info="More keep the photos' identity better, and take longer.",
                    )
                    inversion_steps = gr.Slider(
                        2,
                        50,
                        default["inversion_steps"],
                        step=1,
                        label="Inversion steps",
                        elem_id="inversion-steps",
                        info="Fewer stay closer to the photos, more let the model redraw what warping breaks.",
                    )
                    hold = gr.Slider(0, 3, 0, step=0.1, label="Both ends stand still, in seconds", elem_id="hold")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, elem_id="seed")
                    endpoints = gr.Dropdown(
                        list(ENDPOINTS),
                        value=default["endpoints"],
                        label="Ends",
                        info="The photos themselves, or as the model brings them back.",
                    )
                with gr.Accordion("Say what belongs together", open=False):
                    gr.Markdown(POINTS_HELP)
                    with gr.Row():
                        shown = {"interactive": False, "buttons": [], "height": 260}
                        spots_first = gr.Image(label="1. Click here", elem_id="spots-first", **shown)
                        spots_last = gr.Image(label="2. and here", elem_id="spots-last", **shown)
                    with gr.Row():
                        undo, clear = gr.Button("Take the last one back", size="sm"), gr.Button("Clear", size="sm")
            with gr.Column(scale=3, min_width=340):
                status = gr.Markdown("Choose two photos, or an example.", elem_id="status", elem_classes="status")
                with gr.Tab("Video"):
                    video = gr.Video(label="Video", autoplay=True, loop=True, buttons=["download"], elem_id="video")
                with gr.Tab("Frames"):
                    frame = gr.Image(label="Frame", height=420, elem_id="frame", **VIEW)
                    scrubber = gr.Slider(0, 1, 0, step=1, label="Frame", elem_id="scrubber")
                    moment = gr.Slider(
                        0.01, 0.99, 0.5, step=0.01, label="A moment δ of your own, made anew", elem_id="moment"
                    )
                with gr.Tab("Flow and confidence"):
                    pictures = [gr.Image(show_label=False, elem_id=name, **VIEW) for name in PICTURES]
                with gr.Tab("Beside a cross-fade"):
                    beside = gr.Video(label="Beside a cross-fade", loop=True, buttons=["download"], elem_id="beside")
        spots = gr.State([[], []])

        acts.wish = {
            "first": first,
            "last": last,
            "spots": spots,
            "prompt": prompt,
            "lora_steps": lora_steps,
            "inversion_steps": inversion_steps,
            "seed": seed,
            "n_frames": frames,
            "easing": easing,
            "endpoints": endpoints,
            "fps": fps,
            "hold": hold,
            "ping_pong": ping_pong,
        }
        wish = set(acts.wish.values())
        acts.result = [status, video, beside, scrubber, frame, *pictures]
        on_status = {"api_visibility": "private", "show_progress_on": status, **MACHINE}
        jobs = [make.click(acts.make, wish, acts.result, **on_status)]
        for change in (frames.release, fps.release, hold.release, easing.input, endpoints.input, ping_pong.input):
            jobs.append(change(acts.make_again, wish, acts.result, trigger_mode="always_last", **on_status))
        jobs.append(moment.release(acts.moment, [moment], [status, frame], trigger_mode="always_last", **on_status))
        private = {"api_visibility": "private", **QUIET}
        cancel.click(acts.cancel, None, status, cancels=jobs, **private)
        scrubber.input(acts.scrub, scrubber, frame, trigger_mode="always_last", **private)
        shortly = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        marked = [spots, spots_first, spots_last]
        for photo in (first, last):
            photo.change(acts.new_photos, [first, last], marked, **shortly)
        spots_first.select(acts.point_in_first, [spots, first, last], marked, **shortly)
        spots_last.select(acts.point_in_last, [spots, first, last], marked, **shortly)
        undo.click(acts.undo, [spots, first, last], marked, **shortly)
        clear.click(acts.new_photos, [first, last], marked, **shortly)
        page.load(acts.arrive, None, None, **shortly)
        page.unload(acts.leave)
    return page.queue(max_size=WAITING, api_open=False)


class _Acts:
    """What the page's events call, by people whom their requests tell apart."""

    def __init__(self, studio: Studio, default: dict[str, object]):
        self.studio, self.default = studio, default
        self.wish: dict[str, gr.components.Component] = {}
        self.result: list[gr.components.Component] = []

    def arrive(self, request: gr.Request) -> None:
        with _in_sentences():
            self._session(request)

    def leave(self, request: gr.Request) -> None:
        cookie = request.cookies.get(COOKIE)
        if cookie is not None:
            self.studio.close(cookie, request.session_hash)

    def make(self, values: dict, request: gr.Request, progress=PROGRESS):
        start = time.perf_counter()
        with _in_sentences() as said:
            made = self._session(request).make(**self._arguments(values, request), report=_shown_by(progress))
            rendered = made.rendered
            return (
                _report(made, time.perf_counter() - start),
                made.video,
                made.comparison,
                gr.Slider(maximum=len(rendered.frames) - 1, value=0),
                _frame(rendered.frames[0], rendered.times[0]),
                *(rendered.pictures[name] for name in PICTURES),
            )
        return said[0], *self._unchanged()

    def make_again(self, values: dict, request: gr.Request, progress=PROGRESS):
        """`make`, if that needs no fit; else nothing."""
        try:
            arguments = self._arguments(values, request)
        except ValueError:  # no photos yet
            return gr.skip(), *self._unchanged()
        if not self._session(request).has_prepared(arguments["photos"], arguments["preparing"]):
            return gr.skip(), *self._unchanged()
        return self.make(values, request, progress)

    def moment(self, delta: float, request: gr.Request, progress=PROGRESS):
        with _in_sentences() as said:
            path = self._session(request).moment(delta, {}, _shown_by(progress))
            return f"Made a frame at δ = {delta:g}; the photos were known already.", _frame(path, delta)
        return said[0], gr.skip()

    def _unchanged(self) -> list:
        return [gr.skip() for _ in self.result[1:]]

    def cancel(self, request: gr.Request) -> str:
        self._session(request).cancel()
        return CANCELLED

    def scrub(self, index: int, request: gr.Request):
        made = self._session(request).made
        if made is None or not 0 <= index < len(made.rendered.frames):
            return gr.skip()
        return _frame(made.rendered.frames[int(index)], made.rendered.times[int(index)])

    def new_photos(self, first, last, request: gr.Request):
        return self._spots([[], []], first, last, request)

    def point_in_first(self, spots, first, last, event: gr.SelectData, request: gr.Request):
        before, after = spots
        return self._spots([[*before[: len(after)], tuple(event.index)], after], first, last, request)

    def point_in_last(self, spots, first, last, event: gr.SelectData, request: gr.Request):
        before, after = spots
        if len(after) == len(before):
            gr.Warning("Click a spot in the first photo before that in the last one.")
            return gr.skip(), gr.skip(), gr.skip()
        return self._spots([before, [*after, tuple(event.index)]], first, last, request)

    def undo(self, spots, first, last, request: gr.Request):
        before, after = spots
        kept = len(after) - (len(before) == len(after))
        return self._spots([before[: max(kept, 0)], after[: max(kept, 0)]], first, last, request)

    def _spots(self, spots, first, last, request: gr.Request):
        with _in_sentences():
            photos = [path and self._photo(request, path) for path in (first, last)]
            return spots, *self._session(request).mark(photos, spots)
        return [[], []], None, None

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(_cookie(request), request.session_hash)

    def _photo(self, request: gr.Request, path: str) -> Path:
        if not self.studio.visitors.may_see(_cookie(request), path) or not Path(path).is_file():
            raise ValueError("a photo is no longer there; upload it again.")
        return Path(path)

    def _arguments(self, values: dict, request: gr.Request) -> dict[str, object]:
        """What `Session.make` takes, of the values on the page."""
        wish = {name: values[component] for name, component in self.wish.items()}
        if wish["first"] is None or wish["last"] is None:
            raise ValueError("choose two photos first, or one of the examples")
        return {
            "photos": [self._photo(request, wish[name]) for name in ("first", "last")],
            "preparing": {
                "prompt": wish["prompt"],
                "lora_steps": wish["lora_steps"],
                "inversion_steps": wish["inversion_steps"],
                "feature_step": min(self.default["feature_step"], wish["inversion_steps"]),
                "spots": list(zip(*wish["spots"], strict=False)),  # without one that still waits for its partner
                "seed": wish["seed"] or 0,
            },
            "rendering": {name: wish[name] for name in ("n_frames", "easing", "endpoints")},
            "fps": wish["fps"],
            "hold": wish["hold"],
            "ping_pong": wish["ping_pong"],
        }


def _cookie(request: gr.Request) -> str:
    cookie = request.cookies.get(COOKIE)
    if cookie is None:
        raise ValueError("This page tells visitors apart by a cookie; allow it one and load it again.")
    return cookie


@contextmanager
def _in_sentences() -> Iterator[list[str]]:
    """What goes wrong is said on the page, and collected; what nobody foresaw is told by the server's log."""
    said = []
    try:
        yield said
    except StoppedError:
        said.append(CANCELLED)
    except (TypeError, ValueError, RuntimeError) as error:
        message = html.escape(" ".join(str(error).split()), quote=False)
        said.append(f"{message[:1].upper()}{message[1:].rstrip('.')}.")
        gr.Warning(said[0], duration=20, title="That did not work")
    except Exception:
        traceback.print_exc(file=sys.stderr)
        said.append("Something went wrong here; the server's log says what.")
        gr.Warning(said[0], title="That did not work")


def _shown_by(progress: gr.Progress):
    return lambda stage, done, total: progress((done, total), desc=stage, unit="steps")


def _frame(path: Path, time: float):
    return gr.Image(value=str(path), label=f"Frame at δ = {time:.3f}")


def _report(made: Made, seconds: float) -> str:
    between = len(made.rendered.frames) - 2
    work = {
        "prepared": "got to know the two photos",
        "rendered": f"made {between} frames",
        "written": "wrote the video",
    }
    *others, last = [work[step] for step in made.did]
    did = f"{', '.join(others)} and {last}" if others else last
    text = f"Done in {seconds:.1f} s: {did}."
    if "prepared" not in made.did:
        text += " The photos were known already."
    if made.rendered.flagged:
        text += f" The safety checker blacked out {made.rendered.flagged} frames."
    return text


def _example_rows(folder: Path) -> list[list[str]]:
    return [
        [str(pair / "0.png"), str(pair / "1.png"), (pair / "prompt.txt").read_text(encoding="utf-8").strip()]
        for pair in sorted(folder.iterdir())
    ]


@contextmanager
def serving(
    pipe: DreamMoverPipeline, host: str, port: int, max_upload_mb: float, defaults: dict[str, object]
) -> Iterator[str]:
    """Serve the page while the block runs; every file goes when it ends.

    Args:
        pipe: the model.
        host: the address to listen on.
        port: the port.
        max_upload_mb: megabytes an uploaded file may have.
        defaults: as `build_page` takes them.

    Yields:
        The page's address.

    Raises:
        OSError: the port is taken.
    """
    max_upload = round(max_upload_mb * 2**20)
    with TemporaryDirectory(prefix="dreammover-ui-") as root, _gradio_folder(root):
        visitors = Visitors(Path(root))
        examples = visitors.root / "examples"
        write_examples(examples)
        studio = Studio(pipe, visitors)
        page = build_page(studio, examples, defaults)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_upload,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                css=CSS,
                app_kwargs={"middleware": [Middleware(Doorkeeper, visitors=visitors, max_upload=max_upload)]},
            )
            yield address
        finally:
            studio.close_all()
            page.close(verbose=False)


@contextmanager
def _gradio_folder(folder: str) -> Iterator[None]:
    """Have Gradio keep its files here."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
