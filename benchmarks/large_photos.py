# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "photos": what frames at the size of large photos take, as they are made one by one and dropped."""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import torch

from .footprint import MIB, STEPS, peak_resident, told_by_a_process
from .profiles import PROMPT, Bench
from .report import Table

CHANNELS = 3


def tables(bench: Bench) -> list[Table]:
    """A table of peaks and seconds against the photos' side and the number of frames.

    Every point runs in processes of its own, since a process only knows its peak so far: one for the peak, and one
    for the seconds, in which memory is not given back at once.
    """
    points = bench.profile.photo_points
    run = partial(told_by_a_process, "benchmarks.large_photos", bench.name)
    results = [(run(*point)[0], run(*point, returns_freed=False)[1]) for point in points]
    base = results[0][0]
    rows = []
    for (side, frames), (peak, seconds) in zip(points, results, strict=True):
        photos = 2 * CHANNELS * side * side / MIB if bench.device.type == "cpu" else 0
        pixels = frames * side * side / 1e6
        rows.append((f"{side}²", frames, photos, peak - photos - base, seconds / frames, seconds / pixels))
    return [
        Table(
            f"Frames at the size of the photos, model {bench.profile.model}",
            "measured",
            ("size", "F", "photos, MiB", "peak beyond them, MiB", "s a frame", "s a megapixel"),
            rows,
            "The peak is told beyond that of the first row, photos included. Photos are of 8 bits. Seconds are those "
            "of decoding, detail and what is found out once for the pair.",
        )
    ]


def frames_of_large_photos(name: str, side: int, frames: int) -> tuple[float, float]:
    """Make frames at the size of square photos and drop each.

    Args:
        name: The profile's.
        side: Of the photos, in pixels.
        frames: How many.

    Returns:
        The peak of this process in MiB, of its memory or of the GPU's, and the seconds that making the pictures took.
    """
    bench = Bench(name)
    torch.set_num_threads(1)
    photos = [image.resize((side, side)) for image in bench.images]
    pair = bench.pipe.prepare(*photos, prompt=PROMPT, inversion_steps=STEPS, feature_step=STEPS, lora_steps=0)
    photos.clear()
    made = bench.render(pair, frames, output_type="lazy", detail="photos")
    start = time.perf_counter()
    for _ in made:
        pass
    seconds = time.perf_counter() - start
    on_gpu = bench.device.type == "cuda"
    return torch.cuda.max_memory_allocated() / MIB if on_gpu else peak_resident(), seconds


if __name__ == "__main__":
    print(json.dumps(frames_of_large_photos(*map(json.loads, sys.argv[1:]))))
