# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a manifest, or the sidecars of earlier videos, as jobs, and checks all of them before any work."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..arguments import Numbers, arguments_of
from ..inputs import check_choice, check_integer, check_number
from ..media.files import check_fps, check_name_length, check_video_path
from ..pipeline import DreamMoverPipeline
from ..prompts import pair_negatives, pair_texts
from ..settings import FLOWS, PREPARING, NegativeContent, RenderSettings
from ..steering import point_pairs
from .claims import put_back
from .jobs import Job
from .sidecar import PRIVATE, check_places_of_records, failure_path, is_sidecar, read_sidecar

PLACES = ("img0", "img1", "folder", "output")
# The arguments of the pipeline that a line of text can hold. `Delivery` is left out: the frames always go to a file.
PARAMETERS = {
    name: declared
    for name, declared in arguments_of(*PREPARING, NegativeContent, RenderSettings).items()
    if declared.values.in_files
}
SETTINGS = (*PARAMETERS, "seed", "fps")


def read_manifest(path: str | os.PathLike, folder: Path, defaults: Mapping[str, object]) -> list[Job]:
    """The jobs of a manifest: a `.jsonl` file with an object in each line, or a `.csv` file with the keys in line 1.

    A row names two photos, `img0` and `img1`, or a `folder` that holds them as `0.*` and `1.*`; these paths are
    relative to the manifest. A row may name its `output`, relative to the folder of all outputs, and may decide any of
    `SETTINGS`.

    Args:
        path: The manifest.
        folder: The folder of all outputs.
        defaults: Values of settings, to use instead of the pipeline's defaults where a row does not decide them.

    Raises:
        ValueError: The manifest cannot be read, or a row has an unknown key, lacks one, or has a value that no
            pipeline would take.
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
    """The jobs that make the videos of sidecars once more.

    Args:
        paths: The sidecars.
        folder: The folder of all outputs.

    Raises:
        ValueError: A file is no sidecar, or a damaged one.
    """
    jobs = []
    for path in map(Path, paths):
        recorded = read_sidecar(path)
        if recorded is None and is_sidecar(path):
            raise ValueError(
                f"the sidecar '{path}' is damaged or of another version, so its video cannot be made again from it; "
                "make the video with its manifest"
            )
        if recorded is None:
            raise ValueError(f"'{path}' is no sidecar of dreammover batch")
        photos = tuple(path.parent / photo["path"] for photo in recorded["inputs"])
        name = recorded["output"]["name"]
        settings = settings_of({}, recorded["settings"], str(path))
        jobs.append(Job(str(path), photos, _output(folder, name, str(path)), name, settings, recorded))
    return jobs


def check_job_outputs(jobs: Sequence[Job]) -> None:
    """Refuse outputs that cannot be written, or that would replace a photo, another output or a foreign file.

    The folders of the outputs are made, and a folder of frames that a killed process was about to replace is put back.

    Raises:
        ValueError: An output is refused; the message says where it was asked for.
    """
    owners: dict[Path, Job] = {}
    for job in jobs:
        put_back(job)
        place = job.output.resolve()
        if place in owners:
            raise ValueError(
                f"{job.origin}: the output '{job.name}' is already the one of {owners[place].origin}; "
                "choose another output"
            )
        owners[place] = job
    for job in jobs:
        for photo in job.photos:
            place = photo.resolve()
            _check_not_replaced(f"photo '{photo}'", [place, *place.parents], owners)
        _check_not_replaced(f"output '{job.output}'", job.output.resolve().parents, owners)
    for job in jobs:
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            check_video_path(job.output)
            check_places_of_records(job.output)
            check_name_length(failure_path(job.output))  # the longest name of what is written beside the video
            check_fps(job.settings["fps"], job.output)
        except (OSError, ValueError) as error:
            raise ValueError(f"{job.origin}: {error}") from error


def _check_not_replaced(name: str, places: Iterable[Path], owners: Mapping[Path, Job]) -> None:
    """Refuse an output that would replace a file.

    Args:
        name: What error messages call the file.
        places: The paths at which an output, which may be a folder of frames, would replace the file.
        owners: The jobs by the paths of their outputs.

    Raises:
        ValueError: An output is at one of the places.
    """
    for place in places:
        if place in owners:
            job = owners[place]
            raise ValueError(f"{job.origin}: writing '{job.name}' would replace the {name}; choose another output")


def check_values(pipe: DreamMoverPipeline, fingerprint: str, jobs: Sequence[Job]) -> None:
    """Refuse settings that the pipeline would refuse, and sidecars that record another checkpoint.

    Args:
        pipe: The pipeline, whose own checks are used.
        fingerprint: The fingerprint of its checkpoint.
        jobs: The jobs to check.

    Raises:
        ValueError: A job is refused; the message says where it was asked for.
    """
    width = pipe.unet.config.cross_attention_dim
    for job in jobs:
        settings = job.settings
        try:
            pipe.check_inputs(**settings)
            check_choice("flow", settings["flow"], FLOWS)
            point_pairs(settings["points"])
            pair_texts(settings["prompt"], None, 1, False, width)
            pair_negatives(settings["negative_prompt"], None, 1, width)
            for side in ("height", "width"):
                if settings[side] is not None:
                    check_integer(side, settings[side], 1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{job.origin}: {error}") from error
        if job.recorded and job.recorded["model"]["fingerprint"] != fingerprint:
            name = job.recorded["model"]["name"]
            raise ValueError(
                f"the video of {job.origin} was made with another checkpoint, which was named '{name}' and has other "
                "weights than the one that was loaded; give the right one by --model"
            )


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a `.jsonl` manifest, each with the number of its line; empty lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f'{path.name}, line {number} must be an object like {{"img0": …}}, not {line}')
            yield number, row


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a `.csv` manifest, each with the number of its last line; empty cells and rows are left out."""
    keys = text.partition("\n")[0]
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in keys and "," not in keys:
            raise ValueError(f"{path.name} separates its cells by {name}; save it with commas")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if not any(map(_filled, row.values())):
                continue
            if None in row:
                raise ValueError(
                    f"{path.name}, line {reader.line_num} has more cells than the first line has keys: {row[None]}"
                )
            yield reader.line_num, {key: _cell(key, text) for key, text in row.items() if text}
    except csv.Error as error:
        raise ValueError(f"{path.name} is not valid CSV after line {reader.line_num}: {error}") from error


def _filled(text: str | list | None) -> bool:
    """Whether a cell of a spreadsheet holds anything that can be seen."""
    return bool(text) and (not isinstance(text, str) or bool(text.strip()))


def _cell(key: str, text: str) -> object:
    """The value of a cell: its text where a path or a text is wanted; elsewhere what it is as JSON, if it is JSON."""
    if key in PLACES or (key in PARAMETERS and PARAMETERS[key].annotation.startswith("str")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _job(row: Mapping[str, object], origin: str, base: Path, folder: Path, defaults: Mapping[str, object]) -> Job:
    """The job of a row.

    Args:
        row: The values by their keys.
        origin: What error messages call the row, such as "pairs.jsonl, line 4".
        base: The folder that the paths of photos are relative to.
        folder: The folder of all outputs.
        defaults: Values of settings, to use instead of the pipeline's defaults where the row does not decide them.

    Raises:
        ValueError: The row has an unknown key, lacks one, or has a value that is not allowed.
    """
    places = {key: row[key] for key in PLACES if key in row}
    for key, value in places.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{origin}: `{key}` must be a path, not {value!r}")
    if set(places) - {"output"} not in ({"img0", "img1"}, {"folder"}):
        raise ValueError(f"{origin} must name `img0` and `img1`, or `folder`; it has {', '.join(row) or 'nothing'}")
    if "folder" in places:
        photos = (base / places["folder"],)
        name = f"{photos[0].resolve().name}.mp4"
    else:
        photos = (base / places["img0"], base / places["img1"])
        name = f"{photos[0].stem}-{photos[1].stem}.mp4"
    name = places.get("output", name)
    given = {key: value for key, value in row.items() if key not in PLACES}
    return Job(origin, photos, _output(folder, name, origin), name, settings_of(defaults, given, origin))


def settings_of(defaults: Mapping[str, object], given: Mapping[str, object], origin: str) -> dict[str, object]:
    """A value for each of `SETTINGS`, in the form that JSON holds.

    Args:
        defaults: Values to use instead of the pipeline's defaults.
        given: Values that prevail over all defaults.
        origin: What error messages call the place that the given values come from.

    Raises:
        ValueError: A given key is unknown, or the seed or the frame rate is not allowed.
    """
    unknown = [key for key in given if key not in SETTINGS]
    if unknown:
        allowed = ", ".join((*PLACES, *SETTINGS))
        raise ValueError(f"{origin} has the unknown key {unknown[0]!r}; allowed are {allowed}")
    values = {name: declared.default for name, declared in PARAMETERS.items()}
    values = json.loads(json.dumps({**values, "include_inputs": True, **defaults, **given}))
    for name, value in values.items():
        if type(value) is int and name in PARAMETERS and isinstance(PARAMETERS[name].values, Numbers):
            values[name] = float(value)  # so that 1 and 1.0 make equal requests
    try:
        check_integer("seed", values["seed"], 0)
        if values["seed"] >= 2**63:
            raise ValueError(f"`seed` must be below 2^63, not {values['seed']}")
        check_number("fps", values["fps"], 0, inclusive=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {error}") from error
    return values


def _output(folder: Path, name: str, origin: str) -> Path:
    """The path of an output.

    Args:
        folder: The folder of all outputs.
        name: The path of the output relative to that folder.
        origin: What error messages call the place that the output was asked for.

    Raises:
        ValueError: The output would not be inside the folder, or would be in the folder `PRIVATE`.
    """
    output = folder / name
    inside = output.resolve().is_relative_to(folder.resolve()) and output.resolve() != folder.resolve()
    if not inside or PRIVATE in Path(name).parts:
        raise ValueError(f"{origin}: the output '{name}' must be inside the output folder, and not in '{PRIVATE}'")
    return output
