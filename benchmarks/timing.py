# SPDX-License-Identifier: Apache-2.0
"""Clocks and rounds that give the same answer on a busy machine as on an idle one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this thread's own CPU time, which other processes hardly touch, or synchronised wall time."""
    if device.type == "cpu":
        return time.thread_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def clock_name(device: torch.device) -> str:
    """What `clock` reads, for the heads of tables."""
    return "thread s" if device.type == "cpu" else "s"


def alternate(arms: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after one round that does not count.

    The arms take turns, and every other round in the opposite order, so that neither drift nor what the previous arm
    left in the caches favours one.
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
    """a, b and R² of the least squares y ≈ a + b·x."""
    b, a = np.polyfit(x, y, 1)
    left = np.asarray(y) - (a + b * np.asarray(x))
    return float(a), float(b), 1 - float(left.var() / max(np.var(y), 1e-30))
