# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "scaling": time against the number of frames and against the size of the pictures, and a plot."""

from __future__ import annotations

from pathlib import Path

from .counting import Workload
from .counts import DEFAULT, counted_units
from .plot import Panel, draw
from .profiles import Bench, Profile
from .report import Spread, Table, ratio, spread
from .timing import alternate, clock_name, fit_line

SIZED_FRAMES = 4  # largest number of frames where the size of the pictures varies


def tables(bench: Bench, plot: Path | None = None) -> list[Table]:
    """Tables of time against frames, with a fitted line, and against size, with the FLOPs.

    Args:
        bench: what to measure.
        plot: the path of a PNG to draw measured time and counted FLOPs in; None draws nothing.
    """
    profile = bench.profile
    seconds = against_frames(bench)
    medians = {frames: spread(values) for frames, values in seconds.items()}
    a, b, r2 = fit_line(list(medians), [value.median for value in medians.values()])
    if plot:
        draw(plot, [measured_panel(bench, medians, a, b), counted_panel(profile)])
    unit = clock_name(bench.device)
    rows = [(n, value, a + b * n, value.median / (a + b * n)) for n, value in medians.items()]
    return [
        Table(
            f"Inference against frames, model {profile.model}, no LoRA, {profile.few} rounds",
            "measured",
            ("F", unit, "a + b·F", "over the line"),
            rows,
            f"a = {a:.4g}, b = {b:.4g} {unit}, R² = {r2:.6f}. T = {profile.scaling_steps}; {profile.chunk} at once.",
        ),
        against_size(bench),
    ]


def against_frames(bench: Bench) -> dict[int, list[float]]:
    """Seconds of runs from images to frames, by the number of frames."""
    steps = bench.profile.scaling_steps
    arms = {n: lambda n=n: bench.render(bench.prepare(steps=steps), n) for n in bench.profile.scaling_frames}
    return alternate(arms, bench.profile.few, bench.device)


def against_size(bench: Bench) -> Table:
    """A table of the time at several sizes, and of the ratio that the FLOPs would make one expect."""
    profile, unit = bench.profile, clock_name(bench.device)
    frames = min(SIZED_FRAMES, profile.frames)

    steps = profile.scaling_steps

    def run(side: int) -> None:
        bench.render(bench.prepare(side=side, steps=steps), frames)

    arms = {side: lambda side=side: run(side) for side in profile.scaling_sides}
    seconds = alternate(arms, profile.few, bench.device)
    workload = Workload(frames, steps, profile.chunk)
    flops = {side: counted_units(profile.model, side).inference(workload) for side in profile.scaling_sides}
    first = profile.scaling_sides[0]
    rows = [
        (f"{side}²", spread(values), ratio(values, seconds[first]), flops[side] / flops[first])
        for side, values in seconds.items()
    ]
    return Table(
        f"Inference against size, model {profile.model}, {frames} frames, {profile.few} rounds",
        "measured",
        ("size", unit, "over the first", "by FLOPs"),
        rows,
    )


def measured_panel(bench: Bench, medians: dict[int, Spread], a: float, b: float) -> Panel:
    """A panel of the measured seconds and of the line that was fitted to them."""
    ends = (0, max(medians))
    return Panel(
        f"{bench.profile.model}, measured: {a:.3g} + {b:.3g}·frames",
        "in-between frames",
        clock_name(bench.device),
        points={"measured": [(n, value.median) for n, value in medians.items()]},
        lines={"a + b·frames": [(n, a + b * n) for n in ends]},
    )


def counted_panel(profile: Profile) -> Panel:
    """A panel of the counted model's FLOPs against the number of frames, with a line for every size."""
    frames = (0, 64)
    lines = {}
    for side in profile.counted_sides:
        units = counted_units(profile.counted, side)
        workloads = [Workload(n, DEFAULT.steps, DEFAULT.chunk) for n in frames]
        lines[f"{side} x {side}"] = [(workload.frames, units.inference(workload) / 1e12) for workload in workloads]
    return Panel(
        f"{profile.counted}, counted: inference, T = {DEFAULT.steps}", "in-between frames", "TFLOP", {}, lines
    )
