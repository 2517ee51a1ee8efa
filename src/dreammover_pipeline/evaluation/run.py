# SPDX-License-Identifier: Apache-2.0
"""Runs: every method on every pair, as lines of JSON in a file that stays valid if the process is killed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import PngImagePlugin
from tqdm.auto import tqdm

from .. import __version__
from ..inputs import check_file_place
from ..media.pictures import picture_of
from ..pipeline import DreamMoverPipeline
from ..storage import fingerprint
from .case import EvaluationCase
from .methods import METHODS
from .networks import Tools
from .scoring import score
from .suites import Suite

ROWS = "run.jsonl"
FRAMES, SHEETS = "frames", "sheets"  # the folders beside it
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "scikit-image", "opencv-python-headless")
HEADER_KEY = ("suites", "seed", "settings")  # what the first line of every run has, by which its file is known as one
KEY = ("suite", "pair", "method")  # what tells a row from all others, and every row has


@dataclass
class RunFile:
    """The file of a run: one line that says what is run, then one line for each method and pair."""

    path: Path
    header: dict  # the first line
    rows: list[dict]  # all later lines so far

    @classmethod
    def start(cls, folder: str | Path, header: Mapping[str, object]) -> RunFile:
        """Begin a run in a folder, or go on with a run of the same header that is there.

        If the process was killed while it wrote the last line, that line is dropped. A file that is not of this run
        is left as it is.

        Raises:
            ValueError: the folder holds a run of another header, or what is in the place of its file is no run.
        """
        path = Path(folder) / ROWS
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.loads(json.dumps(header))
        lines, rest = _whole_lines(path)
        if not lines:
            first = _line(header)
            if not first.startswith(rest):
                raise _no_run(path, 1)
            run = cls(path, header, [])
            run._append(first[len(rest) :])  # a kill may have left the beginning of the line
            return run
        other, *rows = lines
        for name in sorted(header.keys() | other.keys()):
            if header.get(name) != other.get(name):
                raise ValueError(
                    f"'{path}' holds a run with {name} {other.get(name)!r}, not {header.get(name)!r}; "
                    "choose another folder"
                )
        if rest:
            os.truncate(path, path.stat().st_size - len(rest))
        return cls(path, other, rows)

    @classmethod
    def read(cls, folder: str | Path) -> RunFile:
        """Read a run from a folder, finished or not, and leave its file as it is.

        Raises:
            ValueError: the folder holds no run.
        """
        path = Path(folder) / ROWS
        lines, _ = _whole_lines(path)
        if not lines:
            raise ValueError(f"'{folder}' holds no run; a '{ROWS}' with a whole line is needed in it")
        return cls(path, lines[0], lines[1:])

    def append(self, row: dict) -> None:
        """Add a row. When this returns, the row is on the disk; after a kill it is there as a whole or not at all."""
        self._append(_line(row))
        self.rows.append(row)

    def done(self) -> set[tuple[str, str, str]]:
        """Suite, pair and method of every row."""
        return {tuple(row[name] for name in KEY) for row in self.rows}

    def strip(self, suite: str, pair: str, row: str) -> Path:
        """Path of the picture that holds frames of a pair side by side.

        Args:
            suite: the name of the suite.
            pair: the name of the pair.
            row: the name of the method that made the frames, or "truth" or "inputs".
        """
        return self.path.parent / FRAMES / suite / pair / f"{row}.png"

    def _append(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _line(record: Mapping[str, object]) -> bytes:
    """The line of a run's file that holds a record."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _whole_lines(path: Path) -> tuple[list[dict], bytes]:
    """The records in the whole lines of a run's file, and the bytes after the last of these lines.

    Both are empty where there is no file.

    Raises:
        ValueError: there is no file but something else, or a line is not what a run has in its place.
    """
    check_file_place(path)
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(KEY if records else HEADER_KEY):
            raise _no_run(path, number)
        records.append(record)
    return records, rest


def _no_run(path: Path, line: int) -> ValueError:
    """The error about a file in a run's place that is no run, as a line of it shows."""
    return ValueError(
        f"'{path}' is not the file of an evaluation, as its line {line} shows; move it away, or choose another folder"
    )


def header(
    pipe: DreamMoverPipeline,
    model: str,
    suites: Sequence[Suite],
    seed: int,
    settings: Mapping[str, object],
    flow: str,
    tools: Tools,
) -> dict:
    """What decides the figures of a run, and the versions and device that they are made with."""
    others = {"controlnet": pipe.controlnet, "clip": pipe.clip}
    return {
        "model": model,
        "weights": fingerprint({"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder})[:12],
        **{name: fingerprint({name: model})[:12] for name, model in others.items() if model is not None},
        "suites": {suite.name: {**suite.parameters, "pairs": list(suite.pairs)} for suite in suites},
        "seed": seed,
        "settings": dict(settings),
        "warping_flow": flow,
        "device": str(pipe.device.type),
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "unavailable": dict(tools.unavailable),
        "versions": {
            "dreammover_pipeline": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
    }


def run(
    pipe: DreamMoverPipeline,
    suites: Sequence[Suite],
    methods: Sequence[str],
    file: RunFile,
    tools: Tools,
    quiet: bool = False,
) -> None:
    """Add the rows that a run still lacks. Frames are rounded to 8 bits, written, and measured as they were written.

    Args:
        pipe: the pipeline to evaluate; the caller decides whether it shows progress bars.
        suites: the suites that the file's header names.
        methods: names in `METHODS`; a method is left out for pairs that lack the truth it needs.
        file: the run to add rows to; rows that it has are not made again.
        tools: the tools to measure with.
        quiet: whether to hide the progress bar.
    """
    done = file.done()
    pairs = [(suite, name) for suite in suites for name in suite.pairs]
    source = _digest_of_source()
    with tqdm(total=len(pairs) * len(methods), desc="Evaluating", disable=quiet) as bar:
        for suite, name in pairs:
            missing = [method for method in methods if (suite.name, name, method) not in done]
            bar.update(len(methods) - len(missing))
            if not missing:
                continue
            case = EvaluationCase(pipe, suite.load(name), file.header["seed"], file.header["settings"])
            _keep_inputs(case, file, suite.name)
            for method in missing:
                bar.set_postfix_str(f"{suite.name} {name} {method}")
                if METHODS[method].suits(case.pair):
                    file.append(_row(case, method, file, suite.name, tools) | {"source": source})
                bar.update()


def _row(case: EvaluationCase, method: str, file: RunFile, suite: str, tools: Tools) -> dict:
    """Run a method on a case, write its frames, and measure them."""
    start, preparing = time.perf_counter(), case.preparing_seconds
    frames, flow = METHODS[method](case)
    seconds = time.perf_counter() - start - (case.preparing_seconds - preparing)
    path = file.strip(suite, case.pair.name, method)
    write_strip(frames, path)
    frames = read_strip(path, len(case.pair.times))
    return {
        "suite": suite,
        "pair": case.pair.name,
        "method": method,
        "times": list(case.pair.times),
        "seconds": round(seconds, 3),
        "metrics": score(case.pair, case.ends, frames, flow, case.canvas, tools),
    }


def _keep_inputs(case: EvaluationCase, file: RunFile, suite: str) -> None:
    write_strip(torch.stack(case.ends), file.strip(suite, case.pair.name, "inputs"))
    if case.pair.truth is not None:
        write_strip(case.pair.truth, file.strip(suite, case.pair.name, "truth"))


def write_strip(frames: torch.Tensor, path: Path) -> None:
    """Write frames (F, 3, H, W) side by side as one 8-bit picture, which is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    picture_of(torch.cat(list(frames), -1)).save(partial, format="png")
    partial.replace(path)


def read_strip(path: Path, count: int) -> torch.Tensor:
    """Read `count` frames written by `write_strip`, (F, 3, H, W) in [0, 1]."""
    with PngImagePlugin.PngImageFile(path) as picture:  # `Image.open` refuses what is as long as strips may be
        pixels = torch.from_numpy(np.asarray(picture).copy())
    return torch.stack((pixels.movedim(-1, 0).float() / 255).chunk(count, -1))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest_of_source() -> str:
    """A digest of the package's modules, so that each row says which code made it."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
