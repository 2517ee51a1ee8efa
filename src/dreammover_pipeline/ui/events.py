# SPDX-License-Identifier: Apache-2.0
"""What the page's buttons, sliders and clicks set off; the work itself is that of `session`."""

from __future__ import annotations

import html
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from ..inputs import check_integer
from ..progress import ProgressListener
from .page import MAX_PROMPT, MAX_SEED, PICTURES, PageComponents
from .results import FinishedVideo, RenderedFrames
from .session import Session, StoppedError
from .studio import Studio
from .visitors import COOKIE

PROGRESS = gr.Progress()  # as a parameter's default it has Gradio pass the progress of the event that is handled
CANCELLED = "Cancelled. What was made before is still here."
WORK = {
    "prepared": "got to know the two photos",
    "rendered": "made {frames} frames",
    "written": "wrote the video",
}

# Events that need the model run one at a time, and show on the status line how far they are.
ONE_AT_A_TIME = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "pipeline"}
# Events that only look something up do not wait in the queue.
UNQUEUED = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
# Events that draw something small do so a few at a time.
SHORT = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "concurrency_limit": 4,
    "concurrency_id": "pictures",
}


class EventHandlers:
    """The functions that the page's events call. A visitor's session is found by the request of the event.

    Args:
        studio: the studio that has the sessions.
        components: the components of the page.
        defaults: what the pipeline's arguments are until a visitor changes them.
    """

    def __init__(self, studio: Studio, components: PageComponents, defaults: Mapping[str, object]):
        self.studio, self.components, self.defaults = studio, components, defaults

    def arrive(self, request: gr.Request) -> None:
        """Open a session when the page is opened."""
        with errors_on_page():
            self._session(request)

    def leave(self, request: gr.Request) -> None:
        """Close the session when the page is closed."""
        cookie = request.cookies.get(COOKIE)
        if cookie is not None:
            self.studio.close(cookie, request.session_hash)

    def make(self, values: dict, request: gr.Request, progress=PROGRESS):
        """Make a video of what the form says, and show all results."""
        return self._make(values, {}, request, progress)

    def _make(self, values: dict, choices: Mapping[float, int], request: gr.Request, progress: gr.Progress):
        start = time.perf_counter()
        with errors_on_page() as messages:
            wanted = self._wanted(values, request)
            self.studio.visitors.check_room()
            finished = self._session(request).make(**wanted, report=_shown_by(progress), choices=choices)
            rendered = finished.rendered
            looked_at = next(iter([*choices, *rendered.candidates]), None)
            return (
                _summary(finished, time.perf_counter() - start),
                finished.video,
                finished.comparison,
                gr.Slider(maximum=len(rendered.files) - 1, value=0),
                _frame(rendered.files[0], rendered.times[0]),
                gr.Dropdown([(f"δ = {delta:.3f}", delta) for delta in rendered.candidates], value=looked_at),
                _candidates(rendered, looked_at),
                *(rendered.pictures.get(name) for name in PICTURES),
            )
        return messages[0], *self._unchanged()

    def make_again(self, values: dict, request: gr.Request, progress=PROGRESS):
        """Make a video of what the form says if the photos are prepared for it; otherwise change nothing."""
        try:
            wanted = self._wanted(values, request)
        except ValueError:  # there are no photos yet
            return gr.skip(), *self._unchanged()
        if not self._session(request).has_prepared(wanted["photos"], wanted["preparing"]):
            return gr.skip(), *self._unchanged()
        return self.make(values, request, progress)

    def look_at(self, delta: float | None, request: gr.Request):
        """Show the candidates for one of the frames of the video that was finished last."""
        finished = self._session(request).finished
        if finished is None or delta not in finished.rendered.candidates:
            return gr.skip()
        return _candidates(finished.rendered, delta)

    def choose(self, values: dict, event: gr.SelectData, request: gr.Request, progress=PROGRESS):
        """Make the video anew with a candidate that is clicked, for the frame whose candidates are shown."""
        delta, finished = values[self.components.results.candidates_of], self._session(request).finished
        if finished is None or finished.rendered.chosen.get(delta) == event.index:
            return gr.skip(), *self._unchanged()
        return self._make(values, {delta: event.index}, request, progress)

    def moment(self, delta: float, request: gr.Request, progress=PROGRESS):
        """Make and show a single frame at a δ of the visitor's choice."""
        with errors_on_page() as messages:
            path = self._session(request).moment(delta, _shown_by(progress))
            return f"Made a frame at δ = {delta:g}; the photos were known already.", _frame(path, delta)
        return messages[0], gr.skip()

    def cancel(self, request: gr.Request) -> str:
        """Stop the visitor's job in progress."""
        self._session(request).cancel()
        return CANCELLED

    def scrub(self, index: int, request: gr.Request):
        """Show one of the frames of the video that was finished last."""
        finished = self._session(request).finished
        if finished is None or not 0 <= index < len(finished.rendered.files):
            return gr.skip()
        return _frame(finished.rendered.files[int(index)], finished.rendered.times[int(index)])

    def new_photos(self, first, last, request: gr.Request):
        """Show the photos without any spots."""
        return self._show_spots([[], []], first, last, request)

    def point_in_first(self, spots, first, last, event: gr.SelectData, request: gr.Request):
        """Add a spot to the first photo, in place of one that has no partner in the last photo yet."""
        in_first, in_last = spots
        return self._show_spots([[*in_first[: len(in_last)], tuple(event.index)], in_last], first, last, request)

    def point_in_last(self, spots, first, last, event: gr.SelectData, request: gr.Request):
        """Add the partner of the first photo's newest spot to the last photo."""
        in_first, in_last = spots
        if len(in_last) == len(in_first):
            gr.Warning("Click a spot in the first photo before the same spot in the last one.")
            return gr.skip(), gr.skip(), gr.skip()
        return self._show_spots([in_first, [*in_last, tuple(event.index)]], first, last, request)

    def undo(self, spots, first, last, request: gr.Request):
        """Take back the newest spot of the first photo, and its partner if it has one."""
        in_first, in_last = spots
        kept = max(len(in_last) - (len(in_first) == len(in_last)), 0)
        return self._show_spots([in_first[:kept], in_last[:kept]], first, last, request)

    def _show_spots(self, spots, first, last, request: gr.Request):
        with errors_on_page():
            photos = [path and self._photo(request, path) for path in (first, last)]
            return spots, *self._session(request).mark(photos, spots)
        return [[], []], None, None

    def _unchanged(self) -> list:
        """Values with which a handler leaves all results as they are, but for the status line."""
        return [gr.skip() for _ in self.components.results.changed_by_a_video[1:]]

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(_cookie(request), request.session_hash)

    def _photo(self, request: gr.Request, path: str) -> Path:
        """The file of a photo that the page names, if this visitor may see it."""
        if not self.studio.visitors.may_see(_cookie(request), path) or not Path(path).is_file():
            raise ValueError("a photo is no longer there; upload the photo again")
        return Path(path)

    def _wanted(self, values: dict, request: gr.Request) -> dict[str, object]:
        """The arguments of `Session.make` for the values of the form's components."""
        form = {name: values[component] for name, component in self.components.form.items()}
        if form["first"] is None or form["last"] is None:
            raise ValueError("choose two photos first, or one of the examples")
        if len(form["prompt"] or "") > MAX_PROMPT:  # the page's own limit holds in the browser only
            raise ValueError(f"what the photos show may have {MAX_PROMPT} characters; {len(form['prompt'])} came")
        seed = form["seed"] or 0  # an empty field is None
        check_integer("Seed", seed, 0, MAX_SEED)
        return {
            "photos": [self._photo(request, form[which]) for which in ("first", "last")],
            "preparing": {
                "prompt": form["prompt"],
                "lora_steps": form["lora_steps"],
                "embedding_steps": form["embedding_steps"],
                "inversion_steps": form["inversion_steps"],
                "feature_step": min(self.defaults["feature_step"], form["inversion_steps"]),
                # A spot of the first photo that has no partner in the last one yet is left out.
                "spots": list(zip(*form["spots"], strict=False)),
                "seed": seed,
            },
            "rendering": {
                **{name: form[name] for name in ("n_frames", "easing", "endpoints", "method")},
                "candidates": form["candidates"] if form["method"] == "noise" else 1,
            },
            "fps": form["fps"],
            "hold": form["hold"],
            "ping_pong": form["ping_pong"],
        }


def connect(page: gr.Blocks, components: PageComponents, handlers: EventHandlers) -> None:
    """Have the events of the page call their handlers."""
    form, buttons, marking, results = components.form, components.buttons, components.marking, components.results
    latest = {"trigger_mode": "always_last"}  # of the moves of a slider during an event, only the last one counts
    job = {**ONE_AT_A_TIME, "show_progress_on": results.status}
    wanted = set(form.values())
    shown = results.changed_by_a_video
    jobs = [buttons.make.click(handlers.make, wanted, shown, **job)]
    jobs += [
        change(handlers.make_again, wanted, shown, **latest, **job)
        for change in (
            form["n_frames"].release,
            form["fps"].release,
            form["hold"].release,
            form["easing"].input,
            form["endpoints"].input,
            form["ping_pong"].input,
        )
    ]
    moment = results.moment
    jobs.append(moment.release(handlers.moment, [moment], [results.status, results.frame], **latest, **job))
    choosing = wanted | {results.candidates_of}
    jobs.append(results.candidates.select(handlers.choose, choosing, shown, **job))
    buttons.cancel.click(handlers.cancel, None, results.status, cancels=jobs, **UNQUEUED)
    results.scrubber.input(handlers.scrub, results.scrubber, results.frame, **latest, **UNQUEUED)
    results.candidates_of.input(handlers.look_at, results.candidates_of, results.candidates, **latest, **UNQUEUED)

    spots, photos = form["spots"], [form["first"], form["last"]]
    marked = [spots, marking.first, marking.last]
    for photo in photos:
        photo.change(handlers.new_photos, photos, marked, **SHORT)
    marking.first.select(handlers.point_in_first, [spots, *photos], marked, **SHORT)
    marking.last.select(handlers.point_in_last, [spots, *photos], marked, **SHORT)
    marking.undo.click(handlers.undo, [spots, *photos], marked, **SHORT)
    marking.clear.click(handlers.new_photos, photos, marked, **SHORT)
    page.load(handlers.arrive, None, None, **SHORT)
    page.unload(handlers.leave)


@contextmanager
def errors_on_page() -> Iterator[list[str]]:
    """Show what goes wrong in the block on the page, in words; an error that nobody foresaw goes to the server's log.

    Yields:
        A list that holds what was shown, once the block has failed.
    """
    messages = []
    try:
        yield messages
    except StoppedError:
        messages.append(CANCELLED)
    except (TypeError, ValueError, RuntimeError) as error:
        message = html.escape(" ".join(str(error).split()), quote=False)
        messages.append(f"{message[:1].upper()}{message[1:].rstrip('.')}.")
        gr.Warning(messages[0], duration=20, title="That did not work")
    except Exception:
        traceback.print_exc(file=sys.stderr)
        messages.append("Something went wrong here; the server's log says what.")
        gr.Warning(messages[0], title="That did not work")


def _cookie(request: gr.Request) -> str:
    cookie = request.cookies.get(COOKIE)
    if cookie is None:
        raise ValueError("This page needs a cookie to tell visitors apart; allow the cookie and load the page again.")
    return cookie


def _shown_by(progress: gr.Progress) -> ProgressListener:
    return lambda stage, done, total: progress((done, total), desc=stage, unit="steps")


def _frame(path: Path, time: float) -> gr.Image:
    return gr.Image(value=str(path), label=f"Frame at δ = {time:.3f}")


def _candidates(rendered: RenderedFrames, time: float | None) -> gr.Gallery:
    """The candidates for the frame at a time, of which the chosen one says so; none where the time is None."""
    if time is None:
        return gr.Gallery([], label="Candidates")
    chosen = rendered.chosen[time]
    captions = [f"{i + 1}, chosen" if i == chosen else f"{i + 1}" for i in range(len(rendered.candidates[time]))]
    pictures = list(zip(map(str, rendered.candidates[time]), captions, strict=True))
    return gr.Gallery(pictures, label=f"Candidates for the frame at δ = {time:.3f}", selected_index=chosen)


def _summary(finished: FinishedVideo, seconds: float) -> str:
    """What the status line says of a finished video."""
    between = len(finished.rendered.files) - 2
    *others, last = [WORK[step].format(frames=between) for step in finished.work]
    done = f"{', '.join(others)} and {last}" if others else last
    text = f"Done in {seconds:.1f} s: {done}."
    if "prepared" not in finished.work:
        text += " The photos were known already."
    if finished.rendered.flagged:
        text += f" The safety checker blacked out {finished.rendered.flagged} frames."
    return text
