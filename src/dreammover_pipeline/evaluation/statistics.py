# SPDX-License-Identifier: Apache-2.0
"""Means over pairs with bootstrap intervals, and differences of two methods pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 10_000, 0
# With fewer pairs, differences that all have one sign happen by chance more often than once in twenty.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` pairs, and its 95 % bootstrap interval from `low` to `high`, both NaN for a single pair."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return (
            _digits(self.mean)
            if self.count == 1
            else f"{_digits(self.mean)} [{_digits(self.low)}, {_digits(self.high)}]"
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero and there are enough pairs to trust it."""
        return self.count >= FEWEST_PAIRS and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its percentile bootstrap interval, from 10,000 resamples with a fixed seed.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there is nothing to take the mean of")
    values = np.asarray(values, dtype=float)
    if len(values) == 1:
        return Estimate(float(values[0]), np.nan, np.nan, 1)
    picks = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def values_by_pair(rows: Iterable[Mapping], method: str, metric: str) -> dict[tuple[str, str], float]:
    """Values of a metric of one method, by suite and pair; pairs without a value are left out."""
    return {
        (row["suite"], row["pair"]): row["metrics"][metric]
        for row in rows
        if row["method"] == method and row["metrics"].get(metric) is not None
    }


def paired_difference(first: Mapping[object, float], second: Mapping[object, float]) -> Estimate | None:
    """The mean of first − second over the pairs that both have; None if they share no pair."""
    shared = sorted(first.keys() & second.keys())
    return estimate([first[key] - second[key] for key in shared]) if shared else None


def _digits(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1.995 else f"{value:.3f}"
