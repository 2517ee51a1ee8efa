# SPDX-License-Identifier: Apache-2.0
"""Timing that gives nearly the same answer on a busy machine as on an idle one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def clock(device: torch.device) -> Callable[[], float]:
    """A function that reads a clock in seconds.

    For the CPU it is the CPU time of this thread, on which other processes have little influence; for other devices it
    is wall time after waiting for the device.
    """
    if device.type == "cpu":
        return time.thread_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def clock_name(device: torch.device) -> str:
    """The unit of what `clock` reads, for the heads of tables."""
    return "thread s" if device.type == "cpu" else "s"


def alternate(arms: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Measure several things by turns, in rounds, after a first round that does not count.

    Every other round has the opposite order, so that neither drift nor what the previous call left in the caches
    favours one of them.

    Args:
        arms: what to measure, by name.
        rounds: number of rounds that count.
        device: the device that the calls run on.

    Returns:
        By the same names, the seconds of every round.
    """
    now = clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name in list(arms)[:: 1 if i % 2 else -1]:
            start = now()
            arms[name]()
            if i:
                seconds[name].append(now() - start)
    return seconds


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """a, b and R² of the line y ≈ a + b·x that is fitted by least squares."""
    b, a = np.polyfit(x, y, 1)
    left = np.asarray(y) - (a + b * np.asarray(x))
    return float(a), float(b), 1 - float(left.var() / max(np.var(y), 1e-30))
