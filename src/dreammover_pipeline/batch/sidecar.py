# SPDX-License-Identifier: Apache-2.0
"""What is written beside a video: a sidecar that tells how the video was made, or a record of why it was not made.

A sidecar is put in its place last, by one rename, and so it is the commit: a batch counts a video only if its sidecar
records the digest of the video's bytes. Any other video is made anew.
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
PRIVATE = ".dreammover"  # the folder beside the outputs for locks, unfinished videos, the journal and LoRAs
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow", "imageio-ffmpeg")


def sidecar_path(output: Path) -> Path:
    """The path of the sidecar, which tells how a video was made."""
    return output.with_name(f"{output.name}.json")


def failure_path(output: Path) -> Path:
    """The path of the record that tells why a video was not made."""
    return output.with_name(f"{output.name}.error.json")


def work_path(output: Path) -> Path:
    """The folder in which a video is claimed by a lock and made before it is put in its place."""
    return output.parent / PRIVATE / "work" / output.name


def read_sidecar(path: Path) -> dict | None:
    """The content of a sidecar; None if the file does not exist, is cut off or is no sidecar."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("dreammover_batch") == FORMAT else None


def read_failures(jobs: Iterable[Job]) -> dict[str, str]:
    """The records of failed jobs that exist at this moment, as text, by the names of the jobs."""
    texts = {}
    for job in jobs:
        path = failure_path(job.output)
        if path.is_file():
            texts[job.name] = path.read_text(encoding="utf-8")
    return texts


def finished_record(output: Path, request: str) -> dict | None:
    """The sidecar of a video if the video exists, is whole and is the one requested; None otherwise.

    Args:
        output: The path of the video.
        request: The digest that `request_of` gives.
    """
    record = read_sidecar(sidecar_path(output))
    if record is None or record["request"] != request:
        return None
    try:
        return record if digest(output) == record["output"]["sha256"] else None
    except OSError:
        return None


def digest(path: Path) -> str:
    """The sha256 of a file, or of the names and the contents of the files in a folder."""
    if path.is_dir():
        lines = [f"{entry.name} {digest(entry)}\n" for entry in sorted(path.iterdir())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request_of(job: Job, inputs: Sequence[str], fingerprint: str, dtype: str) -> str:
    """A digest of everything that decides a video.

    Args:
        job: The job, whose settings and whose output's kind of file count.
        inputs: The digests of the photos' bytes.
        fingerprint: The fingerprint of the checkpoint.
        dtype: The precision of the UNet.
    """
    declared = arguments()
    settings = {name: value for name, value in job.settings.items() if name not in declared or declared[name].decides}
    return digest_of([list(inputs), settings, fingerprint, dtype, job.output.suffix.lower()])


def stack_of(pipe: DreamMoverPipeline) -> dict[str, object]:
    """The precision, the device and the versions that a pipeline runs on.

    Where all of this is equal, equal jobs give videos with equal bytes.
    """
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


def write_record(record: Mapping[str, object], work: Path) -> Path:
    """Write a sidecar or the record of a failure as JSON, to be renamed into its place.

    Args:
        record: The content.
        work: A folder on the disk of the final place that nobody else writes to.

    Returns:
        The path of the file.
    """
    path = work / "record.json"
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    # Names of files that are not UTF-8 have surrogates, and as escapes these are JSON too.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def error_record(error: Exception) -> dict[str, object]:
    """The class of an error, its message in one line, and its traceback with those of the errors that caused it."""
    return {
        "class": type(error).__name__,
        "message": " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)).splitlines(),
    }
