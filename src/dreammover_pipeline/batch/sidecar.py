# SPDX-License-Identifier: Apache-2.0
"""What is written beside a video: how it was made and may be made again, or why it was not.

A sidecar is written last and by one rename, so it is the commit: a video without the sidecar of its own bytes is not
there as far as a batch is concerned, and is made anew.
"""

from __future__ import annotations

import hashlib
import json
import platform
import traceback
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..pipeline import DreamMoverPipeline
from ..settings import arguments
from ..storage import digest_of
from .jobs import Job

FORMAT = 1
PRIVATE = ".dreammover"  # the folder, beside outputs, of what is nobody else's business
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow", "imageio-ffmpeg")


def sidecar_path(output: Path) -> Path:
    """Where it is written how a video was made."""
    return output.with_name(f"{output.name}.json")


def failure_path(output: Path) -> Path:
    """Where it is written why a video was not made."""
    return output.with_name(f"{output.name}.error.json")


def work_path(output: Path) -> Path:
    """The folder in which a video is claimed and made."""
    return output.parent / PRIVATE / "work" / output.name


def read_sidecar(path: Path) -> dict | None:
    """What a sidecar says; None if there is no such file, or it is not a whole sidecar."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("dreammover_batch") == FORMAT else None


def read_failures(jobs: Iterable[Job]) -> dict[str, str]:
    """The failures recorded so far, by the outputs' names, as text."""
    texts = {}
    for job in jobs:
        path = failure_path(job.output)
        if path.is_file():
            texts[job.name] = path.read_text(encoding="utf-8")
    return texts


def finished(output: Path, request: str) -> dict | None:
    """The sidecar of a video that is there, whole and as requested; None if there is no such video."""
    record = read_sidecar(sidecar_path(output))
    if record is None or record["request"] != request:
        return None
    try:
        return record if digest(output) == record["output"]["sha256"] else None
    except OSError:
        return None


def digest(path: Path) -> str:
    """The sha256 of a file, or of a folder of files and their names."""
    if path.is_dir():
        lines = [f"{entry.name} {digest(entry)}\n" for entry in sorted(path.iterdir())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request_of(job: Job, inputs: Sequence[str], fingerprint: str, dtype: str) -> str:
    """In short, everything that decides a video.

    Args:
        job: For its settings and the kind of its file.
        inputs: Digests of the photos' bytes.
        fingerprint: Of the checkpoint.
        dtype: The precision of the UNet.
    """
    declared = arguments()
    settings = {name: value for name, value in job.settings.items() if name not in declared or declared[name].decides}
    return digest_of([list(inputs), settings, fingerprint, dtype, job.output.suffix.lower()])


def stack_of(pipe: DreamMoverPipeline) -> dict[str, object]:
    """On what a pipeline runs; on an equal stack, equal jobs give equal bytes."""
    device = pipe.device
    cuda = device.type == "cuda"
    return {
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "dreammover-pipeline": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
    }


def written(record: Mapping[str, object], work: Path) -> Path:
    """A record as JSON in a file of `work`, a folder of the caller's own, ready to be renamed into place."""
    path = work / "record.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def error_record(error: Exception) -> dict[str, object]:
    """The class of an error, its message in one line, and its traceback with that of what is behind it."""
    return {
        "class": type(error).__name__,
        "message": " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)).splitlines(),
    }
