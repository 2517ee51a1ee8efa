# SPDX-License-Identifier: Apache-2.0
"""What is written beside a video: a sidecar that tells how the video was made, or a record of why it was not made.

A sidecar is put in its place last, by one rename, and so it is the commit: a batch counts a video only if its sidecar
records the digest of the video's bytes. Any other video is made anew.

A record of ours that is damaged counts as absent. A file of a record's name that is not ours is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..inputs import file_fault
from ..media.files import LITTER
from ..pipeline import DreamMoverPipeline
from ..settings import arguments
from ..storage import digest_of, write_whole
from .jobs import Job

FORMAT = 1
# The first keys of the records, by which a file is known as ours.
SIDECAR_MARK = "dreammover_batch"
FAILURE_MARK = "dreammover_failure"
# What a record must have to be whole: a dict stands for a mapping with at least these keys, a list for a list of this
# length, and a type or several for a value of it.
SIDECAR_SHAPE = {
    "request": str,
    "output": {"name": str, "sha256": str, "width": int, "height": int, "blacked_out": int},
    "inputs": [{"path": str, "sha256": str}] * 2,
    "settings": {"seed": int, "fps": (int, float)},  # all other settings have defaults
    "model": {"name": str, "fingerprint": str},
    "stack": {"dtype": str},
    "seconds": dict.fromkeys(("prepare", "render", "write"), (int, float)),
}
FAILURE_SHAPE = {"error": {"class": str, "message": str}}
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
    """The content of a sidecar; None if the file does not exist, is damaged or is no sidecar."""
    record = _content(path)
    if not _has_shape(record, SIDECAR_SHAPE) or record.get(SIDECAR_MARK) != FORMAT:
        return None
    # Earlier versions did not scale videos, and took neither models beside the checkpoint nor masks nor poses.
    sized = _has_shape(record["output"].get("frame_size", [0, 0]), [int, int])
    named = all(isinstance(name, str | None) for name in record["model"].values())
    return record if sized and named and _are_files(record.get("files", {})) else None


def _are_files(value: object) -> bool:
    """Whether a value is what a sidecar says of masks and poses."""
    files = SIDECAR_SHAPE["inputs"][0]
    return isinstance(value, dict) and all(
        isinstance(paths, list) and all(_has_shape(path, files) for path in paths) for paths in value.values()
    )


def read_failures(jobs: Iterable[Job]) -> dict[str, dict]:
    """The whole records of failed jobs that exist at this moment, by the names of the jobs."""
    records = {job.name: _content(failure_path(job.output)) for job in jobs}
    return {name: record for name, record in records.items() if _has_shape(record, FAILURE_SHAPE)}


def is_sidecar(path: Path) -> bool:
    """Whether a file is a sidecar, whole or damaged."""
    record = _content(path)
    return SIDECAR_MARK in record if isinstance(record, dict) else _begins_with(path, SIDECAR_MARK)


def is_failure(path: Path) -> bool:
    """Whether a file is the record of a failure, whole or damaged."""
    record = _content(path)
    if isinstance(record, dict):  # records of earlier versions have no mark
        return FAILURE_MARK in record or {"name", "where", "error"} <= record.keys()
    return _begins_with(path, FAILURE_MARK)


def check_places_of_records(output: Path) -> None:
    """Refuse an output whose sidecar, or the record of whose failure, would replace a file that is not ours.

    Raises:
        ValueError: Such a file, or a folder, is there.
    """
    for path, is_ours in ((sidecar_path(output), is_sidecar), (failure_path(output), is_failure)):
        if os.path.lexists(path) and not is_ours(path):
            raise ValueError(
                f"the batch keeps its record of '{output}' in '{path}', but a file of that name is there that this "
                "program did not write; move it away, or choose another output"
            )


def forget_failure(output: Path) -> None:
    """Remove the record that tells why a video was not made, if there is one."""
    if is_failure(failure_path(output)):
        failure_path(output).unlink(missing_ok=True)


def _content(path: Path) -> object:
    """What a file holds as JSON; None if it does not exist, is no regular file or holds no JSON."""
    if file_fault(path):
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _has_shape(value: object, shape: object) -> bool:
    """Whether a value has a shape like `SIDECAR_SHAPE`."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and _has_shape(value[key], inner) for key, inner in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_has_shape, value, shape))
    return isinstance(value, shape)


def _begins_with(path: Path, mark: str) -> bool:
    """Whether a file begins as our records with this first key do, or is cut off within that beginning.

    A file of nothing but NULs counts too, since a power cut may leave one where a record was.
    """
    if file_fault(path):
        return False
    opening = f'{{"{mark}"'.encode()
    try:
        content = path.read_bytes()
    except OSError:
        return False
    begins = b"".join(content.split(maxsplit=2)[:2])[: len(opening)]
    return bool(begins) and (opening.startswith(begins) or not content.strip(b"\0"))


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
    """The sha256 of a file, or of the names and contents of the files in a folder, but for those of file managers."""
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.name not in LITTER)
        lines = [f"{entry.name} {digest(entry)}\n" for entry in entries]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def request_of(job: Job, read: Mapping, fingerprint: str, dtype: str) -> str:
    """A digest of everything that decides a video.

    Args:
        job: The job, whose settings and whose output's kind of file count.
        read: What the sidecar will record of the files that are read, their digests among it.
        fingerprint: The fingerprint of the checkpoint.
        dtype: The precision of the UNet.
    """
    declared = arguments()
    settings = {name: value for name, value in job.settings.items() if name not in declared or declared[name].decides}

    def digests(files: Iterable[Mapping[str, str]]) -> list[str]:
        return [file["sha256"] for file in files]

    decisive = [digests(read["inputs"]), settings, fingerprint, dtype, job.output.suffix.lower()]
    files = {name: digests(paths) for name, paths in read["files"].items()}
    return digest_of([*decisive, files] if files else decisive)  # as earlier versions did, which took no such files


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
    write_whole(path, text.encode("utf-8", errors="backslashreplace"))
    return path


def error_record(error: Exception) -> dict[str, object]:
    """The class of an error, its message in one line, and its traceback with those of the errors that caused it."""
    return {
        "class": type(error).__name__,
        "message": " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)).splitlines(),
    }
