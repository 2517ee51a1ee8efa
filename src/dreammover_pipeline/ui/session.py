# SPDX-License-Identifier: Apache-2.0
"""What a session of the page does and keeps: prepared pairs, the frames made of them, and the files it shows.

Whatever a session writes lies in one folder, which is removed with the session. Files that are shown stay until those
that replace them are complete.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from ..finishing import KEPT_BYTES
from ..media.files import check_ffmpeg, check_fps, write_picture, write_video
from ..media.pictures import comparison, crossfade
from ..media.playback import check_hold, play
from ..memory import free_cache, is_out_of_memory
from ..pipeline import DreamMoverPipeline
from ..progress import ProgressListener
from ..ranking import Chooser
from ..settings import RenderSettings
from .photos import WHICH, DecodedPhotos, Spot, marked_photo, points_of_spots
from .results import FinishedVideo, PreparedPhotos, RenderedFrames, UnwrittenFrames, explaining_pictures


def equally_good(picture: Image.Image) -> float:
    """The same mark for every candidate, so that the first one is taken until the visitor chooses another."""
    return 0.0


class StoppedError(Exception):
    """A job has ended before it was done, since the visitor cancelled it or left."""


class Session:
    """One open page, with the pair that it prepared last, and the video that it finished last with what it is made of.

    Args:
        pipe: the pipeline, which all sessions share.
        pipeline_lock: a lock that is held by the session whose job the pipeline is doing.
        folder: where the session's files will lie; nothing else may be in it.
    """

    def __init__(self, pipe: DreamMoverPipeline, pipeline_lock: threading.Lock, folder: Path):
        self.folder = folder
        self.used = time.monotonic()  # when a request or a job of this session was last heard of
        self._pipe, self._pipeline_lock = pipe, pipeline_lock
        self._photos = DecodedPhotos()
        self._prepared: PreparedPhotos | None = None
        self._unwritten: UnwrittenFrames | None = None  # frames that could not be written, unless they are large
        self._rendered: RenderedFrames | None = None  # also while no video of them could be written
        self._finished: FinishedVideo | None = None
        self._shown: dict[str, Path] = {}
        self._job_lock, self._shown_lock = threading.Lock(), threading.Lock()
        self._cancels: set[threading.Event] = set()  # one of each job, also of one that waits until another has ended
        self._closed = False

    @property
    def finished(self) -> FinishedVideo | None:
        """The video that was finished last; None before the first one."""
        return self._finished

    def cancel(self) -> None:
        """Stop the job in progress at its next step, and those that wait for it; without a job, do nothing."""
        for cancelled in list(self._cancels):
            cancelled.set()

    def leave(self) -> None:
        """Stop the job in progress at its next step, and let no other job begin."""
        self._closed = True

    def close(self) -> None:
        """Stop the job in progress at its next step, let no other begin, forget everything and remove the folder."""
        self.leave()
        with self._job_lock:  # the job in progress holds it until its next step
            self._prepared = self._unwritten = self._rendered = self._finished = None
            self._photos = DecodedPhotos()
            shutil.rmtree(self.folder, ignore_errors=True)

    def has_prepared(self, photos: Sequence[Path], preparing: Mapping[str, object]) -> bool:
        """Whether these photos are prepared with these settings, so that `make` needs no LoRA fit and no inversion.

        Args:
            photos: the files of the first and of the last photo.
            preparing: settings as `make` takes them.
        """
        return self._known_pair(_key(photos, preparing)) is not None

    def make(
        self,
        photos: Sequence[Path],
        preparing: Mapping[str, object],
        rendering: Mapping[str, object],
        fps: float,
        hold: float = 0.0,
        ping_pong: bool = False,
        report: ProgressListener = lambda stage, done, total: None,
        choices: Mapping[float, int] | None = None,
    ) -> FinishedVideo:
        """Make a video, and do only the part of the work whose results this session has not kept.

        Kept are the pair that was prepared last, the frames that were made last, and the finished video with its pair
        and its frames. Frames that could not be written are kept until others are to be made, if they take at most
        256 MiB.

        Args:
            photos: the files of the first and of the last photo.
            preparing: arguments of `DreamMoverPipeline.prepare` but for the photos. A "seed" takes the place of the
                generator. "spots" take the place of the points: a pair of spots ((x0, y0), (x1, y1)) for each place
                that both photos show, in pixels of the pictures that `mark` returns.
            rendering: arguments of `DreamMoverPipeline.render` but for the pair, "rank_by" and "choices".
            fps: frames per second of the video.
            hold: seconds for which the first and the last frame stand still.
            ping_pong: whether the video also runs back to its beginning.
            report: a function called as (stage name, steps done, steps in all) when a stage begins and after each of
                its steps.
            choices: which of its candidates a frame of the last video is to be from now on, by the frame's δ. The
                others stay what they were chosen to be, as long as the photos and all other settings are the same.

        Raises:
            StoppedError: the visitor cancelled the job or left.
            TypeError, ValueError: an argument or a photo is not what it may be, or there are choices for frames that
                are not those of these photos and settings; raised before any model runs.
            RuntimeError: the work failed. If only writing failed, what the message names is kept for the next call.
        """
        check_ffmpeg()
        self._pipe.check_inputs(**preparing, **rendering, rank_by=equally_good)
        check_fps(fps, "video.mp4")
        check_hold(hold)
        with self._job(report):
            prepared_key = _key(photos, preparing)
            key = f"{prepared_key} {sorted(rendering.items())}"
            rendered = next((frames for frames in self._kept_frames() if frames.key == key), None)
            chosen = {} if rendered is None else rendered.chosen
            wanted = {**chosen, **(choices or {})}
            if wanted.keys() != chosen.keys():
                raise ValueError(
                    "the photos or the settings are no longer those of these candidates; make a new video"
                )
            work = []
            if rendered is None or wanted != chosen:
                frames = self._take_unwritten(key, wanted)
                if frames is None:
                    prepared = self._known_pair(prepared_key)
                    if prepared is None:
                        prepared = self._prepared = self._prepare(prepared_key, photos, preparing)
                        work.append("prepared")
                    frames = self._render(key, prepared, rendering, wanted)
                    work.append("rendered")
                rendered = self._write_frames(frames)
                del frames  # before the video is written, for which they are read again
                self._replace_rendered(rendered)
            return self._write(rendered, fps, hold, ping_pong, (*work, "written"))

    def moment(self, time: float, report: ProgressListener) -> Path:
        """Make a single frame of what the finished video shows, at a δ of the visitor's choice, and return its file.

        It is made as the frames of the video are, but alone and once.

        Args:
            time: the frame's δ, in (0, 1).
            report: a function called as (stage name, steps done, steps in all) when a stage begins and after each of
                its steps.

        Raises:
            StoppedError: the visitor cancelled the job or left.
            TypeError, ValueError: no video is finished yet, or the time is not what it may be; raised before any
                model runs.
            RuntimeError: the work failed.
        """
        finished = self._finished
        if finished is None:
            raise ValueError("make a video first; then single frames of it can be made at any time")
        prepared = finished.rendered.prepared
        settings = {**finished.rendered.rendering, "times": [time], "easing": "linear", "candidates": 1}
        self._pipe.check_inputs(**settings)
        with self._job(report):
            # With the photos, since frames beside them fade out the tone that the VAE takes from the photos.
            made = self._pipe.render(
                prepared.pair, **settings, include_inputs=True, generator=_frames_generator(prepared)
            )
            return self._show("moment", {"moment": made.frames[0][1]})[0]

    def mark(self, photos: Sequence[Path | None], spots: Sequence[Sequence[Spot]]) -> list[Path | None]:
        """Draw numbered spots on the photos, and return the files of the two pictures.

        Args:
            photos: the files of the first and of the last photo; None for a photo that is not chosen yet.
            spots: the spots of the first photo and those of the last one, (x, y) in pixels of the returned pictures.

        Returns:
            The two files; None for a photo that is not chosen yet.

        Raises:
            ValueError: a photo cannot be read.
        """
        marked = {
            which: marked_photo(photo, places)
            for which, photo, places in zip(WHICH, self._photos.get(photos), spots, strict=True)
            if photo is not None
        }
        paths = dict(zip(marked, self._show("marks", marked), strict=True))
        return [paths.get(which) for which in WHICH]

    @contextmanager
    def _job(self, report: ProgressListener) -> Iterator[None]:
        """Have the pipeline for this session alone; its steps are reported, and it stops where the visitor wants."""
        cancelled = threading.Event()

        def step(stage: str, done: int, total: int) -> None:
            if cancelled.is_set() or self._closed:
                raise StoppedError
            report(stage, done, total)

        self._cancels.add(cancelled)
        try:
            with self._job_lock, self._pipeline_lock, self._pipe.listening(step):
                step("Starting", 0, 1)
                try:
                    yield
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise RuntimeError(f"{error} Try smaller photos.") from error
                finally:
                    self._pipe.maybe_free_model_hooks()
                    free_cache(self._pipe.device)
                    self.used = time.monotonic()
        finally:
            self._cancels.discard(cancelled)

    def _kept_frames(self) -> list[RenderedFrames]:
        """The frames that are kept, those that were made last first."""
        shown = None if self._finished is None else self._finished.rendered
        return [frames for frames in (self._rendered, shown) if frames is not None]

    def _known_pair(self, key: str) -> PreparedPhotos | None:
        """The prepared pair that has a key, if it is kept."""
        last = [] if self._prepared is None else [self._prepared]
        pairs = [*last, *(frames.prepared for frames in self._kept_frames())]
        return next((prepared for prepared in pairs if prepared.key == key), None)

    def _prepare(self, key: str, photos: Sequence[Path], preparing: Mapping[str, object]) -> PreparedPhotos:
        pictures = self._photos.get(photos)
        arguments = dict(preparing)
        seed = arguments.pop("seed")
        generator = torch.Generator("cpu").manual_seed(seed)
        arguments["points"] = points_of_spots(arguments.pop("spots"), pictures)
        pair = self._pipe.prepare(*pictures, **arguments, generator=generator)
        return PreparedPhotos(key, pair, seed)

    def _render(
        self, key: str, prepared: PreparedPhotos, rendering: Mapping[str, object], choices: Mapping[float, int]
    ) -> UnwrittenFrames:
        with self._pipe.keeping_sources() as sources:
            output = self._pipe.render(
                prepared.pair,
                **rendering,
                rank_by=equally_good,
                choices=choices,
                include_inputs=True,
                generator=_frames_generator(prepared),
            )
        (chooser,) = output.candidates or [Chooser(equally_good, {})]  # one that nothing was shown to
        return UnwrittenFrames(key, prepared, dict(rendering), output, sources, chooser)

    def _take_unwritten(self, key: str, choices: Mapping[float, int]) -> UnwrittenFrames | None:
        """The frames that could not be written, if they are those of a key and of choices; they are kept no longer."""
        frames, self._unwritten = self._unwritten, None
        return frames if frames is not None and (frames.key, frames.chooser.choices) == (key, choices) else None

    def _write_frames(self, made: UnwrittenFrames) -> RenderedFrames:
        """Write frames and what belongs to them; where that fails they are kept, unless they take too much memory."""
        (frames,), (times,) = made.output.frames, made.output.times
        kept = "the photos are known by now, so another attempt only makes the frames"
        if made.nbytes <= KEPT_BYTES:
            self._unwritten, kept = made, "they are kept for now, so another attempt only writes them"
        motion = RenderSettings.of(made.rendering).motion
        pictures = explaining_pictures(made.prepared.pair, frames, times, made.sources, motion)
        with self._new_folder("the frames", kept) as folder:
            files = _write_pictures(frames, folder / "frames")
            candidates = {
                time: _write_pictures(seen, folder / f"candidates_{number}")
                for number, (time, seen) in enumerate(made.chooser.seen.items())
            }
            paths = {name: folder / f"{name}.png" for name in pictures}
            for name, picture in pictures.items():
                write_picture(picture, paths[name])
        self._unwritten = None
        return RenderedFrames(
            made.key,
            made.prepared,
            made.rendering,
            folder,
            files,
            times,
            paths,
            made.output.blacked_out,
            candidates,
            made.chooser.chosen,
        )

    def _replace_rendered(self, rendered: RenderedFrames) -> None:
        """Keep these frames instead of those before them, which are removed unless the finished video is of them."""
        before, self._rendered = self._rendered, rendered
        if before is not None and (self._finished is None or self._finished.rendered is not before):
            shutil.rmtree(before.folder, ignore_errors=True)

    def _write(
        self, rendered: RenderedFrames, fps: float, hold: float, ping_pong: bool, work: tuple[str, ...]
    ) -> FinishedVideo:
        """Write the video and the comparison, and remove the files of the video that they replace."""
        frames = [Image.open(path).convert("RGB") for path in rendered.files]
        faded = crossfade(frames[0], frames[-1], rendered.times)
        with self._new_folder("the video", "its frames are kept, so another attempt only writes it") as folder:
            finished = FinishedVideo(rendered, folder / "dreammover.mp4", folder / "beside_a_crossfade.mp4", work)
            write_video(play(frames, fps, hold, ping_pong), finished.video, fps)
            beside = comparison({"DreamMover": frames, "cross-fade": faded})
            write_video(play(beside, fps, hold, ping_pong), finished.comparison, fps)
        before, self._finished = self._finished, finished
        if before is not None:
            shutil.rmtree(before.video.parent, ignore_errors=True)
            if before.rendered is not rendered:
                shutil.rmtree(before.rendered.folder, ignore_errors=True)
        return finished

    def _show(self, kind: str, pictures: Mapping[str, Image.Image]) -> list[Path]:
        """Write pictures to files of these names, and remove the pictures of this kind that were shown before."""
        with self._new_folder("the picture", "try again later") as folder:
            for name, picture in pictures.items():
                write_picture(picture, folder / f"{name}.png")
        with self._shown_lock:
            before, self._shown[kind] = self._shown.get(kind), folder
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return [folder / f"{name}.png" for name in pictures]

    @contextmanager
    def _new_folder(self, what: str, kept: str) -> Iterator[Path]:
        """A new folder with a random name: a browser must not take new files for old ones, and nobody may guess it.

        If the block fails, which only writes into the folder, the folder is removed.

        Args:
            what: what is written, for the error.
            kept: what the error says of what is not lost, or of what to do.

        Raises:
            StoppedError: the visitor has left.
            RuntimeError: a file could not be written, such as on a full disk.
        """
        if self._closed:
            raise StoppedError
        folder = self.folder / secrets.token_hex(16)
        try:
            folder.mkdir(parents=True)
            yield folder
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, (OSError, RuntimeError)):
                raise
            reason = getattr(error, "strerror", None) or error  # whose text would name the server's folders
            raise RuntimeError(f"{what} could not be written: {reason}; {kept}") from error


def _frames_generator(prepared: PreparedPhotos) -> torch.Generator:
    """What decides the noise of frames that are made in noise: the visitor's seed, as for all else."""
    return torch.Generator("cpu").manual_seed(prepared.seed)


def _write_pictures(pictures: Iterable[Image.Image], folder: Path) -> tuple[Path, ...]:
    """Write pictures to files in a new folder, and return the files in the order of the pictures."""
    write_video(pictures, folder, fps=1)
    return tuple(sorted(folder.iterdir()))


def _key(photos: Sequence[Path], preparing: Mapping[str, object]) -> str:
    """A text that is equal only for photos of the same content, prepared with the same settings."""
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in photos]
    return f"{digests} {sorted(preparing.items())}"
