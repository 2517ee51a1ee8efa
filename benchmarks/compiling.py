# SPDX-License-Identifier: Apache-2.0
"""Row 7: torch.compile of the UNet, on and off. Graphs are counted; time says something under inductor only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .counting import Job
from .profiles import Bench
from .report import Table, ratio, spread
from .timing import alternate, clock, clock_name

STEPS = 3  # T; graphs do not depend on it


class CountingBackend:
    """A backend of torch.compile that counts the graphs it compiles and how often they run.

    Past its limit of recompilations torch.compile goes on without a word, uncompiled: then graphs run less often than
    the UNet is called.
    """

    def __init__(self, name: str):
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled = self.compile(graph, inputs)
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run


def tables(bench: Bench) -> list[Table]:
    """Compile, render with batches of one and of two sizes and with a LoRA, all again, and against eager."""
    profile, pipe, unit = bench.profile, bench.pipe, clock_name(bench.device)
    eager, now = pipe.unet, clock(bench.device)
    pair = bench.prepare(steps=STEPS)
    with_lora = bench.prepare(lora_steps=1, steps=STEPS)
    expected = bench.render(pair)
    torch._dynamo.reset()
    backend = CountingBackend(profile.compiler)
    compiled = torch.compile(eager, backend=backend)
    more = profile.frames + 1
    parts = {
        # the features' forward runs eagerly: the hook that reads them would not fire
        "prepare": (lambda: bench.prepare(steps=STEPS), STEPS + 1),
        f"render {profile.frames} frames": (lambda: bench.render(pair), _calls(bench, profile.frames)),
        f"render {more} frames": (lambda: bench.render(pair, more), _calls(bench, more)),
        f"render {profile.frames} frames with LoRA": (lambda: bench.render(with_lora), _calls(bench, profile.frames)),
    }
    rows = []
    try:
        pipe.unet = compiled
        for time in ("first", "again", "and again"):
            for name, (run, calls) in parts.items():
                graphs, runs, start = backend.graphs, backend.runs, now()
                run()
                rows.append((name, time, now() - start, backend.graphs - graphs, f"{backend.runs - runs} / {calls}"))
        difference = (bench.render(pair) - expected).abs().max().item()

        def render_with(unet):
            pipe.unet = unet
            bench.render(pair)

        arms = {"off": lambda: render_with(eager), "on": lambda: render_with(compiled)}
        seconds = alternate(arms, profile.few, bench.device)
    finally:
        pipe.unet = eager
        torch._dynamo.reset()
    return [
        Table(
            f"torch.compile(pipe.unet), backend {profile.compiler}, model {profile.model}",
            "counted",
            ("run", "time", unit, "new graphs", "graph runs / UNet calls"),
            rows,
            f"{profile.chunk} frames a call at most. Largest difference of a pixel from eager: {difference:.3g}.",
        ),
        Table(
            f"Compiled against eager, render of {profile.frames} frames, {profile.few} rounds",
            "measured",
            (f"off, {unit}", f"on, {unit}", "off / on"),
            [(spread(seconds["off"]), spread(seconds["on"]), ratio(*seconds.values()))],
            "" if profile.compiler == "inductor" else "This backend only traces: the ratio is what guards cost.",
        ),
    ]


def _calls(bench: Bench, frames: int) -> int:
    job = Job(frames, STEPS, bench.profile.chunk)
    return job.steps * (1 + job.chunks)
