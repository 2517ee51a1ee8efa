# SPDX-License-Identifier: Apache-2.0
"""A job: one video that is to be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Job:
    """One video to make.

    `origin` is where the video was asked for, such as "pairs.jsonl, line 4"; `photos` are two files, or one folder
    that holds them; `output` is the path of the video; `name` is the same path relative to the folder of all outputs;
    `settings` has a value for every setting that a manifest can decide; `recorded` is the sidecar of the video that is
    to be made once more, None for a new video.
    """

    origin: str
    photos: tuple[Path, ...]
    output: Path
    name: str
    settings: Mapping[str, object]
    recorded: Mapping | None = None


def find_photos(job: Job) -> tuple[Path, Path]:
    """The two photos of a job. If the job names a folder, they are the pictures `0.*` and `1.*` in it.

    Raises:
        ValueError: The folder cannot be read, or does not hold exactly one picture `0.*` and one picture `1.*`.
    """
    if len(job.photos) == 2:
        return job.photos
    (folder,) = job.photos
    endings = Image.registered_extensions()
    try:
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    except OSError as error:
        raise ValueError(f"the folder '{folder}' cannot be read: {error}") from error
    candidates = [[path for path in pictures if path.stem == name] for name in ("0", "1")]
    for i, paths in enumerate(candidates):
        if len(paths) != 1:
            present = " and ".join(path.name for path in paths) or "none"
            raise ValueError(f"the folder '{folder}' must hold one photo '{i}.*', but it holds {present}")
    ((first,), (last,)) = candidates
    return first, last
