# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "counts": what runs call, against the formula, and the formula for Stable Diffusion 1.5."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .counting import BareCalls, Units, Workload, count_flops, count_units
from .models import add_lora, fake_models
from .profiles import Bench, Profile
from .record import recorded
from .report import Table

# The workload of the pipeline's defaults, in chunks of 8.
DEFAULT = Workload(frames=32, steps=30, chunk=8, lora_steps=80)


def tables(bench: Bench) -> list[Table]:
    """Tables of the calls and FLOPs of whole runs, of bare calls, and of workloads by the formula."""
    return [runs(bench), units_table(bench.profile), workloads_table(bench.profile)]


def runs(bench: Bench) -> Table:
    """A table of the calls and FLOPs of each of the profile's workloads, which is run to count them."""
    pipe = bench.pipe
    canvas = bench.prepare(steps=1).canvas
    models = (pipe.vae, pipe.text_encoder, canvas.height)
    fitted = copy.deepcopy(pipe.unet)
    units = count_units(BareCalls(pipe.unet, *models), BareCalls(fitted, *models, add_lora(fitted)))
    rows = []
    for workload in bench.profile.counted_workloads:
        with recorded(pipe) as calls:
            flops = count_flops(lambda workload=workload: run_workload(bench, workload))
        sizes = {
            function: [len(call.args[0]) for call in calls if call.function == function]
            for function in (pipe.unet, pipe.vae.encode, pipe.vae.decode)
        }
        unet, encoded, decoded = sizes.values()
        rows.append(
            (
                *(workload.frames, workload.steps, workload.chunk, workload.lora_steps),
                *(f"{len(unet)} / {workload.unet_calls}", f"{sum(unet)} / {workload.unet_samples}"),
                *(f"{sum(encoded)} / 2", f"{sum(decoded)} / {workload.frames}"),
                *(flops / 1e9, flops / units.whole(workload)),
            )
        )
    columns = ("F", "T", "chunk", "L", "UNet calls", "UNet samples", "encodes", "decodes", "GFLOP", "over formula")
    return Table(
        f"A run's calls and FLOPs, counted / by formula, model {bench.profile.model}",
        "counted",
        columns,
        rows,
        "UNet samples: 2L + 2(T+1) + 2 + 2T + F·T. The FLOP formula adds bare calls of the models, in-between frames "
        "under the same references; what is over 1 is matching and, where L > 0, folding the LoRA into the weights.",
    )


def run_workload(bench: Bench, workload: Workload) -> torch.Tensor:
    """Run the pipeline on a workload, from images to frames."""
    pair = bench.prepare(workload.lora_steps, steps=workload.steps)
    return bench.render(pair, workload.frames, workload.chunk)


@cache
def counted_units(name: str, side: int) -> Units:
    """FLOPs of bare calls of the models called `name` at `side` pixels, counted on fake tensors."""
    mode = FakeTensorMode()
    plain, fitted = (fake_models(name, torch.float32, mode) for _ in range(2))
    with mode:
        return count_units(BareCalls(*plain, side), BareCalls(*fitted, side, add_lora(fitted[0])))


def units_table(profile: Profile) -> Table:
    """A table of what each bare call costs, at every size of the profile."""
    rows = []
    for side in profile.counted_sides:
        units = counted_units(profile.counted, side)
        flops = (units.sample, units.frame, units.frames_call, units.encode, units.decode, units.text, units.lora_step)
        rows.append((f"{side}²", *(x / 1e12 for x in flops)))
    columns = ("size", "UNet sample", "… frame", "+ per call", "VAE encode", "VAE decode", "text", "LoRA step")
    return Table(
        f"Bare calls, TFLOP, model {profile.counted}",
        "counted",
        columns,
        rows,
        "In up blocks 2 and 3 a frame attends to the tokens of both inputs: twice the attention there, no keys and "
        "values of its own; the inputs' are projected once per call. A LoRA step: forward and backward of a pair.",
    )


def workloads_table(profile: Profile) -> Table:
    """A table of the FLOPs of workloads by the formula, which differ from the default one in one thing each."""
    side, *other_sides = profile.counted_sides
    workloads = [(side, Workload(n, DEFAULT.steps, DEFAULT.chunk, DEFAULT.lora_steps)) for n in (8, 16, 32, 64)]
    workloads += [(other, DEFAULT) for other in other_sides]
    workloads += [(side, Workload(DEFAULT.frames, 15, DEFAULT.chunk, DEFAULT.lora_steps))]
    rows = []
    for side, workload in workloads:
        units = counted_units(profile.counted, side)
        inference, fit = units.inference(workload), workload.lora_steps * units.lora_step
        frames = workload.steps * units.frames(workload.frames, workload.chunks)
        shares = (100 * frames / inference, (inference + fit) / inference)
        rows.append((f"{side}²", workload.frames, workload.steps, inference / 1e12, fit / 1e12, *shares))
    return Table(
        f"Whole jobs by the formula, model {profile.counted}",
        "counted",
        ("size", "F", "T", "inference TFLOP", "LoRA fit TFLOP", "frames' UNet, % of inference", "whole / inference"),
        rows,
        f"{DEFAULT.lora_steps} LoRA steps, {DEFAULT.chunk} frames a call.",
    )
