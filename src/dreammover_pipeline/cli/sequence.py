# SPDX-License-Identifier: Apache-2.0
"""`dreammover interpolate` with more than two photos: every gap once, kept beside the output until the video is there.

A gap is a job of a batch, whose output is a folder of frames; so a gap that is done is known by its content, and after
a kill the same command goes on with those that are missing. torch and diffusers take seconds to import, so that
happens after the arguments parsed.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..media.files import FRAME_NAME
from ..media.pictures import crossfade, picture_of
from .loading import check_model, load_chosen, pipeline_class
from .options import call_arguments, call_parameters
from .render import check_length, check_outputs, settle_length, write_frames

if TYPE_CHECKING:
    from PIL import Image

    from ..batch.maker import Maker
    from ..batch.manifest import Job
    from ..records import Canvas

# What is about one pair of photos.
OF_A_PAIR = ("flow", "matches", "save_pair", "points", "mask")
PARTS = re.compile(r"gap_\d{4,}(\.json|\.error\.json)?|\.dreammover")


def check_gaps(args: argparse.Namespace, gaps: int) -> None:
    """Refuse numbers that are not one for each gap.

    Args:
        args: with the options of `add_output_options` and `add_method_options`, both with `gaps`.
        gaps: between the photos.

    Raises:
        ValueError: with the reason.
    """
    for option, values in (("--frames", getattr(args, "n_frames", None)), ("--duration", args.duration)):
        if isinstance(values, list) and len(values) != gaps:
            raise ValueError(
                f"{option} has {len(values)} numbers, but {gaps + 1} photos have {gaps} gap{'s' * (gaps > 1)}; "
                "give one for all, or one for each gap"
            )


def make_sequence(args: argparse.Namespace, photos: Sequence[str]) -> None:
    """Make the video through more than two photos, and write what was asked for.

    Args:
        args: of `interpolate`.
        photos: paths, in order.

    Raises:
        ValueError: an argument is not what it may be; before any model runs.
        RuntimeError: a gap failed; the others are kept.
    """
    start = time.perf_counter()
    for name in OF_A_PAIR:
        if getattr(args, name, None):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is about one pair of photos, but {len(photos)} came; leave it out")
    output = Path(args.output).resolve()
    parts = output.with_name(f"{output.name}.parts")
    check_outputs(args, photos, [parts])
    _check_parts(parts)
    counts = _frames_of_gaps(args, len(photos) - 1)
    check_model(args.model, args.allow_pickle)
    pipeline_class()  # first, since it hushes third parties before they are imported
    from ..batch.maker import Maker
    from ..batch.manifest import check_values
    from ..batch.run import run
    from ..batch.sidecar import read_failures
    from ..images import fit_to_output, load_images
    from ..sequence import texts_of_gaps

    for i, photo in enumerate(photos):
        load_images(photo, f"photo {i + 1}")
    call = call_arguments(args)
    texts = texts_of_gaps(call.get("prompt", ""), None, len(photos), 0)
    pipe = load_chosen(args)
    pipe.set_progress_bar_config(disable=args.quiet)
    canvas = pipe.canvas(*load_images(photos[0], "photo 1"), call.get("height"), call.get("width"))
    jobs = _jobs(call, args.seed, photos, [text["prompt"] for text in texts], counts, canvas, parts)
    check_values(pipe, "", jobs)
    with _claimed(parts):
        maker = Maker(pipe, args.model, parts)
        if args.one_lora and call.get("lora_steps", call_parameters()["lora_steps"].default):
            key = _shared_lora(maker, jobs, photos, call)
            jobs = [replace(job, lora=key) for job in jobs]
        outcomes = run(maker, jobs, read_failures(jobs), 0, 1, args.quiet)
        for outcome in outcomes:
            if outcome.status == "failed":
                raise RuntimeError(
                    f"{outcome.job.where} failed ({outcome.note}); the gaps that are done are kept in '{parts}', "
                    "and the same command goes on from there"
                )
        frames, times, flagged = _in_a_row(maker, jobs)

        def fade() -> list[Image.Image]:
            ends = [picture_of(fit_to_output(*load_images(photo, "photo"), canvas)) for photo in photos]
            return [frame for both, gap in zip(pairwise(ends), times, strict=True) for frame in crossfade(*both, gap)]

        moments = [k + moment for k, gap in enumerate(times) for moment in gap]
        length = write_frames(args, frames, moments, flagged, fade)
    shutil.rmtree(parts)
    print(f"{args.output}: {length} frames in {time.perf_counter() - start:.1f} s")


def _frames_of_gaps(args: argparse.Namespace, gaps: int) -> list[int]:
    """How many frames every gap gets, by `--frames` or `--duration`."""
    if not isinstance(args.duration, list):
        settle_length(args)
        if args.duration is None:
            frames = getattr(args, "n_frames", call_parameters()["n_frames"].default)
            return frames if isinstance(frames, list) else [frames] * gaps
        made = args.n_frames - (gaps - 1)  # the photos between the gaps are frames too
        if made < gaps:
            raise ValueError(f"a duration of {args.duration:g} s leaves not a frame for each of the {gaps} gaps")
        return [made // gaps + (k < made % gaps) for k in range(gaps)]
    check_length(args)
    for duration in args.duration:
        if not 0 < duration < math.inf or round(duration * args.fps) < 2:
            raise ValueError(
                f"a gap cannot last {duration:g} s; at {args.fps:g} frames per second the shortest with a frame "
                f"between its photos is {2 / args.fps:.3g} s"
            )
    return [round(duration * args.fps) - 1 for duration in args.duration]


def _jobs(
    call: dict[str, object],
    seed: int,
    photos: Sequence[str],
    prompts: Sequence[tuple[str, str]],
    counts: Sequence[int],
    canvas: Canvas,
    parts: Path,
) -> list[Job]:
    from ..batch.manifest import PARAMETERS, Job, settings_of

    common = {name: value for name, value in call.items() if name in PARAMETERS and name not in ("height", "width")}
    jobs = []
    for k, both in enumerate(pairwise(photos)):
        where, name = f"gap {k + 1} ('{both[0]}' to '{both[1]}')", f"gap_{k + 1:04d}"
        given = {**common, "prompt": prompts[k], "n_frames": counts[k], "seed": seed}
        given["fps"] = 1  # pictures have none, so that another one asks for nothing new
        settings = settings_of({}, given, where)
        jobs.append(Job(where, tuple(map(Path, both)), parts / name, name, settings, canvas=canvas))
    return jobs


def _shared_lora(maker: Maker, jobs: Sequence[Job], photos: Sequence[str], call: dict[str, object]) -> str:
    """The key in the cache of the LoRA of all photos, fitted now if it is not there.

    What it is fitted on (device, versions) does not count: a sequence that goes on elsewhere keeps its LoRA.
    """
    import torch

    from ..batch.lora_cache import lora_key
    from ..images import fit, load_images

    images = [image for photo in photos for image in load_images(photo, "photo")]
    settings = {
        **jobs[0].settings,
        "prompt": [jobs[0].settings["prompt"][0], *(job.settings["prompt"][1] for job in jobs)],
    }
    pixels = torch.stack([fit(image, jobs[0].canvas) for image in images])
    stack = {"dtype": maker.stack["dtype"]}
    key = lora_key(replace(jobs[0], settings=settings), pixels, maker.model["fingerprint"], stack)
    if maker.cache.load(key) is None:
        weights = maker.pipe.fit_shared_lora(
            images,
            height=call.get("height"),
            width=call.get("width"),
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
            **{
                name: settings[name]
                for name in ("prompt", "lora_steps", "lora_rank", "lora_learning_rate", "clip_skip")
            },
        )
        maker.cache.save(key, weights, owner=str(jobs[0].output.parent))
    return key


def _in_a_row(maker: Maker, jobs: Sequence[Job]) -> tuple[list[Image.Image], list[list[float]], int]:
    """The frames of all gaps, with shared photos once; for each gap their times; how many were blacked out."""
    from PIL import Image

    frames, times, flagged = [], [], 0
    for k, job in enumerate(jobs):
        made = maker.finished(job)["output"]
        first = int(k > 0)
        for index in range(first, made["frames"]):
            with Image.open(job.output / FRAME_NAME.format(index)) as frame:
                frames.append(frame.convert("RGB"))
        times.append(made["times"][first:])
        flagged += made["blacked_out"]
    return frames, times, flagged


def _check_parts(parts: Path) -> None:
    """Refuse to keep unfinished gaps where something else is, since they are removed in the end."""
    if parts.exists() and not parts.is_dir():
        raise ValueError(f"unfinished gaps are kept in a folder '{parts}', but there is a file of that name")
    others = [entry.name for entry in parts.glob("*") if not PARTS.fullmatch(entry.name)]
    if others:
        raise ValueError(
            f"unfinished gaps are kept in '{parts}', but besides such it holds '{min(others)}'; move it away"
        )


@contextmanager
def _claimed(parts: Path) -> Iterator[None]:
    """Keep others from making the same video while the context lasts."""
    from filelock import FileLock, Timeout

    (parts / ".dreammover").mkdir(parents=True, exist_ok=True)
    lock = FileLock(parts / ".dreammover" / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"another process works in '{parts}', on the same video") from error
    try:
        yield
    finally:
        lock.release()
