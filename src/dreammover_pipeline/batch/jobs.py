# SPDX-License-Identifier: Apache-2.0
"""A job: one video that is to be made, and the refusal of what can be none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..inputs import check_input_file

PHOTOS = ("img0", "img1")  # what error messages call the two photos


@dataclass(frozen=True)
class Job:
    """One video to make.

    `origin` is where the video was asked for, such as "pairs.jsonl, line 4"; `photos` are two files, or one folder
    that holds them; `output` is the path of the video; `name` is the same path relative to the folder of all outputs;
    `settings` has a value for every setting that a manifest can decide; `recorded` is the sidecar of the video that is
    to be made once more, None for a new video; `files` are the paths of masks and poses, by the names of the
    pipeline's arguments.
    """

    origin: str
    photos: tuple[Path, ...]
    output: Path
    name: str
    settings: Mapping[str, object]
    recorded: Mapping | None = None
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


def find_photos(job: Job) -> tuple[Path, Path]:
    """The two photos of a job. If the job names a folder, they are the pictures `0.*` and `1.*` in it.

    Raises:
        ValueError: The folder cannot be read, or does not hold exactly one picture `0.*` and one picture `1.*`, or a
            photo is no regular file.
    """
    photos = job.photos if len(job.photos) == 2 else _photos_in(*job.photos)
    for name, photo in zip(PHOTOS, photos, strict=True):
        check_input_file(photo, f"{name} ({photo})", "an image file")
    return photos


def check_files(job: Job) -> None:
    """Raise ValueError unless all masks and poses of a job are regular files."""
    for name, paths in job.files.items():
        for path in paths:
            check_input_file(path, f"`{name}` ({path})", "a file")


def _photos_in(folder: Path) -> tuple[Path, Path]:
    """The pictures `0.*` and `1.*` in a folder."""
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


class RefusedRowsError(ValueError):
    """Everything that is wrong with a manifest or with sidecars: a reason for each row that is refused."""

    def __init__(self, reasons: Sequence[str]):
        super().__init__("\n".join(reasons))
        self.reasons = reasons


@contextmanager
def refusing_together() -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """While the context lasts, collect what is wrong with single rows, so that nobody has to mend one for each run.

    Yields:
        Makes a context for one row, given what error messages call the row, or for all of them with `every=True`. An
        error in it is kept for later.

    Raises:
        RefusedRowsError: There were errors. One that all rows have, as of a wrong option, is a single reason.
    """
    origins: set[str] = set()
    refused: dict[str, list[str]] = {}  # the rows' names by what is wrong with them
    whole: list[str] = []  # what is wrong with the manifest itself, or was collected inside

    @contextmanager
    def row(origin: str, every: bool = False) -> Iterator[None]:
        if not every:
            origins.add(origin)
        try:
            yield
        except RefusedRowsError as error:
            whole.extend(error.reasons)
        except (OSError, OverflowError, RecursionError, TypeError, ValueError) as error:
            if every:
                whole.append(f"{origin}: {error}")
            else:
                refused.setdefault(str(error), []).append(origin)

    yield row
    reasons: list[str] = []
    for reason, rows in refused.items():
        shared = len(set(rows)) == len(origins) > 1
        reasons += [f"{rows[0]} and all others: {reason}"] if shared else [f"{origin}: {reason}" for origin in rows]
    if reasons or whole:
        raise RefusedRowsError(reasons + whole)
