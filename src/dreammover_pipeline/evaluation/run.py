# SPDX-License-Identifier: Apache-2.0
"""Runs: every method on every pair, one JSON line each, in a file that survives being killed at any moment."""

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
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..media.pictures import picture_of
from ..pipeline import DreamMoverPipeline
from .methods import METHODS, Job
from .networks import Tools
from .scoring import score
from .suites import Suite

ROWS = "run.jsonl"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "scikit-image", "opencv-python-headless")
KEY = ("suite", "pair", "method")


@dataclass
class RunFile:
    """The file of a run: its first line says what was run, every further one is a row.

    `header` is that first line, `rows` the further ones so far.
    """

    path: Path
    header: dict
    rows: list[dict]

    @classmethod
    def start(cls, folder: str | Path, header: Mapping[str, object]) -> RunFile:
        """Begin a run in a folder, or go on with the one of the same header.

        A last line that was cut off by a kill is dropped.

        Raises:
            ValueError: the folder holds a run of another header.
        """
        path = Path(folder) / ROWS
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.loads(json.dumps(header))
        lines = _whole_lines(path)
        if not lines:
            run = cls(path, header, [])
            run._append_line(header)
            return run
        other = lines[0]
        for name in sorted(header.keys() | other.keys()):
            if header.get(name) != other.get(name):
                raise ValueError(
                    f"'{path}' holds a run with {name} {other.get(name)!r}, not {header.get(name)!r}; "
                    "choose another folder"
                )
        return cls(path, other, lines[1:])

    @classmethod
    def read(cls, folder: str | Path) -> RunFile:
        """A run to report on, finished or not; the file stays as it is.

        Raises:
            ValueError: the folder holds no run.
        """
        path = Path(folder) / ROWS
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            raise ValueError(f"'{folder}' holds no run; there is no '{ROWS}' in it")
        return cls(path, lines[0], lines[1:])

    def append(self, row: dict) -> None:
        """Add a row; it is on disk when this returns, whole or, after a kill, not at all."""
        self._append_line(row)
        self.rows.append(row)

    def done(self) -> set[tuple[str, str, str]]:
        """(suite, pair, method) of all rows."""
        return {tuple(row[name] for name in KEY) for row in self.rows}

    def strip(self, suite: str, pair: str, row: str) -> Path:
        """Where frames of a pair are kept side by side: a method's, or `truth`, or `inputs`."""
        return self.path.parent / "frames" / suite / pair / f"{row}.png"

    def _append_line(self, record: dict) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[dict]:
    """The records of a file, cut after its last whole line."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.decode().splitlines()]


def header(
    pipe: DreamMoverPipeline,
    model: str,
    suites: Sequence[Suite],
    seed: int,
    settings: Mapping[str, object],
    flow: str,
    tools: Tools,
) -> dict:
    """What decides a run's figures, and with what they were made."""
    return {
        "model": model,
        "weights": _digest_of_weights(pipe),
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
    """Add the rows that a run still lacks; each frame is rounded to 8 bits, kept, and measured as kept.

    Args:
        pipe: its progress bars are the caller's business.
        suites: as in the file's header.
        methods: names in `METHODS`; those a pair has not the truth for are left out.
        file: where rows go; rows it has are not made again.
        tools: what to measure with.
        quiet: show no progress bar.
    """
    done = file.done()
    jobs = [(suite, name) for suite in suites for name in suite.pairs]
    source = _digest_of_source()
    with tqdm(total=len(jobs) * len(methods), desc="Evaluating", disable=quiet) as bar:
        for suite, name in jobs:
            missing = [method for method in methods if (suite.name, name, method) not in done]
            bar.update(len(methods) - len(missing))
            if not missing:
                continue
            job = Job(pipe, suite.load(name), file.header["seed"], file.header["settings"])
            _keep_inputs(job, file, suite.name)
            for method in missing:
                bar.set_postfix_str(f"{suite.name} {name} {method}")
                if METHODS[method].suits(job.pair):
                    file.append(_row(job, method, file, suite.name, tools) | {"source": source})
                bar.update()


def _row(job: Job, method: str, file: RunFile, suite: str, tools: Tools) -> dict:
    start, preparing = time.perf_counter(), job.preparing_seconds
    frames, flow = METHODS[method](job)
    seconds = time.perf_counter() - start - (job.preparing_seconds - preparing)
    path = file.strip(suite, job.pair.name, method)
    write_strip(frames, path)
    frames = read_strip(path, len(job.pair.times))
    return {
        "suite": suite,
        "pair": job.pair.name,
        "method": method,
        "times": list(job.pair.times),
        "seconds": round(seconds, 3),
        "metrics": score(job.pair, job.ends, frames, flow, job.canvas, tools),
    }


def _keep_inputs(job: Job, file: RunFile, suite: str) -> None:
    write_strip(torch.stack(job.ends), file.strip(suite, job.pair.name, "inputs"))
    if job.pair.truth is not None:
        write_strip(job.pair.truth, file.strip(suite, job.pair.name, "truth"))


def write_strip(frames: torch.Tensor, path: Path) -> None:
    """Write frames (F, 3, H, W) side by side as one 8-bit picture, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    picture_of(torch.cat(list(frames), -1)).save(partial, format="png")
    partial.replace(path)


def read_strip(path: Path, count: int) -> torch.Tensor:
    """Read `count` frames written by `write_strip`, (F, 3, H, W) in [0, 1]."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy())
    return torch.stack((pixels.movedim(-1, 0).float() / 255).chunk(count, -1))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest_of_source() -> str:
    """Of the package's modules, so that a run says which code made it."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest_of_weights(pipe: DreamMoverPipeline) -> str:
    digest = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
