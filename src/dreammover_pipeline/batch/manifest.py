# SPDX-License-Identifier: Apache-2.0
"""What is to be made: a manifest's rows, or sidecars of earlier videos, as jobs that are checked before any work."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..arguments import Numbers, arguments_of
from ..inputs import check_integer, check_number
from ..media.files import check_fps, check_video_path
from ..pipeline import DreamMoverPipeline
from ..prompts import pair_negatives, pair_texts
from ..settings import PREPARING, NegativeContent, RenderSettings
from ..steering import point_pairs
from .jobs import Job
from .sidecar import PRIVATE, read_sidecar

PLACES = ("img0", "img1", "folder", "output")
# Arguments that a line of text can hold. How frames reach a program is not among them, since here they go to a file.
PARAMETERS = {
    name: declared
    for name, declared in arguments_of(*PREPARING, NegativeContent, RenderSettings).items()
    if declared.values.in_files
}
SETTINGS = (*PARAMETERS, "seed", "fps")


def read_manifest(path: str | os.PathLike, folder: Path, defaults: Mapping[str, object]) -> list[Job]:
    """The jobs of a manifest, `.jsonl` with an object in each line or `.csv` with the keys in its first.

    A row names two photos, `img0` and `img1`, or a `folder` that holds them as `0.*` and `1.*`; paths are relative to
    the manifest. It may name its `output`, relative to the folder of all, and decide any of `SETTINGS`.

    Args:
        path: the manifest.
        folder: where the videos go.
        defaults: of those settings that are not to have the pipeline's.

    Raises:
        ValueError: the manifest cannot be read, or a row has an unknown key, or lacks one.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"the manifest '{path}' ends in '{path.suffix}'; allowed are {' and '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the manifest '{path}' cannot be read: {error}") from error
    jobs = [_job(row, f"{path.name}, line {line}", path.parent, folder, defaults) for line, row in reader(text, path)]
    if not jobs:
        raise ValueError(f"the manifest '{path}' holds no pairs")
    return jobs


def read_sidecars(paths: Sequence[str | os.PathLike], folder: Path) -> list[Job]:
    """The jobs that repeat the videos of sidecars.

    Raises:
        ValueError: a file is no sidecar.
    """
    jobs = []
    for path in map(Path, paths):
        recorded = read_sidecar(path)
        if recorded is None:
            raise ValueError(f"'{path}' is no sidecar of dreammover batch")
        photos = tuple(path.parent / photo["path"] for photo in recorded["inputs"])
        name = recorded["output"]["name"]
        settings = settings_of({}, recorded["settings"], str(path))
        jobs.append(Job(str(path), photos, _output(folder, name, str(path)), name, settings, recorded))
    return jobs


def check_job_outputs(jobs: Sequence[Job]) -> None:
    """Refuse outputs that cannot be written, or that would replace another one or a photo; make their folders.

    Raises:
        ValueError: with the place that asked for it.
    """
    owners = {}
    for job in jobs:
        place = job.output.resolve()
        if place in owners:
            raise ValueError(f"{job.where}: the output '{job.name}' is {owners[place].where}'s already")
        owners[place] = job
    for job in jobs:
        for path, what in (*((photo, "photo") for photo in job.photos), (job.output, "output")):
            place = path.resolve()
            for taken in (*([] if what == "output" else [place]), *place.parents):
                if taken in owners:  # the same place, or in a folder of frames
                    other = owners[taken]
                    raise ValueError(
                        f"{other.where}: writing '{other.name}' would replace the {what} '{path}'; "
                        "choose another output"
                    )
    for job in jobs:
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            check_video_path(job.output)
            check_fps(job.settings["fps"], job.output)
        except (OSError, ValueError) as error:
            raise ValueError(f"{job.where}: {error}") from error


def check_values(pipe: DreamMoverPipeline, fingerprint: str, jobs: Sequence[Job]) -> None:
    """Refuse settings that the pipeline would, by its own checks, and sidecars of another checkpoint than its.

    Raises:
        ValueError: with the place that asked for it.
    """
    width = pipe.unet.config.cross_attention_dim
    for job in jobs:
        settings = job.settings
        try:
            pipe.check_inputs(**settings)
            point_pairs(settings["points"])
            pair_texts(settings["prompt"], None, 1, False, width)
            pair_negatives(settings["negative_prompt"], None, 1, width)
            for side in ("height", "width"):
                if settings[side] is not None:
                    check_integer(side, settings[side], 1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{job.where}: {error}") from error
        if job.recorded and job.recorded["model"]["fingerprint"] != fingerprint:
            name = job.recorded["model"]["name"]
            raise ValueError(
                f"{job.where} was made with another checkpoint, '{name}' as it was then; name it by --model"
            )


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f'{path.name}, line {number} must be an object like {{"img0": …}}, not {line}')
            yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Empty cells are not given; those of texts are taken as they are, all others as JSON where they are that."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{where} has more cells than the first line has keys: {row[None]}")
            yield reader.line_num, {key: _cell(key, text) for key, text in row.items() if text}
    except csv.Error as error:
        raise ValueError(f"{path.name} is no CSV after line {reader.line_num}: {error}") from error


def _cell(key: str, text: str) -> object:
    if key in PLACES or (key in PARAMETERS and PARAMETERS[key].annotation.startswith("str")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _job(row: Mapping[str, object], where: str, base: Path, folder: Path, defaults: Mapping[str, object]) -> Job:
    places = {key: row[key] for key in PLACES if key in row}
    for key, value in places.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where}: `{key}` must be a path, not {value!r}")
    if set(places) - {"output"} not in ({"img0", "img1"}, {"folder"}):
        raise ValueError(f"{where} must name `img0` and `img1`, or `folder`; it has {', '.join(row) or 'nothing'}")
    if "folder" in places:
        photos = (base / places["folder"],)
        name = f"{photos[0].resolve().name}.mp4"
    else:
        photos = (base / places["img0"], base / places["img1"])
        name = f"{photos[0].stem}-{photos[1].stem}.mp4"
    name = places.get("output", name)
    given = {key: value for key, value in row.items() if key not in PLACES}
    return Job(where, photos, _output(folder, name, where), name, settings_of(defaults, given, where))


def settings_of(defaults: Mapping[str, object], given: Mapping[str, object], where: str) -> dict[str, object]:
    """A value for each of `SETTINGS`, as JSON would hold it: the pipeline's, but for `defaults`, but for `given`.

    Raises:
        ValueError: something is given that is none of them, or a seed or a frame rate is none; `where` says whose.
    """
    unknown = [key for key in given if key not in SETTINGS]
    if unknown:
        allowed = ", ".join((*PLACES, *SETTINGS))
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; allowed are {allowed}")
    values = {name: declared.default for name, declared in PARAMETERS.items()}
    values = json.loads(json.dumps({**values, "include_inputs": True, **defaults, **given}))
    for name, value in values.items():
        if type(value) is int and name in PARAMETERS and isinstance(PARAMETERS[name].values, Numbers):
            values[name] = float(value)  # so that 1 and 1.0 are the same request
    try:
        check_integer("seed", values["seed"], 0)
        if values["seed"] >= 2**63:
            raise ValueError(f"`seed` must be below 2^63, not {values['seed']}")
        check_number("fps", values["fps"], 0, inclusive=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return values


def _output(folder: Path, name: str, where: str) -> Path:
    output = folder / name
    inside = output.resolve().is_relative_to(folder.resolve()) and output.resolve() != folder.resolve()
    if not inside or PRIVATE in Path(name).parts:
        raise ValueError(f"{where}: the output '{name}' must be inside the output folder, and not in '{PRIVATE}'")
    return output
