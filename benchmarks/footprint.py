# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "memory": peak memory against the number of frames and against the batch, measured and counted."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .counting import BareCalls, count_peak
from .models import add_lora, fake_models
from .profiles import ROOT, Bench, Profile
from .report import Table
from .timing import fit_line

MIB = 2**20  # bytes
STEPS = 2  # inversion steps, on which peaks do not depend
# Environment variables that make glibc return freed memory to the system at once.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
BETWEEN = (4, 8)  # numbers of frames at once between which the counted slope is taken

Points = list[tuple[int, int, str]]  # (number of frames, number of frames at once, output type)


def tables(bench: Bench) -> list[Table]:
    """Tables of the peaks measured on the profile's model, then one of what the counted model needs."""
    return [*measured(bench), counted(bench.profile)]


def measured(bench: Bench) -> list[Table]:
    """Tables of measured peaks against the number of frames, and against the number of frames at once."""
    profile, on_cpu = bench.profile, bench.device.type == "cpu"
    peaks_of = in_a_process if on_cpu else on_device
    smallest = profile.memory_chunks[0]
    flat = peaks_of(bench, [(frames, smallest, "pil") for frames in profile.memory_frames])
    batches = peaks_of(bench, [(chunk, chunk, "latent") for chunk in profile.memory_chunks])
    own, slope = (fit_line(x, y)[1] for x, y in ((profile.memory_frames, flat), (profile.memory_chunks, batches)))
    expected = counted_slope(profile.model, profile.dtype, profile.memory_side)
    what = "Peak resident set of a process of its own" if on_cpu else "Peak of torch's allocations"
    title = f"model {profile.model}, {profile.memory_side}²"
    return [
        Table(
            f"Memory against frames, {smallest} at once, {title}",
            "measured",
            ("F", "peak, MiB"),
            list(zip(profile.memory_frames, flat, strict=True)),
            f"{what}, decoding included. Slope {own:.3g} MiB a frame: its latents and its finished picture.",
        ),
        Table(
            f"Memory against frames at once, {title}",
            "measured",
            ("chunk", "peak, MiB"),
            list(zip(profile.memory_chunks, batches, strict=True)),
            f"{what}, without decoding. Slope {slope:.3g} MiB a frame; counted: {expected:.3g}.",
        ),
    ]


def in_a_process(bench: Bench, points: Points) -> list[float]:
    """Peaks in MiB, measured in a new process that renders one point after the other.

    Each point must need more memory than the one before it, since a process only knows its peak so far.
    """
    return told_by_a_process("benchmarks.footprint", bench.name, points)


def told_by_a_process(module: str, *arguments: object, returns_freed: bool = True) -> list[float]:
    """The JSON that a module of this package prints when it is run in a process of its own with JSON arguments.

    Args:
        module: its name.
        arguments: what it is given.
        returns_freed: whether freed memory is given back at once, so that a peak is one of what is in use; that takes
            time.
    """
    command = [sys.executable, "-m", module, *map(json.dumps, arguments)]
    environment = os.environ | (RETURN_FREED if returns_freed else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def peak_resident() -> float:
    """This process's peak resident set so far, in MiB."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    # Linux hands `ru_maxrss` on to the programs that a process starts, so a child's would be its parent's at least.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 1024


def render_points(name: str, points: Points) -> list[float]:
    """This process's peak resident set in MiB after each point."""
    bench = Bench(name)
    torch.set_num_threads(1)
    pair = bench.prepare(steps=STEPS, side=bench.profile.memory_side)
    peaks = []
    for frames, chunk, output in points:
        bench.render(pair, frames, chunk, output_type=output)
        peaks.append(peak_resident())
    return peaks


def on_device(bench: Bench, points: Points) -> list[float]:
    """Torch's peak of allocated GPU memory in MiB during each point."""
    pair = bench.prepare(steps=STEPS, side=bench.profile.memory_side)
    peaks = []
    for frames, chunk, output in points:
        torch.cuda.reset_peak_memory_stats()
        bench.render(pair, frames, chunk, output_type=output)
        peaks.append(torch.cuda.max_memory_allocated() / MIB)
    return peaks


@cache
def counted_slope(model: str, dtype: torch.dtype, side: int) -> float:
    """How many MiB one more frame in a batch adds to the peak of a UNet call, counted on fake tensors."""
    mode = FakeTensorMode()
    calls = BareCalls(*fake_models(model, dtype, mode), side)
    with mode, torch.no_grad(), calls.referring():
        few, many = (count_peak(calls.unet, lambda n=n: calls.call_unet(n)) for n in BETWEEN)
    return (many - few) / (BETWEEN[1] - BETWEEN[0]) / MIB


def counted(profile: Profile) -> Table:
    """A table of counted MiB in float16: weights, a frame in a batch, a decoded image, a step of the LoRA fit."""
    rows = []
    for side in profile.counted_sides:
        mode = FakeTensorMode()
        plain, fitted = (fake_models(profile.counted, torch.float16, mode) for _ in range(2))
        weights = sum(p.numel() * p.itemsize for model in plain for p in model.parameters())
        bare = BareCalls(*plain, side)
        with mode, torch.no_grad():
            fit = BareCalls(*fitted, side, add_lora(fitted[0]))
            decode = count_peak(bare.vae, bare.decode)
            step = count_peak(fit.unet, fit.fit_step)
            fit.unet.enable_gradient_checkpointing()
            checkpointed = count_peak(fit.unet.train(), fit.fit_step)
        slope = counted_slope(profile.counted, torch.float16, side)
        rows.append((f"{side}²", weights / MIB, slope, decode / MIB, step / MIB, checkpointed / MIB))
    columns = ("size", "weights", "a frame in a batch", "VAE decode", "LoRA step", "LoRA step, checkpointed")
    return Table(
        f"Memory, MiB, model {profile.counted}, float16, fused attention",
        "counted",
        columns,
        rows,
        "Peaks of live tensors beside the weights; kernels' scratch and the allocator's slack come on top.",
    )


if __name__ == "__main__":
    print(json.dumps(render_points(*map(json.loads, sys.argv[1:]))))
