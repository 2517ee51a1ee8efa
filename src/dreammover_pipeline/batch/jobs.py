# SPDX-License-Identifier: Apache-2.0
"""One video that is to be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Job:
    """One video to make.

    `where` says where it was asked for; `photos` are two files, or one folder that holds them; `name` is the output
    as it was named, relative to the folder of all outputs; `settings` has a value for each key that a manifest may
    have; `recorded` is the sidecar that is to be repeated, None where none is.
    """

    where: str
    photos: tuple[Path, ...]
    output: Path
    name: str
    settings: Mapping[str, object]
    recorded: Mapping | None = None


def find_photos(job: Job) -> tuple[Path, Path]:
    """The two photos of a job, which are looked for in its folder if it has one.

    Raises:
        ValueError: The folder does not hold one of each.
    """
    if len(job.photos) == 2:
        return job.photos
    (folder,) = job.photos
    suffixes = Image.registered_extensions()
    try:
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise ValueError(f"the folder '{folder}' cannot be read: {error}") from error
    found = [[path for path in pictures if path.stem == name] for name in ("0", "1")]
    for i, paths in enumerate(found):
        if len(paths) != 1:
            held = " and ".join(path.name for path in paths) or "none"
            raise ValueError(f"the folder '{folder}' must hold one photo '{i}.*', but it holds {held}")
    return found[0][0], found[1][0]
