# SPDX-License-Identifier: Apache-2.0
"""One pair to one video, committed with its sidecar, or a record of why not."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..arguments import taken
from ..framing import fit
from ..images import decode_images, rgb
from ..media.files import move_over, write_video
from ..pipeline import DreamMoverPipeline
from ..records import PreparedPair
from ..settings import PREPARING, RENDERING
from .jobs import Job, find_photos
from .journal import Journal
from .lora_cache import LoraCache, lora_key
from .sidecar import (
    FORMAT,
    PRIVATE,
    digest,
    error_record,
    failure_path,
    finished,
    request_of,
    sidecar_path,
    stack_of,
    written,
)

PHOTOS = ("img0", "img1")  # as errors call them


class Worker:
    """Makes videos with one loaded pipeline.

    Args:
        pipe: its progress bars are the caller's business.
        model: the name it was loaded by.
        folder: of all outputs; the journal is kept in it.
        lora_cache: folder of the fitted LoRAs; None for one inside `folder`.
    """

    def __init__(self, pipe: DreamMoverPipeline, model: str, folder: Path, lora_cache: Path | None = None):
        self.pipe = pipe
        self.model = {"name": model, "fingerprint": pipe.fingerprint()}
        self.stack = stack_of(pipe)
        self.process = {"run": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        self.cache = LoraCache(lora_cache or folder / PRIVATE / "lora")
        self.journal = Journal(folder / PRIVATE / "journal.jsonl")

    def request(self, job: Job) -> tuple[str, list[dict]]:
        """The request that a job is, and its photos, each with the digest of its bytes.

        Raises:
            OSError, ValueError: a photo cannot be had.
        """
        photos = find_photos(job)
        digests = [digest(photo) for photo in photos]
        fingerprint, dtype = self.model["fingerprint"], self.stack["dtype"]
        inputs = [
            {"path": _relative(photo, job.output.parent), "sha256": sha256}
            for photo, sha256 in zip(photos, digests, strict=True)
        ]
        return request_of(job, digests, fingerprint, dtype), inputs

    def finished(self, job: Job) -> dict | None:
        """The sidecar of a job that is done; None where it is not, or its photos cannot be read to tell."""
        try:
            request, _ = self.request(job)
        except (OSError, ValueError):
            return None
        return finished(job.output, request)

    def make(self, job: Job, work: Path) -> dict:
        """Make a video and commit it.

        Args:
            job: which.
            work: an empty folder of the job's own on the output's disk.

        Returns:
            Its sidecar.

        Raises:
            Exception: anything; then nothing has changed but what `work` holds.
        """
        started = datetime.now(UTC)
        clock = _Clock(self.pipe.device)
        request, inputs = self.request(job)
        if job.recorded:
            _require_recorded(job, inputs)
        pair, lora = self._prepare(job)
        clock.stop("prepare")
        output = self.pipe.render(pair, **taken(job.settings, *RENDERING))
        clock.stop("render")
        frames = output.frames[0]
        video = work / f"video{job.output.suffix}"
        write_video(frames, video, job.settings["fps"])
        clock.stop("write")
        record = {
            "dreammover_batch": FORMAT,
            "request": request,
            "output": {
                "name": job.name,
                "sha256": digest(video),
                "frames": len(frames),
                "times": list(output.times[0]),
                "width": frames[0].width,
                "height": frames[0].height,
                "blacked_out": sum(output.nsfw_content_detected[0]) if output.nsfw_content_detected else 0,
            },
            "inputs": inputs,
            "settings": dict(job.settings),
            "model": self.model,
            "lora": lora,
            "stack": self.stack,
            "seconds": clock.seconds,
            "process": {**self.process, "started": started.isoformat(timespec="seconds")},
        }
        sidecar = written(record, work)  # before anything changes, since a disk may be full
        move_over(video, job.output)
        os.replace(sidecar, sidecar_path(job.output))
        return record

    def _prepare(self, job: Job) -> tuple[PreparedPair, str | None]:
        """The prepared pair, and where its LoRA came from: "fitted", "cached", or None without a LoRA."""
        pipe, settings = self.pipe, job.settings
        first, last = (decode_images(photo, name)[0] for photo, name in zip(find_photos(job), PHOTOS, strict=True))
        arguments = taken(settings, *PREPARING)
        generator = torch.Generator("cpu").manual_seed(settings["seed"])
        if not settings["lora_steps"]:
            return pipe.prepare(first, last, **arguments, generator=generator), None
        canvas = pipe.canvas(first, settings["height"], settings["width"])
        pixels = torch.stack([fit(rgb(photo), canvas) for photo in (first, last)])
        key = lora_key(job, pixels, self.model["fingerprint"], self.stack)
        cached = self.cache.load(key)
        pair = pipe.prepare(first, last, **arguments, generator=generator, lora=cached)
        if cached is None:
            self.cache.save(key, pair.lora, owner=str(job.output.resolve()))
        return pair, "fitted" if cached is None else "cached"

    def record_failure(self, job: Job, error: Exception, work: Path) -> None:
        """Say beside where the video would be why it is not there."""
        record = {
            "name": job.name,
            "where": job.where,
            "error": error_record(error),
            "photos": [str(photo) for photo in job.photos],
            "settings": dict(job.settings),
            "model": self.model,
            "stack": self.stack,
            "process": {**self.process, "failed": datetime.now(UTC).isoformat(timespec="microseconds")},
        }
        os.replace(written(record, work), failure_path(job.output))


def _require_recorded(job: Job, inputs: Sequence[Mapping]) -> None:
    for now, then in zip(inputs, job.recorded["inputs"], strict=True):
        if now["sha256"] != then["sha256"]:
            raise ValueError(f"the photo '{now['path']}' is not the one of {job.where}: its bytes have changed")


def _relative(path: Path, folder: Path) -> str:
    """The way from a folder to a file, so that a tree of both can be moved; absolute between two drives."""
    path, folder = path.resolve(), folder.resolve()
    return os.path.relpath(path, folder) if path.anchor == folder.anchor else str(path)


class _Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stop(self, stage: str) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now
