# SPDX-License-Identifier: Apache-2.0
"""What the page does, without the page: sessions that keep a prepared pair, and one machine that serves them in turn.

Whatever a session writes lies in one folder, which goes with it. What was made stays until something new is complete.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from ..cli.evaluate import check_settings
from ..images import load_images
from ..media.files import check_fps, write_picture, write_video
from ..media.pictures import (
    comparison,
    confidence_picture,
    contact_sheet,
    correspondence_lines,
    crossfade,
    flow_picture,
    occlusion_picture,
    picture_of,
)
from ..media.playback import check_hold, play
from ..memory import free_cache, is_out_of_memory
from ..pipeline import DreamMoverPipeline
from ..records import PreparedPair
from .visitors import Visitors

MAX_SIDE = 1280  # pixels of a photo's longer side; larger ones are shrunk, since frames come back at the photo's size
SPOT = (214, 39, 40)
CLICK_SIDE = 640  # pixels of a photo's longer side where it is shown for clicking, about
IDLE = 12 * 3600  # seconds after which a session that never said goodbye is closed

Report = Callable[[str, int, int], None]


class StoppedError(Exception):
    """The visitor cancelled, or left."""


@dataclass(frozen=True)
class Prepared:
    """A prepared pair and what it was prepared of."""

    key: str
    pair: PreparedPair


@dataclass(frozen=True)
class Rendered:
    """Frames as files, both photos at the ends, each with its δ, and what `_pictures` draws."""

    key: str
    folder: Path
    frames: tuple[Path, ...]
    times: tuple[float, ...]
    pictures: dict[str, Path]
    flagged: int


@dataclass(frozen=True)
class Made:
    """A video, the same beside a cross-fade, and what was done anew for it: "prepared", "rendered", "written"."""

    rendered: Rendered
    video: Path
    comparison: Path
    did: tuple[str, ...]


class Studio:
    """The machine with its model, and everyone's sessions.

    Args:
        pipe: shared by all; one job runs at a time.
        visitors: whose folders the sessions' folders lie in.
    """

    def __init__(self, pipe: DreamMoverPipeline, visitors: Visitors):
        self.pipe, self.visitors = pipe, visitors
        self.machine = threading.Lock()
        self._sessions: dict[tuple[Path, str], Session] = {}
        self._lock = threading.Lock()

    def session(self, cookie: str, name: str) -> Session:
        """The session of this name of this visitor, opened where there is none."""
        self._close_idle()
        visitor = self.visitors.folder(cookie)
        with self._lock:
            session = self._sessions.setdefault((visitor, name), Session(self, visitor / secrets.token_hex(16)))
            session.used = time.monotonic()
            return session

    def close(self, cookie: str, name: str) -> None:
        """End a session: its job stops, its files go, and with a visitor's last session their uploads too."""
        self._close((self.visitors.folder(cookie), name))

    def close_all(self) -> None:
        """End all sessions."""
        for session in list(self._sessions.values()):  # all at once, or one would wait for another's job
            session.leave()
        for key in list(self._sessions):
            self._close(key)

    def _close(self, key: tuple[Path, str]) -> None:
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.close()
        with self._lock:
            if all(visitor != key[0] for visitor, _ in self._sessions):
                shutil.rmtree(key[0], ignore_errors=True)

    def _close_idle(self) -> None:
        now = time.monotonic()
        for key in [key for key, session in list(self._sessions.items()) if now - session.used > IDLE]:
            self._close(key)
        self.visitors.remove_strays({visitor for visitor, _ in list(self._sessions)}, IDLE)


class Session:
    """One open page: the pair it prepared last, the video it made last, and the folder where its files lie."""

    def __init__(self, studio: Studio, folder: Path):
        self.studio, self.folder = studio, folder
        self.used = time.monotonic()
        self._prepared: Prepared | None = None
        self._made: Made | None = None
        self._shown: dict[str, Path] = {}
        self._working, self._showing = threading.Lock(), threading.Lock()
        self._cancelled = threading.Event()
        self._closed = False

    @property
    def made(self) -> Made | None:
        """The video made last."""
        return self._made

    def cancel(self) -> None:
        """Stop the job in progress, if there is one, at its next step."""
        self._cancelled.set()

    def leave(self) -> None:
        """Stop the job in progress at its next step, and let no other begin."""
        self._closed = True

    def close(self) -> None:
        """`leave`, forget everything and remove the folder."""
        self.leave()
        with self._working:  # from that job's next step on
            self._prepared = self._made = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def has_prepared(self, photos: Sequence[Path], preparing: Mapping[str, object]) -> bool:
        """Whether exactly this is prepared, so that `make` and `moment` need no fit."""
        return self._prepared is not None and self._prepared.key == _key(photos, preparing)

    def make(
        self,
        photos: Sequence[Path],
        preparing: Mapping[str, object],
        rendering: Mapping[str, object],
        fps: float,
        hold: float = 0.0,
        ping_pong: bool = False,
        report: Report = lambda stage, done, total: None,
    ) -> Made:
        """Make the video, doing only what this session's last one does not already hold.

        Args:
            photos: files of the first and the last photo.
            preparing: arguments of `DreamMoverPipeline.prepare` but for the photos; "seed" instead of a generator, and
                "spots", ((x0, y0), (x1, y1)) of places on the pictures of `mark`, instead of points.
            rendering: arguments of `DreamMoverPipeline.render` but for the pair.
            fps: frames per second; like the next two for `playback.play`.
            hold: seconds for which either end stands still.
            ping_pong: there and back again.
            report: called as (stage, steps done, steps in all).

        Raises:
            StoppedError: by `cancel` or `close`.
            TypeError, ValueError: an argument or a photo is not what it may be; raised before any model runs.
            RuntimeError: the work failed.
        """
        check_settings(self.studio.pipe, {**preparing, **rendering})
        check_fps(fps, "video.mp4")
        check_hold(hold)
        with self._job(report) as pipe:
            did = []
            if not self.has_prepared(photos, preparing):
                self._prepared = _prepare(pipe, photos, preparing)
                did.append("prepared")
            key = f"{self._prepared.key} {sorted(rendering.items())}"
            rendered = self._made and self._made.rendered
            if rendered is None or rendered.key != key:
                rendered = self._render(pipe, key, rendering)
                did.append("rendered")
            return self._write(rendered, fps, hold, ping_pong, (*did, "written"))

    def moment(self, time: float, rendering: Mapping[str, object], report: Report) -> Path:
        """A single frame of the prepared pair, at a δ of the visitor's own.

        Args:
            time: δ in (0, 1).
            rendering: as for `make`; what places its frames does not matter.
            report: as for `make`.

        Raises:
            StoppedError: by `cancel` or `close`.
            TypeError, ValueError: as `make`, and where nothing is prepared yet.
            RuntimeError: the work failed.
        """
        if self._prepared is None:
            raise ValueError("make a video first; then single frames of it can be made at any time")
        settings = {**rendering, "times": [time], "easing": "linear"}
        check_settings(self.studio.pipe, settings)
        with self._job(report) as pipe:
            ((frame,),) = pipe.render(self._prepared.pair, **settings).frames
            return self._show("moment", {"moment": frame})[0]

    def mark(self, photos: Sequence[Path | None], spots: Sequence[Sequence[tuple[int, int]]]) -> list[Path | None]:
        """The photos with numbered spots on them.

        Args:
            photos: files of the first and the last photo, None where there is none yet.
            spots: of the first and of the last photo, (x, y) in pixels of the pictures that this gives.

        Raises:
            ValueError: a photo cannot be read.
        """
        marked = {
            which: _with_spots(load_photo(path, which), places)
            for path, which, places in zip(photos, ("first", "last"), spots, strict=True)
            if path is not None
        }
        paths = dict(zip(marked, self._show("marks", marked), strict=True))
        return [paths.get(which) for which in ("first", "last")]

    @contextmanager
    def _job(self, report: Report) -> Iterator[DreamMoverPipeline]:
        """The pipeline, for this session alone, which reports its steps and stops where the visitor wants it to."""

        def step(stage: str, done: int, total: int) -> None:
            if self._cancelled.is_set() or self._closed:
                raise StoppedError
            report(stage, done, total)

        pipe = self.studio.pipe
        with self._working:
            self._cancelled.clear()
            with self.studio.machine, pipe.listening(step):
                step("Starting", 0, 1)
                try:
                    yield pipe
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise RuntimeError(f"{error} Try smaller photos.") from error
                finally:
                    pipe.maybe_free_model_hooks()
                    free_cache(pipe.device)
                    self.used = time.monotonic()

    def _render(self, pipe: DreamMoverPipeline, key: str, rendering: Mapping[str, object]) -> Rendered:
        pair = self._prepared.pair
        output = pipe.render(pair, **rendering, include_inputs=True)
        (frames,), (times,) = output.frames, output.times
        folder = self._place()
        write_video(frames, folder / "frames", fps=1)
        pictures = _pictures(pair, frames, times)
        paths = {name: folder / f"{name}.png" for name in pictures}
        for name, picture in pictures.items():
            write_picture(picture, paths[name])
        return Rendered(
            key,
            folder,
            tuple(sorted((folder / "frames").iterdir())),
            times,
            paths,
            sum(output.nsfw_content_detected[0]) if output.nsfw_content_detected else 0,
        )

    def _write(self, rendered: Rendered, fps: float, hold: float, ping_pong: bool, did: tuple[str, ...]) -> Made:
        frames = [Image.open(path).convert("RGB") for path in rendered.frames]
        faded = crossfade(frames[0], frames[-1], rendered.times)
        folder = self._place()
        made = Made(rendered, folder / "dreammover.mp4", folder / "beside_a_crossfade.mp4", did)
        write_video(play(frames, fps, hold, ping_pong), made.video, fps)
        write_video(
            play(comparison({"DreamMover": frames, "cross-fade": faded}), fps, hold, ping_pong), made.comparison, fps
        )
        before, self._made = self._made, made
        if before is not None:
            shutil.rmtree(before.video.parent, ignore_errors=True)
            if before.rendered is not rendered:
                shutil.rmtree(before.rendered.folder, ignore_errors=True)
        return made

    def _show(self, kind: str, pictures: Mapping[str, Image.Image]) -> list[Path]:
        """Write pictures by their names, which replace those of this kind that were shown before."""
        place = self._place()
        for name, picture in pictures.items():
            write_picture(picture, place / f"{name}.png")
        with self._showing:
            before, self._shown[kind] = self._shown.get(kind), place
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return [place / f"{name}.png" for name in pictures]

    def _place(self) -> Path:
        """A new folder; a browser must not take new files for old ones, nor anyone guess where they are."""
        if self._closed:
            raise StoppedError
        place = self.folder / secrets.token_hex(16)
        place.mkdir(parents=True)
        return place


def load_photo(path: Path, which: str) -> Image.Image:
    """An uploaded photo, upright, in RGB, at most `MAX_SIDE` pixels a side.

    Args:
        path: its file; of this only the name appears in complaints.
        which: "first" or "last".

    Raises:
        ValueError: it cannot be read.
    """
    try:
        (image,) = load_images(str(path), f"the {which} photo")
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    photo = picture_of(image)
    photo.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return photo


def _enlargement(photo: Image.Image) -> int:
    """How many times larger a photo is shown for clicking: Gradio locates clicks on pictures that it shrinks only."""
    return max(1, round(CLICK_SIDE / max(photo.size)))


def _with_spots(photo: Image.Image, spots: Sequence[tuple[int, int]]) -> Image.Image:
    """A photo, enlarged, with numbered dots at (x, y) in the pixels of that."""
    marked = ImageOps.scale(photo, _enlargement(photo))
    draw = ImageDraw.Draw(marked)
    radius = min(marked.size) / 24
    for number, (x, y) in enumerate(spots, 1):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=SPOT, outline="white", width=2)
        draw.text((x, y), str(number), fill="white", anchor="mm", font_size=1.4 * radius)
    return marked


def _points(spots: Sequence, photos: Sequence[Image.Image]) -> list | None:
    """Pairs of spots as the pipeline takes them, in pixels of the photos."""
    scales = [_enlargement(photo) for photo in photos]
    return [
        tuple(tuple((place + 0.5) / scale - 0.5 for place in spot) for spot, scale in zip(pair, scales, strict=True))
        for pair in spots
    ] or None


def _key(photos: Sequence[Path], preparing: Mapping[str, object]) -> str:
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in photos]
    return f"{digests} {sorted(preparing.items())}"


def _prepare(pipe: DreamMoverPipeline, photos: Sequence[Path], preparing: Mapping[str, object]) -> Prepared:
    pictures = [load_photo(path, which) for path, which in zip(photos, ("first", "last"), strict=True)]
    arguments = dict(preparing)
    generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
    arguments["points"] = _points(arguments.pop("spots"), pictures)
    return Prepared(_key(photos, preparing), pipe.prepare(*pictures, **arguments, generator=generator))


def _pictures(pair: PreparedPair, frames: Sequence[Image.Image], times: Sequence[float]) -> dict[str, Image.Image]:
    first, last = (picture_of(image) for image in pair.images)
    flow, canvas = pair.flow, pair.canvas
    return {
        "flow": flow_picture(flow, canvas),
        "matches": correspondence_lines(first, last, flow, canvas=canvas),
        "confidence": confidence_picture(flow, (first, last), canvas),
        "occlusion": occlusion_picture(flow, (first, last), canvas),
        "sheet": contact_sheet(frames, times),
    }
