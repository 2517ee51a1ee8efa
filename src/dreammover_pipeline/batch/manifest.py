# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a manifest, or the sidecars of earlier videos, as jobs, and checks all of them before any work."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from ..arguments import Levels, Motion, Numbers, Pictures, Poses, arguments_of
from ..inputs import check_choice, check_input_file, check_integer, check_number
from ..media.files import check_fps, check_name_length, check_video_path, make_folder
from ..media.texts import read_json, read_text
from ..pipeline import DreamMoverPipeline
from ..prompts import pair_negatives, pair_prompts
from ..settings import FLOWS, PREPARING, NegativeContent, RenderSettings
from ..steering import point_pairs
from .claims import put_back
from .jobs import Job, refusing_together
from .sidecar import PRIVATE, check_places_of_records, failure_path, is_sidecar, read_sidecar

PLACES = ("img0", "img1", "folder", "output")
SEPARATORS = ",;\t"  # what separates cells; spreadsheets write ";" where the comma is for decimals, a tab as "text"
# `Delivery` is left out: the frames always go to a file.
GROUPS = (*PREPARING, NegativeContent, RenderSettings)
# The arguments of the pipeline that a line of text can hold.
PARAMETERS = {name: declared for name, declared in arguments_of(*GROUPS).items() if declared.values.in_files}
SETTINGS = (*PARAMETERS, "seed", "fps")
# The arguments whose values are in files, and how many files each may have.
FILES = {
    name: {Pictures: (1, 2), Poses: (2,)}[type(declared.values)]
    for name, declared in arguments_of(*GROUPS).items()
    if isinstance(declared.values, Pictures | Poses)
}
KEYS = (*PLACES, *FILES, *SETTINGS)  # that a row of a manifest may have


def read_manifest(path: str | os.PathLike, folder: Path, defaults: Mapping[str, object]) -> list[Job]:
    """The jobs of a manifest: a `.jsonl` file with an object in each line, or a `.csv` file with the keys in line 1.

    A row names two photos, `img0` and `img1`, or a `folder` that holds them as `0.*` and `1.*`, and may name files of
    a mask and of poses; these paths are relative to the manifest. A row may name its `output`, relative to the folder
    of all outputs, and may decide the settings among `KEYS`. The outputs are checked, and their folders made.

    Args:
        path: The manifest.
        folder: The folder of all outputs.
        defaults: Values of settings, to use instead of the pipeline's defaults where a row does not decide them.

    Raises:
        RefusedRowsError: Rows have an unknown key, lack one, or have a value that no pipeline would take or an output
            that cannot be written; the reasons are those of all rows.
        ValueError: The manifest cannot be read.
    """
    given, path = path, Path(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"the manifest '{given}' ends in '{path.suffix}'; allowed are {' and '.join(readers)}")
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"the manifest '{path}' cannot be read: {error}") from error
    jobs: list[Job] = []
    with refusing_together() as refusing:
        with refusing(path.name, every=True):
            for line, read_row in reader(text):
                origin = f"{path.name}, line {line}"
                with refusing(origin):
                    jobs.append(_job(read_row(), origin, path.parent, folder, defaults))
        with refusing(path.name, every=True):
            check_job_outputs(jobs)
    if not jobs:
        raise ValueError(f"the manifest '{path}' holds no pairs")
    return jobs


def read_sidecars(paths: Sequence[str | os.PathLike], folder: Path) -> list[Job]:
    """The jobs that make the videos of sidecars once more. The outputs are checked, and their folders made.

    Args:
        paths: The sidecars.
        folder: The folder of all outputs.

    Raises:
        RefusedRowsError: Files are no sidecars, or outputs cannot be written; the reasons are those of all files.
    """
    jobs: list[Job] = []
    with refusing_together() as refusing:
        for path in paths:
            with refusing(f"'{path}'"):
                jobs.append(_job_of_sidecar(path, folder))
        with refusing("the sidecars", every=True):
            check_job_outputs(jobs)
    return jobs


def _job_of_sidecar(path: str | os.PathLike, folder: Path) -> Job:
    """The job that makes the video of a sidecar once more, in a folder of outputs."""
    check_input_file(path, "it", "the sidecar of a video")
    path = Path(path)
    recorded = read_sidecar(path)
    if recorded is None and is_sidecar(path):
        raise ValueError(
            "the sidecar is damaged or of another version, so its video cannot be made again from it; make the video "
            "with its manifest"
        )
    if recorded is None:
        raise ValueError("it is no sidecar of dreammover batch")
    photos = tuple(path.parent / photo["path"] for photo in recorded["inputs"])
    files = {
        key: tuple(path.parent / file["path"] for file in read) for key, read in recorded.get("files", {}).items()
    }
    unknown = [key for key in files if key not in FILES]
    if unknown:
        raise ValueError(f"it records files for the unknown argument {unknown[0]!r}")
    name = recorded["output"]["name"]
    settings = settings_of({}, recorded["settings"])
    return Job(str(path), photos, _output(folder, name), name, settings, recorded, files)


def check_job_outputs(jobs: Sequence[Job]) -> None:
    """Refuse outputs that cannot be written, or that would replace an input, another output or a foreign file.

    The folders of the outputs are made, and a folder of frames that a killed process was about to replace is put back.

    Raises:
        RefusedRowsError: Outputs are refused; the reasons say where they were asked for.
    """
    with refusing_together() as refusing:
        owners: dict[Path, Job] = {}
        for job in jobs:
            with refusing(job.origin):
                put_back(job)
            owner = owners.setdefault(_real(job.output), job)
            if owner is not job:
                with refusing(job.origin):
                    raise ValueError(
                        f"the output '{job.name}' is already the one of {owner.origin}; choose another output"
                    )
        for job in jobs:
            read = [("photo", job.photos), *job.files.items()]
            kept = [
                (f"{kind} '{path}'", [_real(path), *_real(path).parents]) for kind, paths in read for path in paths
            ]
            kept.append((f"output '{job.output}'", _real(job.output).parents))
            for name, places in kept:  # an output may be a folder of frames
                owner = next((owners[place] for place in places if place in owners), None)
                if owner is not None:
                    with refusing(owner.origin):
                        raise ValueError(f"writing '{owner.name}' would replace the {name}; choose another output")
            with refusing(job.origin):
                make_folder(job.output.parent)
                check_video_path(job.output)
                check_places_of_records(job.output)
                check_name_length(failure_path(job.output))  # the longest name of what is written beside the video
                check_fps(job.settings["fps"], job.output)


def _real(path: Path) -> Path:
    """A path without symbolic links; where these lead in a circle, which `Path.resolve` refuses, up to there."""
    return Path(os.path.realpath(path))


def check_values(pipe: DreamMoverPipeline, fingerprint: str, jobs: Sequence[Job]) -> None:
    """Refuse settings that the pipeline would refuse, and sidecars that record another checkpoint.

    Args:
        pipe: The pipeline, whose own checks are used.
        fingerprint: The fingerprint of its checkpoint.
        jobs: The jobs to check.

    Raises:
        RefusedRowsError: Jobs are refused; the reasons say where they were asked for.
    """
    with refusing_together() as refusing:
        for job in jobs:
            with refusing(job.origin):
                pipe.check_inputs(**job.settings, **job.files)
                if job.recorded and job.recorded["model"]["fingerprint"] != fingerprint:
                    model = job.recorded["model"]
                    names, options = f"'{model['name']}'", "--model"
                    for component, kind in (("controlnet", "ControlNet"), ("clip", "CLIP")):
                        named = model.get(component)
                        if named is not None or getattr(pipe, component) is not None:
                            names += f" without a {kind}" if named is None else f" with the {kind} '{named}'"
                            options += f" and --{component}"
                    raise ValueError(
                        f"its video was made with another checkpoint, which was named {names} and has other weights "
                        f"than the one that was loaded; give the right one by {options}"
                    )


def _jsonl_rows(text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The rows of a `.jsonl` manifest, each as the number of its line and a function that reads it.

    Empty lines are skipped.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, partial(_jsonl_row, line)


def _jsonl_row(line: str) -> dict:
    """The values in a line of a `.jsonl` manifest by their keys."""
    try:
        row = read_json(line)
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'it must be an object like {{"img0": …}}, not {line}')
    _check_keys(row)
    return row


def _csv_rows(text: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The rows of a `.csv` manifest, each as the number of its last line and a function that reads it.

    Cells are separated as those of the first line are, by commas, semicolons or tabs. Rows without text are skipped.

    Raises:
        ValueError: The text is not valid CSV, or a key is unknown or there twice.
    """
    first = next((line for line in text.split("\n") if line.strip(SEPARATORS + '" ')), "")
    separator = next((mark for mark in SEPARATORS if mark in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    keys: list[str] = []
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if keys:
                yield reader.line_num, partial(_csv_row, keys, cells)
            else:
                keys = [cell.strip().lower() for cell in cells]
                _check_keys([key for key in keys if key])
    except csv.Error as error:
        raise ValueError(f"it is not valid CSV after line {reader.line_num}: {error}") from error


def _csv_row(keys: Sequence[str], cells: Sequence[str]) -> dict:
    """The values in a row of a `.csv` manifest by their keys; cells without text are left out."""
    row = {}
    for key, cell in zip_longest(keys, cells, fillvalue=""):
        if cell.strip():
            if not key:
                raise ValueError(f"the cell {cell!r} is in a column that has no key in the first line")
            row[key] = _cell(key, cell)
    return row


def _check_keys(keys: Collection[str]) -> None:
    """Raise ValueError if a key is unknown, or is there twice."""
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise ValueError(f"it has the unknown key {unknown[0]!r}; allowed are {', '.join(KEYS)}")
    twice = [key for key, count in Counter(list(keys)).items() if count > 1]
    if twice:
        raise ValueError(f"it has the key {twice[0]!r} twice")


def _cell(key: str, text: str) -> object:
    """The value of a cell: its text where a path or a text is wanted; elsewhere what it is as JSON, if it is JSON.

    Where several paths or texts are allowed too, a list of texts in JSON is that list.
    """
    if key in FILES:
        return _texts(text)
    annotation = "str" if key in PLACES else PARAMETERS[key].annotation if key in PARAMETERS else ""
    if annotation.startswith("str"):
        return _texts(text) if "Sequence[str]" in annotation else text
    try:
        return read_json(text.lower() if text in ("TRUE", "FALSE") else text)  # as spreadsheets write truth values
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise ValueError(f"`{key}` has a value that cannot be read: {error}") from error


def _texts(text: str) -> str | list[str]:
    """The texts that a text lists in JSON; where it lists none, the text itself."""
    try:
        value = read_json(text)
    except ValueError:
        return text
    return value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else text


def _job(row: Mapping[str, object], origin: str, base: Path, folder: Path, defaults: Mapping[str, object]) -> Job:
    """The job of a row.

    Args:
        row: The values by their keys.
        origin: What error messages call the row, such as "pairs.jsonl, line 4".
        base: The folder that the paths of photos, masks and poses are relative to.
        folder: The folder of all outputs.
        defaults: Values of settings, to use instead of the pipeline's defaults where the row does not decide them.

    Raises:
        TypeError, ValueError: The row lacks a key, or has a value that is not allowed.
    """
    places = {key: row[key] for key in PLACES if key in row}
    for key, value in places.items():
        _check_path(key, value)
    if set(places) - {"output"} not in ({"img0", "img1"}, {"folder"}):
        raise ValueError(f"it must name `img0` and `img1`, or `folder`; it has {', '.join(row) or 'nothing'}")
    if "folder" in places:
        photos = (base / places["folder"],)
        name = f"{_real(photos[0]).name}.mp4"
    else:
        photos = (base / places["img0"], base / places["img1"])
        name = f"{photos[0].stem}-{photos[1].stem}.mp4"
    name = places.get("output", name)
    given = {key: value for key, value in row.items() if key not in {*PLACES, *FILES}}
    files = {key: _files(key, row[key], base) for key in FILES if row.get(key) is not None}
    return Job(origin, photos, _output(folder, name), name, settings_of(defaults, given), files=files)


def _files(key: str, value: object, base: Path) -> tuple[Path, ...]:
    """The files that a row names for an argument, by one path or by a list of them.

    Args:
        key: The name of the argument.
        value: What the row has.
        base: The folder that paths are relative to.

    Raises:
        ValueError: The value is no path and no list of as many paths as `FILES` says.
    """
    paths = [value] if isinstance(value, str) else value
    counts = FILES[key]
    if not isinstance(paths, list) or len(paths) not in counts or not all(isinstance(path, str) for path in paths):
        form = "a path, or a list of two paths" if 1 in counts else "a list of two paths"
        raise ValueError(f"`{key}` must be {form}, one for each photo, not {value!r}")
    for path in paths:
        _check_path(key, path)
    return tuple(base / path for path in paths)


def _check_path(key: str, text: object) -> None:
    """Raise ValueError unless a value is a text that can be a path on this system."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"`{key}` must be a path, not {text!r}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"`{key}` must be a path, but {text[error.start]!a} is in it") from None
    if "\0" in text:
        raise ValueError(f"`{key}` must be a path, but {chr(0)!a} is in it")


def settings_of(defaults: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """A value for each of `SETTINGS`, in the form that JSON holds.

    Args:
        defaults: Values to use instead of the pipeline's defaults; a size among them does not hold where `given` has
            one of its sides, since the other then follows from the photo's shape.
        given: Values that prevail over all defaults.

    Raises:
        TypeError, ValueError: A given key is unknown, or a value is not allowed, whatever the model.
    """
    unknown = [key for key in given if key not in SETTINGS]
    if unknown:
        raise ValueError(f"it records the unknown setting {unknown[0]!r}")
    sides = ("height", "width")
    if any(given.get(side) is not None for side in sides):
        defaults = {name: value for name, value in defaults.items() if name not in sides}
    values = {name: declared.default for name, declared in PARAMETERS.items()}
    values = json.loads(json.dumps({**values, "include_inputs": True, **defaults, **given}))
    for group in GROUPS:
        group.of(values)
    check_choice("flow", values["flow"], FLOWS)
    point_pairs(values["points"])
    pair_prompts(values["prompt"], 1, False)
    pair_negatives(values["negative_prompt"], None, 1, width=0)  # the width is that of embeddings, and there are none
    for side in sides:
        if values[side] is not None:
            check_integer(side, values[side], 1)
    for name, declared in PARAMETERS.items():  # so that 1 and 1.0 make equal requests
        if type(values[name]) is int and isinstance(declared.values, Numbers):
            values[name] = float(values[name])
        elif isinstance(values[name], list) and isinstance(declared.values, Levels | Motion):
            values[name] = [float(number) for number in values[name]]
    check_integer("seed", values["seed"], 0)
    if values["seed"] >= 2**63:
        raise ValueError("`seed` must be below 2^63")
    check_number("fps", values["fps"], 0, inclusive=False)
    if values["fps"] == round(values["fps"]):
        values["fps"] = round(values["fps"])  # the default is a whole number, and an option gives 16.0
    return values


def _output(folder: Path, name: str) -> Path:
    """The path of an output.

    Args:
        folder: The folder of all outputs.
        name: The path of the output relative to that folder.

    Raises:
        ValueError: The output would not be inside the folder, or would be in the folder `PRIVATE`.
    """
    output = folder / name
    inside = _real(output).is_relative_to(_real(folder)) and _real(output) != _real(folder)
    if not inside or PRIVATE in Path(name).parts:
        raise ValueError(f"the output '{name}' must be inside the output folder, and not in '{PRIVATE}'")
    return output
