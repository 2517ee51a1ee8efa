# SPDX-License-Identifier: Apache-2.0
"""Makes the video of one pair and commits it with its sidecar, or records why the video could not be made."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import torch

from ..arguments import taken
from ..images import decode_images
from ..media.files import check_video_path, video_size, write_video_or_keep
from ..outputs import DreamMoverPipelineOutput
from ..pairs import fitted_photos
from ..pipeline import DreamMoverPipeline
from ..records import PreparedPair
from ..scratch import move_over
from ..settings import PREPARING, RENDERING
from .jobs import PHOTOS, Job, check_files, find_photos
from .journal import Journal
from .lora_cache import LoraCache, cache_key
from .sidecar import (
    FAILURE_MARK,
    FORMAT,
    PRIVATE,
    SIDECAR_MARK,
    check_places_of_records,
    digest,
    error_record,
    failure_path,
    finished_record,
    is_failure,
    request_of,
    sidecar_path,
    stack_of,
    write_record,
)


class Worker:
    """Makes videos with one loaded pipeline.

    Args:
        pipe: The pipeline. Whether it shows progress bars is left to the caller.
        model: The name that the pipeline was loaded by.
        folder: The folder of all outputs, in which the journal is kept too.
        lora_cache: The folder of the fitted LoRAs; by default it is a folder inside `folder`.
        components: The names that models beside it were loaded by, by the pipeline's components.
    """

    def __init__(
        self,
        pipe: DreamMoverPipeline,
        model: str,
        folder: Path,
        lora_cache: Path | None = None,
        components: Mapping[str, str | None] = MappingProxyType({}),
    ):
        self.pipe = pipe
        self.model = {"name": model, **components, "fingerprint": pipe.fingerprint()}
        alone = pipe.clip is None and pipe.controlnet is None
        self.of_pairs = self.model["fingerprint"] if alone else pipe.pair_fingerprint()
        self.stack = stack_of(pipe)
        self.process = {"run": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self.cache = LoraCache(lora_cache or folder / PRIVATE / "lora")
        self.journal = Journal(folder / PRIVATE / "journal.jsonl")

    def request(self, job: Job) -> tuple[str, dict]:
        """The digest of everything that decides a job's video, and what its sidecar records of the files read for it.

        Raises:
            OSError, ValueError: A photo, a mask or a pose does not exist or cannot be read.
        """
        photos = find_photos(job)
        check_files(job)

        def recorded(paths: Sequence[Path]) -> list[dict[str, str]]:
            return [{"path": _relative(path, job.output.parent), "sha256": digest(path)} for path in paths]

        read = {"inputs": recorded(photos), "files": {name: recorded(paths) for name, paths in job.files.items()}}

        return request_of(job, read, self.model["fingerprint"], self.stack["dtype"]), read

    def finished_record(self, job: Job) -> dict | None:
        """The sidecar of a job that is done; None if the job is not done, or if its photos cannot be read."""
        if not sidecar_path(job.output).is_file():
            return None  # before the photos are read, which may be large
        try:
            request, _ = self.request(job)
        except (OSError, ValueError):
            return None
        return finished_record(job.output, request)

    def make(self, job: Job, work: Path) -> dict:
        """Make the video of a job and commit it.

        Args:
            job: The job.
            work: An empty folder on the disk of the output that nobody else writes to.

        Returns:
            The content of the sidecar.

        Raises:
            Exception: The video could not be made, for whatever reason. Nothing has changed but the content of `work`.
        """
        started = datetime.now(UTC)
        clock = _Clock(self.pipe.device)
        request, read = self.request(job)
        if job.recorded:
            _require_recorded(job, read)
        pair, lora = self._prepare(job)
        clock.stop("prepare")
        generator = torch.Generator("cpu").manual_seed(job.settings["seed"])
        output = self.pipe.render(pair, **taken(job.settings, *RENDERING), output_type="lazy", generator=generator)
        clock.stop("render")
        video = work / f"video{job.output.suffix}"
        write_video_or_keep(output.frames[0], video, job.settings["fps"], job.output)
        clock.stop("write")
        record = {
            SIDECAR_MARK: FORMAT,
            "request": request,
            "output": _recorded_output(job, video, output),
            **read,
            "settings": dict(job.settings),
            "model": self.model,
            "lora": lora,
            "stack": self.stack,
            "seconds": clock.seconds,
            "process": {**self.process, "started": started.isoformat(timespec="seconds")},
        }
        sidecar = write_record(record, work)  # while the earlier video is still there, since the disk may be full
        check_video_path(job.output)  # once more, since making the video took a while
        check_places_of_records(job.output)
        move_over(video, job.output)
        os.replace(sidecar, sidecar_path(job.output))
        return record

    def _prepare(self, job: Job) -> tuple[PreparedPair, str | None]:
        """The prepared pair, and whether its LoRA was "fitted" now or "cached" before; None if it has no LoRA."""
        pipe, settings = self.pipe, job.settings
        first, last = (decode_images(photo, name)[0] for photo, name in zip(find_photos(job), PHOTOS, strict=True))
        # One path is for both photos.
        files = {name: paths if len(paths) == 2 else paths[0] for name, paths in job.files.items()}
        arguments = taken(settings, *PREPARING) | files
        generator = torch.Generator("cpu").manual_seed(settings["seed"])
        if not settings["lora_steps"]:
            return pipe.prepare(first, last, **arguments, generator=generator), None
        canvas = pipe.canvas(first, settings["height"], settings["width"])
        key = cache_key(job, fitted_photos((first, last), canvas), self.of_pairs, self.stack)
        cached = self.cache.load(key)
        pair = pipe.prepare(first, last, **arguments, generator=generator, lora=cached)
        if cached is None:
            self.cache.save(key, pair.lora)
        return pair, "fitted" if cached is None else "cached"

    def record_failure(self, job: Job, error: Exception, work: Path) -> None:
        """Record why a video could not be made, in a file beside the place of the video, unless another one is there.

        Args:
            job: The job that failed.
            error: Why it failed.
            work: A folder on the disk of the output that nobody else writes to.
        """
        record = {
            FAILURE_MARK: FORMAT,
            "name": job.name,
            "where": job.origin,
            "error": error_record(error),
            "photos": [str(photo) for photo in job.photos],
            "files": {name: [str(path) for path in paths] for name, paths in job.files.items()},
            "settings": dict(job.settings),
            "model": self.model,
            "stack": self.stack,
            "process": {**self.process, "failed": datetime.now(UTC).isoformat(timespec="microseconds")},
        }
        place = failure_path(job.output)
        if is_failure(place) or not os.path.lexists(place):
            os.replace(write_record(record, work), place)


def _require_recorded(job: Job, read: Mapping) -> None:
    """Raise ValueError unless all files that are read have the bytes that the sidecar of the job records."""
    recorded = job.recorded.get("files", {})
    parts = [("the photo", read["inputs"], job.recorded["inputs"])]
    parts += [(f"`{name}`:", files, recorded[name]) for name, files in read["files"].items()]
    for kind, files, before in parts:
        for now, then in zip(files, before, strict=True):
            if now["sha256"] != then["sha256"]:
                raise ValueError(f"{kind} '{now['path']}' is not the one of {job.origin}: its bytes have changed")


def _recorded_output(job: Job, video: Path, output: DreamMoverPipelineOutput) -> dict[str, object]:
    """What a sidecar says of the video itself.

    Args:
        job: The job, which says what the video is called and how fast it is played.
        video: The file or the folder of frames as it was written.
        output: The output of the pipeline that was written, of lazy frames.
    """
    frames = output.frames[0]
    width, height = video_size(frames.frame_size, video, job.settings["fps"])
    return {
        "name": job.name,
        "sha256": digest(video),
        "frames": len(frames),
        "times": list(output.times[0]),
        "width": width,
        "height": height,
        "frame_size": list(frames.frame_size),
        "blacked_out": output.blacked_out,
    }


def _relative(path: Path, folder: Path) -> str:
    """The path of a file relative to a folder, so that both can be moved together; absolute on another drive."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path.anchor == folder.anchor else str(path)


class _Clock:
    """Measures the seconds of each stage, including the work that the device does on its own.

    Args:
        device: The device of the pipeline.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        """End a stage, which began when the previous one ended, and note its seconds under its name."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now
