# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "compile": torch.compile of the UNet, on and off.

Graphs are counted with any backend. Time is only meaningful with the backend "inductor".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dreammover_pipeline.records import PreparedPair

from .counting import Workload
from .profiles import Bench
from .report import Table, ratio, spread
from .timing import alternate, clock, clock_name

STEPS = 3  # inversion steps T, on which graphs do not depend


class CountingBackend:
    """A backend of torch.compile that counts the graphs that it compiles and how often they run.

    Beyond a limit of recompilations torch.compile silently runs uncompiled code. Graphs then run less often than the
    UNet is called.
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


def tables(bench: Bench) -> Iterator[Table]:
    """For every size of batch a table of the time against eager mode; then one of graphs compiled and run."""
    profile, eager = bench.profile, bench.pipe.unet
    pair = bench.prepare(steps=STEPS)
    with_lora = bench.prepare(lora_steps=1, steps=STEPS)
    expected = bench.render(pair)
    torch._dynamo.reset()
    backend = CountingBackend(profile.compiler)
    compiled = torch.compile(eager, backend=backend)
    try:
        for chunk in profile.compiled_chunks:
            yield _time_render(bench, pair, chunk, eager, compiled, backend)
        bench.pipe.unet = compiled
        rows = _count_graphs(bench, backend, pair, with_lora)
        difference = (bench.render(pair) - expected).abs().max().item()
        yield _graphs_table(bench, rows, difference)
    finally:
        bench.pipe.unet = eager
        torch._dynamo.reset()


def _count_graphs(bench: Bench, backend: CountingBackend, pair: PreparedPair, with_lora: PreparedPair) -> list[tuple]:
    """Rows of the table of graphs: each kind of call three times, so that recompilations show.

    Args:
        bench: the pipeline, whose UNet is compiled, and the profile.
        backend: the backend that it is compiled with.
        pair: a prepared pair without a LoRA.
        with_lora: a prepared pair with a LoRA.
    """
    frames, now = bench.profile.frames, clock(bench.device)
    more = frames + 1
    parts = {
        # T + 1 calls, because the call that features are read from runs eagerly: its hook would not fire otherwise
        "prepare": (lambda: bench.prepare(steps=STEPS), STEPS + 1),
        f"render {frames} frames": (lambda: bench.render(pair), _calls(bench, frames)),
        f"render {more} frames": (lambda: bench.render(pair, more), _calls(bench, more)),
        f"render {frames} frames with LoRA": (lambda: bench.render(with_lora), _calls(bench, frames)),
    }
    rows = []
    for time in ("first", "again", "and again"):
        for name, (run, calls) in parts.items():
            graphs, runs, start = backend.graphs, backend.runs, now()
            run()
            rows.append((name, time, now() - start, backend.graphs - graphs, f"{backend.runs - runs} / {calls}"))
    return rows


def _time_render(
    bench: Bench,
    pair: PreparedPair,
    chunk: int,
    eager: torch.nn.Module,
    compiled: torch.nn.Module,
    backend: CountingBackend,
) -> Table:
    """The time of rendering so many frames a call, with the UNet as it is and compiled, and of the first such call."""
    profile, now, unit = bench.profile, clock(bench.device), clock_name(bench.device)

    def render_with(unet):
        bench.pipe.unet = unet
        bench.render(pair, chunk=chunk)

    graphs, start = backend.graphs, now()
    render_with(compiled)
    first, graphs = now() - start, backend.graphs - graphs
    arms = {"off": lambda: render_with(eager), "on": lambda: render_with(compiled)}
    off, on = alternate(arms, profile.few, bench.device).values()
    return Table(
        f"Compiled against eager, render of {profile.frames} frames, T = {STEPS}, {profile.few} rounds",
        "measured",
        ("frames a call", f"off, {unit}", f"on, {unit}", "off / on", f"first call, {unit}", "new graphs"),
        [(chunk, spread(off), spread(on), ratio(off, on), first, graphs)],
        f"Backend {profile.compiler}, model {profile.model}, {profile.dtype}. The first call compiles the graphs.",
    )


def _graphs_table(bench: Bench, rows: list[tuple], difference: float) -> Table:
    profile = bench.profile
    return Table(
        f"torch.compile(pipe.unet), backend {profile.compiler}, model {profile.model}",
        "counted",
        ("run", "time", clock_name(bench.device), "new graphs", "graph runs / UNet calls"),
        rows,
        f"{profile.chunk} frames a call at most. Largest difference of a pixel from eager: {difference:.3g}.",
    )


def _calls(bench: Bench, frames: int) -> int:
    """Number of UNet calls that rendering so many frames takes."""
    workload = Workload(frames, STEPS, bench.profile.chunk)
    return workload.steps * workload.chunks
