# SPDX-License-Identifier: Apache-2.0
"""Calls of the pipeline's methods in Python, with one to three arguments that are odd."""

from __future__ import annotations

import inspect
from random import Random

import torch
from PIL import Image

from dreammover_pipeline.settings import arguments

from .bench import SHORT, Bench, Case, frame_faults
from .values import PICTURES, drawn, made, odd, one_of

# `fit_lora` is left out: where it succeeds it leaves an adapter on the pipeline, as it says.
METHODS = ("__call__", "__call__", "__call__", "prepare", "render", "interpolate_sequence", "fit_shared_lora")
OTHERS = ("lora", "canvas", "keep")  # arguments that some methods have and that no group of settings declares


def case(bench: Bench, rng: Random) -> Case:
    """A call of one of the methods."""
    name = rng.choice(METHODS)
    method, declared = getattr(bench.pipe, name), arguments()
    taken = {*inspect.signature(method).parameters}
    if name == "interpolate_sequence":  # it takes most of its arguments by `**arguments`, and `lora` is a choice there
        taken = taken | {*declared} - {"lora"}
    changed = {key: drawn(declared[key], rng) for key in rng.sample(sorted(taken & {*declared}), rng.randint(1, 3))}
    photos = {"img0": bench.photos[0], "img1": bench.photos[1], "images": [*bench.photos, bench.photos[0]]}
    photos = {key: value for key, value in photos.items() if key in taken}
    for key in photos if rng.random() < 0.25 else ():
        changed[key] = one_of(PICTURES, rng) if rng.random() < 0.8 else odd(rng, textual=False)
    changed |= {key: odd(rng, textual=False) for key in OTHERS if key in taken and rng.random() < 0.1}
    few = {**SHORT, "lora_steps": rng.choice([1, 2] if name == "fit_shared_lora" else [0, 0, 2])}
    few |= {"generator": torch.Generator().manual_seed(0)}
    values = {key: made(value) for key, value in changed.items()}
    given = {key: value for key, value in few.items() if key in taken} | photos | values
    sources = [bench.pair] if name == "render" else []
    return Case(
        kind=name,
        text=f"{name}({', '.join(f'{key}={value}' for key, value in changed.items())})",
        run=lambda: method(*sources, **given),
        check=lambda result: _faults(result, given, name),
        names=tuple(changed),
        late=any(callable(value) for value in values.values()),  # the caller's own function may raise what it likes
        leaves=["*"] if "keep" in changed else [],
    )


def _faults(result: object, given: dict[str, object], name: str) -> list[str]:
    """The faults of an output, by what was asked for."""
    if name in ("prepare", "fit_shared_lora"):
        return []
    number = given["n_frames"] if given.get("times") is None else len(given["times"])
    inputs, photos = bool(given.get("include_inputs", name == "interpolate_sequence")), 2
    first = given.get("img0")
    if name == "interpolate_sequence":
        first, photos = given["images"][0], len(given["images"])
        number = sum(number) if isinstance(number, (list, tuple)) else number * (photos - 1)
    sides = given.get("width"), given.get("height")
    size = sides if None not in sides else None  # where it is None, it takes more than a look to know the size
    if sides == (None, None) and isinstance(first, Image.Image):
        size = first.size
    size = None if given.get("output_type") == "latent" else size
    videos = result[0] if isinstance(result, tuple) else result.frames
    return [fault for video in videos for fault in frame_faults(video, number + photos * inputs, size)]
