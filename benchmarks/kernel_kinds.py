# SPDX-License-Identifier: Apache-2.0
"""Benchmark row "kernels": what a device is busy with in each part of a job, and how long it waits for the host.

torch's profiler names every kernel and its seconds. On a CPU it does so for torch's operations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .gpu_rows import parts_of_a_job
from .profiles import Bench
from .report import Table
from .timing import alternate, clock

# Kinds of kernels, by what is in their names; the first that fits counts. What cuDNN computes as a matrix product has
# the name of one.
KINDS = {
    "change of layout": r"nchwto|nhwcto",
    "attention": r"attention|fmha|flash|attn|softmax",
    "convolution": r"conv|fprop|dgrad|wgrad|winograd|implicit",
    "matrix product": r"gemm|gemv|nvjet|cutlass|cublas|splitk|addmm|\bmm\b|bmm|\blinear\b",
    "normalisation": r"norm|moments|welford|fusedparams|internalgradients",
    "optimizer": r"adam|multi_tensor|foreach",
    "sum or sort": r"topk|reduce|sum|mean|sort|scan|radix",
    "lookup or resizing": r"grid_sampler|upsample|interpolate|_pad",
    "copy": r"memcpy|memset|copy|cat|index|gather|scatter|fill|clone|contiguous",
    "elementwise": r"elementwise|vectorized|unrolled|aten::(add|mul|sub|div|silu|gelu)",
}
OTHER = "other"


def tables(bench: Bench) -> list[Table]:
    """A table for each part of a job as the defaults make it, of kinds of kernels, their number and their seconds."""
    return [profiled(bench, name, part) for name, part in parts_of_a_job(bench).items()]


def profiled(bench: Bench, name: str, part: Callable[[], object]) -> Table:
    """A table of what some work keeps the device busy with, when it is done for the third time.

    Args:
        bench: The profile, which says what the device is.
        name: What the work is called in the title.
        part: The work.
    """
    on_cpu, now = bench.device.type == "cpu", clock(bench.device)
    ((seconds,),) = alternate({name: part}, 1, bench.device).values()
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as profiler:
        part()
        now()
    numbers, busy, slowest = defaultdict(int), defaultdict(float), defaultdict(str)
    for event in sorted(profiler.key_averages(), key=lambda event: -_seconds(event, on_cpu)):
        if on_cpu or event.device_type == DeviceType.CUDA:
            kind = kind_of(event.key)
            numbers[kind] += event.count
            busy[kind] += _seconds(event, on_cpu)
            slowest[kind] = slowest[kind] or event.key[:80]
    total = sum(busy.values())
    rows = [("all", sum(numbers.values()), total, total / seconds, None)]
    for kind in sorted(busy, key=busy.get, reverse=True):
        rows.append((kind, numbers[kind], busy[kind], busy[kind] / seconds, slowest[kind]))
    note = f"Without the profiler it takes {seconds:.4g} s; while no kernel runs, the device waits for the host."
    columns = ("kind", "number", "s", "share of the part", "the one that takes longest in all")
    title = f"Kernels, {name}, model {bench.profile.model}, {bench.profile.dtype}"
    return Table(title, "measured", columns, rows, note)


def kind_of(name: str) -> str:
    """Which of `KINDS` a kernel is, by its name; `OTHER` if none fits."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _seconds(event, on_cpu: bool) -> float:
    """The seconds that all calls of a kernel or an operation took, without those that it called."""
    return (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6
